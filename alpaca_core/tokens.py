"""A look at what the model really reads and writes: tokens, special tokens, the next token's distribution."""

from collections.abc import Sequence
from operator import index

import numpy

from alpaca_core.errors import InvalidRequest, RowRejected, brief
from alpaca_core.model import DEFAULT_ADAPTER, LanguageModel, RowError, ScoreRow, Trie, check_model
from alpaca_core.prompts import template_of, user_text
from alpaca_core.rows import Progress, check_rows, map_rows, run_rows
from alpaca_core.spec import TemplateName, Value
from alpaca_core.tokenizer import Tokenizer

MOST_TOKENS = 100_000
"""Tokens of one text that are shown; each is a value of its own."""


class Token(Value):
    """One token: its id, the vocabulary's spelling, what it adds to a text, whether it is a control token."""

    id: int
    piece: str
    text: str
    special: bool


class TokenProbability(Token):
    """A token, and the probability that the model gives it as the next one."""

    probability: float


def show_tokens(model: LanguageModel, texts: Sequence[str | RowError]) -> list[tuple[Token, ...] | RowError]:
    """Split texts into tokens, with the tokens that the model expects before a text, such as BOS.

    Args:
        model: Only its tokenizer is used.
        texts: Any texts; a control token's name in them is split like any other text.

    Returns:
        A tuple of `Token` for each text, in order; a `RowError` in place of each that is no text.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> [token.text for token in show_tokens(FakeModel(""), ["paca"])[0]]
        ['p', 'a', 'c', 'a']
    """
    check_model(model)
    check_rows("texts", texts)
    tokenizer = model.tokenizer

    def check(tokens: int, has: str) -> None:
        if tokens > MOST_TOKENS:
            raise RowRejected(
                "prompt_too_long",
                f"a text of at most {MOST_TOKENS:,} tokens is shown, but this one has {has}{tokens:,}. "
                "Show a part of it.",
            )

    def split(text: object) -> tuple[Token, ...]:
        known = user_text("a text", text)
        check(len(known) // tokenizer.longest_piece, "at least ")  # before megabytes are split, as for prompts
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(known)]
        check(len(ids), "")
        return tuple(_describe(tokenizer, token) for token in ids)

    return map_rows(split, texts)


def describe_tokens(model: LanguageModel, token_ids: Sequence[int]) -> tuple[Token, ...]:
    """Decode token ids one by one, each as it reads in mid-text.

    Args:
        model: Only its tokenizer is used.
        token_ids: Any ids of the vocabulary.

    Raises:
        InvalidRequest: If the vocabulary has no such id.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> [token.text for token in describe_tokens(FakeModel(""), [112, 97])]
        ['p', 'a']
    """
    check_rows("token_ids", token_ids)
    try:
        return tuple(_describe(model.tokenizer, index(token)) for token in token_ids)
    except (RowRejected, TypeError) as error:
        raise InvalidRequest(f"token_ids are numbers of the vocabulary, but {error}") from error


def _describe(tokenizer: Tokenizer, token_id: int) -> Token:
    special = tokenizer.is_special(token_id)
    return Token(
        id=token_id,
        piece=tokenizer.piece(token_id),
        text=tokenizer.decode([token_id], special=True),
        special=special,
    )


def special_tokens(model: LanguageModel) -> tuple[Token, ...]:
    """Return the model's control tokens, by id: those that stand for no text, such as BOS and EOS."""
    return describe_tokens(model, sorted(model.tokenizer.special_ids.values()))


def next_tokens(
    model: LanguageModel,
    prompts: Sequence[str | RowError],
    n: int = 20,
    *,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[tuple[TokenProbability, ...] | RowError]:
    """Return the likeliest next tokens after each prompt, from one forward pass.

    Args:
        model: From `load_model`.
        prompts: Instructions; whole prompts where the template is ``raw``.
        n: How many tokens; the whole vocabulary where it is smaller.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of rows just finished.

    Returns:
        For each prompt a tuple of `TokenProbability`, likeliest first; over the whole vocabulary they sum to 1.

    Raises:
        InvalidRequest: If n is below 1, or the adapter or template is unknown.
    """
    check_rows("prompts", prompts)
    if not isinstance(n, int) or n < 1:
        raise InvalidRequest(f"n counts the tokens to show, at least 1, but got {brief(n)}. Use 20.")
    writer = template_of(model, template, adapter)
    everything = Trie(tuple(range(model.info.vocab_size)), (-1,) * model.info.vocab_size)
    rows = map_rows(
        lambda prompt: ScoreRow(writer.encode(user_text("a prompt", prompt)).ids, everything, adapter), prompts
    )
    scored = run_rows(model.loglikelihood, rows, progress)
    return map_rows(lambda scores: _likeliest(model.tokenizer, scores, n), scored)


def _likeliest(tokenizer: Tokenizer, scores: list[float], n: int) -> tuple[TokenProbability, ...]:
    probabilities = numpy.exp(numpy.asarray(scores))
    # A head padded beyond the vocabulary has rows that no token stands for.
    best = [int(token) for token in numpy.argsort(-probabilities, kind="stable") if token < tokenizer.vocab_size][:n]
    return tuple(
        TokenProbability(**_describe(tokenizer, token).model_dump(), probability=float(probabilities[token]))
        for token in best
    )
