"""Tiny random models: two LLaMA layers with grouped queries, in float32 on the CPU.

Where vLLM is installed, the contract tests are run on it alone: `make test-vllm`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import tokenizers
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_core.engines.llama import runs
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.transformers import TransformersModel
from alpaca_core.model import AdapterInfo, ModelInfo
from alpaca_core.tokenizer import Tokenizer
from tests.engines.on_vllm import Served

ON_VLLM = find_spec("vllm") is not None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and wait for it long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token a byte, and two control tokens behind them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={piece: place for place, piece in enumerate(alphabet)}, merges=[])
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(built.to_str(), eos_ids=(257,))


@pytest.fixture(scope="session")
def make_network() -> Callable[..., LlamaForCausalLM]:
    """Make a random network; the same arguments give the same weights.

    A large `spread` of the head makes distributions sharp, a small one makes them flat.
    """

    def make(vocab: int = 258, seed: int = 0, spread: float = 6.0, **changes: Any) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": vocab,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32 if ON_VLLM or torch.cuda.is_available() else None,  # of vLLM on a CPU; Triton takes 16
                "max_position_embeddings": 256,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": None,
                **changes,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network: LlamaForCausalLM = LlamaForCausalLM(config).eval()
            with torch.no_grad():
                for name, weight in network.named_parameters():
                    if "norm" not in name:
                        weight.normal_(0.0, 0.3)
                network.get_output_embeddings().weight.mul_(spread * 0.3)
        return network

    return make


@pytest.fixture(scope="session")
def add_adapters() -> Callable[..., Any]:
    """Put random LoRA adapters beside a network, with weights that depend on their name."""

    def add(network: Any, names: Sequence[str] = ("default",), dropout: float = 0.5) -> Any:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=dropout)
        adapted: Any = get_peft_model(network, config, adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, config)
        with torch.random.fork_rng(), torch.no_grad():
            for name in names:
                torch.manual_seed(sum(map(ord, name)))
                for path, weight in adapted.named_parameters():
                    if f".{name}." in path:
                        weight.normal_(0.0, 0.4)
        return adapted

    return add


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Networks that vLLM runs, closed in the end."""
    networks = Served(tmp_path_factory)
    yield networks
    networks.close()


@pytest.fixture(scope="session", params=["vllm"] if ON_VLLM else ["native", "transformers"])
def make_model(request: pytest.FixtureRequest, tokenizer: Tokenizer, served: Served) -> Callable[..., Any]:
    """Wrap a network as a `LanguageModel`, on each engine; on the second alone where the first does not run it."""
    if request.param == "vllm":
        return partial(wrapped, served, tokenizer)

    def make(network: Any, *args: Any, **settings: Any) -> TransformersModel:
        engine = NativeModel if request.param == "native" and runs(network) else TransformersModel
        return wrapped(engine, tokenizer, network, *args, **settings)

    return make


@pytest.fixture
def make_native(make_network: Callable[..., Any], make_model: Callable[..., Any]) -> Callable[..., NativeModel]:
    """Wrap a network, a tiny one of 1,024 tokens unless said, for tests of our own engine alone."""

    def make(batch_size: int = 8, adapters: tuple[str, ...] = (), network: Any = None, **changes: Any) -> NativeModel:
        network = network or make_network(max_position_embeddings=1024, **changes)
        if not isinstance(model := make_model(network, adapters, batch_size=batch_size), NativeModel):
            pytest.skip("for the engine of our own")
        return model

    return make


@pytest.fixture(scope="session")
def make_transformers(tokenizer: Tokenizer) -> Callable[..., TransformersModel]:
    """Wrap a network as a `LanguageModel` that calls it as a whole, so that hooks see the calls."""
    return partial(wrapped, TransformersModel, tokenizer)


def wrapped(
    engine: Callable[..., TransformersModel],
    tokenizer: Tokenizer,
    network: Any,
    adapters: Sequence[str] = (),
    eos_ids: Sequence[int] = (257,),
    batch_size: int = 8,
) -> TransformersModel:
    info = ModelInfo(
        name="tiny",
        digest="0" * 64,
        engine="transformers",
        device="cpu",
        dtype="float32",
        quantization="none",
        context_length=network.config.max_position_embeddings,
        vocab_size=network.config.vocab_size,
        eos_ids=tuple(eos_ids),
        adapters=tuple(AdapterInfo(name=name, source="test", digest=name) for name in adapters),
    )
    return engine(network, tokenizer, info, batch_size)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what vLLM does not promise."""
    if ON_VLLM:
        for item in items:
            if item.get_closest_marker("independent"):
                item.add_marker(pytest.mark.skip(reason="ModelInfo.rows_independent is False on vLLM"))
