"""What an engine is: rows of token ids in, results out as they finish. Two methods, no more.

Everything else in `alpaca_core` is written on `LanguageModel.generate` and `LanguageModel.loglikelihood`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

from pydantic import Field

from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.spec import Sampling, TemplateName, Value
from alpaca_core.tokenizer import Tokenizer

ErrorCode = Literal[
    "not_text",  # the row is None, a number, a list …
    "empty_text",  # nothing but white space
    "invalid_text",  # a lone surrogate: not encodable as UTF-8
    "prompt_too_long",  # prompt and answer do not fit the model's context
    "unknown_adapter",  # the row names an adapter that the model does not have
    "not_finite",  # the model's logits hold NaN or infinity for this row
    "not_enough_memory",  # the row finds no memory even alone
    "engine_failed",  # the engine died of the row, more than once
    "no_spelling",  # a label cannot be told apart from the others after this prompt
    "not_supported",  # the model's engine does not do what the row asks for
]
ERROR_CODES: tuple[str, ...] = get_args(ErrorCode)

DEFAULT_ADAPTER = "default"
"""Name of the spec's own adapter; on a model without one it means the bare base."""


class RowError(Value):
    """What a row gets in place of a result: a code for programs, a sentence for people."""

    code: ErrorCode
    message: str

    @classmethod
    def of(cls, error: RowRejected) -> "RowError":
        """Turn a rejection into the value that stands in the row's place."""
        return cls.model_validate({"code": error.code, "message": str(error)})


class Completion(Value):
    """A generated response: the response only, cut by token count, without special tokens.

    `finish_reason` is ``stop`` where the model ended by itself, ``length`` where `max_new_tokens` did.
    `escaped` says that a line of the prompt that equalled a template's marker got a leading space.
    `shape` is the model's `ModelInfo.shape` when the response was computed, empty where its bits do not depend on it.
    """

    text: str
    token_ids: tuple[int, ...] = Field(repr=False)
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    escaped: bool = False
    shape: str = ""


class Scores(list[float]):
    """Numbers of one row, and the `shape` of the passes that they came of, as in `ModelInfo`."""

    def __init__(self, numbers: Iterable[float], shape: str = "") -> None:
        super().__init__(numbers)
        self.shape = shape


def shapes_of(*results: object) -> str:
    """Name the shapes that results were computed in, each once; usually it is one, or none.

    Example:
        >>> shapes_of(Scores([0.5], "32x2048"), Scores([0.1], "16x1024"), [0.2])
        '32x2048, 16x1024'
    """
    return ", ".join(dict.fromkeys(shape for each in results if (shape := getattr(each, "shape", ""))))


class AdapterInfo(Value):
    """One loaded adapter: its name for rows, the digest of its weights, the template that it records."""

    name: str
    source: str
    digest: str
    revision: str | None = None
    template: TemplateName | None = None


class ModelInfo(Value):
    """What a loaded model is, in JSON.

    `digest` covers everything that can change a result, versions of libraries aside: base weights,
    tokenizer, adapters and their templates, quantization, dtype, merging. `memory_gib` is what the
    weights take on their device, in GiB; `load_seconds` the load, imports included.
    `rows_independent` says whether a row's result is the same in any company, bit for bit, with beams too. On a
    GPU that holds for one `shape`, rows of a decode step by tokens of a pass over prompts, which `digest` covers.
    Where a GPU runs out of memory the shape becomes a smaller one, and `info` of the model another.
    `unshaped_digest` is `digest` without the shape, where that counts: what calibrations are bound to.
    """

    name: str
    digest: str
    engine: str
    device: str
    dtype: str
    quantization: str
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    template: TemplateName = "auto"
    chat_template: str | None = Field(default=None, repr=False)
    adapters: tuple[AdapterInfo, ...] = ()
    revision: str | None = None
    rows_independent: bool = False
    shape: str = ""
    unshaped_digest: str = ""
    memory_gib: float = 0.0
    load_seconds: float = 0.0

    def adapter(self, name: str | None) -> AdapterInfo | None:
        """Return the adapter that a row means; None is the bare base.

        Raises:
            RowRejected: If the model has no adapter of that name.
        """
        found = next((adapter for adapter in self.adapters if adapter.name == name), None)
        if found is None and name not in (None, DEFAULT_ADAPTER):
            known = ", ".join(repr(adapter.name) for adapter in self.adapters) or "none"
            raise RowRejected(
                "unknown_adapter",
                f"a row names one of the model's adapters ({known}), but this one says {name!r}. "
                "Add it to ModelSpec.adapters, or use None for the bare base.",
            )
        return found


