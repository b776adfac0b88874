"""Pushing a merged model: what is uploaded, to whom it is shown, and what is said when it cannot be."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from manyshot.__main__ import main
from manyshot.errors import PushError, RunFolderError
from manyshot.push import find_target, plan_upload, push
from manyshot.rundir import link_atomically

CARD = "---\nlicense: mit\nbase_model:\n- owner/base\ntags:\n- merge\n---\n# A model\n"


def http_error(kind: type[HfHubHTTPError], code: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/api")
    return kind(f"{code} answer\nmore lines", response=httpx2.Response(code, request=request))


@dataclass
class FakeHub:
    """The four calls that a push makes of HfApi; repositories by name, true where private."""

    repos: dict[str, bool] = field(default_factory=dict)
    failure: Exception | None = None
    uploads: list[dict[str, Any]] = field(default_factory=list)

    def whoami(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return {"name": "me"}

    def repo_info(self, repo: str, *, repo_type: str) -> Any:
        if repo not in self.repos:
            raise http_error(RepositoryNotFoundError, 404)
        return SimpleNamespace(private=self.repos[repo])

    def create_repo(self, repo: str, *, private: bool, repo_type: str, exist_ok: bool) -> str:
        self.repos.setdefault(repo, private)
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **asked: Any) -> None:
        self.uploads.append(asked)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of one round, with things in it that are nobody's business."""
    folder = tmp_path / "run"
    merged = folder / "round_001" / "merged"
    merged.mkdir(parents=True)
    recipe = {
        "tasks": {"math": {}},
        "protocol": {"rounds": 1},
        "operator": {"name": "mean"},
        "evaluation": {"experts": False, "post_hoc": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    (folder / "metrics.jsonl").write_text("", "utf-8")
    for name in ("round_000/scores.json", "round_001/math/local_update.json", "round_001/merge.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", "utf-8")
    for name, text in (("model.safetensors", "weights"), ("config.json", "{}"), ("a[1].txt", "x"), ("README.md", CARD)):
        (merged / name).write_text(text, "utf-8")
    link_atomically(folder / "merged", merged)
    return folder


def test_plan_lists_the_merged_folder_and_nothing_else_of_the_run(run: Path) -> None:
    upload = plan_upload(run, "owner/name", private=True)
    assert upload.folder == (run / "round_001" / "merged").resolve()
    assert upload.files == {"README.md": len(CARD), "a[1].txt": 1, "config.json": 2, "model.safetensors": 7}
    assert (upload.num_bytes, upload.unfinished) == (len(CARD) + 10, "round 1: measure")
    assert upload.metadata["license"] == "mit"


def test_push_uploads_the_listed_files_in_one_commit_and_privately(run: Path) -> None:
    from fnmatch import fnmatch

    hub: Any = FakeHub()
    upload = plan_upload(run, "name", private=True)
    target = find_target(upload, hub)
    assert (target, hub.uploads) == ("me/name", [])
    assert push(upload, target, hub) == "https://huggingface.co/me/name"
    assert hub.repos == {"me/name": True}
    (asked,) = hub.uploads
    assert (asked["repo_id"], asked["folder_path"], asked["repo_type"]) == ("me/name", upload.folder, "model")
    assert "token" not in asked
    for name in upload.files:
        assert sum(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) == 1, name
    assert not any(fnmatch("a1.txt", pattern) for pattern in asked["allow_patterns"])


def test_a_repository_that_is_public_already_is_refused_unless_that_is_meant(run: Path) -> None:
    hub: Any = FakeHub({"owner/open": False, "owner/closed": True})
    with pytest.raises(PushError, match="owner/open: is there already, and public"):
        find_target(plan_upload(run, "owner/open", private=True), hub)
    assert find_target(plan_upload(run, "owner/open", private=False), hub) == "owner/open"
    assert find_target(plan_upload(run, "owner/closed", private=True), hub) == "owner/closed"


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (LocalTokenNotFoundError("none"), "no token for the Hub: run `hf auth login`, or set HF_TOKEN"),
        (http_error(HfHubHTTPError, 401), "the Hub refused: 401 answer; the token is not valid"),
        (http_error(HfHubHTTPError, 403), "the token may not write there"),
        (http_error(HfHubHTTPError, 500), "the Hub refused: 500 answer; nothing more was uploaded"),
        (httpx2.ConnectError("no route\nhere"), r"the Hub cannot be reached \(ConnectError: no route\)"),
    ],
)
def test_what_the_hub_answers_is_one_clear_error(run: Path, failure: Exception, text: str) -> None:
    hub: Any = FakeHub(failure=failure)
    with pytest.raises(PushError, match=text):
        find_target(plan_upload(run, "owner/name", private=True), hub)


