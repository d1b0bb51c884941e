"""A `LanguageModel` whose engine runs in a host: the same rows, the same results, no torch in this process."""

import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import httpx
import orjson

from alpaca_core.errors import AlpacaError, HostBusy, HostError, HostUnavailable, RowRejected
from alpaca_core.host.protocol import (
    GenerateJson,
    ModelReply,
    ModelRequest,
    ScoreJson,
    TokenizerReply,
    check_version,
    read_error,
    read_result,
)
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow, shapes_of
from alpaca_core.spec import ModelSpec
from alpaca_core.tokenizer import Tokenizer

_CHUNK = 256
"""Rows of one request."""
_STREAMS = 4
"""Requests of one call at once: while the last rows of one end, the next one's have begun."""
_SILENCE = 60.0
"""Seconds without a byte after which a host counts as gone; one that lives says so more often."""
_PATIENCE = 600.0
"""Seconds without any result, in which a host that is gone or busy is tried again."""

Row = TypeVar("Row", GenerateRow, ScoreRow)
Result = Completion | list[float] | RowError


class Connect(Protocol):
    """Opens a connection to the host, which it starts where it can: again after the host has died."""

    def __call__(self) -> httpx.Client: ...


class HostModel:
    """A model that a host keeps warm. Its methods may be called from several threads.

    A host that dies is started again, or waited for, and the rows that had not come out are asked again: their
    results are the same.

    Args:
        spec: What is asked for.
        connect: Opens connections.
        patience: Seconds without any result after which a call gives up.

    Raises:
        HostUnavailable: If the host cannot be reached.
        LoadError: If it cannot load the model.
        InvalidRequest: If it keeps another model, or speaks another version.
    """

    def __init__(self, spec: ModelSpec, connect: Connect, patience: float = _PATIENCE) -> None:
        self._spec, self._connect, self._patience = spec, connect, patience
        self._me = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._generation = 0
        self._http = connect()
        self._told: ModelReply = self._until_patience_ends(self._ask)
        self._tokenizer: Tokenizer = self._until_patience_ends(self._ask_tokenizer)

    @property
    def info(self) -> ModelInfo:
        """What the model is, as one who loads the spec in its own process would see it."""
        return self._told.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, in this process."""
        return self._tokenizer

    def close(self) -> None:
        """Close the connections; the host goes on."""
        self._http.close()

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row; rows come out as they end."""
        return self._run("/v1/generate", rows, GenerateJson.of)  # type: ignore[return-value]

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats."""
        return self._run("/v1/loglikelihood", rows, ScoreJson.of)  # type: ignore[return-value]

    def _run(
        self, path: str, rows: Sequence[Row], write: Callable[[Row], GenerateJson | ScoreJson]
    ) -> Iterator[tuple[int, Result]]:
        ready: list[tuple[int, Row]] = []
        for index, row in enumerate(rows):
            try:
                self.info.adapter(row.adapter)
                ready.append((index, row))
            except RowRejected as rejection:
                yield index, RowError.of(rejection)
        chunks = [ready[first : first + _CHUNK] for first in range(0, len(ready), _CHUNK)]
        if not chunks:
            return
        call = _Call(self, path, write, chunks)
        try:
            left = len(ready)
            while left:
                found = call.results.get()
                if isinstance(found, BaseException):
                    raise found
                left -= 1
                yield found
                shape = shapes_of(found[1])
                if shape and shape != self.info.shape:
                    self._refresh()
        finally:
            call.cancel()

    def _row(self, row: GenerateJson | ScoreJson) -> dict[str, Any]:
        """Write a row, with its adapter as this host calls it."""
        told = row.model_dump(mode="json")
        told["adapter"] = None if row.adapter is None else self._told.adapters.get(row.adapter)
        return told

    def _refresh(self) -> None:
        """Ask again what the model is: its shape may have become a smaller one."""
        with suppress(AlpacaError, httpx.HTTPError):
            self._told = self._ask()

    def _reconnect(self, generation: int) -> None:
        """Open a new connection, unless another thread has since `generation`.

        Raises:
            HostError: If that failed; it may be tried again.
        """
        with self._lock:
            if generation == self._generation:
                self._http = self._connect()
                told = self._ask()
                if told.info.digest != self.info.digest and told.info.unshaped_digest != self.info.unshaped_digest:
                    raise HostUnavailable(
                        f"a call's rows are all of one model, but {self._spec.base_model!r} has become another one "
                        "since it began. Run it again."
                    )
                self._told = told
                self._generation += 1

    def _ask(self) -> ModelReply:
        reply = self._post("/v1/model", ModelRequest(spec=self._spec).model_dump(mode="json"))
        check_version(reply.get("protocol"))
        return ModelReply.model_validate(reply)

    def _ask_tokenizer(self) -> Tokenizer:
        told = TokenizerReply.model_validate(_checked(self._http.get("/v1/tokenizer")))
        return Tokenizer(told.definition, told.eos_ids, told.named)

    def _post(self, path: str, body: object) -> dict[str, Any]:
        # loading may take minutes, and is not a stream with signs of life
        return _checked(self._http.post(path, json=body, timeout=httpx.Timeout(_SILENCE, read=None)))

    def _until_patience_ends(self, ask: Callable[[], Any]) -> Any:
        wait = _Wait(self._patience)
        while True:
            try:
                return ask()
            except (httpx.TransportError, HostError) as error:
                wait(error)
            with suppress(HostError):
                self._http = self._connect()


class _Call:
    """The requests of one call, each run by a thread; results of all come in one queue, and so does an error."""

    def __init__(
        self,
        model: HostModel,
        path: str,
        write: Callable[[Any], GenerateJson | ScoreJson],
        chunks: list[list[tuple[int, Any]]],
    ) -> None:
        self._model, self._path, self._write = model, path, write
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
            _hang_up(response)

    def _work(self) -> None:
        try:
            while not self._cancelled.is_set():
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._finish(dict(chunk))
        except BaseException as error:
            self.results.put(error)

    def _finish(self, left: dict[int, Any]) -> None:
        """Ask for rows, and again for those that have not come out when a connection broke."""
        wait = _Wait(self._model._patience)
        while left and not self._cancelled.is_set():
            before, generation = len(left), self._model._generation
            try:
                self._ask(left)
                problem: Exception = HostUnavailable("the host ended its answer before all rows had come.")
            except HostBusy as error:
                wait(error)
                continue
            except (httpx.TransportError, httpx.StreamError, HostError, OSError) as error:
                problem = error
            if self._cancelled.is_set() or not left:
                return
            if len(left) < before:
                wait = _Wait(self._model._patience)
            wait(problem)
            with suppress(HostError, httpx.TransportError):
                self._model._reconnect(generation)

    def _ask(self, left: dict[int, Any]) -> None:
        order = list(left)
        body = {"rows": [self._model._row(self._write(left[index])) for index in order]}
        headers = {"alpaca-client": self._model._me}
        with self._model._http.stream("POST", self._path, json=body, headers=headers) as response:
            with self._lock:
                self._open.add(response)
            try:
                if response.status_code != 200:
                    response.read()
                    _checked(response)
                for line in response.iter_lines():
                    if self._cancelled.is_set():
                        return
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


class _Wait:
    """Sleeps longer each time; raises what it was told last when patience has ended."""

    def __init__(self, patience: float) -> None:
        self._ends = time.monotonic() + patience
        self._pause = 0.05

    def __call__(self, problem: Exception) -> None:
        if time.monotonic() > self._ends:
            if isinstance(problem, AlpacaError):
                raise problem
            raise HostUnavailable(
                f"the host cannot be reached ({problem}). Read its log, and run it again."
            ) from problem
        time.sleep(self._pause * random.uniform(0.5, 1.5))
        self._pause = min(2.0, 1.5 * self._pause)


def _checked(response: httpx.Response) -> dict[str, Any]:
    """Return a reply's JSON; raise the error that it holds."""
    try:
        told = orjson.loads(response.content)
    except ValueError:
        told = None
    if response.status_code == 200 and isinstance(told, dict):
        return told
    if isinstance(told, dict) and "error" in told:
        raise read_error(told["error"])
    raise HostUnavailable(f"a host answers in JSON, but this gave status {response.status_code}. Check ALPACA_HOST.")


def _hang_up(response: httpx.Response) -> None:
    """Shut a response's connection down, so that a thread that reads it wakes up."""
    stream = response.extensions.get("network_stream")
    sock = stream.get_extra_info("socket") if stream is not None else None
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(2)