@dataclass(frozen=True)
class Trie:
    """Token sequences with shared beginnings, told once.

    Node ``i`` is token ``tokens[i]`` after node ``parents[i]``, which is smaller than ``i``; -1 is the
    end of the prompt.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> tuple["Trie", list[int]]:
        """Build the trie of non-empty `sequences`; also return each sequence's last node."""
        nodes: dict[tuple[int, int], int] = {}
        ends = []
        for sequence in sequences:
            node = -1
            for token in sequence:
                node = nodes.setdefault((node, token), len(nodes))
            ends.append(node)
        return cls(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes)), ends

    def depths(self) -> tuple[int, ...]:
        """Depth of each node; a node right after the prompt has depth 1."""
        return self._depths

    def path(self, node: int) -> list[int]:
        """The nodes from the prompt's end to `node`, which comes last."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def paths(self, nodes: Collection[int]) -> list[list[int]]:
        """Paths that together hold `nodes`, with all their ancestors, and of which none is part of another."""
        above = {self.parents[node] for node in nodes}
        return [self.path(node) for node in sorted(nodes) if node not in above]

    @cached_property
    def deepest(self) -> int:
        """Tokens of the longest path; 0 where there is none."""
        return max(self._depths, default=0)

    @cached_property
    def extremes(self) -> tuple[int, int]:
        """The least token and the largest; 0 and 0 where there is none."""
        return min(self.tokens, default=0), max(self.tokens, default=0)

    @cached_property
    def _depths(self) -> tuple[int, ...]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)


@dataclass(frozen=True, slots=True)
class GenerateRow:
    """One response to generate: `sample_index` counts the samples that are drawn of one prompt."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    sample_index: int = 0
    adapter: str | None = DEFAULT_ADAPTER


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """Continuations of one prompt to score, as a trie."""

    prompt_ids: tuple[int, ...]
    continuations: Trie
    adapter: str | None = DEFAULT_ADAPTER


class LanguageModel(Protocol):
    """A loaded model. Rows come out as they finish, in any order, each with its index.

    Closing an iterator cancels the rows that have not come out. Neither method raises for a bad row:
    that row's result is a `RowError`. Both may be called from several threads.
    """

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Generate one response for each row."""
        ...

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score each row's trie: for each node log P(token | prompt, path to its parent), in nats; perhaps `Scores`."""
        ...


class Feed(Protocol):
    """Rows on their way through an engine: they may come at any time, and come out as they end.

    One thread uses a feed; several feeds of one model may share its passes.
    """

    def add(self, key: int, row: GenerateRow | ScoreRow) -> None:
        """Take a row of any kind. One that is refused comes out as a `RowError` at the next step."""
        ...

    def drop(self, key: int) -> None:
        """Forget a row: its result never comes out. Of a key that is not there nothing is said."""
        ...

    def step(self) -> list[tuple[int, Completion | list[float] | RowError]]:
        """Take one step of the engine; return the rows that have ended, by their keys."""
        ...

    def __len__(self) -> int:
        """Count the rows that have not come out."""
        ...


def check_model(model: object) -> None:
    """Refuse what is no loaded model: a `ModelSpec` is the usual slip, since tasks take one.

    Raises:
        InvalidRequest: With what it is.
    """
    if not all(hasattr(model, name) for name in ("info", "tokenizer", "generate", "loglikelihood")):
        raise InvalidRequest(
            f"model is a loaded model, but got {model!r:.80}. Write `with load_model(spec) as model:` around the call."
        )


def check_fits(prompt_tokens: int, new_tokens: int, info: ModelInfo, setting: str = "max_new_tokens") -> None:
    """Refuse a row that would run beyond the model's context; nothing is ever cut silently.

    Raises:
        RowRejected: With code ``prompt_too_long``.
    """
    room = info.context_length - prompt_tokens
    over = new_tokens - room
    if over > 0:
        if prompt_tokens <= over:  # without any prompt it would not fit either
            remedy = f"Lower {setting} to {room:,}" if room > 0 else f"Shorten the prompt, and lower {setting}"
        else:
            remedy = f"Shorten the prompt by {over:,} tokens" + (f" or lower {setting}" if room > 0 else "")
        raise RowRejected(
            "prompt_too_long",
            f"prompt has {prompt_tokens:,} tokens and {setting} is {new_tokens:,}, but {info.name!r} reads "
            f"{info.context_length:,}. {remedy}.",
        )
