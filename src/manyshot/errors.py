"""Errors a user can act on. Each names the file, key, task, round or tensor; the CLI prints them and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ManyshotError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class RecipeError(ManyshotError):
    """The recipe is wrong: unknown key, value out of range, settings that contradict each other."""


class DataError(ManyshotError):
    """A data file or a row of it cannot be used."""


class ModelError(ManyshotError):
    """A model folder, an adapter or one of their tensors cannot be used."""


class MergeError(ManyshotError):
    """A merge would give a wrong or empty result."""


class RunFolderError(ManyshotError):
    """The run folder is not in the state that the command needs."""


class TrainingError(ManyshotError):
    """A task could not be trained."""


class WorkerError(ManyshotError):
    """A process that ran a job ended before the job did."""


class ServeError(ManyshotError):
    """A page cannot be served: its port is taken."""


class PushError(ManyshotError):
    """A merged model cannot be uploaded as asked."""


class TrackerError(ManyshotError):
    """A tracker cannot be used."""


class MissingExtraError(ManyshotError):
    """An optional package is not installed."""


def suggestion(found: str, allowed: Iterable[str]) -> str:
    """Say what there is, and what was probably meant: `; did you mean 'metis'? there are: mean, metis`."""
    names = sorted(allowed)
    close = get_close_matches(found, names, n=1, cutoff=0.6)
    meant = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{meant} there are: {', '.join(names)}"
