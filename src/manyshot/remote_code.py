"""Python code that came with a model runs only where two say so: the recipe, and whoever starts the command.

A recipe comes from anywhere, and so does the model that it names; that both want their code to run is no consent. The
consent is a variable of the environment, so that worker processes have it too; `--trust-remote-code` sets it.
"""

from __future__ import annotations

import os

from manyshot.errors import ModelError

CONSENT = "MANYSHOT_TRUST_REMOTE_CODE"


def allow() -> None:
    """Consent, for this process and those that it starts."""
    os.environ[CONSENT] = "1"


def consented(asked: bool) -> bool:
    """What the recipe asks for. Raises ModelError where it asks for code to run and nobody has consented."""
    if asked and os.environ.get(CONSENT) != "1":
        raise ModelError(
            "trust_remote_code: true lets Python code run that came with the model, with all that you may do on this "
            "machine. A recipe alone cannot ask for that: read the model's .py files, and if you trust them say so by "
            f"`manyshot --trust-remote-code …` ({CONSENT}=1 from Python)"
        )
    return asked
