"""The forward pass of LLaMA's family over a flat list of tokens and a paged key-value cache.

Weights are those of a network that transformers loaded, fused where layers read the same input. What lies
between the matrix products is `eager`, or `kernels` on CUDA.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from alpaca_core.engines import eager
from alpaca_core.engines.lora import CausalLM, bare, names_of
from alpaca_core.engines.packing import PAGE, Packed
from alpaca_core.engines.projections import Gate, Norm, Projection, halves, is_steady, random_rows

_FAMILIES = {LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM}
_LINEAR = {"Linear", "Linear8bitLt", "Linear4bit"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def runs(network: CausalLM) -> bool:
    """Say whether `Llama` computes what this network computes.

    Not so for other families, other positions than fixed rotary ones, attention that is not causal in all
    layers within the context, weights on several devices or away until used, and adapters of the embedding or
    the head.
    """
    base: Any = bare(network)
    if type(base) not in _FAMILIES:
        return False
    rope = getattr(base.config, "rope_parameters", None) or {}
    width = base.model.layers[0].self_attn.head_dim
    modules = dict(base.named_modules())
    layers = [module for name, module in modules.items() if name.endswith(_PROJECTIONS)]
    plain = [getattr(module, "base_layer", module) for module in layers]
    wrapped = [name for name, module in modules.items() if hasattr(module, "base_layer")]
    return (
        rope.get("rope_type", "default") in {"default", "linear", "llama3", "yarn"}
        and base.config.hidden_act == "silu"
        and width & (width - 1) == 0
        and width >= (16 if base.device.type == "cuda" else 8)  # the least of Triton's products
        and {type(module).__name__ for module in plain} <= _LINEAR
        and all(name.endswith(_PROJECTIONS) for name in wrapped)
        and not any(hasattr(module, "_hf_hook") for module in modules.values())
        and len({parameter.device for parameter in base.parameters()}) == 1
        and not any(getattr(module, "use_dora", {}).get(name) for module in layers for name in names_of(network))
    )


class _Layer:
    """Weights of one layer."""

    def __init__(self, layer: Any, names: list[str], operations: ModuleType, eps: float, *, few: bool = False) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        before_attention = Norm(operations.norm, layer.input_layernorm.weight, eps)
        before_mlp = Norm(operations.norm, layer.post_attention_layernorm.weight, eps)
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], names, before_attention, few=few)
        self.out = Projection([attention.o_proj], names, few=few)
        self.gate = Gate(mlp.gate_proj, mlp.up_proj, names, operations.silu_mul, before_mlp, few=few)
        self.down = Projection([mlp.down_proj], names, few=few)
        self.ranks = self.qkv.ranks, self.out.ranks, self.gate.ranks, self.down.ranks


class Llama:
    """A network's weights, and two ways to run them: over tiles of text, and over one new token of each row.

    A token's result depends on the tokens that it sees, on its adapter, on the way it is run, and on a GPU on
    the number of tokens in the pass: not on its place in the pass, nor on what else the pass reads.

    Args:
        network: One that `runs` accepts. Its layers keep their weights, or views of fused ones, so it still works.

    Attributes:
        large: Whether products of many rows may be our own.
    """

    def __init__(self, network: CausalLM) -> None:
        self.large = True
        base: Any = bare(network)
        names = names_of(network)
        config = base.config
        body = base.model
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.width: int = body.layers[0].self_attn.head_dim
        self.embedding: Tensor = body.embed_tokens.weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.operations: ModuleType = _operations(self.device)
        eps: float = config.rms_norm_eps
        norm = Norm(self.operations.norm, body.norm.weight, eps)
        self.head = self.step_head = Projection([base.lm_head], norm=norm)
        self.layers = self.step_layers = [_Layer(layer, names, self.operations, eps) for layer in body.layers]
        self.narrow = halves([module for name, module in body.layers.named_modules() if name.endswith(_PROJECTIONS)])
        if self.narrow:  # steps read weights of 16 bits
            self.step_head = Projection([base.lm_head], norm=norm, few=halves([base.lm_head]))
            self.step_layers = [_Layer(layer, names, self.operations, eps, few=True) for layer in body.layers]
        # transformers' own module, so that scaled positions are scaled as the family does it
        places = torch.arange(config.max_position_embeddings, device=self.device)
        cos, sin = body.rotary_emb(torch.zeros(1, device=self.device), places[None])
        self.cos, self.sin = (table[0, :, : self.width // 2].float().contiguous() for table in (cos, sin))

    def steady(self, counts: Sequence[int], most: int, *, steps: bool = False) -> bool:
        """Try whether the layers' products give a row the same bits among some numbers of rows.

        One layer is tried of all those whose products have the same sizes, adapters' included.

        The head's are tried on the CPU alone: on a GPU its number of rows is always the same.

        Args:
            counts: Rows.
            most: What they are compared with: as many rows.
            steps: Whether the products of decode steps are tried, or those of passes.
        """
        x = random_rows(most, self.embedding.shape[1], self.embedding)
        attended = random_rows(most, self.heads * self.width, self.embedding)
        adapters = torch.zeros(most, dtype=torch.long, device=self.device)

        def tried(run: Callable[..., Tensor], rows: Tensor, *onto: Tensor) -> bool:
            return is_steady(run, [rows, adapters[: len(rows)], *onto], counts)

        def steady(layer: _Layer) -> bool:
            return (
                tried(layer.qkv, x)
                and tried(lambda rows, others, onto: layer.out(rows, others, add_to=onto.clone()), attended, x)
                and tried(layer.gate, x)
                and tried(
                    lambda rows, others, onto: layer.down(rows, others, add_to=onto.clone()), layer.gate(x, adapters), x
                )
            )

        layers, head = (self.step_layers, self.step_head) if steps else (self.layers, self.head)
        unlike = {layer.ranks: layer for layer in layers}
        return all(map(steady, unlike.values())) and (self.device.type != "cpu" or tried(head, x[:256]))

    def leave_large(self) -> None:
        """Leave products of many rows to cuBLAS, where ours fail, or give a row other bits than cuBLAS does."""
        self.large = False
        for layer in self.layers:
            layer.qkv.leave_large()
            layer.gate.leave_large()

    @property
    def page_bytes(self) -> int:
        """What a page of the cache takes, in all layers."""
        numbers: int = 2 * len(self.layers) * PAGE * self.kv_heads * self.width
        return numbers * int(self.dtype.itemsize)

    @property
    def most_pages(self) -> int:
        """Pages whose numbers of one layer the kernels can count in 32 bits."""
        return (2**31 - 1) // (PAGE * self.kv_heads * self.width)

    def new_cache(self, pages: int) -> Tensor:
        """Make a cache, ``(layers, keys and values, pages, 16, key heads, width)``."""
        shape = (len(self.layers), 2, pages, PAGE, self.kv_heads, self.width)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def read(self, packed: Packed, cache: Tensor, *, every: bool) -> Tensor:
        """Read tiles, and store their keys and values.

        Args:
            packed: The tiles, in a multiple of 16 tokens.
            cache: As `new_cache` made it; written.
            every: Whether states are wanted of all tokens, or of the last one of each tile.

        Returns:
            The last states: ``(N, width)``, or ``(len(packed.ends), width)``.
        """
        ops = self.operations
        x, adapters = embedding(packed.ids, self.embedding), packed.adapters
        plan = ops.plan_tiles(packed, self.cos, self.sin)
        for place, layer in enumerate(self.layers):
            qkv = layer.qkv(x, adapters)
            keys, values = cache[place]
            attended = ops.read_tiles(qkv, keys, values, plan, self.heads)
            if not every and place == len(self.layers) - 1:  # behind the last cache nothing else is looked at
                x, attended, adapters = x[packed.ends], attended[packed.ends], adapters[packed.ends]
            x = self._rest(layer, x, attended, adapters)
        return x

    def step(
        self, tokens: Tensor, lengths: Tensor, table: Tensor, adapters: Tensor, cache: Tensor, longest: int
    ) -> Tensor:
        """Read one token of each row.

        Args:
            tokens: ``(N,)``; on the CPU a multiple of 16, unless its weights are `narrow`.
            lengths: Tokens of each row before this one.
            table: Pages of each row, ``(N, pages)``, with one for the new token.
            adapters: Number of each row's adapter, -1 for none.
            cache: Written.
            longest: No row has more tokens.

        Returns:
            Float32 logits, ``(N, vocab)``.
        """
        ops = self.operations
        x = embedding(tokens, self.embedding)
        plan = ops.plan_step(lengths, table, self.cos, self.sin, longest)
        for place, layer in enumerate(self.step_layers):
            qkv = layer.qkv(x, adapters)
            keys, values = cache[place]
            attended = ops.step(qkv, keys, values, plan, self.heads)
            x = self._rest(layer, x, attended, adapters)
        return self.step_head(x).float()

    def logits(self, states: Tensor) -> Tensor:
        """Return the float32 logits of last states, ``(N, vocab)``; on the CPU N is a multiple of 16."""
        return self.head(states).float()

    def _rest(self, layer: _Layer, x: Tensor, attended: Tensor, adapters: Tensor) -> Tensor:
        """What follows attention in a layer; `x` is written."""
        x = layer.out(attended, adapters, add_to=x)
        inner = layer.gate(x, adapters)
        return layer.down(inner, adapters, add_to=x)


def _operations(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        try:
            from alpaca_core.engines import kernels
        except ImportError:  # no Triton for this platform
            return eager
        return kernels
    return eager
