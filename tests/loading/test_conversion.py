"""GGUF files and sentencepiece models become what they were made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import AutoModelForCausalLM

from alpaca_core.checkpoints import Checkpoint, find_base, read_json
from alpaca_core.engines.conversion import convert_tokenizer, unpack_gguf
from alpaca_core.errors import InvalidCheckpoint
from alpaca_core.spec import ModelSpec
from alpaca_core.tokenizer import Tokenizer

proto: Any = sentencepiece_model_pb2  # filled when it is imported, so a type checker sees nothing in it
WORDS = ["the", "a", "of", "Einstein", "Albert", "and", "first", "name", "is", "what", "two", "cans", "pierogi"]


def test_a_gguf_file_unpacks_to_the_weights_that_went_in(
    make_gguf: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    unpack_gguf(make_gguf(), folder)
    expected, found = load_file(tiny / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor.bfloat16()), key
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_an_unpacked_network_answers_as_the_one_that_went_in(
    make_gguf: Callable[..., Path], tiny: Path, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    unpack_gguf(make_gguf(), tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(found, [1, 5, 9, 30]), logits(expected, [1, 5, 9, 30]))


def test_a_gguf_file_s_tokenizer_and_chat_template_come_along(
    make_gguf: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    unpack_gguf(make_gguf(), tmp_path)
    expected = Tokenizer.from_file(tiny / "tokenizer.json")
    found = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for text in ("abab ba", " </s> ", "Ünï 🦙\n"):
        assert found.encode(text) == expected.encode(text)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_what_lies_beside_a_gguf_file_has_no_say(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    file, evidence = make_gguf(), tmp_path / "evidence"
    unpack_gguf(file, tmp_path / "alone")
    code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    beside = {
        "config.json": json.dumps({"model_type": "own", "hidden_size": 7, "auto_map": code}),
        "tokenizer_config.json": json.dumps({"eos_token": "<s>", "tokenizer_class": "Own", "auto_map": code}),
        "generation_config.json": '{"eos_token_id": 77}',
        "special_tokens_map.json": '{"eos_token": "<unk>"}',
        "added_tokens.json": '{"added": 260}',
        "chat_template.jinja": "beside",
        "own.py": f"import os; os.mkdir({str(evidence)!r})",
        "adapter_config.json": "{}",
    }
    for name, content in beside.items():
        (tmp_path / name).write_text(content)
    link = tmp_path / "elsewhere" / "link.gguf"
    link.parent.mkdir()
    link.symlink_to(file)
    for place, path in (("among", file), ("linked", link)):
        unpack_gguf(path, tmp_path / place)
        written = {path.name for path in (tmp_path / place).iterdir()}
        assert written == {path.name for path in (tmp_path / "alone").iterdir()}
        for name in written:
            assert (tmp_path / place / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert not evidence.exists()


def test_a_tensor_that_has_no_place_is_refused(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    file = make_gguf(extra="rope_freqs.weight")
    with pytest.raises(InvalidCheckpoint, match="holds 22 tensors for the 21 of a llama"):
        unpack_gguf(file, tmp_path / "out")


def test_another_family_is_refused(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"other.gguf"):
        unpack_gguf(make_gguf("other.gguf", architecture="qwen2"), tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 20, 500, -1000])
def test_a_torn_gguf_file_is_refused(make_gguf: Callable[..., Path], tmp_path: Path, keep: int) -> None:
    file = make_gguf()
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidCheckpoint, match="Fetch the file again"):
        unpack_gguf(file, tmp_path / "out")


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    """A folder with a sentencepiece model of LLaMA's kind: BPE, byte fallback, dummy prefix."""
    model = proto.ModelProto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    letters = sorted({*"".join(WORDS), "▁", "1", "é"})
    merged = dict.fromkeys(f"▁{word}"[:end] for word in WORDS for end in range(2, len(word) + 2))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁▁", *merged, *letters]
    model.trainer_spec.vocab_size = len(pieces)
    for place, piece in enumerate(pieces):
        kind = 2 if place == 0 else 3 if place < 3 else 6 if place < 259 else 1
        model.pieces.add(piece=piece, type=kind, score=float(min(259 - place, 0)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(model.SerializeToString())
    return tmp_path / "model"


SETTINGS = {
    "none": None,
    "the first LLaMA conversions' own": {
        "bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer",
        "model_max_length": 1000000000000000019884624838656,
    },
    "legacy": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "bos_token": "<s>"},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_converted_tokenizer_encodes_as_sentencepiece_does(
    sentencepiece: Path, tmp_path: Path, settings: dict[str, object] | None
) -> None:
    if settings is not None:
        (sentencepiece / "tokenizer_config.json").write_text(json.dumps(settings))
    convert_tokenizer(sentencepiece, tmp_path / "out")
    oracle = SentencePieceProcessor(model_file=str(sentencepiece / "tokenizer.model"))
    found = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    for text in ("Albert Einstein", "", " ", "  two cans ", "the\nfirst\tname", "🦙é", "a</s>", "x▁y"):
        if "</s>" not in text:
            assert found.encode(text) == oracle.encode(text), text
    assert found.prefix_ids == (oracle.bos_id(),)
    assert found.special_ids["</s>"] not in found.encode("a</s>")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_a_tokenizer_that_wants_no_bos_gets_none(sentencepiece: Path, tmp_path: Path) -> None:
    (sentencepiece / "tokenizer_config.json").write_text('{"add_bos_token": false, "chat_template": "x"}')
    convert_tokenizer(sentencepiece, tmp_path / "out")
    assert Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").prefix_ids == ()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "x"


def test_every_file_that_a_tokenizer_is_converted_from_counts(sentencepiece: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, sentencepiece)
    vocab = SentencePieceProcessor(model_file=str(sentencepiece / "tokenizer.model")).vocab_size()

    def variant(name: str, content: str) -> Checkpoint:
        folder = Path(shutil.copytree(sentencepiece, tmp_path / f"{name} {content}"))
        (folder / name).write_text(content)
        return find_base(ModelSpec(base_model=str(folder)), unpack_gguf, convert_tokenizer)

    found = [
        variant("README.md", ""),
        variant("chat_template.jinja", "one"),
        variant("chat_template.jinja", "two"),
        variant("added_tokens.json", json.dumps({"<added>": vocab})),
        variant("special_tokens_map.json", '{"pad_token": "<pad>"}'),
    ]
    assert [base.chat_template for base in found] == [None, "one", "two", None, None]
    added = [
        {token["content"] for token in read_json(base.tokenizer / "tokenizer.json")["added_tokens"]} for base in found
    ]
    assert [names - added[0] for names in added] == [set(), set(), set(), {"<added>"}, {"<pad>"}]
    assert len({base.digest for base in found}) == len({base.tokenizer for base in found}) == len(found)
    again = variant("unknown.json", '{"eos_token": "a"}')
    assert (again.digest, again.tokenizer) == (found[0].digest, found[0].tokenizer)


def test_a_model_of_another_kind_is_refused(sentencepiece: Path, tmp_path: Path) -> None:
    model = proto.ModelProto()
    model.ParseFromString((sentencepiece / "tokenizer.model").read_bytes())
    model.normalizer_spec.remove_extra_whitespaces = True
    (sentencepiece / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(InvalidCheckpoint, match=r"Put a tokenizer.json there"):
        convert_tokenizer(sentencepiece, tmp_path / "out")


def test_a_torn_model_is_refused(sentencepiece: Path, tmp_path: Path) -> None:
    (sentencepiece / "tokenizer.model").write_bytes(b"torn")
    with pytest.raises(InvalidCheckpoint, match="Fetch it again"):
        convert_tokenizer(sentencepiece, tmp_path / "out")
