"""The verb `generate`, and what every verb that generates is made of."""

from collections.abc import Sequence

from alpaca_core.errors import InvalidRequest
from alpaca_core.model import DEFAULT_ADAPTER, Completion, GenerateRow, LanguageModel, RowError
from alpaca_core.prompts import template_of, user_text
from alpaca_core.rows import Progress, check_rows, column, map_rows, run_rows
from alpaca_core.spec import GREEDY, Sampling, TemplateName

Slot = tuple[str, str | None]
"""An instruction, and the input that it works on."""


def generate(
    model: LanguageModel,
    prompts: Sequence[str | RowError],
    sampling: Sampling = GREEDY,
    *,
    inputs: Sequence[str | RowError | None] | None = None,
    sample_indices: Sequence[int] | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Completion | RowError]:
    """Generate one response to each prompt.

    Args:
        model: From `load_model`, or a `FakeModel`.
        prompts: Instructions, put into the template; whole prompts where the template is ``raw``.
        sampling: How tokens are chosen; greedy unless it says otherwise.
        inputs: What each instruction works on; None for none.
        sample_indices: Which sample of its prompt each row is, 0 unless said: the same prompt, seed and
            index give the same response, another index another one.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of rows just finished.

    Returns:
        A `Completion` for each prompt, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: If the lists differ in length, or the adapter or template is unknown.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> generate(FakeModel("Suri and Huacaya."), ["Name two breeds of alpaca."])[0].text
        'Suri and Huacaya.'
    """
    check_rows("prompts", prompts)

    def slot(prompt: object, input: object) -> Slot:
        return user_text("a prompt", prompt), None if input is None else user_text("an input", input)

    slots = map_rows(slot, prompts, column("inputs", inputs, prompts))
    return complete(model, slots, sampling, sample_indices, template, adapter, progress)


def complete(
    model: LanguageModel,
    slots: Sequence[Slot | RowError],
    sampling: Sampling,
    sample_indices: Sequence[int] | None,
    template: TemplateName | None,
    adapter: str | None,
    progress: Progress | None,
) -> list[Completion | RowError]:
    """Generate a response for each (instruction, input) pair; errors among the pairs stay where they are."""
    indices = [0] * len(slots) if sample_indices is None else column("sample_indices", sample_indices, slots)
    for place, index in enumerate(indices):
        if not isinstance(index, int) or not 0 <= index < 2**64:
            raise InvalidRequest(
                f"sample_indices are whole numbers from 0 to 2**64 - 1, but that of row {place:,} is not. Count from 0."
            )
    if not isinstance(sampling, Sampling):
        raise InvalidRequest(f"sampling is a Sampling, but got {sampling!r:.80}. Leave it out for greedy responses.")
    writer = template_of(model, template, adapter)
    prompts = map_rows(lambda slot: writer.encode(*slot), slots)
    rows = map_rows(lambda prompt, index: GenerateRow(prompt.ids, sampling, index, adapter), prompts, indices)
    return map_rows(
        lambda completion, prompt: completion.model_copy(update={"escaped": prompt.escaped}),
        run_rows(model.generate, rows, progress),
        prompts,
    )
