"""Text to tokens and back, without torch, and without user text ever becoming a control token.

A ``tokenizer.json`` is read twice or more. `_full` is the tokenizer as published; it decodes. `_plain` is the
same with every control token taken out of its vocabulary, so that no text can reach one: flags such as
``split_special_tokens`` still let added, non-special tokens through, and flags on a shared Rust object
gave two threads one another's settings. Control tokens are put in by id, by `prompts.py` alone.
"""

import copy
import json
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import orjson
import tokenizers

from alpaca_core.errors import InvalidCheckpoint, RowRejected

Place = Literal["start", "segment", "inside"]

Made = TypeVar("Made")

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TAIL = 8
"""Tokens at the end of a prompt that can change how what follows them is split."""


class Tokenizer:
    """A model's tokenizer; nothing on it changes after construction, so threads may share it.

    Args:
        definition: Content of a ``tokenizer.json``.
        eos_ids: Tokens that end a response.
        named: Spellings that ``tokenizer_config.json`` gives to ``bos_token``, ``eos_token`` and their like,
            for a chat template to name.

    Raises:
        InvalidCheckpoint: If the definition is none that the `tokenizers` library reads.
    """

    def __init__(self, definition: str, eos_ids: Sequence[int] = (), named: Mapping[str, str] | None = None) -> None:
        try:
            parsed: dict[str, Any] = orjson.loads(definition)
            self._full = tokenizers.Tokenizer.from_str(definition)
            self._full.no_padding()
            self._full.no_truncation()
            self.special_ids: dict[str, int] = {
                token["content"]: token["id"] for token in parsed["added_tokens"] if token["content"].strip()
            }
            self._plain, self._inner = _without_control_tokens(self._full, parsed)
        except (ValueError, KeyError, TypeError, Exception) as error:  # tokenizers raises bare Exception
            raise InvalidCheckpoint(f"tokenizer.json cannot be read ({error}). Fetch the model again.") from error
        self.definition = definition
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = _size(parsed)
        with_bos, bare = self._full.encode("a").ids, self._full.encode("a", add_special_tokens=False).ids
        self.prefix_ids: tuple[int, ...] = tuple(with_bos[: with_bos.index(bare[0])]) if bare else ()
        """Tokens that the model was trained to see before a text, such as BOS."""
        self._control = frozenset(self.special_ids.values())
        self._byte_level = "ByteLevel" in json.dumps([parsed.get("pre_tokenizer"), parsed.get("decoder")])
        self._every_segment = '"prepend_scheme": "first"' not in json.dumps(parsed.get("pre_tokenizer"))
        self._word_piece = (parsed.get("decoder") or {}).get("type") == "WordPiece"
        # Decoders drop the space of a first word; behind this token everything is in mid-text.
        self._anchor = (bare or [0])[-1]
        self._anchor_text = self._full.decode([self._anchor], skip_special_tokens=False)
        self.named: dict[str, str] = dict(named or {})
        self._continue = lru_cache(maxsize=65_536)(self._continuation)
        self._remembered = lru_cache(maxsize=512)(lambda make, key: make(self, *key))

    @classmethod
    def from_file(cls, path: Path, eos_ids: Sequence[int] = (), named: Mapping[str, str] | None = None) -> Self:
        """Read a ``tokenizer.json``."""
        try:
            return cls(path.read_text(encoding="utf-8"), eos_ids, named)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidCheckpoint(f"{path} cannot be read ({error}). Fetch the model again.") from error

    def remember(self, make: Callable[..., Made], *key: Hashable) -> Made:
        """Return ``make(self, *key)``, worked out once, and forgotten together with this tokenizer."""
        made: Made = self._remembered(make, key)
        return made

    def is_special(self, token_id: int) -> bool:
        """Say whether a token is a control token: one that no text can spell."""
        return token_id in self._control

    def encode(self, text: str, place: Place = "start") -> list[int]:
        """Encode text as text, whatever control tokens it spells; adds no token of its own.

        Args:
            text: Any text that UTF-8 can hold.
            place: Where it stands: at the ``start`` of the prompt, at the start of a ``segment`` behind a
                control token, or ``inside`` running text. Sentencepiece puts a space before a text at the
                start; its older conversions do so before every segment.

        Raises:
            RowRejected: With code ``invalid_text`` for a lone surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowRejected(
                "invalid_text",
                f"text must be encodable as UTF-8, but character {error.start:,} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}. Decode the source with errors='replace'.",
            ) from error
        plain = self._plain if place == "start" or (place == "segment" and self._every_segment) else self._inner
        return list(plain.encode(text, add_special_tokens=False).ids)

    def split_controls(self, text: str) -> list[int | str]:
        """Split a template's own text into control tokens, by id, and the text between them.

        Only for text that comes with the model; a user's text goes through `encode`.
        """
        encoding = self._full.encode(text, add_special_tokens=False)
        parts: list[int | str] = []
        end = 0
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control:
                parts += [text[end:start], token]
                end = stop
        return [part for part in [*parts, text[end:]] if part != ""]

    @cached_property
    def longest_piece(self) -> int:
        """Characters of the vocabulary's longest piece: a text has at least its length over this in tokens."""
        return max(map(len, self._full.get_vocab(with_added_tokens=False)))

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Decode tokens as they read in mid-text, a leading space included.

        Args:
            ids: Token ids.
            special: Whether control tokens are shown; they are left out otherwise.
        """
        kept = [token for token in ids if special or token not in self._control]
        if not kept:
            return ""
        text: str = self._full.decode([self._anchor, *kept], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    def piece(self, token_id: int) -> str:
        """Return the vocabulary's own spelling of a token, such as ``▁Einstein`` or ``ĠEinstein``.

        Raises:
            RowRejected: If the vocabulary has no such id.
        """
        piece = self._full.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            raise RowRejected(
                "not_text", f"a token id lies between 0 and {self.vocab_size - 1:,}, but got {token_id}. Check the id."
            )
        return piece

    def continuation(self, prompt_ids: Sequence[int], text: str) -> tuple[int, ...]:
        """Return the canonical tokens of `text` after a prompt.

        They are what encoding prompt and text in one string adds to the prompt's tokens. Where the
        border would melt (the prompt's last token would become another), the model, which continues
        the prompt's tokens as they are, cannot follow; then the text is encoded as mid-text by itself.
        """
        return self._continue(self.tail(prompt_ids), text)

    def tail(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the end of a prompt, as far as it can change how a text after it is split.

        Between two bytes that stand side by side in no token, no token can ever form: what is before them does
        not matter. So prompts that end alike have one tail, and what is worked out for it is worked out once.
        """
        tail: list[int] = []
        for token in reversed(prompt_ids[-_TAIL:]):
            if token in self._control:
                break
            tail.insert(0, token)
        for first in range(len(tail) - 1, 0, -1):
            if self._apart(tail[first - 1], tail[first]) and _REPLACEMENT not in self.decode(tail[first:]):
                return tuple(tail[first:])
        return tuple(tail)

    def _apart(self, token: int, following: int) -> bool:
        before, after = self.token_bytes[token], self.token_bytes[following]
        if not before or not after or (self._word_piece and self.piece(following).startswith("##")):
            return False  # WordPiece cuts a word from its beginning on
        return (before[-1], after[0]) not in self._side_by_side

    @cached_property
    def _side_by_side(self) -> frozenset[tuple[int, int]]:
        """The pairs of bytes that follow one another in a token."""
        return frozenset(pair for content in self.token_bytes if content for pair in pairwise(content))

    def _continuation(self, tail: tuple[int, ...], text: str) -> tuple[int, ...]:
        # A tail that begins in mid-word, or with half a character, does not encode to itself: begin later.
        for start in range(len(tail)):
            ids = list(tail[start:])
            before = self.decode(ids)
            if _REPLACEMENT not in before and self.encode(before, "inside") == ids:
                whole = self.encode(before + text, "inside")
                if whole[: len(ids)] == ids:
                    return tuple(whole[len(ids) :])
                break
        return tuple(self.encode(text, "inside"))

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """What each token adds to a text, as UTF-8 bytes; None for control tokens and unused ids."""
        return [self._bytes(token) for token in range(self.vocab_size)]

    @cached_property
    def ids_by_meaning(self) -> dict[str, tuple[int, ...]]:
        """The tokens that mean the same text, by `meaning` of what they decode to."""
        found: dict[str, list[int]] = {}
        for token, content in enumerate(self.token_bytes):
            try:
                text = meaning(content.decode("utf-8")) if content else ""
            except UnicodeDecodeError:  # part of a character
                continue
            if text:
                found.setdefault(text, []).append(token)
        return {text: tuple(tokens) for text, tokens in found.items()}

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        """The tokens that add the same bytes to a text."""
        found: dict[bytes, list[int]] = {}
        for token, content in enumerate(self.token_bytes):
            if content:
                found.setdefault(content, []).append(token)
        return {content: tuple(tokens) for content, tokens in found.items()}

    def _bytes(self, token: int) -> bytes | None:
        piece = self._full.id_to_token(token)
        if piece is None or token in self._control:
            return None
        if self._byte_level:
            if all(character in _BYTE_OF for character in piece):
                return bytes(_BYTE_OF[character] for character in piece)
            return piece.encode("utf-8")  # an added run of spaces is stored as it reads
        if self._word_piece:
            return (piece.removeprefix("##") if piece.startswith("##") else " " + piece).encode("utf-8")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode("utf-8")


def _size(parsed: dict[str, Any]) -> int:
    """One more than the greatest id."""
    vocab = parsed["model"]["vocab"]
    known = vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
    return 1 + max([*known, *(token["id"] for token in parsed["added_tokens"])], default=-1)


def meaning(text: str) -> str:
    """Reduce a text to what it says: no outer white space, no case, one Unicode form (NFKC)."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).strip().casefold()).strip()


def _without_control_tokens(
    full: tokenizers.Tokenizer, parsed: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Make the tokenizers of a text at the start of a prompt, and inside it. Making one from JSON takes a while."""
    if _out_of_reach(parsed):  # the tables can be those of `full`: without its added tokens nothing leads to them
        plain = tokenizers.Tokenizer(full.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if parsed.get(part):
                setattr(plain, part, getattr(full, part))
        definition = parsed
    else:
        definition = _stripped(parsed)
        plain = _made_of(definition)
    inner = _without_dummy_prefix(definition)
    if all(inner[part] == definition.get(part) for part in ("normalizer", "pre_tokenizer")):
        return plain, plain
    return plain, _made_of(inner if definition is not parsed else _without_dummy_prefix(_stripped(parsed)))


def _made_of(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(orjson.dumps(definition))


def _out_of_reach(parsed: dict[str, Any]) -> bool:
    """Say whether no text leads a BPE vocabulary to a control token: no merge touches one, no word is looked up."""
    model = parsed["model"]
    others = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(name) for name in others):
        return False
    added = [token["content"] for token in parsed["added_tokens"]]
    if any(len(content) < 2 or not content.strip() or content == model.get("unk_token") for content in added):
        return False
    control = set(added)
    merges = model["merges"]
    pairs = merges if merges and isinstance(merges[0], list) else [merge.split(" ", 1) for merge in merges]
    return not any(left in control or right in control or left + right in control for left, right in pairs)


def _stripped(parsed: dict[str, Any]) -> dict[str, Any]:
    """Take the control tokens out of a tokenizer's definition, so that no text encodes to one."""
    control = {token["content"] for token in parsed["added_tokens"] if token["content"].strip()}
    model = dict(parsed["model"])
    if isinstance(model["vocab"], dict):
        gone = control - {model.get("unk_token")}
        model["vocab"] = {piece: token for piece, token in model["vocab"].items() if piece not in gone}
        if "merges" in model:  # sentencepiece conversions hold merges that end in </s>
            pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
            model["merges"] = [
                [left, right]
                for left, right in pairs
                if left not in control and right not in control and left + right not in control
            ]
    else:  # Unigram: a list whose positions are the ids, so a piece is made unspeakable instead
        model["vocab"] = [
            [f"\0{place}\0", -1e9] if piece in control and place != model.get("unk_id") else [piece, score]
            for place, (piece, score) in enumerate(model["vocab"])
        ]
    added = [token for token in parsed["added_tokens"] if not token["content"].strip()]
    return {**parsed, "model": model, "added_tokens": added, **dict.fromkeys(_AROUND)}


_AROUND = ("post_processor", "truncation", "padding")
"""Parts of a tokenizer that put something around a text, or cut it."""


def _without_dummy_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """Take out the space that sentencepiece models put before a text, for text inside a prompt."""
    normalizer, splitter = copy.deepcopy([definition.get("normalizer"), definition.get("pre_tokenizer")])
    if normalizer and normalizer["type"] == "Prepend":
        normalizer = None
    elif normalizer and normalizer["type"] == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
    for part in [splitter, *splitter.get("pretokenizers", [])] if splitter else []:
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    return {**definition, "normalizer": normalizer, "pre_tokenizer": splitter}


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_of()
