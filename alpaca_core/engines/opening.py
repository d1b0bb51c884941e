"""From a recipe to an engine in this process: which engine runs which network."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from alpaca_core.adapters import find_adapters
from alpaca_core.errors import AlpacaError, InvalidAdapter
from alpaca_core.model import LanguageModel
from alpaca_core.spec import ModelSpec


@contextmanager
def open_model(spec: ModelSpec) -> Iterator[LanguageModel]:
    """Load a model into this process, and free its memory at the end of the block.

    Args:
        spec: The recipe.

    Raises:
        LoadError: As `alpaca_core.loading.load_model`.
    """
    started = time.perf_counter()  # importing torch is part of what a user waits for
    if spec.engine == "vllm":
        from alpaca_core.engines.vllm import load_vllm

        with closing(load_vllm(spec, started)) as served:
            yield served
        return
    from alpaca_core.engines.llama import runs
    from alpaca_core.engines.native import NativeModel
    from alpaca_core.engines.transformers import TransformersModel
    from alpaca_core.engines.weights import load_weights

    loaded = load_weights(spec, started)
    engine = NativeModel if runs(loaded.network) else TransformersModel
    model = engine(loaded.network, loaded.tokenizer, loaded.info, spec.batch_size, spec.memory_share)
    del loaded
    with closing(model):
        yield model


def refusals(spec: ModelSpec) -> dict[str, InvalidAdapter]:
    """Say which adapters do not go on a spec's base, as its engine would: on networks that take no memory.

    Args:
        spec: The recipe, with named adapters beside its base.

    Returns:
        What speaks against an adapter, by its name. What else keeps one from being loaded, as files that have gone, is
        left for a load to find.

    Raises:
        LoadError: What `open_model` would raise of the base.
    """
    import torch

    from alpaca_core.engines.lora import attach
    from alpaca_core.engines.weights import device_of, dtype_of, find, open_network

    dtype = dtype_of(spec, device_of(spec))
    plain = spec.model_copy(update={"quantization": "none", "device_map": None, "adapters": ()})
    base, _ = find(plain)
    refused: dict[str, InvalidAdapter] = {}
    for adapter in spec.adapters:
        try:
            found = find_adapters(plain.model_copy(update={"adapters": (adapter,)}))
            network = open_network(plain, base, torch.device("meta"), dtype)
            if spec.engine == "vllm":
                from alpaca_core.engines import vllm

                vllm.check_adapters(network, found, dtype)
            else:
                attach(network, found, dtype)
        except InvalidAdapter as error:
            refused[adapter.name] = error
        except AlpacaError:
            continue
    return refused
