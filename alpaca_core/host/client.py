"""A `LanguageModel` whose engine runs in a host: the same rows, the same results, no torch in this process."""

import logging
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import httpx
import orjson

from alpaca_core.errors import AlpacaError, HostBusy, HostError, HostUnavailable, InvalidRequest, RowRejected
from alpaca_core.host.exchange import Wait, ask, checked, hang_up
from alpaca_core.host.protocol import (
    MOST_BYTES,
    MOST_TOKENS,
    GenerateJson,
    ModelReply,
    ModelRequest,
    ScoreJson,
    TokenizerReply,
    check_version,
    read_error,
    read_result,
)
from alpaca_core.model import (
    DEFAULT_ADAPTER,
    Completion,
    GenerateRow,
    ModelInfo,
    RowError,
    ScoreRow,
    check_fits,
    shapes_of,
)
from alpaca_core.spec import ModelSpec
from alpaca_core.tokenizer import Tokenizer

_CHUNK = 256
"""Rows of one request."""
_CHUNK_BYTES = MOST_BYTES // 4
"""Bytes of one request, as they are guessed: eight for each token."""
_STREAMS = 4
"""Requests of one call at once: while the last rows of one end, the next one's have begun."""
_PATIENCE = 600.0
"""Seconds without a result or a sign of life, in which a host that is gone or busy is tried again."""
_CONTACT = 30.0
"""Seconds for a host to be there at all, when it is asked for the first time."""

Row = TypeVar("Row", GenerateRow, ScoreRow)
Result = Completion | list[float] | RowError


class Connect(Protocol):
    """Opens a connection to the host, which it starts where it can: again after the host has died."""

    def __call__(self) -> httpx.Client: ...


@dataclass(frozen=True, slots=True)
class Session:
    """A connection, and what the host at its other end said of the model: names of adapters hold there alone."""

    http: httpx.Client
    told: ModelReply

    def write(self, row: GenerateJson | ScoreJson) -> dict[str, Any]:
        """Write a row, with its adapter as this host calls it."""
        told = row.model_dump(mode="json")
        told["adapter"] = None if row.adapter is None else self.told.adapters.get(row.adapter)
        return told


class _Changed(HostUnavailable):
    """What a spec means has become another model, so that it is of no use to try again."""


