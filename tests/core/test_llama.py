"""The notebook's chapters on tokens and on yes and no, on LLaMA's own tokenizer."""

from alpaca_core import describe_tokens, show_tokens, special_tokens
from alpaca_core.labels import find_spellings
from alpaca_core.prompts import Template
from alpaca_core.spec import YES_NO
from alpaca_core.tokenizer import Tokenizer
from tests.core.worlds import TableModel

# What the notebook prints, and the tokens that it lists for yes and no.
EINSTEIN = [1, 2694, 5465, 3337, 12304, 27626, 12304]
YES = {8241, 3582, 21143, 5574, 3009, 29979, 3869, 20652}
NO = {3782, 1217, 6632, 8824, 4541, 29940}


def test_a_text_shows_the_ids_that_the_notebook_prints(llama: Tokenizer) -> None:
    tokens = show_tokens(TableModel(llama), ["Einstein Ейнштейн"])[0]
    assert [token.id for token in tokens] == EINSTEIN
    assert "".join(token.text for token in tokens[1:]) == " Einstein Ейнштейн"
    assert [token.special for token in tokens] == [True] + [False] * 6


def test_single_ids_are_described_as_the_notebook_decodes_them(llama: Tokenizer) -> None:
    tokens = describe_tokens(TableModel(llama), [2694, 5465, 3337, 31999])
    assert [token.text for token in tokens] == [" Ein", "stein", " Е", "给"]
    assert [token.piece for token in tokens] == ["▁Ein", "stein", "▁Е", "给"]
    assert not any(token.special for token in tokens)


def test_the_special_tokens_are_unknown_begin_and_end(llama: Tokenizer) -> None:
    assert [(token.id, token.piece) for token in special_tokens(TableModel(llama))] == [
        (0, "<unk>"),
        (1, "<s>"),
        (2, "</s>"),
    ]


def test_every_token_of_the_notebooks_lists_is_found_once_and_those_that_it_missed(llama: Tokenizer) -> None:
    model = TableModel(llama)
    for template in ("alpaca", "alpaca-lora"):
        prompt = Template(model, template).encode("Are logits a good way to ask a model?")
        spellings = find_spellings(llama, YES_NO, prompt.ids)
        for label, listed in enumerate((YES, NO)):
            found = [sequence for sequence in spellings.sequences(label) if len(sequence) == 1]
            assert len(found) == len(set(found))
            assert {token for (token,) in found} > listed


def test_a_control_tokens_name_in_a_text_is_text(llama: Tokenizer) -> None:
    for name, token in llama.special_ids.items():
        assert token not in llama.encode(f"before {name} after {name}")
        assert name in llama.decode(llama.encode(f"before {name}"))
