"""From a recipe to a network on its device, with every check that transformers leaves out.

`from_pretrained` gives no exception for missing tensors (it makes them up), NaN, or a wrong layer count.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from alpaca_core.adapters import Adapter, find_adapters
from alpaca_core.checkpoints import Checkpoint, find_base, read_json
from alpaca_core.engines.conversion import convert_tokenizer, unpack_gguf
from alpaca_core.engines.lora import CausalLM, attach, merge
from alpaca_core.engines.recovering import Stopped, ran_out
from alpaca_core.engines.sharing import keep, room
from alpaca_core.errors import DeviceUnavailable, InvalidCheckpoint, NotEnoughMemory, UnsafeCheckpoint
from alpaca_core.identity import identity
from alpaca_core.model import ModelInfo
from alpaca_core.spec import ModelSpec
from alpaca_core.tokenizer import Tokenizer

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Weights:
    """What an engine runs: the network, its tokenizer, and what both are."""

    network: CausalLM
    tokenizer: Tokenizer
    info: ModelInfo


def load_weights(spec: ModelSpec, started: float | None = None) -> Weights:
    """Load a spec's base model and adapters onto their device.

    Args:
        spec: The recipe.
        started: When the load began, by `time.perf_counter`; None is now.

    Raises:
        LoadError: As `alpaca_core.loading.load_model`.
    """
    started = time.perf_counter() if started is None else started
    device = device_of(spec)
    dtype = dtype_of(spec, device)
    base, adapters = find(spec)
    config = config_of(base)
    context_length_of(base, config)  # refuses other families, before anything is read
    tokenizer = base.open_tokenizer()
    check_memory(spec, base, device, dtype)
    if spec.quantization != "none":  # transformers before 5.20 does not report misshapen tensors of these
        open_network(spec.model_copy(update={"quantization": "none"}), base, torch.device("meta"), dtype)
    try:
        network: Any = open_network(spec, base, device, dtype)
        if spec.quantization != "none":
            _check_quantized(network, spec.quantization, base, dtype)
        if adapters:
            network = attach(network, adapters, dtype)
        if spec.merge_adapter:
            network = merge(network)
        network.eval().requires_grad_(False)
        check_finite(network.named_parameters(), base, dtype)
    except (Exception, Stopped) as error:
        if not ran_out(error):
            raise
        loading = " and ".join(repr(name) for name in (base.name, *(adapter.info.source for adapter in adapters)))
        raise NotEnoughMemory(f"{device} ran out of memory while it loaded {loading}. {_SMALLER}") from error
    place = str(device) if spec.device_map is None else spec.device_map
    memory = network.get_memory_footprint()
    info = describe(spec, base, adapters, config, tokenizer, "transformers", place, dtype, memory, started)
    return Weights(network, tokenizer, info)


def describe(
    spec: ModelSpec,
    base: Checkpoint,
    adapters: Sequence[Adapter],
    config: Any,
    tokenizer: Tokenizer,
    engine: str,
    device: str,
    dtype: torch.dtype,
    memory: float,
    started: float,
) -> ModelInfo:
    """Say what a loaded model is.

    Args:
        spec: The recipe.
        base: Where the base lies.
        adapters: Those of the spec, in its order.
        config: As `config_of` returns it.
        tokenizer: The model's.
        engine: Its name.
        device: As results call it.
        dtype: That the model computes in.
        memory: What the weights take, in bytes.
        started: When the load began, by `time.perf_counter`.
    """
    told = tuple(adapter.info for adapter in adapters)
    shown = str(dtype).removeprefix("torch.")
    return ModelInfo(
        name=base.name,
        digest=identity(base.digest, told, spec.quantization, shown, spec.merge_adapter, engine),
        engine=engine,
        device=device,
        dtype=shown,
        quantization=spec.quantization,
        context_length=context_length_of(base, config),
        vocab_size=config.vocab_size,
        eos_ids=tokenizer.eos_ids,
        template=spec.template,
        chat_template=base.chat_template,
        adapters=told,
        revision=base.revision,
        memory_gib=memory / _GIB,
        load_seconds=time.perf_counter() - started,
    )


def find(spec: ModelSpec, *, again: bool = False) -> tuple[Checkpoint, tuple[Adapter, ...]]:
    """Find a spec's base and adapters; the adapters first, since a base takes long to fetch."""
    adapters = find_adapters(spec, again=again)
    return find_base(spec, unpack_gguf, convert_tokenizer, again=again), adapters


def device_of(spec: ModelSpec) -> torch.device:
    if spec.device == "cpu" or (spec.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = int(spec.device.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device={spec.device!r} needs GPU number {number}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}. Use device='auto' or 'cpu', or install a torch built for this GPU."
        )
    return torch.device("cuda", number)


def dtype_of(spec: ModelSpec, device: torch.device) -> torch.dtype:
    chosen = ("float32" if device.type == "cpu" else "bfloat16") if spec.dtype == "auto" else spec.dtype
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def bytes_needed(base: Checkpoint, quantization: str, dtype: torch.dtype) -> float:
    """Compute from the headers of the files what the weights will take, in bytes."""
    per_linear = {"none": dtype.itemsize, "int8": 1.0, "nf4": 0.5}[quantization]
    total = 0.0
    for name, file in stored_tensors(base):
        shape = file.get_slice(name).get_shape()
        linear = len(shape) == 2 and "embed" not in name and "lm_head" not in name
        total += torch.Size(shape).numel() * (per_linear if linear else dtype.itemsize)
    return total


