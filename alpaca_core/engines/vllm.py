"""From a recipe to vLLM's engine: the checks of the other engines come first, and vLLM gets the folder.

vLLM runs in this process, except for the workers that it starts itself for `tensor_parallel_size`. It sees token ids
alone, reports nothing to anybody, and listens on the loopback interface at most.
"""

import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from alpaca_core.adapters import Adapter
from alpaca_core.checkpoints import Checkpoint
from alpaca_core.engines.lora import attach
from alpaca_core.engines.recovering import ran_out
from alpaca_core.engines.sharing import keep, room
from alpaca_core.engines.vllm_model import Started, VllmModel
from alpaca_core.engines.weights import (
    bytes_needed,
    check_finite,
    config_of,
    context_length_of,
    describe,
    device_of,
    dtype_of,
    find,
    open_network,
    stored_tensors,
)
from alpaca_core.errors import (
    DeviceUnavailable,
    EngineUnavailable,
    InvalidAdapter,
    InvalidCheckpoint,
    LoadError,
    NotEnoughMemory,
)
from alpaca_core.spec import ModelSpec

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is stepped here
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the first one's sampler is what all this was tried with
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
_CPU_CACHE = 4 * 2**30
"""Bytes of the key-value cache on a CPU at most, unless one row needs more."""
_SHARE = 0.8
"""Of the room beside the weights on a CPU, what that cache may take."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of LoRA weights that vLLM makes room for: its `MaxLoRARanks`."""
_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Layers whose LoRA weights vLLM was tried with here; it can do without those of embedding and head in silence."""


def load_vllm(spec: ModelSpec, started: float | None = None) -> VllmModel:
    """Load a spec's base model and adapters with vLLM.

    Args:
        spec: The recipe, with ``engine="vllm"``.
        started: When the load began, by `time.perf_counter`; None is now.

    Raises:
        EngineUnavailable: If vLLM is not installed.
        LoadError: As `alpaca_core.loading.load_model`.
    """
    started = time.perf_counter() if started is None else started
    kind = _platform()
    if spec.device.partition(":")[0] not in ("auto", kind):
        raise DeviceUnavailable(
            f"device={spec.device!r} needs a vLLM that is built for it, but the one that is installed is for {kind}. "
            f"Use device={kind!r}, or install the other build."
        )
    device = torch.device("cpu") if kind == "cpu" else device_of(spec)
    dtype = dtype_of(spec, device)
    base, adapters = find(spec)
    config = config_of(base)
    context = context_length_of(base, config)
    tokenizer = base.open_tokenizer()
    memory = bytes_needed(base, "none", dtype)
    _check_memory(spec, base, device, memory)
    stored = ((name, file.get_tensor(name)) for name, file in stored_tensors(base))
    check_finite(stored, base, dtype)
    # vLLM leaves out tensors that are missing, in silence: transformers reports them, on a network without memory
    check_adapters(open_network(spec, base, torch.device("meta"), dtype), adapters, dtype)
    if spec.tensor_parallel_size > 1:  # CUDA, which the checks above use, and threads do not survive a fork
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    settings: dict[str, Any] = {"gpu_memory_utilization": spec.memory_share}
    if device.type == "cpu":
        settings = {"kv_cache_memory_bytes": _cpu_cache(spec, config, dtype, context, memory)}
    else:
        keep(device, 1.0)  # vLLM keeps its share by itself, and passes it for a moment as it starts
        if first := device.index:
            settings["device_ids"] = list(range(first, first + spec.tensor_parallel_size))
    try:
        engine = start(
            base.folder,
            {adapter.info.name: adapter.folder for adapter in adapters},
            rank=max([0, *(max([adapter.lora.r, *adapter.lora.rank_pattern.values()]) for adapter in adapters)]),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=context,
            max_num_seqs=spec.batch_size,
            tensor_parallel_size=spec.tensor_parallel_size,
            **settings,
        )
    except LoadError:
        raise
    except Exception as error:  # vLLM raises every kind
        if ran_out(error) or "memory" in str(error).lower():
            raise NotEnoughMemory(
                f"vLLM does not find the memory for {base.name!r} on {device} ({error}). "
                "Use a smaller model, a narrower dtype, another memory_share, or more GPUs by tensor_parallel_size."
            ) from error
        raise InvalidCheckpoint(
            f"vLLM cannot load {base.folder} ({type(error).__name__}: {error}). "
            'Fetch the model again, or load it with engine="auto".'
        ) from error
    place = str(device)
    info = describe(spec, base, adapters, config, tokenizer, "vllm", place, dtype, memory, started)
    return VllmModel(engine, tokenizer, info)


def start(folder: Path, adapters: Mapping[str, Path], *, rank: int, **settings: Any) -> Started:
    """Start vLLM's engine in this process, in a thread of its own.

    Args:
        folder: ``config.json`` and safetensors.
        adapters: Folder of each LoRA, by its name.
        rank: The largest of the adapters.
        settings: More of vLLM's `EngineArgs`.
    """
    _platform()
    thread = ThreadPoolExecutor(1, "vllm")
    try:
        engine, requests = thread.submit(_engine, folder, adapters, rank, settings).result()
    except BaseException:
        thread.shutdown(wait=False)
        raise
    return Started(engine, requests, thread)


def _engine(
    folder: Path, adapters: Mapping[str, Path], rank: int, settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """vLLM's `LLMEngine`, and its `LoRARequest` for each adapter, which is loaded."""
    with _undisturbed():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.kv_cache_interface import KVCacheConfig

        if adapters:
            room_for = next((each for each in _RANKS if each >= rank), rank)
            # 0.32 on a CPU adds the last place to rows without adapter, beside rows with one: it stays empty
            places = len(adapters) + int(current_platform.is_cpu())
            settings |= {"enable_lora": True, "max_loras": places, "max_lora_rank": room_for}
        if "device_ids" in settings and "device_ids" not in EngineArgs.__dataclass_fields__:
            raise DeviceUnavailable(
                f"this vLLM starts at the first GPU, but device is 'cuda:{settings['device_ids'][0]}'. "
                "Name the GPUs in CUDA_VISIBLE_DEVICES, and use device='cuda'."
            )
        arguments = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="safetensors",
            trust_remote_code=False,
            generation_config="vllm",  # sampling is the row's
            logprobs_mode="raw_logprobs",
            max_logprobs=-1,
            enable_prefix_caching=True,
            # on a CPU compiling takes a minute at every start, and is no faster
            enforce_eager=bool(current_platform.is_cpu()),
            # pages of 32 tokens on a CPU, where vLLM's are of 128, and prompts share whole pages alone
            block_size=32 if current_platform.is_cpu() else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **settings,
        )
        if current_platform.is_cpu():  # 0.32 reads pages to their end there, and NaN that a row has left spoils others
            KVCacheConfig.needs_kv_cache_zeroing = True
        engine = LLMEngine.from_engine_args(arguments)
        requests = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)
        }
        for request in requests.values():
            engine.add_lora(request)
    return engine, requests


