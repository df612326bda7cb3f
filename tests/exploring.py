"""A database of the tiny run, collected once for all tests of the explorer, and a server of it."""

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI

from mxd.explorer.collect import CollectConfig, collect
from mxd.explorer.database import identify_run
from mxd.explorer.library import Library
from mxd.explorer.live import LiveModel
from mxd.explorer.server import listen, make_app
from tests.tiny_run import tiny_run

STUDENTS = ("0/mxd-k4", "1/topk-sae-k4")


@cache
def explored(folder: Path) -> Path:
    """Return a copy of the run of this session, with a database of two of its students."""
    run = folder / "explored-run"
    shutil.copytree(tiny_run(folder).run, run)
    collect(run, run / "explorer.sqlite", CollectConfig(student=STUDENTS))
    return run


def library_of(run: Path) -> Library:
    """Return a run's library."""
    return Library(database=run / "explorer.sqlite", run=run, identity=identify_run(run))


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served(NamedTuple):
    """A server in a thread of this process."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Send a request as the server's own page would, save for these headers."""
        own = {"Host": f"127.0.0.1:{self.port}", "Origin": f"http://127.0.0.1:{self.port}"}
        own |= {} if body is None else {"Content-Type": "application/json"}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = body if isinstance(body, str) or body is None else json.dumps(body)
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in own.items():
                if value:
                    connection.putheader(name, value)
            if sent is not None:
                connection.putheader("Content-Length", str(len(sent.encode())))
            connection.endheaders(None if sent is None else sent.encode())
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@contextmanager
def served(run: Path, students: Sequence[str] = STUDENTS) -> Generator[Served, None, None]:
    """Serve a run's database for as long as this is open."""
    bound = listen(18321)
    with serving(make_app(library_of(run), LiveModel(run, students), int(bound.getsockname()[1])), bound) as server:
        yield server


@contextmanager
def serving(app: FastAPI, bound: socket.socket) -> Generator[Served, None, None]:
    """Serve in a thread for as long as this is open."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield Served(int(bound.getsockname()[1]))
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        bound.close()
