"""What a caller may choose, and what is refused with a reason."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alpaca_core import Label, ModelSpec, NamedAdapter, Sampling
from alpaca_core.errors import InvalidRequest


def test_no_argument_means_the_embedded_model() -> None:
    assert ModelSpec() == ModelSpec.preset("embedded")


def test_an_emptied_field_of_a_form_is_unset() -> None:
    emptied = {"revision": "", "adapter": "", "adapter_revision": "", "device_map": ""}
    assert ModelSpec.model_validate(emptied) == ModelSpec()


def test_the_notebooks_model_is_a_preset() -> None:
    assert ModelSpec.preset("alpaca-7b") == ModelSpec(
        base_model="huggyllama/llama-7b", adapter="tloen/alpaca-lora-7b", quantization="int8"
    )
    with pytest.raises(InvalidRequest, match="alpaca-7b"):
        ModelSpec.preset("gpt-4")


@pytest.mark.parametrize(
    "fields",
    [
        {"base_modle": "x"},
        {"base_model": ""},
        {"quantization": "int3"},
        {"dtype": "float8"},
        {"device": "tpu"},
        {"device": "cuda:x"},
        {"device": "cpu", "device_map": "auto"},
        {"revision": "abc"},
        {"adapter_revision": "abc"},
        {"merge_adapter": True},
        {"adapter": "a/b", "merge_adapter": True, "quantization": "int8"},
        {"adapter": "a/b", "merge_adapter": True, "adapters": [{"name": "x", "source": "c/d"}]},
        {"adapters": [{"name": "x", "source": "c/d"}, {"name": "x", "source": "e/f"}]},
        {"adapters": [{"name": "default", "source": "c/d"}]},
        {"template": "vicuna"},
        {"batch_size": 0},
        {"memory_share": 0},
        {"memory_share": 1.01},
        {"memory_share": math.nan},
    ],
    ids=repr,
)
def test_a_spec_that_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1, "top_p": 0},
        {"temperature": 1, "top_p": 1},
        {"temperature": 1, "top_p": math.nan},
        {"temperature": 1, "top_k": 0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"num_beams": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"temprature": 1},
    ],
    ids=repr,
)
def test_sampling_without_effect_or_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Sampling.model_validate(fields)


@given(
    st.builds(
        Sampling,
        temperature=st.floats(0.01, 10),
        top_k=st.none() | st.integers(1, 100),
        top_p=st.none() | st.floats(0.01, 0.99),
        num_beams=st.integers(1, 8),
        max_new_tokens=st.integers(1, 4096),
        seed=st.integers(0, 2**64 - 1),
    )
)
def test_values_survive_json_and_are_hashable(sampling: Sampling) -> None:
    assert Sampling.model_validate_json(sampling.model_dump_json()) == sampling
    spec = ModelSpec(adapter="a/b", adapters=(NamedAdapter(name="x", source="c/d"),))
    assert hash(ModelSpec.model_validate_json(spec.model_dump_json())) == hash(spec)


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Sampling().temperature = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Label(name=" ")
