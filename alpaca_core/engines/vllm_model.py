"""`LanguageModel` on vLLM's engine, which runs in this process and is driven step by step.

vLLM makes up each pass anew of whatever rows are there, so a row's last bits depend on its neighbours:
`ModelInfo.rows_independent` is False.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import Any, TypeVar

from alpaca_core.engines.recovering import count_pass
from alpaca_core.engines.vllm_rows import Ask, Outcome, Task, task_of
from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow
from alpaca_core.tokenizer import Tokenizer

_Row = TypeVar("_Row", GenerateRow, ScoreRow)
_NUMBERS = count()
"""Of requests; one is never used again in a process."""
_LIVE: list[Any] = []
"""Engines of this process that have not been stopped."""


@dataclass(frozen=True, slots=True)
class Started:
    """vLLM's engine as it was started.

    Args:
        engine: An `LLMEngine`, in this process.
        adapters: The `LoRARequest` of each adapter, by its name for rows.
        thread: The one thread that started it, and takes its steps: the current GPU and the threads of products on a
            CPU belong to a thread.
    """

    engine: Any
    adapters: Mapping[str, Any]
    thread: Executor


class VllmModel:
    """A model that vLLM runs.

    Several threads may use it at once: whoever waits for a row has the next step taken for all.

    Args:
        started: The engine.
        tokenizer: The model's; vLLM has none.
        info: What the model is.
    """

    def __init__(self, started: Started, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._requests = _Requests(started, info)

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._requests.closed

    def feed(self) -> "VllmFeed":
        """Return a feed of its own for one caller; all of them share vLLM's passes."""
        return VllmFeed(self._requests, self.info, self.tokenizer)

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row; each comes out as soon as it has ended."""
        yield from self._run(rows)

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats."""
        yield from self._run(rows)

    def _run(self, rows: Sequence[_Row]) -> Iterator[tuple[int, Any]]:
        feed = self.feed()
        try:
            for index, row in enumerate(rows):
                feed.add(index, row)
            while len(feed):
                for ended in feed.step():
                    self._requests.check_open()
                    yield ended
        finally:
            feed.clear()

    def close(self) -> None:
        """Free the memory of weights and cache. Iterators that are still open raise at their next step."""
        self._requests.close()
        gc.collect()


class VllmFeed:
    """Rows of one caller on their way through vLLM: `alpaca_core.model.Feed`."""

    def __init__(self, requests: "_Requests", info: ModelInfo, tokenizer: Tokenizer) -> None:
        self._requests = requests
        self._info = info
        self._tokenizer = tokenizer
        self._rows: dict[int, _Running] = {}  # those that are running
        self._ended: list[tuple[int, Outcome]] = []

    def add(self, key: int, row: GenerateRow | ScoreRow) -> None:
        """Take a row of any kind. One that is refused comes out as a `RowError` at the next step.

        Raises:
            InvalidRequest: If a row of this key has not come out yet.
        """
        if key in self._rows or any(key == ended for ended, _ in self._ended):
            raise InvalidRequest(f"a feed's keys are of one row each, but {key} has not come out yet. Use another.")
        try:
            task = task_of(row, self._info, self._tokenizer)
        except RowRejected as rejection:
            self._ended.append((key, RowError.of(rejection)))
            return
        if not (asks := task.begin()):  # a trie without nodes
            self._ended.append((key, []))
            return
        found = self._info.adapter(row.adapter)

        def end(outcome: Outcome) -> None:
            self._ended.append((key, outcome))  # first, so that `__len__` never misses the row in between
            del self._rows[key]

        self._rows[key] = running = _Running(task, found.name if found else None, end)
        self._requests.submit(running, asks)

    def drop(self, key: int) -> None:
        """Forget a row: its result never comes out."""
        with self._requests.lock:
            running = self._rows.pop(key, None)
            if running is not None:
                self._requests.cancel([running])
            self._ended = [(ended, outcome) for ended, outcome in self._ended if ended != key]

    def clear(self) -> None:
        """Forget all rows."""
        with self._requests.lock:
            self._requests.cancel(list(self._rows.values()))
            self._rows.clear()
            self._ended.clear()

    def step(self) -> list[tuple[int, Outcome]]:
        """Take one step of the engine, unless rows have ended already; return those that have.

        Raises:
            InvalidRequest: If the model is closed.
        """
        self._requests.step(lambda: bool(self._rows) and not self._ended)
        with self._requests.lock:
            ended, self._ended = self._ended, []
        return ended

    def __len__(self) -> int:
        """Count the rows that have not come out."""
        return len(self._rows) + len(self._ended)


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """A row's task, the adapter it names, and where its outcome goes."""

    task: Task
    adapter: str | None
    end: Callable[[Outcome], None]


