"""How fast rows are done: a model that counts the tokens of what comes out of it."""

import time
from collections.abc import Iterator, Sequence

from alpaca_core.model import Completion, GenerateRow, LanguageModel, ModelInfo, RowError, ScoreRow
from alpaca_core.spec import Value
from alpaca_core.tokenizer import Tokenizer


class Speed(Value):
    """What a call did, and how long it took.

    Args:
        rows: Rows that the caller gave, those that failed included.
        seconds: Of the whole call.
        tokens_read: Of the prompts of all rows that the model finished, those that it still knew included.
        tokens_written: Of all responses.

    Example:
        >>> speed = Speed(rows=4, seconds=2.0, tokens_read=100, tokens_written=30)
        >>> speed.rows_per_second, speed.tokens_per_second
        (2.0, 65.0)
        >>> print(speed)
        4 rows in 2.0 s: 2.0 rows/s, 65 tokens/s (100 read, 30 written)
    """

    rows: int
    seconds: float
    tokens_read: int
    tokens_written: int

    @property
    def rows_per_second(self) -> float:
        """Rows by second."""
        return self.rows / max(self.seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Tokens by second, read and written together."""
        return (self.tokens_read + self.tokens_written) / max(self.seconds, 1e-9)

    @property
    def rates(self) -> str:
        """Both rates, in words."""
        return f"{self.rows_per_second:,.1f} rows/s, {self.tokens_per_second:,.0f} tokens/s"

    def __str__(self) -> str:
        done = f"{self.rows:,} row{'' if self.rows == 1 else 's'} in {self.seconds:.1f} s"
        return f"{done}: {self.rates} ({self.tokens_read:,} read, {self.tokens_written:,} written)"


class Metered(LanguageModel):
    """A model that counts; its results are those of the model that it is made of.

    Args:
        model: Any loaded model.

    Example:
        >>> from alpaca_core import generate
        >>> from alpaca_core.testing import FakeModel
        >>> model = Metered(FakeModel("Suri."))
        >>> rows = generate(model, ["Name a breed."])
        >>> model.speed(rows=1).tokens_written
        5
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._read = self._written = 0
        self._started = time.perf_counter()

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self._model.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._model.tokenizer

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """As the model, and counted."""
        for index, result in self._model.generate(rows):
            if isinstance(result, Completion):
                self._read += result.prompt_tokens
                self._written += result.completion_tokens
            yield index, result

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """As the model, and counted."""
        for index, result in self._model.loglikelihood(rows):
            if not isinstance(result, RowError):
                self._read += len(rows[index].prompt_ids)
            yield index, result

    def restart(self) -> None:
        """Count from now on."""
        self._read = self._written = 0
        self._started = time.perf_counter()

    def speed(self, rows: int) -> Speed:
        """Tell what was done since this was made, or since `restart`, for so many rows of a caller."""
        seconds = time.perf_counter() - self._started
        return Speed(rows=rows, seconds=seconds, tokens_read=self._read, tokens_written=self._written)
