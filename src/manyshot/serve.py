"""`manyshot serve`: the report of a run as a page of this machine that follows the run.

The standard library's http.server, which is not made for the open net: it listens on 127.0.0.1 and nowhere else,
answers GET and HEAD of three fixed addresses, and only where the Host header names this machine (a page of another site
that has pointed its own name here is refused). Nothing in a request ever becomes a path of a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from html import escape, unescape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from manyshot.errors import ManyshotError, ServeError
from manyshot.live_state import LiveRun
from manyshot.live_text import doing_text, totals, troubles

ADDRESS = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
POLICY_TAG = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')
STRICT = "default-src 'none'; script-src"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
# files whose change changes the report; metrics.jsonl grows every few seconds and is not among them
RECORDS = ("*.json", "*/*.json", "*/*/*.json")
MakePage = Callable[[Path], str]


class LivePage:
    """The page of a run, made anew when its records have changed; and what is going on right now."""

    def __init__(self, path: Path, make_page: MakePage) -> None:
        self.path = path
        self._make_page = make_page
        self._run = LiveRun(path)
        self._reading, self._making = threading.Lock(), threading.Lock()
        self._made: tuple[str, str, str] | None = None

    def version(self) -> str:
        """A digest of the run's records: name, size and time of each."""
        found = []
        for pattern in RECORDS:
            for file in sorted(self.path.glob(pattern)):
                try:
                    status = file.stat()
                except OSError:
                    continue  # replaced at this moment; the next look will find it
                found.append((file.relative_to(self.path).as_posix(), status.st_size, status.st_mtime_ns))
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def status(self) -> dict[str, Any]:
        """The version, and in words what is going on."""
        try:
            with self._reading:
                state = self._run.read()
        except ManyshotError as error:
            return {"version": self.version(), "status": str(error), "finished": False}
        now = state.doing
        lines = [doing_text(now, state.next.model) + _share(now.done, now.total)] if now and state.next else []
        lines += [totals(state), *troubles(state)]
        return {"version": self.version(), "status": "\n".join(lines), "finished": state.finished}

    def page(self) -> tuple[str, str]:
        """(the page with the script that follows the run, the policy to send with it)."""
        with self._making:
            version = self.version()
            if self._made is None or self._made[0] != version:
                try:
                    html = self._make_page(self.path)
                except ManyshotError as error:  # such as a record that is damaged: shown, and looked at again
                    html = f"<!doctype html><title>manyshot</title><body><p>{escape(str(error))}</p>"
                self._made = (version, *following(html, version))
            return self._made[1:]


def _share(done: int, total: int | None) -> str:
    return f" {done}/{total}" if total else ""


def following(html: str, version: str) -> tuple[str, str]:
    """The page with /live.js in the place of its content security policy, and that policy, which now allows the script
    and its questions, for the header.
    """
    script = f'<script src="/live.js" data-version="{version}" defer></script>'
    found = POLICY_TAG.search(html)
    policy = unescape(found.group(1)) if found else STRICT
    policy = policy.replace("script-src", "script-src 'self'", 1) + "; connect-src 'self'; frame-ancestors 'none'"
    if found:
        return html[: found.start()] + script + html[found.end() :], policy
    return html + script, policy


def live_script() -> str:
    """The script that follows the run."""
    return files("manyshot").joinpath("live_assets", "live.js").read_text("utf-8")


class PageServer(ThreadingHTTPServer):
    """Serves one run. Raises ServeError where the port cannot be had."""

    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        self.script = live_script().encode()
        try:
            super().__init__((ADDRESS, port), PageHandler)
        except OSError as error:
            known = {errno.EADDRINUSE: "is taken", errno.EACCES: "is not yours to use"}
            reason = known.get(error.errno or 0, f"cannot be had ({error})")
            raise ServeError(
                f"port {port} of {ADDRESS} {reason}; choose another with --port, or any that is free with --port 0"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone in the middle of an answer is no error of ours; all else is, and is shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PageHandler(BaseHTTPRequestHandler):
    """Three addresses, looked up in a table."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 30  # of a connection on which nothing is asked
    ROUTES: ClassVar[Mapping[str, str]] = {"/": "_page", "/version": "_version", "/live.js": "_script"}

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not HOSTS.fullmatch(hosts[0]):
            self.send_error(HTTPStatus.FORBIDDEN, "this page answers to 127.0.0.1 and localhost only")
            return
        answer = self.ROUTES.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND, "there is only /")
            return
        getattr(self, answer)()

    do_HEAD = do_GET

    def refuse(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, "this page is for reading")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = refuse

    def _page(self) -> None:
        html, policy = self.server.page.page()
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", html.encode(), policy)

    def _version(self) -> None:
        text = json.dumps(self.server.page.status(), ensure_ascii=False)
        self._answer(HTTPStatus.OK, "application/json", text.encode(), NOTHING)

    def _script(self) -> None:
        self._answer(HTTPStatus.OK, "text/javascript; charset=utf-8", self.server.script, NOTHING)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, policy: str) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, body = HTTPStatus.NOT_MODIFIED, b""
        self.send_response(status)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        for name, value in (HEADERS | {"Content-Security-Policy": policy, "ETag": tag}).items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if status >= HTTPStatus.BAD_REQUEST:  # a body that nobody reads would be taken for the next request
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Plain text with the same headers, also for what http.server itself refuses."""
        status = HTTPStatus(code)
        self._answer(status, "text/plain; charset=utf-8", f"{message or status.phrase}\n".encode(), NOTHING)

    def version_string(self) -> str:
        return "manyshot"

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody asked for a line for every question."""
