"""Where adapters are found, which configurations are taken, and how pickles become safetensors."""

import json
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_core.adapters import find_adapters, read_lora
from alpaca_core.cache import sha256_of
from alpaca_core.errors import DigestMismatch, InvalidAdapter, InvalidRequest, ModelNotFound, UnsafeCheckpoint
from alpaca_core.host.beside import still_there
from alpaca_core.loading import import_adapter
from alpaca_core.spec import ModelSpec, NamedAdapter
from tests.loading.conftest import SPOILT, spoil


def test_adapters_come_in_the_spec_s_order_its_own_first(make_adapter: Callable[..., Path]) -> None:
    one, two = make_adapter("one"), make_adapter("two", seed=2)
    spec = ModelSpec(adapter=str(two), adapters=(NamedAdapter(name="b", source=str(one)),))
    found = find_adapters(spec)
    assert [(adapter.info.name, adapter.folder) for adapter in found] == [("default", two), ("b", one)]
    assert found[0].info.digest != found[1].info.digest
    assert find_adapters(ModelSpec()) == ()


def test_an_adapter_s_template_is_what_lies_beside_it(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter()
    spec = ModelSpec(adapter=str(folder))
    assert find_adapters(spec)[0].info.template is None
    (folder / "alpaca.json").write_text('{"template": "alpaca-lora"}')
    assert find_adapters(spec)[0].info.template == "alpaca-lora"


@pytest.mark.parametrize("content", ['{"template": "jinja"}', "{", "", "[]", '{"unknown": 1}'])
def test_a_sidecar_of_one_s_own_that_cannot_be_read_is_to_be_mended_and_not_its_folder_deleted(
    make_adapter: Callable[..., Path], content: str
) -> None:
    sidecar = make_adapter() / "alpaca.json"
    sidecar.write_text(content)
    with pytest.raises(InvalidAdapter, match=r"Fix or remove that file") as caught:
        find_adapters(ModelSpec(adapter=str(sidecar.parent)))
    assert str(sidecar) in str(caught.value)
    assert "Delete" not in str(caught.value)


def test_an_unreadable_manifest_of_an_imported_adapter_is_to_be_deleted_with_its_folder(
    make_pickled: Callable[..., Path],
) -> None:
    source = make_pickled()
    folder = import_adapter(source)
    (folder / "alpaca.json").write_text("{")
    for named in (source, folder):
        with pytest.raises(DigestMismatch, match="Delete that folder"):
            find_adapters(ModelSpec(adapter=str(named)))


def test_a_hub_adapter_is_read_from_its_cache(make_adapter: Callable[..., Path], publish: Callable[..., str]) -> None:
    commit = publish(make_adapter(), "someone/lora")
    (adapter,) = find_adapters(ModelSpec(adapter="someone/lora"))
    assert adapter.info.revision == commit
    (pinned,) = find_adapters(ModelSpec(adapter="someone/lora", adapter_revision=commit))
    assert pinned.info == adapter.info


def test_an_adapter_that_is_not_there_is_not_found(tmp_path: Path, publish: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("nobody/no-lora", str(tmp_path / "nothing"), str(tmp_path / "empty")):
        with pytest.raises(ModelNotFound):
            find_adapters(ModelSpec(adapter=source))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("r", 0),
        ("r", None),
        ("target_modules", 3),
        ("bias", "all"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("enable_lora", [True, False, True]),
        ("init_lora_weights", "pissa_niter_16"),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("trainable_token_indices", [1]),
        ("a_field_of_tomorrow", "on"),
    ],
)
def test_what_is_no_plain_lora_is_refused(make_adapter: Callable[..., Path], field: str, value: object) -> None:
    path = make_adapter() / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InvalidAdapter, match=f"{field}="):
        read_lora(path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_torn_configuration_is_refused(make_adapter: Callable[..., Path], content: str) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(InvalidAdapter, match="JSON"):
        find_adapters(ModelSpec(adapter=str(folder)))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_cannot_be_read_is_an_invalid_adapter(
    make_adapter: Callable[..., Path], file: str, how: str
) -> None:
    folder = make_adapter()
    named = NamedAdapter(name="a", source=str(folder))
    (digest,) = [adapter.info.digest for adapter in find_adapters(ModelSpec(adapters=(named,)))]
    assert still_there({digest: named}) == {digest: named}
    spoil(folder / file, how)
    with pytest.raises((InvalidAdapter, ModelNotFound), match=str(folder)) as caught:
        find_adapters(ModelSpec(adapters=(named,)))
    assert isinstance(caught.value, InvalidAdapter) or "link" in how
    assert still_there({digest: named}) == {}


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(make_pickled: Callable[..., Path]) -> None:
    folder = make_pickled()
    with pytest.raises(UnsafeCheckpoint, match=f"`alpaca import-adapter {folder}`"):
        find_adapters(ModelSpec(adapter=str(folder)))


def test_the_preset_s_adapter_is_refused_with_its_command_without_asking_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alpaca_core.adapters.fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UnsafeCheckpoint, match="`alpaca import-adapter tloen/alpaca-lora-7b`"):
        find_adapters(ModelSpec.preset("alpaca-7b"))
    with pytest.raises(UnsafeCheckpoint, match="`alpaca import-adapter tloen/alpaca-lora-7b --revision abc`"):
        find_adapters(ModelSpec(adapter="tloen/alpaca-lora-7b", adapter_revision="abc"))


