"""The host's web application: the same on a Unix socket, on TCP and as a replica of Ray Serve.

Results come as lines of JSON, as rows end; an empty line says that the host is alive. Closing the connection takes the
rest of the rows out. Errors are ``{"error": {"type": ..., "message": ...}}``, with the class of `alpaca_core.errors`.

Pages of the web are kept out, which a browser would let send to this machine: what they send as a form is no JSON,
and a name of theirs that is made to mean this machine (DNS rebinding) is none of this machine's own.
"""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alpaca_core.errors import AlpacaError, HostBusy, HostError, HostUnavailable, InvalidRequest
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.metrics import exposition
from alpaca_core.host.protocol import (
    MOST_BYTES,
    UNIX_NAME,
    GenerateRequest,
    ModelReply,
    ModelRequest,
    ScoreRequest,
    Status,
    StopRequest,
    TokenizerReply,
    write_error,
)
from alpaca_core.host.scheduler import Ticket
from alpaca_core.spec import Value

_PULSE = 5.0
"""Seconds after which a stream without results gets an empty line."""
_SLOWEST = 60.0
"""Seconds in which a request's body has to be there in whole; until then what has come of it is kept."""

Client = Annotated[str, Header(alias="alpaca-client", max_length=64)]
"""Rows of one client take turns with those of others."""
Identity = Annotated[str, Header(alias="alpaca-model", max_length=64)]
"""Of the model that rows were written for, as the reply to ``/v1/model`` said."""


def application(warm: WarmModel, token: str | None = None, leave: Callable[[], None] | None = None) -> FastAPI:
    """Make the application of one warm model, which it starts and ends.

    Args:
        warm: The model.
        token: That a request has to bear; None asks for none, and takes requests to this machine alone: the
            host that they name is ``localhost`` or an address in numbers.
        leave: Ends the server, for whoever asks it to; None refuses that.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warm.start()
        yield
        await warm.stop()

    app = FastAPI(title="alpaca host", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(AlpacaError, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _wrong)
    app.add_middleware(_Capped)
    app.add_middleware(_Json)
    if token is not None:
        app.add_middleware(_Bearer, token=token)
    else:
        app.add_middleware(_Near)

    @app.get("/health")
    async def health() -> Response:
        """Say whether requests can succeed: 200 when loading or ready, else 503."""
        status = warm.status()
        return JSONResponse({"state": status.state}, 200 if status.well else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Tell Prometheus."""
        text, kind = exposition(warm.status())
        return Response(text, media_type=kind)

    @app.get("/v1/status")
    async def status() -> Status:
        """Look at the host."""
        return warm.status()

    @app.post("/v1/model", response_model=ModelReply)
    async def model(request: ModelRequest) -> Response:
        """Wait for the model, with a spec's adapters."""
        return await _once_there(warm.model(request.spec))

    @app.get("/v1/tokenizer", response_model=TokenizerReply)
    async def tokenizer() -> Response:
        """Give the model's tokenizer."""
        return await _once_there(warm.tokenizer())

    @app.post("/v1/generate", response_class=StreamingResponse)
    async def generate(request: GenerateRequest, client: Client = "", identity: Identity = "") -> StreamingResponse:
        """Generate a response for each row."""
        rows = [row.model_dump(mode="json") for row in request.rows]
        return _Rows(warm, warm.submit(client, "generate", rows, identity))

    @app.post("/v1/loglikelihood", response_class=StreamingResponse)
    async def loglikelihood(request: ScoreRequest, client: Client = "", identity: Identity = "") -> StreamingResponse:
        """Score each row."""
        rows = [row.model_dump(mode="json") for row in request.rows]
        return _Rows(warm, warm.submit(client, "loglikelihood", rows, identity))

    @app.post("/v1/stop")
    async def stop(request: StopRequest) -> dict[str, bool]:
        """End the host at once; rows that have not come out are cut off."""
        if leave is None:
            raise InvalidRequest("this host is ended where it was started, and not by a request.")
        if request.idle is not None and warm.idle() <= request.idle:  # somebody has come since it was looked at
            return {"stopping": False}
        leave()
        return {"stopping": True}

    return app


class _Rows(StreamingResponse):
    """The results of a ticket as they come; however it ends, what is left of the ticket is taken out."""

    def __init__(self, warm: WarmModel, ticket: Ticket) -> None:
        super().__init__(_lines(ticket), media_type="application/x-ndjson")
        self._warm, self._ticket = warm, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._warm.scheduler.drop(self._ticket)


