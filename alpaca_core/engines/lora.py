"""LoRA adapters beside the base weights, each tensor accounted for.

PEFT loads an adapter whose keys do not match as one that does nothing, with a warning at most. So keys
and shapes are compared here, and the tensors are copied by this module.
"""

import re
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from alpaca_core.adapters import WEIGHTS, Adapter
from alpaca_core.errors import InvalidAdapter

_KIND = r"lora_(?:A|B|embedding_A|embedding_B)"


def attach(network: PreTrainedModel, adapters: Sequence[Adapter], dtype: torch.dtype) -> PeftModel:
    """Put adapters beside a base, in their order.

    PEFT calls them ``adapter0``, ``adapter1`` …: a name of the user's could be that of a module's method.

    Args:
        network: The base; it is changed in place.
        adapters: At least one; the first one is active afterwards.
        dtype: That the adapters compute in.

    Raises:
        InvalidAdapter: If an adapter was made for another base, is not finite, or changes nothing.
        torch.OutOfMemoryError, MemoryError: If they do not fit beside the base.
    """
    model: PeftModel | None = None
    for place, adapter in enumerate(adapters):
        name = f"adapter{place}"
        config = LoraConfig(**adapter.lora.settings(), task_type="CAUSAL_LM", inference_mode=True)
        try:
            if model is None:
                with warnings.catch_warnings():
                    # PEFT reads a property that transformers has renamed
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                    model = PeftModel(network, config, name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, config)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InvalidAdapter(
                f"adapter {adapter.info.name!r} ({adapter.info.source}) does not go on this base: {error}. "
                "It was made for another base."
            ) from error
        _fill(model, adapter, name, dtype)
    assert model is not None
    return model


def merge(model: PeftModel) -> PreTrainedModel:
    """Add the active adapter into the base weights."""
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def _fill(model: PeftModel, adapter: Adapter, name: str, dtype: torch.dtype) -> None:
    """Copy an adapter's tensors to their places, and see that both sides are complete."""
    path = adapter.folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidAdapter(f"{path} cannot be read ({error}). Fetch the adapter again.") from error
    suffix = re.compile(rf"(\.{_KIND})\.{name}(?=\.weight$|$)")
    places = {suffix.sub(r"\1", key): place for key, place in model.named_parameters() if suffix.search(key)}
    for key in sorted(set(places) ^ set(tensors)):
        raise _other_base(adapter, f"it {'has' if key in tensors else 'lacks'} {key}")
    for key, place in places.items():
        tensor = tensors[key]
        if tensor.shape != place.shape:
            raise _other_base(adapter, f"{key} is {tuple(tensor.shape)}, where the base wants {tuple(place.shape)}")
        tensors[key] = tensor = tensor.to(dtype)
        if not tensor.isfinite().all():
            raise InvalidAdapter(f"adapter weights must be finite, but {key} of {path} is not. Fetch it again.")
        place.data = tensor.to(place.device)
    ends = [key for key in places if re.search(r"_A(\.|$)", key)]
    live = [key for key in ends if tensors[key].any() and tensors[re.sub(r"_A(?=\.weight$|$)", "_B", key)].any()]
    if not live or not adapter.lora.lora_alpha:
        raise InvalidAdapter(
            f"an adapter must change its base, but {path} adds zero everywhere: it was never trained. Leave it out."
        )


def _other_base(adapter: Adapter, why: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"an adapter's tensors must be those that its base has places for, but {adapter.info.source!r} was made for "
        f"another base: {why}. Load it with the base that it was trained on."
    )