def test_an_imported_adapter_holds_the_same_tensors_and_is_found_by_its_source(
    make_pickled: Callable[..., Path], cache: Path
) -> None:
    source = make_pickled()
    folder = import_adapter(source)
    assert folder.parent == cache / "adapters"
    (adapter,) = find_adapters(ModelSpec(adapter=str(source)))
    assert adapter.folder == folder
    expected = torch.load(source / "adapter_model.bin", weights_only=True)
    found = load_file(folder / "adapter_model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    sidecar = json.loads((folder / "alpaca.json").read_text())
    assert sidecar["source"] == str(source)
    assert sidecar["source_sha256"]["adapter_model.bin"] == sha256_of(source / "adapter_model.bin")
    assert sidecar["sha256"]["adapter_model.safetensors"] == sha256_of(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], "enable_lora" in config) == (16, 16, False)


def test_a_pickle_may_be_named_by_its_file(make_pickled: Callable[..., Path]) -> None:
    file = make_pickled() / "adapter_model.bin"
    folder = import_adapter(file, template="alpaca")
    (adapter,) = find_adapters(ModelSpec(adapter=str(file)))
    assert (adapter.folder, adapter.info.template) == (folder, "alpaca")


def test_the_notebook_s_adapter_is_imported_from_the_hub_with_its_template(
    make_pickled: Callable[..., Path], publish: Callable[..., str]
) -> None:
    commit = publish(make_pickled(), "tloen/alpaca-lora-7b")
    import_adapter("tloen/alpaca-lora-7b")
    (adapter,) = find_adapters(ModelSpec.preset("alpaca-7b"))
    assert (adapter.info.template, adapter.info.revision) == ("alpaca-lora", commit)
    with pytest.raises(UnsafeCheckpoint, match="--revision"):
        find_adapters(ModelSpec(adapter="tloen/alpaca-lora-7b", adapter_revision=commit))
    import_adapter("tloen/alpaca-lora-7b", revision=commit, template="raw")
    (pinned,) = find_adapters(ModelSpec(adapter="tloen/alpaca-lora-7b", adapter_revision=commit))
    assert (pinned.info.template, pinned.info.digest) == ("raw", adapter.info.digest)


def test_a_pickle_that_is_written_again_has_to_be_imported_again(make_pickled: Callable[..., Path]) -> None:
    source = make_pickled()
    import_adapter(source)
    spec = ModelSpec(adapter=str(source))
    before = find_adapters(spec)[0].info.digest
    torch.save({key: 2 * value for key, value in torch.load(source / "adapter_model.bin", weights_only=True).items()},
               source / "adapter_model.bin")  # fmt: skip
    with pytest.raises(DigestMismatch, match=r"has changed since it was imported.*import-adapter"):
        find_adapters(spec)
    import_adapter(source)
    assert find_adapters(spec)[0].info.digest != before


def test_a_flipped_bit_in_an_imported_adapter_is_found(make_pickled: Callable[..., Path]) -> None:
    source = make_pickled()
    weights = import_adapter(source) / "adapter_model.safetensors"
    find_adapters(ModelSpec(adapter=str(source)))
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for times in ((stat.st_atime_ns, stat.st_mtime_ns), (1, 1)):
        os.utime(weights, ns=times)
        with pytest.raises(DigestMismatch, match=r"adapter_model.safetensors"):
            find_adapters(ModelSpec(adapter=str(source)))


