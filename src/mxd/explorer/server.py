"""The explorer's server: this machine only, one run, one database."""

import asyncio
import errno
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, cast

import uvicorn
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import iterate_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mxd.atomic import JSON
from mxd.edits import Edit
from mxd.explorer.labels import Label, write_label
from mxd.explorer.library import Library, NotFoundError
from mxd.explorer.live import MOST_NEW_TOKENS, LiveModel, SteeringRequest
from mxd.explorer.pages import CONTENT_SECURITY_POLICY, PAGE_FILES, page_file

LOOPBACK = "127.0.0.1"
PORTS_TRIED = 20
LONGEST_TEXT = 100_000
"""Characters of a text that a page may send."""

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Sent(BaseModel):
    """Something that a page sends."""

    model_config = ConfigDict(extra="forbid")


class Written(_Sent):
    """A label and a note."""

    label: Annotated[str, Field(max_length=200)]
    note: Annotated[str, Field(max_length=10_000)]


class LabelSent(Written):
    """A label and a note for a latent."""

    student: Annotated[str, Field(max_length=500)]
    latent: Annotated[int, Field(ge=0, lt=2**31)]
    before: Written | None = None
    """What the page has read, and nothing else is to be replaced; anything where None."""


class TextSent(_Sent):
    """A text to look at."""

    student: Annotated[str, Field(max_length=500)]
    text: Annotated[str, Field(max_length=LONGEST_TEXT)]


class SteeringSent(_Sent):
    """A prompt, and how to steer what follows."""

    student: Annotated[str, Field(max_length=500)]
    prompt: Annotated[str, Field(max_length=LONGEST_TEXT)]
    edits: Annotated[list[dict[str, Any]], Field(max_length=100)]
    beside: Literal["original", "replaced"] = "original"
    new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 48
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Endpoints:
    """What the server answers."""

    library: Library
    live: LiveModel

    def page(self) -> Response:
        return self.file("index.html")

    def file(self, name: str) -> Response:
        if name not in PAGE_FILES:
            return Response(status_code=404)
        headers = {} if name == "index.html" else {"Cache-Control": "max-age=31536000, immutable"}
        return Response(page_file(name, live=True), media_type=PAGE_FILES[name], headers=headers)

    def run(self) -> JSONResponse:
        return JSONResponse(self.library.overview())

    def map(self, student: str) -> Response:
        return Response(self.library.map(student), media_type="application/json")

    def labels(self, student: str) -> JSONResponse:
        return JSONResponse(self.library.labels(student))

    def latent(self, student: str, latent: Annotated[int, Field(ge=0, lt=2**31)]) -> JSONResponse:
        return JSONResponse(self.library.latent(student, latent))

    def search(self, student: str, query: Annotated[str, Field(max_length=500)]) -> JSONResponse:
        return JSONResponse(self.library.search(student, query))

    def label(self, sent: Annotated[LabelSent, Body()]) -> JSONResponse:
        self.library.latent(sent.student, sent.latent)
        changed = datetime.now(UTC).isoformat(timespec="seconds")
        label = Label(sent.student, sent.latent, sent.label.strip(), sent.note.strip(), changed)
        write_label(self.library.database, label, sent.before and (sent.before.label, sent.before.note))
        return JSONResponse({"saved": changed, "label": label.label, "note": label.note})

    def text(self, sent: Annotated[TextSent, Body()]) -> JSONResponse:
        return JSONResponse(self.live.attribute(sent.student, sent.text))

    def steer(self, sent: Annotated[SteeringSent, Body()]) -> StreamingResponse:
        stop = threading.Event()
        request = SteeringRequest(
            student=sent.student,
            prompt=sent.prompt,
            edits=[Edit.from_json(edit) for edit in sent.edits],
            beside=sent.beside,
            new_tokens=sent.new_tokens,
            temperature=sent.temperature,
            seed=sent.seed,
        )
        pieces = self.live.continuations(request, stop)

        async def lines() -> AsyncIterator[str]:
            try:
                async for piece in iterate_in_threadpool(pieces):
                    yield json.dumps(piece) + "\n"
            finally:
                stop.set()

        return StreamingResponse(lines(), media_type="application/x-ndjson")


def make_app(library: Library, live: LiveModel, port: int) -> FastAPI:
    """Return the server's application.

    A request must name this machine and port as its host, and one that changes or computes anything must come from a
    page of this server; others get an empty answer with status 403, so that no web page elsewhere can reach in, also
    not by a name that it lets point here.

    Args:
        library: What is shown.
        live: What is computed.
        port: Where the server listens.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    endpoints = _Endpoints(library=library, live=live)
    for path, endpoint in {
        "/": endpoints.page,
        "/api/run": endpoints.run,
        "/api/map": endpoints.map,
        "/api/labels": endpoints.labels,
        "/api/latent": endpoints.latent,
        "/api/search": endpoints.search,
        "/page/{name}": endpoints.file,
    }.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_api_route("/api/label", endpoints.label, methods=["PUT"], response_model=None)
    app.add_api_route("/api/text", endpoints.text, methods=["POST"], response_model=None)
    app.add_api_route("/api/steer", endpoints.steer, methods=["POST"], response_model=None)
    app.add_exception_handler(NotFoundError, _sentence(404))
    app.add_exception_handler(ValueError, _sentence(400))
    app.add_exception_handler(OSError, _sentence(400))
    app.add_exception_handler(RequestValidationError, _what_does_not_fit)
    app.add_exception_handler(HTTPException, _nothing)
    # At its default port a browser leaves the number out.
    hosts = {f"{name}:{port}" if port != 80 else name for name in (LOOPBACK, "localhost")}
    app.add_middleware(_Guard, hosts=hosts)
    return app


class _Guard:
    """Lets in what is ours, and says with each answer what its page may do."""

    def __init__(self, app: ASGIApp, hosts: set[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_ours(Request(scope), self._hosts):
            await Response(status_code=403)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _is_ours(request: Request, hosts: set[str]) -> bool:
    hosts_named = request.headers.getlist("host")
    if len(hosts_named) != 1 or hosts_named[0].lower() not in hosts:
        return False
    # A link from elsewhere may lead here; what it finds can be neither framed nor read from there.
    is_visit = request.headers.get("sec-fetch-dest") == "document" and request.url.path == "/"
    if not is_visit and request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    if request.method in ("GET", "HEAD"):
        return True
    origin = request.headers.get("origin")
    is_json = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
    return is_json and origin in {f"http://{host}" for host in hosts}


def _sentence(status: int) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        sentence: dict[str, JSON] = {"error": " ".join(str(error).split())}
        return JSONResponse(sentence, status_code=status)

    return answer


def _what_does_not_fit(request: Request, error: Exception) -> Response:
    first = cast("RequestValidationError", error).errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return JSONResponse({"error": f"{place} does not fit: {first['msg']}."}, status_code=422)


def _nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=cast("HTTPException", error).status_code)


def listen(port: int) -> socket.socket:
    """Return a socket on this machine's own address, at this port or the first free one after it.

    Raises:
        ValueError: If none of the next ports is free.
    """
    for tried in range(port, min(port + PORTS_TRIED, 65536)):
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name != "nt":
            # There it would let two servers share a port.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((LOOPBACK, tried))
            # Two sockets may be bound to a port of which neither listens yet.
            bound.listen()
        except OSError as error:
            bound.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
        else:
            return bound
    raise ValueError(f"One of the ports {port} to {port + PORTS_TRIED - 1} must be free; none is. Name another --port.")


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Serve until interrupted."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False, proxy_headers=False
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[bound]))
