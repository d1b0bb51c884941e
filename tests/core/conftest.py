"""Tokenizers of several families, LLaMA's own among them."""

import json

import pytest

from alpaca_core import ModelSpec, load_model
from alpaca_core.model import LanguageModel
from alpaca_core.tokenizer import Tokenizer
from tests.core.vocabularies import FAMILIES, llama_model_proto
from tests.data import needed


@pytest.fixture(scope="session")
def embedded() -> LanguageModel:
    """The embedded model, loaded once."""
    with load_model(ModelSpec()) as model:
        yield model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """LLaMA's own tokenizer, rebuilt from its vocabulary and converted as a checkpoint's would be."""
    vocabulary = needed("llama_vocab.json")
    from alpaca_core.engines.conversion import convert_tokenizer

    source, converted = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("converted")
    pieces = json.loads(vocabulary.read_text(encoding="utf-8"))
    (source / "tokenizer.model").write_bytes(llama_model_proto(pieces))
    (source / "config.json").write_text('{"model_type": "llama"}')
    convert_tokenizer(source, converted)
    return Tokenizer.from_file(converted / "tokenizer.json", eos_ids=(2,))


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Tokenizer:
    """A small tokenizer of each family, trained on a few sentences."""
    return FAMILIES[request.param]()
