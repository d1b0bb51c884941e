"""What a caller chooses: the model, the sampling, the labels. Frozen, validated, JSON."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from alpaca_core.errors import InvalidRequest, brief

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""Name of the model that comes with the project, SmolLM2-135M-Instruct (Apache 2.0)."""

TemplateName = Literal["auto", "chat", "alpaca", "alpaca-lora", "raw"]


class Value(BaseModel):
    """A frozen value that refuses unknown fields, NaN and infinity, and turns into JSON and back."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Value)


def check_kind(name: str, value: object, kind: type[Kind], remedy: str) -> Kind:
    """Return a value of the kind that an argument takes.

    Raises:
        InvalidRequest: For anything else: its JSON and its name are the usual slips.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InvalidRequest(f"{name} is {article} {kind.__name__}, but got {brief(value)}. {remedy}")
    return value


def digest_of(value: Any) -> str:
    """Hash a JSON value in canonical form: sorted keys, no blanks; hexadecimal SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


Unset = BeforeValidator(lambda value: None if isinstance(value, str) and not value.strip() else value)
"""A form sends an emptied field as an empty text, which means none; so does one with blanks only."""

OptionalText = Annotated[str | None, Unset]
"""A text that a form may leave out."""


class NamedAdapter(Value):
    """LoRA weights that rows may ask for by name, beside the spec's own adapter.

    Args:
        name: What a row says to get it: letters, digits, ``_`` and ``-``.
        source: Hub repository or local folder, in PEFT's format, safetensors.
        revision: Commit of the hub repository; None takes the newest, and the status names its commit.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="What a row says to get this adapter.")]
    source: Annotated[str, Field(min_length=1, description="Hub repository or local folder of the LoRA weights.")]
    revision: OptionalText = Field(default=None, description="Commit of the hub repository, pinned.")


class ModelSpec(Value):
    """The recipe of a model: small, hashable and JSON, so that it can cross a task's border.

    Args:
        base_model: A hub repository (``owner/name``), a local folder, a ``.gguf`` file, or
            ``smollm2-135m-instruct``, the embedded model, which is the default.
        revision: Commit of the hub repository. None takes the newest; the status names its commit.
        adapter: LoRA weights that every row gets unless it says otherwise: hub repository or folder.
        adapter_revision: Commit of the adapter's hub repository.
        adapters: More LoRA weights, which rows ask for by name.
        merge_adapter: Add the adapter into the base weights: faster, but rows can no longer choose.
        quantization: ``int8`` or ``nf4`` by bitsandbytes (LLM.int8(), arXiv 2208.07339, at threshold 0;
            QLoRA, arXiv 2305.14314), or ``none``.
        dtype: Of weights and activations; ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: transformers' placement over several devices: ``auto``, ``balanced``, ``balanced_low_0`` or
            ``sequential``; excludes `device`.
        engine: ``auto`` is our own, on transformers' network where the family is none of LLaMA's. ``vllm`` is vLLM's
            (extra ``vllm``), without quantization, merging and `device_map`: see docs/engines.md.
        tensor_parallel_size: GPUs over which vLLM splits each layer; above 1 for that engine alone.
        template: ``auto`` takes what the adapter records, else the model's chat template, else Alpaca.
            ``alpaca`` ends in ``### Response:``, ``alpaca-lora`` in that and a newline; ``raw`` adds nothing.
        batch_size: Sequences computed together at most; a row with beams counts as many.
        memory_share: Of the device's memory, what this process may take for weights, cache and passes together,
            above 0 and at most 1. On a CPU it bounds weights and cache. No result depends on it, except that where
            a GPU runs out of memory, passes get smaller: see `ModelInfo.shape`.

    Raises:
        pydantic.ValidationError: For an unknown field, or fields that contradict one another.

    Example:
        >>> ModelSpec().base_model
        'smollm2-135m-instruct'
        >>> ModelSpec.preset("alpaca-7b").adapter
        'tloen/alpaca-lora-7b'
    """

    base_model: str = Field(
        default=EMBEDDED_MODEL,
        min_length=1,
        description="Hub repository (owner/name), local folder, .gguf file, or smollm2-135m-instruct (embedded).",
    )
    revision: OptionalText = Field(default=None, description="Commit of the hub repository, pinned.")
    adapter: OptionalText = Field(default=None, description="LoRA weights: hub repository or local folder.")
    adapter_revision: OptionalText = Field(default=None, description="Commit of the adapter's hub repository, pinned.")
    adapters: tuple[NamedAdapter, ...] = Field(default=(), description="More LoRA weights, which rows name.")
    merge_adapter: bool = Field(default=False, description="Add the adapter into the base weights.")
    quantization: Literal["none", "int8", "nf4"] = Field(default="none", description="bitsandbytes quantization.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU."
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    device_map: Annotated[Literal["auto", "balanced", "balanced_low_0", "sequential"] | None, Unset] = Field(
        default=None, description="transformers' placement over several devices, such as auto."
    )
    engine: Literal["auto", "vllm"] = Field(default="auto", description="auto: our own; vllm: vLLM's, extra vllm.")
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024, description="GPUs that vLLM splits each layer over.")
    template: TemplateName = Field(
        default="auto", description="Prompt template; auto asks the adapter, then the model."
    )
    batch_size: int = Field(default=32, ge=1, le=4096, description="Sequences computed together at most.")
    memory_share: float = Field(
        default=0.9, gt=0.0, le=1.0, description="Share of the device's memory that may be taken, such as 0.9."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.revision and self.base_model == EMBEDDED_MODEL:
            raise ValueError("revision is for hub repositories, but base_model is the embedded model. Drop revision.")
        if self.adapter_revision and not self.adapter:
            raise ValueError(f"adapter_revision is {self.adapter_revision!r}, but there is no adapter. Name one.")
        if self.merge_adapter and not self.adapter:
            raise ValueError("merge_adapter=True needs an adapter, but adapter is None. Name one.")
        if self.merge_adapter and self.adapters:
            raise ValueError("merge_adapter=True leaves no clean base for the other adapters. Drop one of the two.")
        if self.merge_adapter and self.quantization != "none":
            raise ValueError(
                f"merge_adapter=True would round the weights of {self.quantization} twice. "
                'Use quantization="none", or leave the adapter beside the base.'
            )
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"device_map={self.device_map!r} places the model, so device={self.device!r} has no say.")
        self._check_engine()
        names = [adapter.name for adapter in self.adapters]
        if len({*names, "default"}) != len(names) + 1:
            raise ValueError(f"adapter names must be unique, and 'default' is the spec's own; got {names}.")
        return self

    def _check_engine(self) -> None:
        if self.engine != "vllm":
            if self.tensor_parallel_size > 1:
                raise ValueError(
                    f"tensor_parallel_size={self.tensor_parallel_size} is vLLM's, but engine is {self.engine!r}. "
                    'Use engine="vllm", or spread the model with device_map.'
                )
            return
        if self.quantization != "none":
            raise ValueError(
                f"vLLM loads plain weights here, but quantization is {self.quantization!r}. "
                'Use engine="auto", or quantization="none".'
            )
        if self.merge_adapter:
            raise ValueError('vLLM keeps adapters beside the base, but merge_adapter=True. Drop it, or engine="vllm".')
        if self.device_map is not None:
            raise ValueError(
                f"device_map={self.device_map!r} is transformers' placement, and engine is vLLM. "
                "Use tensor_parallel_size."
            )

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return a named recipe.

        Args:
            name: ``embedded``, or ``alpaca-7b``: LLaMA-7B in 8 bits with the Alpaca-LoRA adapter.

        Raises:
            InvalidRequest: For any other name.
        """
        if name not in _PRESETS:
            raise InvalidRequest(f"there is no preset {name!r}. Choose one of: {', '.join(sorted(_PRESETS))}.")
        return cls.model_validate(_PRESETS[name])


_PRESETS: dict[str, dict[str, str]] = {
    "embedded": {},
    "alpaca-7b": {
        "base_model": "huggyllama/llama-7b",
        "adapter": "tloen/alpaca-lora-7b",
        "quantization": "int8",
    },
}


MOST_NEW_TOKENS = 1_000_000
"""Tokens of one response; the model's context is the limit that counts."""

