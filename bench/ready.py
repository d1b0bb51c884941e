"""How long a process takes to its first results: run by `bench/engine.py`, in a process of its own.

    python bench/ready.py ours|transformers SPEC ROWS

SPEC is a `ModelSpec` in JSON. Prints seconds since the process began to import: `imported`, `loaded`, `first_token` of
one row, and `ready`, when a batch of ROWS has been generated and one judged, so that everything is compiled and
captured.
"""

import time

STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402


def main() -> None:
    """Load, generate, judge, and print when each was done."""
    who, spec, rows = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    told = (ours if who == "ours" else transformers)(spec, rows)
    print(json.dumps({name: round(moment - STARTED, 2) for name, moment in told.items()}))


def ours(spec: dict[str, object], rows: int) -> dict[str, float]:
    """Use this project."""
    from alpaca_core import ModelSpec, Sampling, load_model
    from alpaca_core.engines import native, weights  # noqa: F401 -- as a load imports them
    from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie

    told = {"imported": time.perf_counter()}
    with load_model(ModelSpec.model_validate(spec)) as model:
        told["loaded"] = time.perf_counter()
        for count in (1, rows):
            asked = [GenerateRow((*range(10, 70), 100 + row % 100), Sampling(max_new_tokens=2)) for row in range(count)]
            assert not any(isinstance(row, RowError) for _, row in model.generate(asked))
            told.setdefault("first_token", time.perf_counter())
        trie = Trie.of([[5], [9]])[0]
        assert not any(isinstance(row, RowError) for _, row in model.loglikelihood([ScoreRow((1, 2, 3), trie)] * rows))
        return told | {"ready": time.perf_counter()}


def transformers(spec: dict[str, object], rows: int) -> dict[str, float]:
    """Use transformers alone, with a dynamic cache, on the same folder."""
    import torch
    from transformers import AutoModelForCausalLM

    told = {"imported": time.perf_counter()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(spec["base_model"], dtype=spec["dtype"], device_map=device)
    told["loaded"] = time.perf_counter()
    for count in (1, rows):
        ids = torch.tensor([[*range(10, 70), 100 + row % 100] for row in range(count)], device=device)
        network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        told.setdefault("first_token", time.perf_counter())
    with torch.inference_mode():
        network(ids, logits_to_keep=1).logits.tolist()
    return told | {"ready": time.perf_counter()}


if __name__ == "__main__":
    main()
