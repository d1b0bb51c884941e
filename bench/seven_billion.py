"""LLaMA-7B's shape with random weights: load, generate and judge as the notebook's preset does, with figures.

    python bench/seven_billion.py --folder /tmp/llama-7b --out figures.json

The weights are random, so the text means nothing; memory, time and the code path are those of
`ModelSpec.preset("alpaca-7b")`: a base folder, a LoRA adapter published as a pickle and imported once, int8.
Needs 14 GB of disk, and a GPU unless `--layers` makes it small.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from words import Words, write_tokenizer

import alpaca_core
from alpaca_core import ModelSpec, Sampling, answer, generate, judge, load_model
from alpaca_core.loading import import_adapter
from alpaca_core.model import RowError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random checkpoint is written")
    parser.add_argument("--layers", type=int, default=32, help="LLaMA-7B has 32")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each response")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256], help="rows at once")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()

    make_base(options.folder / "base", options.layers)
    imported = make_adapter(options.folder, options.folder / "base")
    base = str(options.folder / "base")
    specs = {
        "int8 + LoRA": ModelSpec(base_model=base, adapter=str(imported), quantization="int8", batch_size=256),
        "bf16 + LoRA": ModelSpec(base_model=base, adapter=str(imported), dtype="bfloat16", batch_size=256),
        "nf4 + LoRA": ModelSpec(base_model=base, adapter=str(imported), quantization="nf4", batch_size=256),
        "bf16": ModelSpec(base_model=base, dtype="bfloat16", batch_size=256),
    }
    figures = {"machine": machine(), "rows": [measure(name, spec, options) for name, spec in specs.items()]}
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def make_base(folder: Path, layers: int) -> None:
    """Write a checkpoint of LLaMA-7B's shape, with a tokenizer of made-up words."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        eos_token_id=256,
        bos_token_id=256,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        network = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    network.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


def make_adapter(folder: Path, base: Path) -> Path:
    """Make a random LoRA for a base model as tloen/alpaca-lora-7b is published, a pickle, and import it.

    Returns:
        The imported adapter's folder, in `folder`.
    """
    imported = folder / "imported"
    if not imported.exists():
        _make_pickled_adapter(folder / "adapter", LlamaConfig.from_pretrained(base))
        import_adapter(folder / "adapter", template="alpaca-lora", out=imported)
    return imported


def _make_pickled_adapter(folder: Path, shape: LlamaConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    width = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    queries, keys = shape.num_attention_heads * width, shape.num_key_value_heads * width
    sizes = {"q_proj": (shape.hidden_size, queries), "o_proj": (queries, shape.hidden_size)}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (shape.hidden_size, keys))
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{end}.weight": torch.randn(
            (16, sizes[target][0]) if end == "A" else (sizes[target][1], 16), generator=generator
        )
        / 100
        for layer in range(shape.num_hidden_layers)
        for target in TARGETS
        for end in "AB"
    }
    torch.save(tensors, folder / "adapter_model.bin")
    config = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 16,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(name: str, spec: ModelSpec, options: argparse.Namespace) -> dict[str, object]:
    """Load, then time generation and judging at each batch size; the first call of each is not counted."""
    start = time.perf_counter()
    with load_model(spec) as model:
        figures: dict[str, object] = {
            "model": name,
            "load_s": round(time.perf_counter() - start, 1),
            "memory_gib": round(model.info.memory_gib, 2),
            "device": model.info.device,
        }
        sampling = Sampling(max_new_tokens=options.tokens)
        tokens, items = {}, {}
        for batch in options.batches:
            words = Words(model.tokenizer, model.info.vocab_size)
            prompts = [words.text(tokens) for tokens in words.draw(batch, 64)]  # "raw": of 64 tokens
            generate(model, prompts, Sampling(max_new_tokens=2), template="raw")
            rows, seconds = timed(lambda rows=prompts: generate(model, rows, sampling, template="raw"))
            tokens[batch] = round(sum(row.completion_tokens for row in rows) / seconds)
            rows, seconds = timed(lambda rows=prompts: judge(model, rows, template="raw"))
            items[batch] = round(batch / seconds, 1)
        figures |= {"tokens_per_s": tokens, "items_per_s": items}
        if spec.adapter:
            (row,) = answer(model, ["Each of 2 cans has 5 pierogi. How many pierogi?"], Sampling(max_new_tokens=32))
            assert not isinstance(row, RowError), row
            figures |= {"p_correct": row.p_correct, "attempts": row.attempts}
            with_adapter, without = (judge(model, ["Is it so?"], adapter=each)[0] for each in ("default", None))
            figures["adapter_changes_p_yes_by"] = abs(
                with_adapter.probabilities["Yes"] - without.probabilities["Yes"]  # type: ignore[union-attr]
            )
        if model.info.device != "cpu":
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()
    return figures


def timed(call: Callable[[], Sequence[object]]) -> tuple[Sequence[object], float]:
    """Run a call; return its rows, none of them an error, and its seconds."""
    start = time.perf_counter()
    rows = call()
    seconds = time.perf_counter() - start
    failed = [row for row in rows if isinstance(row, RowError)]
    assert not failed, failed[0]
    return rows, seconds


def machine() -> dict[str, str]:
    """Name what the figures were measured on, and of what: `source` is a digest of the package's files."""
    from importlib.metadata import version

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    source = sha256(b"".join(path.read_bytes() for path in sorted(Path(alpaca_core.__file__).parent.rglob("*.py"))))
    told = {"date": datetime.date.today().isoformat(), "source": source.hexdigest()[:12]}
    return {"device": gpu, "python": platform.python_version(), **packages, **told}


if __name__ == "__main__":
    main()