SEEDS = 2**64
"""Seeds are whole numbers from 0 up to below this."""


class Sampling(Value):
    """How the next token is chosen. None means unset; what would have no effect is refused.

    Temperature divides the logits; top-k keeps the k likeliest tokens; top-p then keeps the likeliest
    that together reach p (nucleus sampling, arXiv 1904.09751, section 3.1), in transformers' order and
    with its definitions. With beams, a temperature above 0 samples beams by the row's own noise.

    Args:
        temperature: 0 is greedy; 1 samples the model's own distribution.
        top_k: Keep the k likeliest tokens, at least 1.
        top_p: Keep the likeliest tokens up to this mass, above 0 and below 1.
        num_beams: Beams kept side by side; 1 is no beam search.
        max_new_tokens: Most tokens of one response.
        seed: Of the row's noise: the same seed, prompt and sample index give the same tokens.

    Raises:
        pydantic.ValidationError: For values out of range, or ``top_k``/``top_p`` at temperature 0.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).num_beams
        1
    """

    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy; 1 samples the model's own distribution.")
    top_k: int | None = Field(default=None, ge=1, description="Keep the k likeliest tokens.")
    top_p: float | None = Field(default=None, gt=0.0, lt=1.0, description="Keep the likeliest tokens up to this mass.")
    num_beams: int = Field(default=1, ge=1, le=64, description="Beams kept side by side; 1 is no beam search.")
    max_new_tokens: int = Field(default=256, ge=1, le=MOST_NEW_TOKENS, description="Most tokens of one response.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Same seed, prompt and sample index: same tokens.")

    @model_validator(mode="after")
    def _effective(self) -> Self:
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            if self.temperature == 0 and value is not None:
                raise ValueError(
                    f"{name}={value} has no effect at temperature 0, which always takes the likeliest token. "
                    f"Set a temperature above 0, or leave {name} unset."
                )
        return self


GREEDY = Sampling()
"""The likeliest token each time, at most 256 of them."""


class Label(Value):
    """One choice of a judgment, and other words that mean the same.

    Args:
        name: How results call it, and its first spelling.
        aliases: Other words for it; each counts in all its spellings.
        exact: Count the words only as they are written, in no other case: ``A`` is not the article ``a``.

    Raises:
        pydantic.ValidationError: If the name or an alias is blank.
    """

    name: str = Field(description="How results call this label.")
    aliases: tuple[str, ...] = Field(default=(), description="Other words that mean the same.")
    exact: bool = Field(default=False, description="Count the words only as they are written, in no other case.")

    @field_validator("name", "aliases")
    @classmethod
    def _not_blank(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in (value,) if isinstance(value, str) else value:
            if not text.strip():
                raise ValueError(f"a label is a word or words, but got {text!r}. Drop it, or name it.")
        return value


YES_NO = (Label(name="Yes", aliases=("y", "true")), Label(name="No", aliases=("n", "false")))
"""The labels of a judgment that names none."""
