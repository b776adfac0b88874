"""Everything random comes from a named generator: (seed, round, task, tensor) -> torch.Generator.

No global random state is read or set, so a result does not depend on the order of the steps, on the executor,
or on having been interrupted.
"""

from __future__ import annotations

import hashlib

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
