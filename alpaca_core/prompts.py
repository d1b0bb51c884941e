"""Every prompt text of the project, and how text becomes a prompt.

Text of a template and text of a user between two control tokens are encoded as one string, since
splitting at the fields would change the tokens that the model was trained on. Control tokens are put in
by id, from the template alone, so that user text can never become one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.model import DEFAULT_ADAPTER, LanguageModel, check_model
from alpaca_core.spec import Label, TemplateName
from alpaca_core.tokenizer import Tokenizer

# Stanford Alpaca, train.py, PROMPT_DICT: https://github.com/tatsu-lab/stanford_alpaca
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_MARKERS = frozenset({"### Instruction:", "### Input:", "### Response:"})

# The two prompts of the notebook that this project grew from; the first is zero-shot chain of thought
# (Kojima et al. 2022, arXiv 2205.11916) asked for as a paragraph.
CHAIN_OF_THOUGHT = "Write a paragraph to answer the following question. Think step by step. {question}"
CONCLUDE = "Answer the following question '{question}' given these steps. {reasoning}"
CONCLUDE_DIRECTLY = "{question}"

# P(True), Kadavath et al. 2022, arXiv 2207.05221, section 3, asked as yes or no.
VERIFY = "Question: {question}\nProposed answer: {answer}\nIs the proposed answer correct? Answer yes or no."
VERIFY_WITH_REASONING = (
    "Question: {question}\nReasoning: {reasoning}\nProposed answer: {answer}\n"
    "Is the proposed answer correct? Answer yes or no."
)

TEXT = "{text}"
"""Where a judge's instruction takes the text that is judged; without it the text is the instruction's input."""

# To go on with, not to obey: small models know a category where one is about to follow.
CLASSIFY = "Text: {text}\nCategory:"
SAME_MEANING = "Do these two sentences mean the same thing?"
PAIR = "Sentence 1: {first}\nSentence 2: {second}"
# The examples come first, so that all rows share them.
IS_OUTLIER = "These texts are of one kind:\n{reference}\n\nIs the next of that kind, too?\n{text}\nAnswer yes or no."
# G-Eval's form, Liu et al. 2023, arXiv 2303.16634, section 2: a criterion and a scale.
RATE = "{criterion}\nText: {text}\nRate it from {worst} (worst) to {best} (best). Answer with a number."

# The second judgment of a cascade: its instruction is not the first one's, so no calibration fits both by chance.
REASON_ABOUT = "{question}\nThe choices are: {labels}."
REASONED = "Use the reasoning below to answer.\n{question}"
REASONING = "{text}\nReasoning: {reasoning}"

NO_ANSWER = "(no answer)"
"""What the verifier is shown where the model ended without a word."""

SHOW_LABELS = "{instruction}\nAnswer with one of: {labels}."
SHOW_LETTERS = "{instruction}\n{labels}\nAnswer with a letter."

_SLOT = "\N{OBJECT REPLACEMENT CHARACTER}user text\N{OBJECT REPLACEMENT CHARACTER}"

_BLANK = "\N{EM SPACE}"
"""White space that no template has of its own: whether it is left shows whether the template strips."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's token ids; `escaped` says that a line of user text got a space before it."""

    ids: tuple[int, ...]
    escaped: bool


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A template with a hole: control tokens by id, text in between, `_SLOT` where the user's text goes."""

    parts: tuple[int | str, ...]
    strip_left: bool
    strip_right: bool

    def stripped(self, text: str) -> str:
        """Strip a user's text where the template does."""
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text

    def filled(self, text: str) -> list[int | str]:
        """Put a user's text into the hole."""
        return [part if isinstance(part, int) else text.join(part.split(_SLOT)) for part in self.parts]