def test_an_import_may_go_to_a_new_folder_of_one_s_own(make_pickled: Callable[..., Path], tmp_path: Path) -> None:
    source, before = make_pickled(), {*tmp_path.iterdir()}
    out = import_adapter(source, out=tmp_path / "out", template="raw")
    assert {*tmp_path.iterdir()} - before == {out, tmp_path / "cache"}
    assert find_adapters(ModelSpec(adapter=str(out)))[0].info.template == "raw"
    with pytest.raises(InvalidRequest, match="exists"):
        import_adapter(make_pickled("again"), out=out)


def test_what_needs_no_import_is_said_to(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Load it as it is"):
        import_adapter(make_adapter())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match=r"adapter_model.bin"):
        import_adapter(tmp_path / "empty")
    with pytest.raises(ModelNotFound, match="neither on this disk"):
        import_adapter("nobody/no-lora", revision="abc")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.evidence),)


@pytest.mark.parametrize("write", ["torch", "torch, old", "pickle"])
@pytest.mark.parametrize("force", [None, "1"])
def test_a_pickle_s_code_never_runs(
    make_pickled: Callable[..., Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    write: str, force: str | None,
) -> None:  # fmt: skip
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    source, evidence = make_pickled(), tmp_path / "evidence"
    content = {"weight": torch.ones(1), "payload": Malicious(evidence)}
    if write == "pickle":
        (source / "adapter_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, source / "adapter_model.bin", _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(UnsafeCheckpoint, match="tensors and nothing else"):
        import_adapter(source)
    assert not evidence.exists()
    assert not [path for path in (cache / "adapters").iterdir() if path.is_dir()]
    # the payload is live: opened carelessly, it runs
    if write == "pickle":
        pickle.loads((source / "adapter_model.bin").read_bytes())
    else:
        torch.load(source / "adapter_model.bin", weights_only=False)
    assert evidence.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"a": 1},
        {"a": {"b": torch.ones(1)}},
        {1: torch.ones(1), "1": torch.ones(1)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, 2).to_sparse_csr()},
        {"a": torch.ones(1, device="meta")},
        {"a": torch.ones(1, dtype=torch.int8)},
        {"a": torch.ones(1, dtype=torch.complex64)},
        {"a": torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.qint8)},
        {"a": torch.nested.nested_tensor([torch.ones(1)])},
    ],
    ids=lambda content: repr(content)[:40],
)
def test_a_pickle_of_something_else_is_refused(make_pickled: Callable[..., Path], content: object) -> None:
    source = make_pickled()
    torch.save(content, source / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="dict of tensors"):
        import_adapter(source)


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_torn_pickle_is_refused(make_pickled: Callable[..., Path], keep: float) -> None:
    file = make_pickled() / "adapter_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(UnsafeCheckpoint, match="torn"):
        import_adapter(file)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pickle of one small LoRA pair, whose bytes are nearly all structure."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}')
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_a_spoilt_pickle_is_a_typed_error_or_tensors(small: Path, zipped: bool) -> None:
    file = small / "adapter_model.bin"
    pair = {f"q_proj.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    torch.save(pair, file, _use_new_zipfile_serialization=zipped)
    whole, outcomes = file.read_bytes(), set()
    chosen = random.Random(0)
    spoilt = [whole[: chosen.randrange(len(whole))] for _ in range(100)]
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(chosen.choice([1, 1, 5])):
            content[chosen.randrange(len(whole))] = chosen.randrange(256)
        spoilt.append(bytes(content))
    for content in spoilt:
        file.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_adapter(small)
        except UnsafeCheckpoint:
            outcomes.add("refused")
        else:
            outcomes.add("imported")
    assert "refused" in outcomes


def test_tensors_that_share_memory_are_imported(make_pickled: Callable[..., Path]) -> None:
    source = make_pickled()
    tensors = torch.load(source / "adapter_model.bin", weights_only=True)
    whole = torch.randn(64, 32)
    first, second = (key for key in list(tensors) if tensors[key].shape == (64, 16) and "layers.0" in key)
    tensors[first], tensors[second] = whole[:, :16], whole[:, 16:]
    torch.save(tensors, source / "adapter_model.bin")
    found = load_file(import_adapter(source) / "adapter_model.safetensors")
    assert torch.equal(found[first], whole[:, :16])
    assert torch.equal(found[second], whole[:, 16:])


def test_safetensors_beside_a_pickle_are_preferred(make_pickled: Callable[..., Path]) -> None:
    source = make_pickled()
    import_adapter(source)
    tensors = torch.load(source / "adapter_model.bin", weights_only=True)
    save_file(tensors, source / "adapter_model.safetensors")
    (adapter,) = find_adapters(ModelSpec(adapter=str(source)))
    assert adapter.folder == source
