"""What makes two loaded models the same: the digest that results, calibrations and hosts go by."""

from collections.abc import Sequence

from alpaca_core.model import AdapterInfo, ModelInfo
from alpaca_core.spec import TemplateName, digest_of


def identity(
    base: str, adapters: Sequence[AdapterInfo], quantization: str, dtype: str, merged: bool, engine: str
) -> str:
    """Hash everything that can change a result, versions of libraries and shapes of passes aside.

    Args:
        base: Digest of the base weights and their tokenizer.
        adapters: What lies beside them, or has been merged into them.
        quantization: As in `ModelSpec`.
        dtype: Of weights and activations, such as ``bfloat16``.
        merged: Whether the adapter is part of the base weights.
        engine: Its name. vLLM's counts: it draws other tokens for a seed, and in bfloat16 gives a row other numbers
            than ours, and again others from call to call.
    """
    named = {"engine": engine} if engine == "vllm" else {}
    return digest_of(
        {
            **named,
            "base": base,
            "adapters": {adapter.name: [adapter.digest, adapter.template] for adapter in adapters},
            "quantization": quantization,
            "dtype": f"torch.{dtype}",
            "merge_adapter": merged,
        }
    )


def shaped(info: ModelInfo, unshaped: str, shape: str) -> ModelInfo:
    """Tell the shape of passes, which decides the last bits; an empty one decides nothing."""
    told = {"digest": digest_of([unshaped, shape]), "unshaped_digest": unshaped} if shape else {"digest": unshaped}
    return info.model_copy(update={"shape": shape, **told})


def as_asked(
    info: ModelInfo, base: str, adapters: Sequence[AdapterInfo], template: TemplateName, merged: bool
) -> ModelInfo:
    """Describe a loaded model as one who loads it with these adapters alone would see it.

    Args:
        info: Of the engine, which may have more adapters, under other names.
        base: Digest of the base weights and their tokenizer.
        adapters: Those that are asked for, by the names that are asked for.
        template: Likewise.
        merged: Whether the adapter is part of the base weights.
    """
    told = info.model_copy(update={"adapters": tuple(adapters), "template": template})
    return shaped(told, identity(base, adapters, info.quantization, info.dtype, merged, info.engine), info.shape)
