"""What clients, host and engine tell one another: JSON, versioned, with sizes that end.

Numbers survive: Python writes a float so that reading it gives the same bits.
"""

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from alpaca_core import errors
from alpaca_core.errors import AlpacaError, HostUnavailable, InvalidRequest
from alpaca_core.model import (
    DEFAULT_ADAPTER,
    Completion,
    GenerateRow,
    ModelInfo,
    RowError,
    ScoreRow,
    Scores,
    Trie,
)
from alpaca_core.spec import ModelSpec, Sampling, Value

VERSION = 1
"""Of this protocol; client and host must have the same."""

UNIX_NAME = "alpaca"
"""The host's name in requests over its Unix socket."""

MOST_ROWS = 1024
"""Rows of one request; a client sends more rows in several."""

MOST_BYTES = 32 * 2**20
"""Bytes of one request's body."""

MOST_TOKENS = 1_000_000
"""Tokens of one row's prompt, or of its trie."""

Name = Annotated[str, Field(max_length=256)]
Kind = Literal["generate", "loglikelihood"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class GenerateJson(Value):
    """A `GenerateRow` in JSON. Token ids may be any whole numbers: the engine refuses rows of strange ones."""

    prompt_ids: tuple[int, ...] = Field(max_length=MOST_TOKENS)
    sampling: Sampling = Sampling()
    sample_index: int = 0
    adapter: Name | None = DEFAULT_ADAPTER

    @classmethod
    def of(cls, row: GenerateRow) -> "GenerateJson":
        """Write a row, whose values have been checked where they were made."""
        return cls.model_construct(
            prompt_ids=row.prompt_ids, sampling=row.sampling, sample_index=row.sample_index, adapter=row.adapter
        )

    def row(self) -> GenerateRow:
        """Read the row."""
        return GenerateRow(self.prompt_ids, self.sampling, self.sample_index, self.adapter)


class ScoreJson(Value):
    """A `ScoreRow` in JSON: node ``i`` of its trie is ``tokens[i]`` after node ``parents[i]``, or -1."""

    prompt_ids: tuple[int, ...] = Field(max_length=MOST_TOKENS)
    tokens: tuple[int, ...] = Field(max_length=MOST_TOKENS)
    parents: tuple[Annotated[int, Field(ge=-1)], ...] = Field(max_length=MOST_TOKENS)
    adapter: Name | None = DEFAULT_ADAPTER

    @model_validator(mode="after")
    def _is_trie(self) -> "ScoreJson":
        if len(self.tokens) != len(self.parents) or any(parent >= node for node, parent in enumerate(self.parents)):
            raise ValueError("a trie has one parent for each token, and each parent comes before its children.")
        if len(set(zip(self.parents, self.tokens, strict=True))) != len(self.tokens):
            raise ValueError("a trie tells every token after a node once, but one comes twice.")
        return self

    @classmethod
    def of(cls, row: ScoreRow) -> "ScoreJson":
        """Write a row, whose values have been checked where they were made."""
        trie = row.continuations
        return cls.model_construct(
            prompt_ids=row.prompt_ids, tokens=trie.tokens, parents=trie.parents, adapter=row.adapter
        )

    def row(self) -> ScoreRow:
        """Read the row."""
        return ScoreRow(self.prompt_ids, Trie(self.tokens, self.parents), self.adapter)


class GenerateRequest(Value):
    """Rows to generate a response for, each."""

    rows: tuple[GenerateJson, ...] = Field(max_length=MOST_ROWS)


class ScoreRequest(Value):
    """Rows to score."""

    rows: tuple[ScoreJson, ...] = Field(max_length=MOST_ROWS)


class ModelRequest(Value):
    """Asks for a model: the host answers what it is, and what rows have to call its adapters."""

    spec: ModelSpec = ModelSpec()


class ModelReply(Value):
    """A model as a spec means it. `adapters` maps the spec's names to those that rows have to say.

    Requests that bear its `identity` in ``alpaca-model`` are refused by a host of another model.
    """

    protocol: int = VERSION
    info: ModelInfo
    adapters: dict[str, str] = Field(default_factory=dict)
    identity: str = ""


class TokenizerReply(Value):
    """What a `Tokenizer` is made of."""

    definition: str
    eos_ids: tuple[int, ...]
    named: dict[str, str]


class StopRequest(Value):
    """Ends a host at once; with `idle`, only where it has had nothing to do for more than so many seconds."""

    idle: float | None = Field(default=None, ge=0)


class Status(Value):
    """A host at a glance. Memory in GiB, times in seconds, rows that wait or run, sums since its start.

    A model that is spread over several devices has all of them in `device`, as in ``cuda:0+cuda:1``.
    """

    protocol: int = VERSION
    version: str
    pid: int
    engine_pid: int | None
    key: str
    device: str
    state: Literal["loading", "ready", "leaving", "failed"]
    info: ModelInfo | None
    uptime: float
    idle: float
    memory_gib: float
    waiting: int
    running: int
    clients: int
    rows: int
    tokens: int
    tokens_per_second: float
    restarts: int
    queue_limit: int

    @property
    def well(self) -> bool:
        """Whether requests can succeed, now or when the model is loaded."""
        return self.state in ("loading", "ready")


Result = Completion | list[float] | RowError


def write_result(result: Result) -> dict[str, Any]:
    """Turn a row's result into JSON. A log of zero, which JSON has no number for, is written as a text."""
    if isinstance(result, RowError):
        return {"error": {"code": result.code, "message": result.message}}
    if isinstance(result, Completion):
        return {"completion": result.model_dump(mode="json")}
    numbers = [number if math.isfinite(number) else str(number) for number in result]
    return {"scores": numbers, "shape": getattr(result, "shape", "")}


def read_result(told: dict[str, Any]) -> Result:
    """Turn JSON back into a row's result."""
    if "completion" in told:
        return Completion.model_validate(told["completion"])
    if "scores" in told:
        return Scores(map(float, told["scores"]), told["shape"])
    return RowError.model_validate(told["error"])


def write_error(error: AlpacaError) -> dict[str, str]:
    """Turn an error of the project into JSON."""
    return {"type": type(error).__name__, "message": str(error)}


def read_error(told: object) -> AlpacaError:
    """Turn JSON back into the error: of its own class where that takes nothing but a message."""
    found = told if isinstance(told, dict) else {}
    kind = getattr(errors, str(found.get("type")), None)
    message = str(found.get("message", told))
    if isinstance(kind, type) and issubclass(kind, AlpacaError) and kind is not errors.RowRejected:
        return kind(message)
    return HostUnavailable(f"the host gave an error that is not known here: {message:.500}. Update both sides.")


def check_version(protocol: object) -> None:
    """Refuse a host that speaks otherwise.

    Raises:
        InvalidRequest: With both versions.
    """
    if protocol != VERSION:
        raise InvalidRequest(
            f"client and host speak one protocol, but this is version {VERSION} and the host has {protocol!r:.40}. "
            "Install the same prefect-alpaca on both."
        )
