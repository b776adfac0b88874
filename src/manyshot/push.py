"""`manyshot push`: the merged model of a run, with its card and nothing else, to the Hugging Face Hub.

Nothing is uploaded unless somebody asks for it by this command. The token is the environment's or the login's own; it
is never taken as an argument, shown or written.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyshot.errors import PushError
from manyshot.misshapen import misshapen
from manyshot.rundir import RunFolder
from manyshot.status import planned_steps, read_outline

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
HTTP_UNAUTHORIZED, HTTP_FORBIDDEN = 401, 403


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and where: files of one folder by name, with their sizes."""

    folder: Path
    files: dict[str, int]
    repo: str
    private: bool
    metadata: dict[str, Any]
    unfinished: str | None  # the run's next step, where it has not ended

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


@misshapen(PushError, "cannot be read")
def plan_upload(run: Path, repo: str, *, private: bool) -> Upload:
    """What a push of the run's merged model would upload. Asks no network.

    Raises PushError for a run without a merged model, a folder with something in it that is no model's, or a card that
    the Hub would refuse; RunFolderError where the folder holds no run.
    """
    folder = RunFolder(run)
    pending = [step.name for step in planned_steps(folder, read_outline(folder)) if not step.record.exists()]
    if not folder.merged.exists():
        upcoming = f"; next: {pending[0]}" if pending else ""
        raise PushError(f"{run}: has no merged model yet{upcoming}")
    merged = folder.merged.resolve()
    if run.resolve() not in merged.parents:
        raise PushError(
            f"{folder.merged}: points out of the run folder, to {merged}; only the run's own model is uploaded"
        )
    files = {file.name: file.stat().st_size for file in _model_files(merged)}
    if CARD not in files or not any(name.endswith(".safetensors") for name in files):
        raise PushError(f"{merged}: is no merged model with its card (no {CARD}, or no weights)")
    _check_name(repo)
    metadata = check_card((merged / CARD).read_text("utf-8"), str(merged / CARD))
    return Upload(merged, files, repo, private, metadata, pending[0] if pending else None)


def _model_files(folder: Path) -> list[Path]:
    """The files of a model folder. Raises PushError for what is not a plain file of that folder."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_symlink() or not file.is_file() or file.name.startswith("."):
            raise PushError(f"{file}: is not a plain file of the merged model; move it away before the upload")
        found.append(file)
    return found


def check_card(text: str, where: str) -> dict[str, Any]:
    """The card's metadata, read as the Hub's own library reads it. Raises PushError for a card that cannot be."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except Exception as error:  # noqa: BLE001 - YAML, types and missing keys: the library lets through what it meets
        raise PushError(f"{where}: its metadata cannot be used ({error})") from None
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    if not found:
        raise PushError(f"{where}: has no metadata at its top")
    return found


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"'{repo}' is no name of a repository ({error}); give name, or owner/name") from None


def find_target(upload: Upload, api: HfApi) -> str:
    """The full name of the repository, `owner/name`, after asking the Hub who we are and whether it is there.

    Raises PushError without a token or network, and for a repository that is public where a private one was meant.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with _clear_errors():
        owner = api.whoami()["name"]
        repo = upload.repo if "/" in upload.repo else f"{owner}/{upload.repo}"
        try:
            there = api.repo_info(repo, repo_type="model")
        except RepositoryNotFoundError:
            return repo
    if upload.private and not there.private:
        raise PushError(
            f"{repo}: is there already, and public: everyone could read what is uploaded. Choose another name, make it "
            "private on the Hub, or say --public"
        )
    return repo


def push(upload: Upload, repo: str, api: HfApi) -> str:
    """Create the repository where it is missing, upload the listed files in one commit; returns the page's address."""
    with _clear_errors():
        created = api.create_repo(repo, private=upload.private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=upload.folder,
            repo_type="model",
            allow_patterns=[glob.escape(name) for name in upload.files],
            commit_message="Merged model and card, by manyshot",
        )
    return str(created)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What the Hub and the network answer, as one error that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

    try:
        yield
    except LocalTokenNotFoundError:
        raise PushError("no token for the Hub: run `hf auth login`, or set HF_TOKEN, then push again") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        hint = {
            HTTP_UNAUTHORIZED: "the token is not valid: run `hf auth login`, or set HF_TOKEN anew",
            HTTP_FORBIDDEN: "the token may not write there: it needs write access to this owner",
        }.get(code, "nothing more was uploaded; the push can be repeated")
        raise PushError(f"the Hub refused: {_first_line(error)}; {hint}") from None
    except (NetworkError, ConnectionError, TimeoutError) as error:
        raise PushError(
            f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)}); nothing on this machine has "
            "changed, and the push can be repeated"
        ) from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
