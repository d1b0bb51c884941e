"""Rows that every engine refuses, and completions as all of them give them. No network is needed for either."""

from collections.abc import Sequence

from alpaca_core.errors import RowRejected
from alpaca_core.model import Completion, GenerateRow, ModelInfo, ScoreRow, check_fits
from alpaca_core.tokenizer import Tokenizer


def check_row(row: GenerateRow | ScoreRow, info: ModelInfo, *, merged: bool = False) -> None:
    """Refuse what a network would fail on, or answer wrongly; an id out of range ends a CUDA context.

    Args:
        row: Of either kind.
        info: Of the model that is to run it.
        merged: Whether the adapters are added into the base weights, so that there is no bare base.

    Raises:
        RowRejected: With code ``empty_text``, ``prompt_too_long``, ``not_text`` or ``unknown_adapter``.
    """
    if not row.prompt_ids:
        raise RowRejected("empty_text", "a prompt has one token at least, but this one has none. Write something.")
    least, largest = min(row.prompt_ids), max(row.prompt_ids)
    if isinstance(row, GenerateRow):
        check_fits(len(row.prompt_ids), row.sampling.max_new_tokens, info)
    else:
        check_fits(len(row.prompt_ids), row.continuations.deepest, info, "the longest continuation")
        first, last = row.continuations.extremes
        least, largest = min(least, first), max(largest, last)
    if not 0 <= least <= largest < info.vocab_size:
        strange = least if least < 0 else largest
        raise RowRejected(
            "not_text", f"a token id lies between 0 and {info.vocab_size - 1:,}, but got {strange}. Check the id."
        )
    info.adapter(row.adapter)
    if row.adapter is None and info.adapters and merged:
        raise RowRejected(
            "unknown_adapter",
            "a row asks for the bare base, but the adapter is merged into it. Load with merge_adapter=False.",
        )


def completion(
    row: GenerateRow, token_ids: Sequence[int], stopped: bool, tokenizer: Tokenizer, shape: str = ""
) -> Completion:
    """Make a completion of what a row said, without the token that ended it; special tokens are left out."""
    tokens = tuple(token for token in token_ids if not tokenizer.is_special(token))
    return Completion(
        text=tokenizer.decode(tokens),
        token_ids=tokens,
        finish_reason="stop" if stopped else "length",
        prompt_tokens=len(row.prompt_ids),
        completion_tokens=len(tokens),
        shape=shape,
    )
