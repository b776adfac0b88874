"""Everything random comes from a named generator: (seed, round, task, tensor) -> torch.Generator.

No result depends on the global random state, and so none on the order of the steps, on the executor, or on having been
interrupted; the libraries that set it (the trainer does) find their caller's put back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from named parts, stable across machines and Python versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(*parts: str | int) -> torch.Generator:
    """A CPU generator of its own for the given parts."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(*parts))  # this generator only, never the global one
    return generator


def permutation(length: int, *parts: str | int) -> list[int]:
    """A permutation of range(length) that depends only on the parts."""
    order: list[int] = torch.randperm(length, generator=make_generator(*parts)).tolist()
    return order


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global random states of Python, numpy and torch back as they were."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
