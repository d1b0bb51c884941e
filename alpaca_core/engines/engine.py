"""What the engines on torch have in common: the names of adapters, and the device."""

import gc
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch

from alpaca_core.engines.checking import check_row, completion
from alpaca_core.engines.decoding import Reply
from alpaca_core.engines.lora import CausalLM, names_of
from alpaca_core.errors import RowRejected
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow
from alpaca_core.tokenizer import Tokenizer


class Engine:
    """Of a `LanguageModel`, all but its two primitives. It holds no weights.

    Args:
        network: A causal LM, or the `PeftModel` around it with the adapters that `info` names, in their order.
        tokenizer: The model's.
        info: What the model is.
        batch_size: Sequences computed together.
    """

    def __init__(self, network: CausalLM, tokenizer: Tokenizer, info: ModelInfo, batch_size: int) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        names = names_of(network)
        self._adapted = bool(names)
        self._peft_names = dict(zip((adapter.name for adapter in info.adapters), names, strict=False))
        self._lock = Lock()
        embedding: Any = network.get_input_embeddings()
        # accelerate leaves offloaded weights on "meta", and its hook knows where they are computed
        hook = getattr(embedding, "_hf_hook", None)
        self._device = torch.device(getattr(hook, "execution_device", None) or embedding.weight.device)
        self._dtype: torch.dtype = embedding.weight.dtype

    def _check(self, row: GenerateRow | ScoreRow) -> None:
        """Refuse a row that the network would fail on, or answer wrongly."""
        check_row(row, self.info, merged=not self._adapted)

    def _adapter(self, row: GenerateRow | ScoreRow) -> str | None:
        """The PEFT name of what the row asks for; None is the bare base."""
        found = self.info.adapter(row.adapter)
        return self._peft_names.get(found.name) if found else None

    def _completion(self, row: GenerateRow, outcome: Reply | RowRejected) -> Completion | RowError:
        if isinstance(outcome, RowRejected):
            return RowError.of(outcome)
        return completion(row, outcome.token_ids, outcome.stopped, self.tokenizer, outcome.shape)

    def _at_device(self) -> AbstractContextManager[object]:
        """Make the model's GPU the one that streams, events and kernels are of."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _give_back(self) -> None:
        """Give memory back that nobody holds."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
