"""The HTTP server of `svfap serve`: a page, and the JSON endpoint that it uses.

A video is the body of a POST: it is received into a file without a name, and refused as soon as it
is known to be larger than the limit. One video is computed at a time, in the order of arrival; a
place in the queue is taken before the video is received, so files and memory are bounded. Each
client has one place.

Without a token only programs of this machine may call: the server listens on loopback, and refuses
pages of other sites, whose requests a browser would send (Host and Origin). With a token every call
carries it in a header; it is never part of a URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import secrets
import socket
import tempfile
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from svfap_dist import json_text, storage
from svfap_dist.errors import ConfigError, SvfapError
from svfap_dist.model.weights import ModelInfo
from svfap_dist.serving.analyze import Analysis, UnusableError
from svfap_dist.video.probe import Limits

TOKEN_VARIABLE = "SVFAP_SERVE_TOKEN"  # noqa: S105 - its name
_SHORTEST_TOKEN = 16  # characters
_RECEIVE_SECONDS = 120.0  # for a whole video
_DISCARD_SECONDS = 30.0  # for the rest of one that is refused
_CONNECTIONS = 100
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Service:
    """What is served.

    Args:
        analyze: Analyzes one video; called by one thread at a time.
        info: Of the network.
        name: Of the network, for the page.
        limits: What a video may cost.
        queue: Maximum number of queued videos while one is processed.
        token: Token that each request must send; empty: none, for programs of this machine.
    """

    analyze: Callable[[bytes], Analysis]
    info: ModelInfo
    name: str
    limits: Limits
    queue: int
    token: str = ""


class _RefusedError(Exception):
    """A request that is refused, with an HTTP status."""

    def __init__(self, status: int, error: SvfapError, retry_after: int = 0) -> None:
        super().__init__(str(error))
        self.status, self.error, self.retry_after = status, error, retry_after


def _refused(status: int, what: str, found: str, do: str, retry_after: int = 0) -> _RefusedError:
    return _RefusedError(status, SvfapError(what, "this request", found, do), retry_after)


class Queue:
    """One computation at a time, in the order of arrival, one place for each client.

    Args:
        waiting: Clients that may wait while one is served.
    """

    def __init__(self, waiting: int) -> None:
        self._places = waiting + 1
        self._clients: set[str] = set()
        self._turn = asyncio.Lock()  # wakes those who wait in the order of arrival
        self._seconds = 1.0  # that the last computation took

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Have a place in the queue within this context.

        Args:
            client: Who gets it.

        Raises:
            _RefusedError: All places are taken, or the client has one already.
        """
        retry_after = max(1, round(self._seconds))
        if client in self._clients:
            found, do = "it has not been answered yet", "send one video at a time"
            raise _refused(
                429, "This client already has a video in the queue", found, do, retry_after
            )
        if len(self._clients) >= self._places:
            found = f"{len(self._clients)} videos are being processed or waiting"
            raise _refused(503, "Queue is full", found, "retry later", retry_after)
        self._clients.add(client)
        try:
            yield
        finally:
            self._clients.discard(client)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Be the only one who computes within this context."""
        async with self._turn:
            began = time.monotonic()
            try:
                yield
            finally:
                self._seconds = time.monotonic() - began


class _ErrorResponse(JSONResponse):
    """An error; the rest of the request's body is received and discarded after it was sent.

    Many clients read no answer before they have sent everything, and see only a broken connection
    if it is closed before that.
    """

    def __init__(self, error: SvfapError, status: int, retry_after: int, discard: bool) -> None:
        parts = {name: getattr(error, name) for name in ("what", "where", "found", "do")}
        headers = {"Retry-After": str(retry_after)} if retry_after else {}
        headers |= {"Connection": "close"} if discard else {}
        super().__init__({"error": {**parts, "message": str(error)}}, status, headers)
        self._discard = discard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": self._discard})
        if self._discard:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_SECONDS):
                    while (await receive()).get("more_body"):
                        pass
            await send({"type": "http.response.body", "body": b""})


class _Site:
    """The pages and endpoints of a service."""

    def __init__(self, service: Service) -> None:
        self._service, self._queue = service, Queue(service.queue)
        self._page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        """Return the page: the same for all, without anything about the network."""
        if refused := self._refuse(request, needs_token=False):
            return self._error(request, refused)
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data:; media-src blob: data:; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy}
        return HTMLResponse(self._page.replace("{nonce}", nonce), headers=headers)

    async def about(self, request: Request) -> Response:
        """Return what the page shows about the network, and the limits."""
        if refused := self._refuse(request):
            return self._error(request, refused)
        info, limits = self._service.info, self._service.limits
        return JSONResponse(
            {
                "name": self._service.name,
                "kind": info.kind,
                "names": [info.name_of(number) for number in range(info.num_outputs)],
                "license": info.license,
                "limits": {
                    "bytes": limits.file_bytes,
                    "pixels": limits.pixels,
                    "seconds": limits.duration,
                    "queue": self._service.queue,
                },
            }
        )

    async def analyze(self, request: Request) -> Response:
        """Return the analysis of the video in the request's body."""
        try:
            if refused := self._refuse(request):
                raise refused
            analysis = await self._compute(request)
        except _RefusedError as error:
            return self._error(request, error)
        except UnusableError as error:
            return self._error(request, _RefusedError(422, error))
        except ClientDisconnect:
            return Response(status_code=400)  # which no one reads
        except Exception as error:
            log.exception("A video cannot be computed")
            do = "see the server's log"
            unexpected = _refused(500, "Video cannot be computed", type(error).__name__, do)
            return self._error(request, unexpected)
        found = dataclasses.asdict(analysis)
        if request.query_params.get("pictures") == "no":
            found |= {"pictures": {}, "crop": ""}
        log.info("Analyzed a video of %d frames", found["video"]["num_frames"])
        return Response(json_text.dumps(found), media_type="application/json")

    async def _compute(self, request: Request) -> Analysis:
        address = request.client.host if request.client else ""
        client = f"{address} {request.headers.get('x-client', '')[:64]}"
        with self._queue.place(client), tempfile.TemporaryFile() as file:
            await self._receive(request, file)
            async with self._queue.turn():
                if await request.is_disconnected():
                    raise ClientDisconnect
                file.seek(0)
                return await asyncio.to_thread(self._service.analyze, file.read())

    async def _receive(self, request: Request, file: IO[bytes]) -> None:
        """Write the request's body to a file."""
        limit, size = self._service.limits.file_bytes, 0
        if (declared := int(request.headers.get("content-length", 0))) > limit:
            raise _too_big(declared, limit)
        try:
            async with asyncio.timeout(_RECEIVE_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise _too_big(size, limit)
                    file.write(chunk)
        except TimeoutError:
            found, do = f"{size} bytes in {_RECEIVE_SECONDS:.0f} s", "send a smaller video"
            raise _refused(408, "Video was not received in time", found, do) from None
        request.state.is_received = True

    def _refuse(self, request: Request, *, needs_token: bool = True) -> _RefusedError | None:
        """Return why a request is refused, if it is."""
        if expected := self._service.token:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            is_right = secrets.compare_digest(given.encode(), expected.encode())
            if is_right or not needs_token:
                return None
            do = "send it in the header: Authorization: Bearer TOKEN"
            return _refused(401, "Token is missing or wrong", "no such token", do)
        host = request.headers.get("host", "")
        origin = request.headers.get("origin", f"http://{host}")
        if _name_of(host) in _LOOPBACK_NAMES and origin == f"http://{host}":
            return None
        do = "open the page at http://localhost with the server's port, or serve with a token"
        return _refused(403, "Request from another site", f"Host {host}, Origin {origin}", do)

    def _error(self, request: Request, refused: _RefusedError) -> Response:
        is_received = getattr(request.state, "is_received", request.method != "POST")
        log.info("Refused (%d): %s", refused.status, refused.error)
        return _ErrorResponse(
            refused.error, refused.status, refused.retry_after, discard=not is_received
        )


def _too_big(size: int, limit: int) -> _RefusedError:
    found = f"at least {size} bytes; the limit is {limit}"
    return _refused(413, "Video is too large", found, f"give a file of at most {limit >> 20} MiB")


def _name_of(host: str) -> str:
    """Return the name in a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_app(service: Service) -> Starlette:
    """Return the ASGI application.

    Args:
        service: What is served.
    """
    site = _Site(service)

    def with_headers(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            response = await endpoint(request)
            response.headers.update(_HEADERS)
            return response

        return respond

    return Starlette(
        routes=[
            Route("/", with_headers(site.page)),
            Route("/api/about", with_headers(site.about)),
            Route("/api/analyze", with_headers(site.analyze), methods=["POST"]),
        ]
    )


def build_server(app: Starlette) -> uvicorn.Server:
    """Return the server of an application; run it with the socket of `listen`.

    Args:
        app: From `build_app`.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int, *, has_token: bool) -> socket.socket:
    """Return a listening socket.

    Args:
        host: Name or address.
        port: 0: any free one.
        has_token: Whether each call must carry a token.

    Raises:
        ConfigError: The address is not of this machine or in use, or others can reach it and there
            is no token.
    """
    where = f"--host {host} --port {port}"
    try:
        family, *_, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        is_loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        if not is_loopback and not has_token:
            do = f"set {TOKEN_VARIABLE}, or give --token-file; or serve on 127.0.0.1"
            title = "Missing token for a non-loopback address"
            raise ConfigError(title, where, "no token", do)
        return socket.create_server(address, family=family)
    except OSError as error:
        found, do = error.strerror or str(error), "give an address of this machine and a free port"
        raise ConfigError("Cannot listen", where, found, do) from error


def read_token(path: str) -> str:
    """Return the token from a file, else from the environment, from which it is removed; or "".

    Args:
        path: Path of the file; empty: none.

    Raises:
        ConfigError: The token is too short, or cannot be part of a header.
        StorageError: The file cannot be read.
    """
    from_environment = os.environ.pop(TOKEN_VARIABLE, "")  # child processes need none
    if not path and not from_environment:
        return ""
    where = path or TOKEN_VARIABLE
    raw = storage.read_bytes(path) if path else from_environment.encode()
    token = raw.strip().decode("ascii", errors="replace")
    do = 'make one: python -c "import secrets; print(secrets.token_urlsafe())"'
    if len(token) < _SHORTEST_TOKEN:
        found = f"{len(token)} characters, fewer than {_SHORTEST_TOKEN}"
        raise ConfigError("Token is too short", where, found, do)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("Token is invalid", where, "it has blanks or non-ASCII characters", do)
    return token