class _Requests:
    """vLLM's engine, and whose each of its requests is.

    vLLM's sampler gives wrong numbers to a request for the log-probabilities of all tokens if another one in its pass
    names a few (0.32: `Sampler.forward` drops the former's). So requests of these two kinds take turns.
    """

    def __init__(self, started: Started, info: ModelInfo) -> None:
        self.lock = Lock()
        self._engine: Any = started.engine
        self._adapters = started.adapters
        self._thread = started.thread
        _LIVE.append(self._engine)
        self._info = info
        self._waiting: deque[tuple[_Running, Ask]] = deque()
        self._inside: dict[str, tuple[_Running, Ask]] = {}

    def submit(self, running: _Running, asks: Sequence[Ask]) -> None:
        """Put a row's requests in line."""
        with self.lock:
            self._waiting.extend((running, ask) for ask in asks)

    def cancel(self, gone: Sequence[_Running]) -> None:
        """Take all requests of some rows back, with the lock held."""
        rows = set(gone)
        if not rows:
            return
        self._waiting = deque(each for each in self._waiting if each[0] not in rows)
        names = [name for name, (running, _) in self._inside.items() if running in rows]
        for name in names:
            del self._inside[name]
        if names and self._engine is not None:
            self._engine.abort_request(names)

    def step(self, wanted: Callable[[], bool]) -> None:
        """Take one step of vLLM, unless it is not wanted any more once earlier ones are over; hand out what has ended.

        The step is finished even where the caller is interrupted, so that no other caller's row gets lost.
        """
        if wanted():
            self.check_open()
            self._thread.submit(self._advance, wanted).result()

    def _advance(self, wanted: Callable[[], bool]) -> None:
        with self.lock:
            if wanted():
                self.check_open()
                self._step()

    def _step(self) -> None:
        self._admit()
        outputs = self._engine.step()
        count_pass()
        for output in outputs:
            if not output.finished or output.request_id not in self._inside:
                continue
            running, ask = self._inside.pop(output.request_id)
            outcome, more = running.task.take(ask, output.outputs[0])
            self._waiting.extend((running, each) for each in more)
            if outcome is not None:
                self.cancel([running])
                running.end(outcome)

    @property
    def closed(self) -> bool:
        """Whether the engine has been let go."""
        return self._engine is None

    def check_open(self) -> None:
        """Refuse to go on with a model that is closed.

        Raises:
            InvalidRequest: If it is.
        """
        if self.closed:
            raise InvalidRequest(f"{self._info.name!r} is closed. Load it again.")

    def close(self) -> None:
        """Let go of the engine."""
        with self.lock:
            engine, self._engine = self._engine, None
            self._waiting.clear()
            self._inside.clear()
        if engine is not None:
            self._thread.submit(_stop, engine).result()
            self._thread.shutdown()

    def _admit(self) -> None:
        """Give vLLM what waits, in order, as far as its passes can hold it together."""
        kinds = {ask.reads for _, ask in self._inside.values()} - {"own"}
        kept: deque[tuple[_Running, Ask]] = deque()
        refused: dict[_Running, ValueError] = {}
        waiting, self._waiting = self._waiting, deque()
        for running, ask in waiting:
            if running in refused:
                continue
            if ask.reads == "own" or (not kept and kinds <= {ask.reads}):
                kinds |= {ask.reads} - {"own"}
                try:
                    self._send(running, ask)
                except ValueError as error:
                    refused[running] = error
            else:
                kept.append((running, ask))
        self._waiting = kept
        for running, reason in refused.items():
            self._refuse(running, reason)

    def _send(self, running: _Running, ask: Ask) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        settings = SamplingParams(**ask.settings, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        adapter = self._adapters[running.adapter] if running.adapter is not None else None
        name = str(next(_NUMBERS))
        self._engine.add_request(name, tokens_input(list(ask.prompt)), settings, lora_request=adapter)
        self._inside[name] = running, ask

    def _refuse(self, running: _Running, reason: ValueError) -> None:
        """End a row that vLLM does not take."""
        self.cancel([running])
        running.end(
            RowError(code="not_supported", message=f'vLLM refuses this row ({reason}). Use engine="auto" for it.')
        )


def _stop(engine: Any) -> None:
    """Stop an engine; vLLM's own way would also end what all engines of the process share."""
    _LIVE[:] = [each for each in _LIVE if each is not engine]
    if not _LIVE:
        engine.engine_core.shutdown()
        return
    core = engine.engine_core.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
