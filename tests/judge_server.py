"""A server that speaks OpenAI's chat completions, on this machine, and can be made to fail in every way."""

import json
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the server does with one question."""

    text: str = ""
    """The answer's text."""
    status: int = 200
    """The HTTP status."""
    headers: Mapping[str, str] = {}
    """Further headers."""
    body: str | None = None
    """The whole body, in place of a chat completion."""
    delay: float = 0.0
    """Seconds before it answers."""


class JudgeServer(NamedTuple):
    """A running server."""

    url: str
    """Its base URL."""
    asked: list[dict[str, Any]]
    """The requests so far."""
    keys: list[str]
    """What each request gave as its key."""
    headers: list[Mapping[str, str]]
    """The headers of each request, by their names in small letters."""


@contextmanager
def judge_server(reply: Callable[[dict[str, Any]], Reply]) -> Generator[JudgeServer, None, None]:
    """Run a server that replies as it is told, for as long as the context is open."""
    asked: list[dict[str, Any]] = []
    keys: list[str] = []
    headers: list[Mapping[str, str]] = []
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with guard:
                asked.append(request)
                keys.append(str(self.headers["Authorization"]))
                headers.append({name.lower(): value for name, value in self.headers.items()})
                answer = reply(request)
            time.sleep(answer.delay)
            body = answer.body
            if body is None:
                message = {"role": "assistant", "content": answer.text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                body = json.dumps(
                    {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                )
            try:
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())
            except OSError:
                # Who asked no longer waits.
                return

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield JudgeServer(f"http://127.0.0.1:{server.server_port}/v1", asked, keys, headers)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
