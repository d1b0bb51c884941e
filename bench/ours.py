"""What the measurements need of this project: a network loaded once, models on it, and their two primitives."""

import json
import tempfile
from pathlib import Path
from typing import Any

from seven_billion import make_adapter
from timing import settle
from words import Words

from alpaca_core import ModelSpec, Sampling
from alpaca_core.engines.llama import runs
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.transformers import TransformersModel
from alpaca_core.engines.weights import find, load_weights
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie


class Loaded:
    """A network, and models of any batch size on it; the end of text is switched off.

    Args:
        spec: What is loaded.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._weights = load_weights(spec)
        self.info = self._weights.info.model_copy(update={"eos_ids": ()})
        self.network: Any = self._weights.network
        self.tokenizer = self._weights.tokenizer
        self.words = Words(self.tokenizer, self.info.vocab_size)
        self._model: Any = None

    @property
    def config(self) -> Any:
        """The network's shape."""
        return self.network.config

    @staticmethod
    def words_of(spec: ModelSpec) -> Words:
        """Return the words of a spec's model without loading its weights."""
        base = find(spec)[0]
        return Words(base.open_tokenizer(), json.loads((base.folder / "config.json").read_text())["vocab_size"])

    def model(self, rows: int) -> Any:
        """Return a model that runs so many rows at once; the one before it is closed."""
        if self._model is not None and self._model._batch_size == rows:
            return self._model
        self.close()
        engine = NativeModel if runs(self.network) else TransformersModel
        self._model = engine(self.network, self.tokenizer, self.info, rows)
        return self._model

    def close(self) -> None:
        """Give back the memory of the model; the network's stays."""
        if self._model is not None:
            self._model.close()
        self._model = None
        settle()

    def generate(self, rows: int, prompt: int, tokens: int, **settings: Any) -> int:
        """Generate after new prompts, greedily or as `Sampling` is told, and count tokens."""
        sampling = Sampling(max_new_tokens=tokens, **settings)
        asked = [GenerateRow(each, sampling) for each in self.words.draw(rows, prompt)]
        done = 0
        for _, row in self._model.generate(asked):
            assert not isinstance(row, RowError), row
            done += row.completion_tokens
        return done

    def judge(self, items: int, prompt: int, shared: int, trie: Trie | None = None) -> int:
        """Judge new prompts between two labels of a token, or those of a trie."""
        trie = trie or Trie.of([[5], [9]])[0]
        for _, row in self._model.loglikelihood(
            [ScoreRow(each, trie) for each in self.words.draw(items, prompt, shared)]
        ):
            assert not isinstance(row, RowError), row
        return items


def folder_of(spec: ModelSpec) -> Path:
    """Return the folder that a spec's base model is read from."""
    return Path(find(spec)[0].folder)


def adapter_for(spec: ModelSpec, folder: Path | None) -> str:
    """Return the folder of a random LoRA for a spec's base, made in `folder` or in one that the run leaves behind."""
    place = folder or Path(tempfile.mkdtemp(prefix="alpaca-bench-"))
    return str(make_adapter(place, folder_of(spec)))
