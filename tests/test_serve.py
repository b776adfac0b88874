"""The page of a run: what it answers, to whom, and that nothing in a request reaches a file."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from manyshot.errors import RunFolderError, ServeError
from manyshot.rundir import append_line, write_json
from manyshot.serve import HEADERS, LivePage, PageServer, following, live_script

POLICY = "default-src &#39;none&#39;; script-src &#39;sha256-abc&#39;; style-src &#39;sha256-def&#39;"
META = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'


def make_page(path: Path) -> str:
    """A page in the form of the report's: its own policy, and a number that says how often it was made."""
    made = len(list(path.glob("made_*.txt")))
    (path / f"made_{made}.txt").touch()
    if (path / "damaged").exists():
        raise RunFolderError("<script>alert(1)</script>: damaged")
    return f"<!doctype html><html><head>{META}<title>run</title></head><body>made {made}</body></html>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two tasks that has begun."""
    path = tmp_path / "run"
    (path / "round_000").mkdir(parents=True)
    recipe = {
        "tasks": {"math": {}, "safety": {}},
        "protocol": {"rounds": 2},
        "preset": "paper",
        "operator": {"name": "metis"},
        "evaluation": {"experts": False, "post_hoc": False},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    append_line(path / "metrics.jsonl", {"kind": "begin", "began": time.time(), "time": time.time()})
    start = {"kind": "start", "phase": "validation", "round": 0, "task": "math", "total": 8, "time": time.time()}
    append_line(path / "metrics.jsonl", start)
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[PageServer]:
    with PageServer(LivePage(folder, make_page), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str


def ask(server: PageServer, path: str = "/", method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read().decode())
    finally:
        connection.close()


def test_page_carries_the_script_and_a_policy_that_allows_it_and_its_questions(server: PageServer) -> None:
    answer = ask(server)
    assert answer.status == 200 and "made 0" in answer.text
    assert '<script src="/live.js" data-version="' in answer.text and "http-equiv" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert policy == (
        "default-src 'none'; script-src 'self' 'sha256-abc'; style-src 'sha256-def'; connect-src 'self'; "
        "frame-ancestors 'none'"
    )
    script = ask(server, "/live.js")
    assert script.text == live_script() and script.headers["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize("path", ["/", "/version", "/live.js", "/nothing"])
def test_every_answer_has_the_headers_that_keep_other_sites_out(server: PageServer, path: str) -> None:
    answer = ask(server, path)
    assert HEADERS.items() <= answer.headers.items()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Server"] == "manyshot" and "Access-Control-Allow-Origin" not in answer.headers


def test_version_changes_with_the_records_and_not_with_every_line_of_metrics(server: PageServer, folder: Path) -> None:
    first = json.loads(ask(server, "/version").text)
    beat = {"kind": "advance", "phase": "validation", "round": 0, "task": "math", "done": 4, "total": 8}
    append_line(folder / "metrics.jsonl", beat | {"time": time.time()})
    second = json.loads(ask(server, "/version").text)
    assert first["version"] == second["version"]
    assert "pretrained, math: validation loss 0/8" in first["status"] and "4/8" in second["status"]
    assert "made 0" in ask(server).text and "made 0" in ask(server).text  # made once for a version
    write_json(folder / "round_000" / "scores.json", {})
    third = json.loads(ask(server, "/version").text)
    assert third["version"] != second["version"] and not third["finished"]
    page = ask(server).text
    assert "made 1" in page and f'data-version="{third["version"]}"' in page
    append_line(folder / "metrics.jsonl", {"kind": "end", "time": time.time()})
    assert json.loads(ask(server, "/version").text)["finished"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil.example",
     "", "[::1]", "0.0.0.0", "127.0.0.1:", "127.0.0.1:8765:1", "localhost:99999999"],
)  # fmt: skip
def test_other_hosts_are_refused(server: PageServer, host: str) -> None:
    for path in ("/", "/version", "/live.js"):
        answer = ask(server, path, Host=host)
        assert answer.status == 403 and "made" not in answer.text


def test_this_machine_is_answered_by_both_of_its_names_and_through_forwarded_ports(server: PageServer) -> None:
    for host in ("127.0.0.1", "localhost", f"localhost:{server.server_port}", "LOCALHOST:9999"):
        assert ask(server, Host=host).status == 200


def raw(server: PageServer, request: str) -> str:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request.encode())
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


def test_two_hosts_or_none_or_a_request_for_another_machine_are_refused(server: PageServer) -> None:
    assert " 403 " in raw(server, "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert " 403 " in raw(server, "GET / HTTP/1.1\r\n\r\n")
    assert " 404 " in raw(server, "GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_allowed(server: PageServer, method: str) -> None:
    answer = ask(server, method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_a_body_is_not_taken_for_the_next_request(server: PageServer) -> None:
    inner = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = raw(server, f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(inner)}\r\n\r\n{inner}")
    assert found.count("HTTP/1.1 ") == 1 and " 405 " in found


@pytest.mark.parametrize(
    "path",
    ["/recipe.yaml", "/../run/recipe.yaml", "/%2e%2e/run/recipe.yaml", "//etc/passwd", "/round_000/scores.json",
     "/metrics.jsonl", "/live.js/../recipe.yaml", "/live%2ejs", "/.", "/\\..\\recipe.yaml"],
)  # fmt: skip
def test_no_path_of_a_request_reaches_a_file(server: PageServer, folder: Path, path: str) -> None:
    write_json(folder / "round_000" / "scores.json", {"secret": 1})
    answer = ask(server, path)
    assert answer.status == 404 and answer.text == "there is only /\n"


def test_head_is_get_without_its_body(server: PageServer) -> None:
    got, head = ask(server), ask(server, method="HEAD")
    assert head.text == "" and head.headers["Content-Length"] == got.headers["Content-Length"]
    assert head.headers["ETag"] == got.headers["ETag"]


def test_a_page_that_has_not_changed_is_not_sent_again(server: PageServer) -> None:
    tag = ask(server).headers["ETag"]
    again = ask(server, **{"If-None-Match": tag})
    assert (again.status, again.text) == (304, "")
    assert ask(server, **{"If-None-Match": '"other"'}).status == 200


def test_a_damaged_record_is_shown_as_text_and_looked_at_again(server: PageServer, folder: Path) -> None:
    (folder / "damaged").touch()
    answer = ask(server)
    assert answer.status == 200
    assert "&lt;script&gt;alert(1)&lt;/script&gt;: damaged" in answer.text and "<script>alert" not in answer.text
    assert "/live.js" in answer.text
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    (folder / "damaged").unlink()
    write_json(folder / "round_000" / "losses.json", {})
    assert "made 1" in ask(server).text


def test_a_run_that_is_gone_is_said_so_while_serving(server: PageServer, folder: Path) -> None:
    (folder / "recipe.yaml").unlink()
    assert "holds no run" in json.loads(ask(server, "/version").text)["status"]


def test_a_port_that_is_taken_is_a_clear_error(server: PageServer, folder: Path) -> None:
    with pytest.raises(ServeError, match=f"port {server.server_port} of 127.0.0.1 is taken; .*--port 0"):
        PageServer(LivePage(folder, make_page), server.server_port)


def test_only_this_machine_is_listened_to(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.url)


def test_a_page_without_a_policy_gets_the_strictest_that_lets_it_follow() -> None:
    html, policy = following("<p>x</p>", "v1")
    assert html == '<p>x</p><script src="/live.js" data-version="v1" defer></script>'
    assert policy == "default-src 'none'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"