def check_memory(spec: ModelSpec, base: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Compare what the weights will take with what is free, before anything is read."""
    needed = bytes_needed(base, spec.quantization, dtype)
    devices = [device]
    if spec.device_map is not None:
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        devices.append(torch.device("cpu"))
    free = sum(max(0.0, room(each, spec.memory_share)) for each in devices)
    if needed > free:
        raise NotEnoughMemory(
            f"the weights of {base.name!r} take {needed / _GIB:.1f} GiB as {spec.quantization}/{dtype}, but {device} "
            f"has {free / _GIB:.1f} GiB free within a memory_share of {spec.memory_share:g}. "
            f"{_SMALLER} Or raise memory_share."
        )
    for each in devices:
        keep(each, spec.memory_share)


_SMALLER = "Use quantization='int8' or 'nf4', a narrower dtype, a smaller model, or free memory there."


def open_network(spec: ModelSpec, base: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    quantization = None
    if spec.quantization != "none":
        from alpaca_core.engines.quantizing import recipe  # bitsandbytes takes seconds, which plain weights do not need

        quantization = recipe(spec.quantization, dtype)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base.folder,
                dtype=dtype,
                device_map=spec.device_map or {"": device},
                quantization_config=quantization,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, which is refused below
            )
    except Exception as error:  # shapes, torn files, unknown families: transformers raises every kind
        if ran_out(error):
            raise
        raise InvalidCheckpoint(f"{base.folder} cannot be loaded ({error}). Fetch the model again.") from error
    network: PreTrainedModel
    network, report = loaded
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise InvalidCheckpoint(
            f"config.json and weights must name the same tensors, but {base.folder} has "
            + "; ".join(f"{len(keys)} {kind.replace('_', ' ')} ({', '.join(keys[:3])})" for kind, keys in wrong.items())
            + ". Fetch the model again, config.json included."
        )
    return network


def config_of(base: Checkpoint) -> Any:
    """The configuration as transformers reads it."""
    config = read_json(base.folder / "config.json")
    if "quantization_config" in config:
        raise InvalidCheckpoint(
            f"a checkpoint holds plain weights, but {base.folder} is quantized already. "
            "Use the repository that it was made from, and quantization='int8' or 'nf4'."
        )
    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every kind again
        if "auto_map" in config:
            raise UnsafeCheckpoint(
                f"a checkpoint's own code is never run, but {base.folder} brings {config['auto_map']}. "
                "Use a model whose family transformers knows."
            ) from error
        raise InvalidCheckpoint(f"{base.folder / 'config.json'} is no model's ({error}). Fetch it again.") from error


_INPUTS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


def context_length_of(base: Checkpoint, config: Any) -> int:
    """Return how many tokens the network may read, each of which sees all before it.

    Scoring shows a token its whole path, so a sliding window ends the context; within it there is no
    difference. LongRoPE ends where it was trained: beyond, one long row turns the frequencies of its batch.
    """
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    inputs = set(signature(family.forward).parameters) if family else set()
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # of a family that keeps something else, by any kind of error
        layers = []
    if (
        _INPUTS - inputs  # Mamba, BLOOM, T5
        or not family._supports_sdpa  # GPT-J
        or getattr(config, "attn_logit_softcapping", None)  # Gemma 2; transformers before 5.20 leaves it out
        or ("encoder_hidden_states" in inputs and getattr(config, "is_decoder", None) is False)  # BERT
        or getattr(config, "alibi", False)  # the first Falcons
        or not layers
        or {type(layer) for layer in layers} - _LAYERS  # Jamba, DeepSeek 3.2
        or not (hasattr(config, "max_position_embeddings") and hasattr(config, "vocab_size"))  # one part of several
    ):
        raise InvalidCheckpoint(
            "a base model is a LLaMA-like decoder, with attention in every layer, positions and a key-value cache, "
            f"but {base.folder} is a {config.model_type}, which transformers runs otherwise. Use another model."
        )
    limits = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    return int(min([config.max_position_embeddings, *limits]))


def stored_tensors(base: Checkpoint) -> Iterator[tuple[str, Any]]:
    """The name of each stored tensor, and the open file that holds it."""
    for name in base.weights:
        try:
            with safe_open(base.folder / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 -- no mapping
                    yield tensor, file
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(f"{base.folder / name} cannot be read ({error}). Fetch the model again.") from error


def check_finite(
    tensors: Iterable[tuple[str, torch.Tensor]], base: Checkpoint, dtype: torch.dtype, instead: str = "dtype='float32'"
) -> None:
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        # NaN wins in both, and infinity in one; sixty times as fast as isfinite over all of it
        lowest, highest = tensor.to(dtype).aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise InvalidCheckpoint(
                f"weights must be finite in {dtype}, but {name} of {base.folder} holds NaN or infinity. "
                f"Fetch the model again, or use {instead}."
            )


def _check_quantized(network: PreTrainedModel, quantization: str, base: Checkpoint, dtype: torch.dtype) -> None:
    """Look at the numbers that a network was quantized from: its own are integers, none of which is NaN."""
    from alpaca_core.engines.quantizing import ends_of

    ends = ends_of(network).items()
    if quantization == "int8":
        check_finite(ends, base, torch.float16, "quantization='nf4'")
    else:
        check_finite(ends, base, dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out progress bars: a load is a few seconds."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
