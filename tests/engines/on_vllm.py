"""Networks of the tests, run by vLLM: saved as a checkpoint, and started; engines are kept for the next test."""

import copy
import hashlib
from typing import Any

import pytest
from peft import PeftModel

from alpaca_core.model import ModelInfo
from alpaca_core.tokenizer import Tokenizer

_KEPT = 6
"""Engines that are alive at once."""


class Served:
    """Makes `VllmModel` of a network in memory.

    Args:
        folders: Where checkpoints are written.
    """

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._engines: dict[str, tuple[Any, list[Any]]] = {}

    def __call__(self, network: Any, tokenizer: Tokenizer, info: ModelInfo, batch_size: int = 8) -> Any:
        """Run a network; rows of all batch sizes run on the same engine."""
        from alpaca_core.engines.vllm_model import VllmModel

        adapted = isinstance(network, PeftModel)
        if info.adapters and not adapted:
            pytest.skip("vLLM merges no adapter")
        if getattr(network.config, "quantization_config", None) or hasattr(network, "_hf_hook"):
            pytest.skip("vLLM loads plain weights itself")
        key = _digest(network)
        if key in self._engines and any(model.closed for model in self._engines[key][1]):
            del self._engines[key]
        if key not in self._engines:
            while len(self._engines) >= _KEPT:
                self._end(next(iter(self._engines)))
            self._engines[key] = self._start(network, info, adapted), []
        started, models = self._engines[key]
        models.append(VllmModel(started, tokenizer, info.model_copy(update={"engine": "vllm"})))
        return models[-1]

    def close(self) -> None:
        """End all engines."""
        for key in list(self._engines):
            self._end(key)

    def _start(self, network: Any, info: ModelInfo, adapted: bool) -> Any:
        from alpaca_core.engines.vllm import start

        folder = self._folders.mktemp("served")
        plain = copy.deepcopy(network).unload() if adapted else network
        plain.save_pretrained(folder)
        adapters = {}
        if adapted:
            network.save_pretrained(folder / "adapters")
            for adapter in info.adapters:
                own = folder / "adapters" / adapter.name
                adapters[adapter.name] = own if own.exists() else folder / "adapters"
        return start(
            folder,
            adapters,
            rank=4,
            dtype="float32",
            max_model_len=info.context_length,
            max_num_seqs=64,
            kv_cache_memory_bytes=2**26,
        )

    def _end(self, key: str) -> None:
        _, models = self._engines.pop(key)
        models[-1].close()


def _digest(network: Any) -> str:
    """Of a network's weights and configuration."""
    digest = hashlib.sha256(network.config.to_json_string().encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