class Template:
    """How a model wants to be asked; made once for a batch by `template_of`.

    Args:
        model: Whose tokenizer and context length count.
        name: Resolved template name, anything but ``auto``.

    Raises:
        InvalidRequest: If the model has no chat template, or one that cannot be used.
    """

    def __init__(self, model: LanguageModel, name: TemplateName) -> None:
        self.name = name
        self._info = model.info
        self._tokenizer = model.tokenizer
        self._markers: frozenset[str] = frozenset()
        self._chat: _Skeleton | None = None
        if name == "chat":
            if model.info.chat_template is None:
                raise InvalidRequest(
                    f"template='chat' needs a model with a chat template, but {model.info.name!r} has none. "
                    "Use template='alpaca', 'alpaca-lora' or 'raw'."
                )
            self._chat = model.tokenizer.remember(_chat_skeleton, model.info.chat_template)
            self._markers = _markers_of(self._chat)
        elif name in ("alpaca", "alpaca-lora"):
            self._markers = ALPACA_MARKERS

    def encode(self, instruction: str, input: str | None = None) -> Prompt:
        """Write one prompt.

        Args:
            instruction: What to do; for ``raw`` the whole prompt.
            input: What to do it with; a slot of its own in Alpaca's template, a paragraph elsewhere.

        Raises:
            RowRejected: With code ``prompt_too_long`` or ``invalid_text``.
        """
        self._refuse_hopeless(len(instruction) + len(input or ""))
        parts: Iterable[int | str]
        if self.name in ("alpaca", "alpaca-lora"):
            fields = {"instruction": self._escape(instruction), "input": self._escape(input or "")}
            escaped = fields != {"instruction": instruction, "input": input or ""}
            text = (ALPACA if input is None else ALPACA_WITH_INPUT).format(**fields)
            parts = [text + ("\n" if self.name == "alpaca-lora" else "")]
        else:
            text = instruction if input is None else f"{instruction}\n\n{input}"
            text = self._chat.stripped(text) if self._chat else text
            kept = self._escape(text)  # after stripping, which would take the escape away again
            escaped = kept != text
            parts = self._chat.filled(kept) if self._chat else [kept]
        ids = [] if self._chat else list(self._tokenizer.prefix_ids)
        for place, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self._tokenizer.encode(part, "segment" if place else "start")
        return Prompt(tuple(ids), escaped)

    def _escape(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        return "".join(f" {line}" if line.rstrip() in self._markers else line for line in lines)

    def _refuse_hopeless(self, characters: int) -> None:
        """Refuse a text that cannot fit before its megabytes are split into tokens."""
        least = characters // self._tokenizer.longest_piece
        if least > self._info.context_length:
            raise RowRejected(
                "prompt_too_long",
                f"prompt has {characters:,} characters, so at least {least:,} tokens, but {self._info.name!r} "
                f"reads {self._info.context_length:,}. Shorten the prompt.",
            )


def template_of(model: LanguageModel, template: TemplateName | None, adapter: str | None = DEFAULT_ADAPTER) -> Template:
    """Return the template that a batch asks for.

    Args:
        template: A name; None takes the spec's; ``auto`` takes what the adapter records, else the model's
            chat template, else Alpaca.
        adapter: The adapter that the batch's rows name.

    Raises:
        InvalidRequest: For an unknown adapter or template, or ``chat`` on a model without a chat template.
    """
    check_model(model)
    if template is not None and not (isinstance(template, str) and template in get_args(TemplateName)):
        known = ", ".join(get_args(TemplateName))
        given = repr(template)[:80] if isinstance(template, str) else type(template).__name__
        raise InvalidRequest(f"template is one of {known}, but got {given}. Name one of them, or None.")
    if adapter is not None and not isinstance(adapter, str):
        raise InvalidRequest(f"adapter is the name of LoRA weights, or None, but got a {type(adapter).__name__}.")
    try:
        used = model.info.adapter(adapter)
    except RowRejected as error:
        raise InvalidRequest(str(error)) from error
    name = template or model.info.template
    if name == "auto" and used is not None and used.template is not None:
        name = used.template
    if name == "auto":
        name = "chat" if model.info.chat_template else "alpaca"
    return Template(model, name)


def user_text(name: str, value: object) -> str:
    """Check one field of one row.

    Raises:
        RowRejected: With code ``not_text`` or ``empty_text``.
    """
    if not isinstance(value, str):
        raise RowRejected(
            "not_text",
            f"{name} must be a string, but got {value!r:.80} ({type(value).__name__}). Convert it, or drop the row.",
        )
    if not value.strip():
        raise RowRejected("empty_text", f"{name} must hold a visible character, but got {value!r:.80}. Drop the row.")
    return value


def with_labels(instruction: str, labels: Sequence[Label], letters: Sequence[str] | None = None) -> str:
    """Name the choices in the instruction, in their order; each on a line behind its letter where there are letters."""
    names = [label.name.strip() for label in labels]
    if letters is None:
        return SHOW_LABELS.format(instruction=instruction, labels=", ".join(names))
    lines = "\n".join(f"{letter}. {name}" for letter, name in zip(letters, names, strict=True))
    return SHOW_LETTERS.format(instruction=instruction, labels=lines)


class _Generation(Extension):
    """Accepts the tags around a response, which trainers read, and renders what is between them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse up to the closing tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _chat_skeleton(tokenizer: Tokenizer, chat_template: str) -> _Skeleton:
    """Render a chat template once, around a slot, so that only the template's own text is parsed for tokens."""
    rendered = _render(chat_template, tokenizer, f"{_BLANK}{_SLOT}{_BLANK}")
    strip_left, strip_right = f"{_BLANK}{_SLOT}" not in rendered, f"{_SLOT}{_BLANK}" not in rendered
    rendered = _render(chat_template, tokenizer, _SLOT)
    if _SLOT not in rendered:
        raise InvalidRequest("the model's chat template drops the user's message. Use template='alpaca' or 'raw'.")
    return _Skeleton(tuple(tokenizer.split_controls(rendered)), strip_left, strip_right)


def _render(chat_template: str, tokenizer: Tokenizer, content: str) -> str:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    # No strftime_now: a prompt that names the day would change its answer overnight.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    names: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "add_generation_prompt": True,
        "bos_token": tokenizer.piece(tokenizer.prefix_ids[0]) if tokenizer.prefix_ids else "",
        "eos_token": tokenizer.piece(tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
        **tokenizer.named,
    }
    try:
        return environment.from_string(chat_template).render(names)
    except Exception as error:  # the template's own program may raise any kind
        raise InvalidRequest(
            f"the model's chat template cannot write a single user message ({error}). Use template='alpaca' or 'raw'."
        ) from error


def _markers_of(skeleton: _Skeleton) -> frozenset[str]:
    """Whole lines of the template's own text that no control token guards, such as ``<|user|>`` spelt as text."""
    lines: set[str] = set()
    for place, part in enumerate(skeleton.parts):
        if isinstance(part, str):
            guarded = place > 0
            lines.update(line.rstrip() for line in part.splitlines()[int(guarded) :] if _SLOT not in line)
    return frozenset(line for line in lines if line.strip())