def _platform() -> str:
    """Import vLLM with its settings, and say what it is built for: ``cpu`` or ``cuda``."""
    if find_spec("vllm") is None:
        raise EngineUnavailable(
            "engine='vllm' needs the package vllm, which is not installed. Run `pip install 'prefect-alpaca[vllm]'`, "
            "or on a machine without a GPU see docs/engines.md."
        )
    os.environ.update(_SETTINGS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it does to Triton's names
        from vllm.platforms import current_platform
    return "cpu" if current_platform.is_cpu() else "cuda"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Give back what vLLM changes in its process: the state of random generators, and torch's `set_num_threads`."""
    kept = random.getstate(), np.random.get_state(), torch.set_num_threads
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_num_threads = kept[2]


def _check_memory(spec: ModelSpec, base: Checkpoint, device: torch.device, needed: float) -> None:
    each = needed / spec.tensor_parallel_size
    if each > (free := max(0.0, room(device, spec.memory_share))):
        raise NotEnoughMemory(
            f"the weights of {base.name!r} take {each / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free "
            f"within a memory_share of {spec.memory_share:g}. Use a smaller model, a narrower dtype, another "
            "memory_share, or more GPUs by tensor_parallel_size."
        )


def _cpu_cache(spec: ModelSpec, config: Any, dtype: torch.dtype, context: int, weights: float) -> int:
    """Bytes of the key-value cache on a CPU: for all rows at their longest, within the share and a limit."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row: int = 2 * config.num_hidden_layers * heads * size * dtype.itemsize * (context + 256)  # and a block or two
    left = int(_SHARE * (room(torch.device("cpu"), spec.memory_share) - weights))
    if left < row:
        raise NotEnoughMemory(
            f"one row of {context:,} tokens needs {row / 2**30:.1f} GiB, but beside the weights {left / 2**30:.1f} GiB "
            f"are free within a memory_share of {spec.memory_share:g}. Use a narrower dtype, or raise memory_share."
        )
    return min(left, max(row, min(spec.batch_size * row, _CPU_CACHE)))


def check_adapters(network: PreTrainedModel, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
    """Put the adapters on a network without memory: all their tensors must have their place there."""
    if not adapters:
        return
    _platform()
    from vllm.lora.peft_helper import PEFTHelper

    model = attach(network, adapters, dtype)
    for place, adapter in enumerate(adapters):
        layers = {key.partition(".lora_")[0] for key, _ in model.named_parameters() if f".adapter{place}." in f"{key}."}
        patterned = adapter.lora.rank_pattern or adapter.lora.alpha_pattern
        if patterned and "rank_pattern" not in PEFTHelper.__dataclass_fields__:
            raise InvalidAdapter(
                f"this vLLM gives all layers of an adapter one rank, but {adapter.info.source!r} has rank_pattern or "
                'alpha_pattern, which it would drop. Install a newer one, or load it with engine="auto".'
            )
        strange = sorted({layer.rpartition(".")[2] for layer in layers} - _LAYERS)
        if strange or adapter.lora.fan_in_fan_out:
            raise InvalidAdapter(
                f"with vLLM an adapter is on attention and MLP layers, but {adapter.info.source!r} is also on "
                f'{", ".join(strange) or "transposed ones"}. Load it with engine="auto".'
            )