async def _lines(ticket: Ticket) -> AsyncIterator[str]:
    out = ticket.left + ticket.results.qsize()
    while out:
        try:
            found = await asyncio.wait_for(ticket.results.get(), _PULSE)
        except TimeoutError:
            yield "\n"
            continue
        lines: list[str] = []
        while True:
            if isinstance(found, AlpacaError):
                yield "".join([*lines, json.dumps({"failed": write_error(found)}), "\n"])
                return
            index, result = found
            lines.append(json.dumps({"index": index, **result}, separators=(",", ":")) + "\n")
            out -= 1
            if ticket.results.empty():
                break
            found = ticket.results.get_nowait()
        yield "".join(lines)


async def _once_there(reply: Coroutine[Any, Any, Value]) -> Response:
    """Answer with what comes of waiting: at once, or after an empty line every few seconds, which JSON may begin with.

    An answer that took longer has status 200 whatever it is; an error is told by what it holds. What is waited for goes
    on when nobody listens any more, since a load is never cut off halfway.
    """
    task = asyncio.create_task(reply)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # looked at, even if by nobody else
    if (await asyncio.wait([task], timeout=_PULSE))[0]:
        return Response((await task).model_dump_json(), media_type="application/json")

    async def lines() -> AsyncIterator[str]:
        yield "\n"
        while not (await asyncio.wait([task], timeout=_PULSE))[0]:
            yield "\n"
        try:
            yield (await task).model_dump_json()
        except AlpacaError as error:
            yield json.dumps({"error": write_error(error)})

    return StreamingResponse(lines(), media_type="application/json")


def _reply(error: AlpacaError, status: int) -> Response:
    """Write an error. What a request held may be in it, so that not all of it need be text that can be encoded."""
    retry = {"Retry-After": "1"} if isinstance(error, HostError) else None
    return Response(json.dumps({"error": write_error(error)}), status, retry, "application/json")


def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, AlpacaError)
    return _reply(error, 429 if isinstance(error, HostBusy) else 503 if isinstance(error, HostError) else 422)


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    told = InvalidRequest(f"{place[:200]}: {first['msg'][:300]}. See /openapi.json for what a request holds.")
    return _reply(told, 422)


def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path:.200}"
    return _reply(InvalidRequest(f"{where}: {error.detail}. See /openapi.json for what there is."), error.status_code)


class _Near:
    """Refuses requests to a name that is not this machine's own, whichever machine it is made to mean."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not _is_near(named):
                error = InvalidRequest(
                    f"a host without a token answers to localhost and addresses in numbers, but not to {named!r:.80}. "
                    "Write the address, or give the host a token."
                )
                return await _reply(error, 403)(scope, receive, send)
        await self._app(scope, receive, send)


def _is_near(named: str) -> bool:
    name = named[1:].partition("]")[0] if named.startswith("[") else named
    for each in (name, name.rpartition(":")[0]):
        if each in ("localhost", UNIX_NAME):
            return True
        with suppress(ValueError):
            return bool(ipaddress.ip_address(each))
    return False


class _Json:
    """Refuses what is sent as anything but JSON: a page of another origin may send forms, but no JSON, unasked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
            if kind.partition(";")[0].strip().lower() != "application/json":
                error = InvalidRequest(f"a request is application/json, but this one is {kind!r:.80}. Say so in it.")
                return await _reply(error, 415)(scope, receive, send)
        await self._app(scope, receive, send)


class _Capped:
    """Refuses bodies that are too large, before they are read in whole, and those that do not end in time.

    Requests of other methods than POST are answered without their bodies, which stay unread: uvicorn takes in 64 KiB of
    one that nobody asks for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if not told.isdigit() or int(told) > MOST_BYTES:
                raise InvalidRequest(_TOO_LARGE)
            async with asyncio.timeout(_SLOWEST):
                body = await _whole(receive)
        except InvalidRequest as error:
            return await _reply(error, 413)(scope, receive, send)
        except TimeoutError:
            late = HostUnavailable(f"a request comes in whole within {_SLOWEST:g} s, but this one did not. Send less.")
            reply = _reply(late, 408)
            reply.headers["connection"] = "close"  # the rest of the body is not waited for either
            return await reply(scope, receive, send)
        body.reverse()

        async def replay() -> Message:
            return body.pop() if body else await receive()

        await self._app(scope, replay, send)


_TOO_LARGE = f"a request has at most {MOST_BYTES:,} bytes. Send the rows in several."


async def _whole(receive: Receive) -> list[Message]:
    """Read a body.

    Raises:
        InvalidRequest: If it is too large.
    """
    left, body = MOST_BYTES, list[Message]()
    while True:
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise InvalidRequest(_TOO_LARGE)
        body.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body


class _Bearer:
    """Refuses requests that do not bear the token; only whether the host is well may be asked without."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) != ("GET", "/health"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = InvalidRequest("this host wants its token. Set ALPACA_HOST_TOKEN to it.")
                return await _reply(error, 401)(scope, receive, send)
        await self._app(scope, receive, send)
