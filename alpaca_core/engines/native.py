"""`LanguageModel` on our own forward pass: on a GPU a row's result is the same in any company, bit for bit."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.reading import Reader
from alpaca_core.engines.running import Request, Runner, outcomes
from alpaca_core.engines.searching import Searcher
from alpaca_core.engines.shapes import Shape
from alpaca_core.engines.transformers import TransformersModel
from alpaca_core.errors import InvalidRequest, NotEnoughMemory, RowRejected
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow
from alpaca_core.spec import digest_of
from alpaca_core.tokenizer import Tokenizer

_GPU_TOKENS = 4096
"""Tokens of a pass over prompts on a GPU, where more are no faster."""
_CPU_TOKENS = 1024
_ATTEMPTS = 8

_Found = TypeVar("_Found")


class NativeModel(TransformersModel):
    """A loaded network of LLaMA's family, run by `Llama`.

    Callers in several threads share passes: whoever waits for a row takes the next step for all, in turn one of
    the rows without beams and one of those with beams.

    Args:
        network: One that `llama.runs` accepts.
        tokenizer: The model's.
        info: What the model is.
        batch_size: Rows that a decode step computes.
    """

    def __init__(
        self, network: PreTrainedModel | PeftModel, tokenizer: Tokenizer, info: ModelInfo, batch_size: int = 32
    ) -> None:
        super().__init__(network, tokenizer, info, batch_size)
        fixed = self._device.type == "cuda"
        tokens = min(_GPU_TOKENS, max(64, 64 * batch_size)) if fixed else _CPU_TOKENS
        shape = Shape(batch_size, tokens, fixed)
        with torch.no_grad():
            self._llama: Llama | None = Llama(network)
            told: dict[str, object] = {"engine": "native", "rows_independent": fixed or self._llama.steady()}
            self._memory = Memory(self._llama)
            self._runner = Runner(self._llama, self._memory, shape, info.eos_ids)
            self._searcher = Searcher(self._llama, self._memory, shape, info.eos_ids)
        if fixed:
            sizes = f"{shape.slots}x{shape.tokens}"
            told |= {"shape": sizes, "digest": digest_of([info.digest, sizes])}
        self.info = info.model_copy(update=told)
        self._shape = shape
        self._failures = Counter[str]()  # one after the other, of each kind of step
        self._numbers = {name: number for number, name in enumerate(self._peft_names.values())}

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row; each comes out as soon as it has ended."""
        plain: list[tuple[int, GenerateRow, int]] = []
        beams: list[tuple[int, GenerateRow, int]] = []
        for index, row in enumerate(rows):
            try:
                self._check(row, row.sampling.max_new_tokens, "max_new_tokens")
                (beams if row.sampling.num_beams > 1 else plain).append((index, row, self._number(row)))
            except RowRejected as rejection:
                yield index, RowError.of(rejection)
        request = Request(len(plain) + len(beams))
        with self._lock:
            self._open()
            runner, searcher = self._runner, self._searcher
            runner.submit(request, plain)
            searcher.submit(request, beams)
        try:
            while request.left or request.ended:
                for worker in (runner, searcher):
                    with self._lock:
                        self._open()
                        if not request.ended:
                            self._attempt(worker.advance)
                    for index, outcome in outcomes(request):
                        yield index, self._completion(rows[index], outcome)
        finally:
            with self._lock:
                runner.cancel(request)
                searcher.cancel(request)

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats."""
        ready = []
        for index, row in enumerate(rows):
            trie = row.continuations
            try:
                self._check(row, max(trie.depths(), default=0), "the longest continuation", trie.tokens)
                ready.append((index, row, self._number(row)))
            except RowRejected as rejection:
                yield index, RowError.of(rejection)
        self._open()
        assert self._llama is not None
        reader = Reader(self._llama, self._memory, self._shape, ready)
        try:
            while not reader.done:
                with self._lock:
                    self._open()
                    ended = self._attempt(reader.advance)
                for index, outcome in ended or ():
                    yield index, RowError.of(outcome) if isinstance(outcome, RowRejected) else outcome
        finally:
            with self._lock:
                reader.release()

    def close(self) -> None:
        """Free the memory of weights and cache. Iterators that are still open raise at their next step."""
        with self._lock:
            if self._llama is not None:
                self._llama = None
                self._memory.close()
                self._runner.close()
                self._searcher.close()
                del self._memory, self._runner, self._searcher
        super().close()

    def _attempt(self, advance: Callable[[], _Found]) -> _Found | None:
        """Take a step; where memory is short give back what is spare, and let the caller try again.

        Raises:
            NotEnoughMemory: After several attempts one after the other.
        """
        try:
            found = advance()
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._failures[advance.__qualname__] += 1
            if self._failures[advance.__qualname__] > _ATTEMPTS:
                raise NotEnoughMemory(
                    f"{self.info.device} has no memory for a step of {self._shape.slots} rows and passes of "
                    f"{self._shape.tokens:,} tokens. Lower batch_size, or load the model in fewer bits."
                ) from error
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        del self._failures[advance.__qualname__]
        return found

    def _open(self) -> None:
        if self._llama is None:
            raise InvalidRequest(f"{self.info.name!r} is closed. Load it again.")

    def _number(self, row: GenerateRow | ScoreRow) -> int:
        """Number of the row's adapter; -1 is the bare base."""
        name = self._adapter(row)
        return -1 if name is None else self._numbers[name]