class HostModel:
    """A model that a host keeps warm. Its methods may be called from several threads.

    A host that dies is started again, or waited for, and the rows that had not come out are asked again: their
    results are the same.

    Args:
        spec: What is asked for.
        connect: Opens connections.
        patience: Seconds without any result after which a call gives up.
        called: The same with names as the caller gave them, for `info`; None is `spec`.

    Raises:
        HostUnavailable: If the host cannot be reached.
        LoadError: If it cannot load the model.
        InvalidRequest: If it keeps another model, or speaks another version.
    """

    def __init__(
        self, spec: ModelSpec, connect: Connect, patience: float = _PATIENCE, called: ModelSpec | None = None
    ) -> None:
        self._spec, self._connect, self.patience, self._called = spec, connect, patience, called or spec
        self._headers = {"alpaca-client": uuid.uuid4().hex}
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._closed = False
        self._shapes: set[str] = set()
        self.session, self._tokenizer = self._first()
        if (shape := self.info.shape) and int(shape.partition("x")[0]) != spec.batch_size:
            _tell_shape(self.info.name, shape, spec.batch_size)

    @property
    def info(self) -> ModelInfo:
        """What the model is, as one who loads the spec in its own process would see it."""
        return self.session.told.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, in this process."""
        return self._tokenizer

    def close(self) -> None:
        """Close the connections; the host goes on. Iterators that are still open raise at their next step."""
        self._closed = True
        for call in list(self._calls):
            call.cancel()
            call.results.put(self._is_closed())
        self.session.http.close()

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row; rows come out as they end."""
        return self._run("/v1/generate", rows, GenerateJson.of)  # type: ignore[return-value]

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats."""
        return self._run("/v1/loglikelihood", rows, ScoreJson.of)  # type: ignore[return-value]

    def _run(
        self, path: str, rows: Sequence[Row], write: Callable[[Row], GenerateJson | ScoreJson]
    ) -> Iterator[tuple[int, Result]]:
        if self._closed:
            raise self._is_closed()
        ready: list[tuple[int, Row]] = []
        for index, row in enumerate(rows):
            try:
                self.info.adapter(row.adapter)
                _check_size(row, self.info)
                ready.append((index, row))
            except RowRejected as rejection:
                yield index, RowError.of(rejection)
        if not ready:
            return
        call = _Call(self, path, self._headers, write, list(_chunks(ready)))
        self._calls.add(call)
        try:
            left = len(ready)
            while left:
                found = call.results.get()
                if self._closed:
                    raise self._is_closed()
                if isinstance(found, BaseException):
                    raise found
                left -= 1
                yield found
                shape = shapes_of(found[1])
                if shape and shape != self.info.shape and shape not in self._shapes:
                    self._shapes.add(shape)  # replicas of a cluster may have several, each for ever
                    self._refresh()
        finally:
            self._calls.discard(call)
            call.cancel()

    def reconnect(self, before: Session, wait: Wait) -> None:
        """Open a new connection, unless another thread has done so since `before`; `wait` is told of signs of life.

        Raises:
            HostError: If that failed; it may be tried again, but not where the model has become another one.
            LoadError: If the host cannot load the model any more.
        """
        with self._lock:
            if self.session is not before or self._closed:
                return
            session = self._open(wait)
            try:
                self._check_same(session.told)
            except _Changed:
                session.http.close()
                raise
            self.session = session

    def _first(self) -> tuple[Session, Tokenizer]:
        wait, contact = Wait(self.patience), Wait(min(self.patience, _CONTACT))
        while True:
            http = self._connect()
            try:
                session = Session(http, self._ask(http, wait))
                told = TokenizerReply.model_validate(ask(http, "GET", "/v1/tokenizer", wait))
                return session, Tokenizer(told.definition, told.eos_ids, told.named)
            except (httpx.TransportError, HostError) as error:
                http.close()
                (contact if isinstance(error, httpx.ConnectError) else wait)(error)
            except BaseException:
                http.close()
                raise

    def _open(self, wait: Wait) -> Session:
        http = self._connect()
        try:
            return Session(http, self._ask(http, wait))
        except BaseException:
            http.close()
            raise

    def _ask(self, http: httpx.Client, wait: Wait) -> ModelReply:
        body = ModelRequest(spec=self._spec).model_dump(mode="json")
        reply = ask(http, "POST", "/v1/model", wait, json=body, headers=self._headers)
        check_version(reply.get("protocol"))
        told = ModelReply.model_validate(reply)
        return told.model_copy(update={"info": self._named(told.info)})

    def _named(self, info: ModelInfo) -> ModelInfo:
        """Call the model and its adapters as the caller does, whose paths may have been made absolute."""
        called = self._called
        sources = {each.name: each.source for each in called.adapters} | {DEFAULT_ADAPTER: called.adapter}
        adapters = [each.model_copy(update={"source": sources.get(each.name) or each.source}) for each in info.adapters]
        return info.model_copy(update={"name": called.base_model, "adapters": tuple(adapters)})

    def _check_same(self, told: ModelReply) -> None:
        old, new = self.info, told.info
        if new.digest != old.digest and new.unshaped_digest != (old.unshaped_digest or None):
            raise _Changed(
                f"a call's rows are all of one model, but {self._spec.base_model!r} has become another one since it "
                "was loaded. Load it again."
            )

    def _refresh(self) -> None:
        """Ask again what the model is: its shape may have become a smaller one."""
        with suppress(AlpacaError, httpx.HTTPError), self._lock:
            told = self._ask(self.session.http, Wait(0.0))
            self._check_same(told)
            self.session = Session(self.session.http, told)

    def _is_closed(self) -> InvalidRequest:
        return InvalidRequest(f"{self.info.name!r} is closed. Load it again.")


@cache
def _tell_shape(name: str, shape: str, asked: int) -> None:
    """Warn, once, that rows are computed in another number at a time than a spec asks for."""
    logging.getLogger(__name__).warning(
        "the host of %r computes in shape %s, as the run that started it asked for or its memory allowed, and not with "
        "this spec's batch_size of %d: last bits may differ from those of a host of your own. Ask for the same "
        "batch_size, or `alpaca host stop` it when nobody uses it.",
        *(name, shape, asked),
    )


def _check_size(row: GenerateRow | ScoreRow, info: ModelInfo) -> None:
    """Refuse a row that is too large to be sent, as an engine would that has seen it.

    Raises:
        RowRejected: With code ``prompt_too_long``.
    """
    if len(row.prompt_ids) > MOST_TOKENS:
        if isinstance(row, GenerateRow):
            check_fits(len(row.prompt_ids), row.sampling.max_new_tokens, info)
        else:
            deepest = row.continuations.deepest
            check_fits(len(row.prompt_ids), deepest, info, "the longest continuation")


def _chunks(rows: list[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Put rows together that are sent in one request: not too many, and not too much."""
    chunk: list[tuple[int, Row]] = []
    size = 0
    for index, row in rows:
        trie = 0 if isinstance(row, GenerateRow) else 2 * len(row.continuations.tokens)
        bytes_ = 8 * (len(row.prompt_ids) + trie)
        if chunk and (len(chunk) == _CHUNK or size + bytes_ > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append((index, row))
        size += bytes_
    yield chunk


class _Call:
    """The requests of one call, each run by a thread; results of all come in one queue, and so does an error."""

    def __init__(
        self,
        model: HostModel,
        path: str,
        headers: dict[str, str],
        write: Callable[[Any], GenerateJson | ScoreJson],
        chunks: list[list[tuple[int, Any]]],
    ) -> None:
        self._model, self._path, self._headers, self._write = model, path, headers, write
        self.results: queue.SimpleQueue[tuple[int, Result] | BaseException] = queue.SimpleQueue()
        self._chunks = iter(chunks)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._open: set[httpx.Response] = set()
        for _ in range(min(_STREAMS, len(chunks))):
            threading.Thread(target=self._work, daemon=True).start()

    def cancel(self) -> None:
        """Close what is open: the host takes the rows out."""
        self._cancelled.set()
        with self._lock:
            responses = list(self._open)
        for response in responses:
            hang_up(response)

    def _work(self) -> None:
        try:
            while not self._cancelled.is_set():
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._finish(dict(chunk))
        except BaseException as error:
            if not self._cancelled.is_set():
                self.results.put(error)

    def _finish(self, left: dict[int, Any]) -> None:
        """Ask for rows, and again for those that have not come out when a connection broke."""
        wait = Wait(self._model.patience)
        while left and not self._cancelled.is_set():
            session, before = self._model.session, len(left)
            try:
                self._ask(session, left, wait)
                problem: Exception = HostUnavailable("the host ended its answer before all rows had come.")
            except HostBusy as error:
                wait(error)
                continue
            except (httpx.TransportError, httpx.StreamError, HostError, OSError) as error:
                problem = error
            if len(left) < before:
                wait = Wait(self._model.patience)
            while left and not self._cancelled.is_set():
                wait(problem)
                try:
                    self._model.reconnect(session, wait)
                    break
                except _Changed:
                    raise
                except (httpx.TransportError, HostError) as error:
                    problem = error

    def _ask(self, session: Session, left: dict[int, Any], wait: Wait) -> None:
        order = list(left)
        body = {"rows": [session.write(self._write(left[index])) for index in order]}
        headers = self._headers | {"alpaca-model": session.told.identity}
        with session.http.stream("POST", self._path, json=body, headers=headers) as response:
            with self._lock:
                self._open.add(response)
            try:
                if response.status_code != 200:
                    checked(response.status_code, response.read())
                if self._cancelled.is_set():  # before there was anything to hang up
                    return
                for line in response.iter_lines():
                    if self._cancelled.is_set():
                        return
                    wait.life()
                    if line:
                        told = orjson.loads(line)
                        if "failed" in told:
                            raise read_error(told["failed"])
                        index = order[told.pop("index")]
                        if left.pop(index, None) is not None:
                            self.results.put((index, read_result(told)))
            finally:
                with self._lock:
                    self._open.discard(response)
