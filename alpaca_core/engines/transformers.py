"""`LanguageModel` on transformers, the default: LLaMA-like decoders of its library, PEFT adapters beside them."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from alpaca_core.engines.batching import Job, batches, shorten
from alpaca_core.engines.decoding import Decoding, Reply
from alpaca_core.engines.engine import Engine
from alpaca_core.engines.heads import split
from alpaca_core.engines.lora import CausalLM, bare
from alpaca_core.engines.recovering import persevere, ran_out, too_large
from alpaca_core.engines.scoring import score
from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow
from alpaca_core.tokenizer import Tokenizer

_Row = TypeVar("_Row", GenerateRow, ScoreRow)
_Outcome = TypeVar("_Outcome")


class TransformersModel(Engine):
    """A loaded network that generates and scores.

    Several threads may use it at once: choosing an adapter, which PEFT does for the whole network, and the
    forward pass that relies on it are one step under a lock. No lock is held while a result is out.

    Args:
        network: A causal LM that attends to all it has seen, through a key-value cache; or the `PeftModel` around
            it with the adapters that `info` names, in their order.
        tokenizer: The model's.
        info: What the model is.
        batch_size: Sequences computed together at most; a row with beams counts as many. Where memory runs out,
            a batch is run in halves, and a row that fails alone gets an error.
        memory_share: Kept by the loader and by torch; the sizes of batches do not follow from it.
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
        self._network: Any = network.eval()
        plain: Any = bare(network)
        parts: tuple[Any, Any] = split(plain)
        self._body, self._head = parts
        self._active: str | None = ""  # no adapter has this name

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row; each comes out as soon as it has ended."""
        with closing(self.stepwise(rows)) as steps:
            yield from (found for found in steps if found is not None)

    def stepwise(self, rows: Sequence[GenerateRow]) -> Generator[tuple[int, Completion | RowError] | None]:
        """Generate as `generate` does, and give None after each token of a batch, so that others may have a turn."""

        def job(index: int, row: GenerateRow) -> Job:
            self._check(row)
            new_tokens = row.sampling.max_new_tokens
            return Job(index, self._adapter(row), len(row.prompt_ids), row.sampling.num_beams, new_tokens)

        jobs: list[Job] = []
        yield from _refused(rows, job, jobs)

        def decode(batch: list[int]) -> Iterator[tuple[int, Reply | RowRejected] | None]:
            members = [rows[index] for index in batch]
            decoding = Decoding(self._chosen(members[0]), members, self.info.eos_ids, self._device)
            while decoding.live:
                yield from ((batch[place], outcome) for place, outcome in decoding.step())
                yield None

        for found in self._in_halves(jobs, decode):
            yield None if found is None else (found[0], self._completion(rows[found[0]], found[1]))

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats."""

        def job(index: int, row: ScoreRow) -> Job:
            trie = row.continuations
            self._check(row)
            two_passes = any(parent >= 0 for parent in trie.parents)
            group = self._adapter(row), two_passes
            return Job(index, group, len(row.prompt_ids), new_tokens=trie.deepest)

        jobs: list[Job] = []
        yield from _refused(rows, job, jobs)

        def read(batch: list[int]) -> Iterator[tuple[int, list[float] | RowRejected] | None]:
            members = [rows[index] for index in batch]
            yield from zip(batch, score(self._chosen(members[0]), members, self._device), strict=True)

        for index, outcome in filter(None, self._in_halves(jobs, read)):
            yield index, RowError.of(outcome) if isinstance(outcome, RowRejected) else outcome

    def _in_halves(
        self, jobs: Sequence[Job], run: Callable[[list[int]], Iterator[tuple[int, _Outcome] | None]]
    ) -> Iterator[tuple[int, _Outcome | RowRejected] | None]:
        """Run batch after batch; one that runs out of memory again in two halves, without the rows that came out."""
        sizes = {job.index: job.length + job.new_tokens for job in jobs}
        waiting = deque(batches(jobs, self._batch_size))
        while waiting:
            batch = waiting.popleft()
            left = set(batch)
            try:
                for found in run(batch):
                    if found is not None:
                        left.remove(found[0])
                    yield found
                continue
            except Exception as error:
                if not ran_out(error):
                    raise
            if len(batch) == 1:
                yield batch[0], too_large(sizes[batch[0]], self._device)
                continue
            again = [index for index in batch if index in left]
            half = -(-len(again) // 2)
            waiting.extendleft(part for part in (again[half:], again[:half]) if part)

    def close(self) -> None:
        """Free the memory of the weights. Iterators that are still open raise at their next step."""
        with self._lock:
            self._network = self._body = self._head = None
        self._give_back()

    def _chosen(self, row: GenerateRow | ScoreRow) -> "_Chosen":
        return _Chosen(self, self._adapter(row))

    def _states(self, adapter: str | None, ids: Tensor, positions: Tensor, seen: Tensor, cache: Cache | None) -> Tensor:
        if seen.dim() == 4:
            # Eager attention adds the mask, so it cannot be of bools; infinity would make NaN of empty rows.
            seen = torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, torch.finfo(self._dtype).min)
        with self._lock:
            self._choose(adapter)
            output = self._body(
                input_ids=ids,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _logits(self, adapter: str | None, states: Tensor) -> Tensor:
        with self._lock:
            self._choose(adapter)
            output = self._head(inputs_embeds=states, use_cache=False)
        return output.logits.to(self._device, torch.float32)  # type: ignore[no-any-return]

    def _choose(self, adapter: str | None) -> None:
        """Make the network use this adapter; a walk over all its modules, so only where it changes."""
        if self._network is None:
            raise InvalidRequest(f"{self.info.name!r} is closed. Load it again.")
        if not self._adapted or adapter == self._active:
            return
        if adapter is None:
            self._network.base_model.disable_adapter_layers()
        else:
            self._network.base_model.enable_adapter_layers()
            self._network.set_adapter(adapter, inference_mode=True)
        self._active = adapter


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The network with one of its adapters; a pass that runs out of memory is run again, a few times."""

    model: TransformersModel
    adapter: str | None

    def states(self, ids: Tensor, positions: Tensor, seen: Tensor, cache: Cache | None) -> Tensor:
        held = 0 if cache is None else cache.get_seq_length()

        def run() -> Tensor:
            if cache is not None:
                shorten(cache, held)  # a pass that failed has left something in the first layers
            return self.model._states(self.adapter, ids, positions, seen, cache)

        return persevere(run, self.model._device)

    def logits(self, states: Tensor) -> Tensor:
        return persevere(partial(self.model._logits, self.adapter, states), self.model._device)


def _refused(rows: Sequence[_Row], job: Callable[[int, _Row], Job], jobs: list[Job]) -> Iterator[tuple[int, RowError]]:
    """Put the jobs of good rows into `jobs`, and give out the errors of the others."""
    for index, row in enumerate(rows):
        try:
            jobs.append(job(index, row))
        except RowRejected as rejection:
            yield index, RowError.of(rejection)