def test_offline_mode_and_a_missing_token_of_the_real_library_are_clear(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upload = plan_upload(run, "owner/name", private=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match=r"the Hub cannot be reached \(OfflineModeIsEnabled"):
        find_target(upload, HfApi(token="hf_secret"))
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(PushError, match="no token for the Hub"):
        find_target(upload, HfApi())


@pytest.mark.parametrize("name", ["a b", "owner/name/more", "..", "-x", "owner/"])
def test_names_that_no_repository_can_have_are_refused(run: Path, name: str) -> None:
    with pytest.raises(PushError, match="is no name of a repository"):
        plan_upload(run, name, private=True)


def test_what_is_no_merged_model_of_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    merged = run / "round_001" / "merged"

    def refusal() -> str:
        with pytest.raises(PushError) as caught:
            plan_upload(run, "owner/name", private=True)
        return str(caught.value)

    for strange in (".cache", "token.txt"):
        (merged / strange).symlink_to(tmp_path)
        assert f"{merged / strange}: is not a plain file of the merged model" in refusal()
        (merged / strange).unlink()
    (merged / "more").mkdir()
    assert "more: is not a plain file" in refusal()
    (merged / "more").rmdir()
    (merged / "README.md").write_text("---\nmodel-index:\n- name: 1\n---\n", "utf-8")
    assert "README.md: its metadata cannot be used" in refusal()
    (merged / "README.md").write_text("---\n[\n---\n", "utf-8")
    assert "README.md: its metadata cannot be used" in refusal()
    (merged / "README.md").write_text("# no metadata\n", "utf-8")
    assert "has no metadata at its top" in refusal()
    (merged / "README.md").unlink()
    assert "is no merged model with its card" in refusal()
    (tmp_path / "elsewhere").mkdir()
    link_atomically(run / "merged", tmp_path / "elsewhere")
    assert "points out of the run folder" in refusal()
    (run / "merged").unlink()
    assert "has no merged model yet; next: round 1: measure" in refusal()
    with pytest.raises(RunFolderError, match="holds no run"):
        plan_upload(tmp_path, "owner/name", private=True)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    handler = signal.getsignal(signal.SIGTERM)

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["manyshot", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return (int(exit_.value.code or 0), *capfd.readouterr())

    yield run_main
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


def test_command_shows_every_file_then_uploads(call: Any, hub: FakeHub, run: Path) -> None:
    code, out, err = call("push", run, "name", "--yes")
    assert (code, err) == (0, "")
    assert "to me/name, private" in out and "base_model: ['owner/base']; license: mit" in out
    assert all(name in out for name in ("model.safetensors", "config.json", "a[1].txt", "README.md"))
    assert "the run has not ended (next: round 1: measure)" in out
    assert out.splitlines()[-1] == "https://huggingface.co/me/name"
    assert len(hub.uploads) == 1 and hub.repos == {"me/name": True}
    assert call("push", run, "open", "--yes", "--public")[0] == 0
    assert hub.repos["me/open"] is False


def test_command_asks_and_uploads_nothing_without_a_yes(
    call: Any, hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call("push", run, "name")
    assert (code, "nobody can be asked here; --yes" in err) == (2, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda text, default: next(answers))
    code, out, _ = call("push", run, "name")
    assert (code, hub.uploads, hub.repos) == (1, [], {}) and "nothing was uploaded" in out
    assert call("push", run, "name")[0] == 0 and len(hub.uploads) == 1


def test_command_never_shows_or_keeps_a_token(
    call: Any, hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisisasecret")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    _, out, err = call("push", run, "name", "--yes")
    assert "thisisasecret" not in out + err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert os.environ["HF_TOKEN"] == "hf_thisisasecret"
