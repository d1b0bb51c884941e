"""`LanguageModel` on our own forward pass: a row's result is the same in any company, bit for bit."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from alpaca_core.engines.engine import Engine
from alpaca_core.engines.feeding import NativeFeed
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.lora import CausalLM
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.reading import Reader
from alpaca_core.engines.recovering import Recovery, Worker, ran_out
from alpaca_core.engines.running import Runner
from alpaca_core.engines.searching import Searcher
from alpaca_core.engines.shapes import Shape
from alpaca_core.engines.working import Request
from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.identity import shaped
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow
from alpaca_core.tokenizer import Tokenizer

_GPU_TOKENS = 4096
"""Tokens of a pass over prompts on a GPU, where more are no faster."""
_GPU_GRAIN = 256
"""Passes are filled up to a multiple of this: on an H100, cuBLAS sums in the same order for all of them."""
_CPU_TOKENS = 1024
_log = logging.getLogger(__name__)


class NativeModel(Engine):
    """A loaded network of LLaMA's family, run by `Llama`.

    Callers in several threads share passes: whoever waits for a row takes the next steps for all, in turn one of
    the rows without beams, one of those with beams, and one of judged rows. Where memory runs out the shape of
    passes may become a smaller one, and `info` another: `recovering.py`.

    Args:
        network: One that `llama.runs` accepts. It is not kept, so that its weights are in memory once.
        tokenizer: The model's.
        info: What the model is.
        batch_size: Rows that a decode step computes.
        memory_share: Of the device's memory, what weights, cache and passes may take together.
    """

    def __init__(
        self,
        network: CausalLM,
        tokenizer: Tokenizer,
        info: ModelInfo,
        batch_size: int = 32,
        memory_share: float = 0.9,
    ) -> None:
        super().__init__(network, tokenizer, info, batch_size)
        with torch.no_grad(), self._at_device():
            self._llama: Llama | None = Llama(network)
            self._memory = Memory(self._llama, memory_share)
            shape, self._steady = tried(self._llama, first_shape(self._device, batch_size))
            self._runner = Runner(self._llama, self._memory, shape, info.eos_ids)
            self._searcher = Searcher(self._llama, self._memory, shape, info.eos_ids)
            self._reader = Reader(self._llama, self._memory, shape)
        self._loaded = info
        self._dropped: deque[Request] = deque()  # requests that nobody waits for any more
        self._recovery = Recovery(shape, self._changed)
        self._tell(shape)
        self._numbers = {name: number for number, name in enumerate(self._peft_names)}

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row; each comes out as soon as it has ended."""
        plain: list[tuple[int, GenerateRow, int]] = []
        beams: list[tuple[int, GenerateRow, int]] = []
        for index, row in enumerate(rows):
            try:
                (beams if row.sampling.num_beams > 1 else plain).append((index, row, self._number(row)))
            except RowRejected as rejection:
                yield index, RowError.of(rejection)
        request = Request(len(plain) + len(beams))
        with self._lock:
            self._open()
            self._runner.submit(request, plain)
            self._searcher.submit(request, beams)
        for index, outcome in self._driven(request):
            yield index, self._completion(rows[index], outcome)

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats."""
        ready: list[tuple[int, ScoreRow, int]] = []
        for index, row in enumerate(rows):
            try:
                ready.append((index, row, self._number(row)))
            except RowRejected as rejection:
                yield index, RowError.of(rejection)
        request = Request(len(ready))
        with self._lock:
            self._open()
            self._reader.submit([(request, *each) for each in ready])
        for index, outcome in self._driven(request):
            yield index, RowError.of(outcome) if isinstance(outcome, RowRejected) else outcome

    def feed(self) -> NativeFeed:
        """Open the engine step by step; one thread uses it, and nobody calls the other methods meanwhile."""
        self._open()
        return NativeFeed(self._runner, self._searcher, self._reader, self._advance, self._number, self._completion)

    def _driven(self, request: Request) -> Iterator[tuple[int, Any]]:
        """Let all workers take steps in turn, until the rows of a request have come back."""
        try:
            while request.left or request.ended:
                for worker in self._workers:
                    with self._lock:
                        self._open()
                        if not request.ended:
                            self._advance(worker)
                    self._drop()
                    yield from request.take()
        finally:
            self._dropped.append(request)
            self._drop()

    def _drop(self) -> None:
        """Take the rows of requests that nobody waits for out, unless the lock is held: then its holder does so after.

        It may be this thread that holds it: where garbage is collected in mid-step, and a generator with it.
        """
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    request = self._dropped.popleft()
                    for worker in self._workers:
                        worker.cancel(request)
            finally:
                self._lock.release()

    @property
    def _workers(self) -> tuple[Runner | Searcher | Reader, ...]:
        return () if self._llama is None else (self._runner, self._searcher, self._reader)

    def _advance(self, worker: Worker) -> None:
        with self._at_device():
            self._recovery.advance(worker)

    def close(self) -> None:
        """Free the memory of weights and cache. Iterators that are still open raise at their next step."""
        with self._lock:
            if self._llama is not None:
                for worker in self._workers:
                    worker.close()
                self._llama = None
                self._memory.close()
                del self._memory, self._runner, self._searcher, self._reader
        self._give_back()

    def _changed(self, shape: Shape) -> None:
        """Drop what passes of another shape have left, since bits depend on it."""
        self._memory.forget()
        self._tell(shape)

    def _tell(self, shape: Shape) -> None:
        told = self._loaded.model_copy(update={"engine": "native", "rows_independent": self._steady})
        self.info = shaped(told, self._loaded.digest, shape.name)

    def _open(self) -> None:
        if self._llama is None:
            raise InvalidRequest(f"{self.info.name!r} is closed. Load it again.")

    def _number(self, row: GenerateRow | ScoreRow) -> int:
        """Check a row, and return the number of its adapter; -1 is the bare base."""
        self._check(row)
        return -1 if row.adapter is None else self._numbers.get(row.adapter, -1)


def first_shape(device: torch.device, batch_size: int) -> Shape:
    """Choose the sizes of passes: on a GPU a function of the batch size, since bits depend on them."""
    if device.type == "cuda":
        tokens = min(_GPU_TOKENS, max(64, 64 * batch_size))
        return Shape(batch_size, tokens, fixed=True, grain=tokens)
    return Shape(batch_size, _CPU_TOKENS, fixed=False)


def tried(llama: Llama, shape: Shape) -> tuple[Shape, bool]:
    """Try what a shape takes for granted: that a row's bits do not depend on the number of rows beside it.

    Returns:
        The shape, on a GPU with passes of any multiple of 256 tokens where these give the same bits as full ones, if
        need be without large products of our own, on a CPU with decode steps of any number of rows if so; and whether
        a row's bits are the same in any company.
    """
    if not shape.fixed:
        counts = [shape.grain * each for each in (1, 2, 3, 4, 8, 16)]
        steady = all(llama.steady(counts, shape.tokens, steps=steps) for steps in {False, llama.narrow})
        single = steady and llama.narrow and llama.steady([*range(1, 16), 17, 31], 32, steps=True)
        return replace(shape, steps=1) if single else shape, steady
    for large in (True, False):
        if not large:
            llama.leave_large()
        try:
            if llama.steady(range(_GPU_GRAIN, shape.tokens, _GPU_GRAIN), shape.tokens):
                return replace(shape, grain=min(_GPU_GRAIN, shape.tokens)), True
        except Exception as error:
            if ran_out(error):  # passes of this size will, too, and take a smaller shape
                break
            if not large:
                raise
            _log.warning("Large products are left to cuBLAS, which is slower: Triton failed with %r", error)
    return shape, True
