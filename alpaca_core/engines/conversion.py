"""What is converted once: a GGUF file to a safetensors folder, a sentencepiece model to tokenizer.json.

Both are checked against what they came from, since the libraries drop and change things in silence.
"""

import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaTokenizer

from alpaca_core.checkpoints import SENTENCEPIECE, read_json
from alpaca_core.errors import InvalidCheckpoint

_PROBES = ("Einstein Ейнштейн", " two  leading\n\n\tspaces ", "日本語 🦙 é", "def f(x):\n    return x**2  # 1,024")


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write a LLaMA-family GGUF file as a checkpoint folder, its weights de-quantised to bfloat16.

    Args:
        gguf: The file.
        folder: Gets config, weights, ``tokenizer.json`` and chat template.

    Raises:
        InvalidCheckpoint: If the file is no GGUF, of another family, or holds tensors that the network
            has no place for (such as LLaMA 3's scaled rotary frequencies, which transformers drops).
    """
    tensors = _tensor_count(gguf)
    with _alone(gguf.parent, [gguf.name]) as place:
        source = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
        try:
            network = AutoModelForCausalLM.from_pretrained(
                place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
            )
            tokenizer = AutoTokenizer.from_pretrained(place, **source)
        except Exception as error:  # a torn file fails as IndexError, KeyError, ValueError, struct.error …
            raise InvalidCheckpoint(f"{gguf} cannot be unpacked ({error}). Fetch the file again.") from error
    places = len(list(network.parameters()))
    if network.config.model_type != "llama" or places != tensors:
        raise InvalidCheckpoint(
            f"a GGUF file must hold a LLaMA-family network and nothing else, but {gguf} holds {tensors} tensors for "
            f"the {places} of a {network.config.model_type}. Use the model's safetensors repository."
        )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _alone(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Show some files of a folder in one of their own: transformers also reads what it was not asked to."""
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            if (folder / name).exists():
                (Path(place) / name).symlink_to((folder / name).resolve())
        yield Path(place)


def _tensor_count(gguf: Path) -> int:
    """Read the head of the file: magic, version, number of tensors (GGUF specification, "File structure")."""
    with gguf.open("rb") as file:
        head = file.read(16)
    if len(head) < 16 or head[:4] != b"GGUF":
        raise InvalidCheckpoint(f"a GGUF file begins with the bytes GGUF, but {gguf} does not. Fetch the file again.")
    tensors: int = struct.unpack("<4sIQ", head)[2]
    return tensors


def convert_tokenizer(source: Path, folder: Path) -> None:
    """Write ``tokenizer.json`` for a folder with LLaMA's kind of sentencepiece ``tokenizer.model``.

    transformers takes BOS, EOS and the leading space from ``tokenizer_config.json``, which old
    repositories leave empty or wrong: then it drops BOS, or does not end. They are taken from the
    sentencepiece model instead, and the result must encode some texts as sentencepiece itself does.

    Args:
        source: Folder with ``tokenizer.model``; of its other files, `SENTENCEPIECE` alone are read.
        folder: Gets ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

    Raises:
        InvalidCheckpoint: If the two do not agree, or the file cannot be read.
    """
    settings = read_json(config) if (config := source / "tokenizer_config.json").exists() else {}
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        with _alone(source, SENTENCEPIECE) as place:
            tokenizer = LlamaTokenizer.from_pretrained(
                place,
                bos_token=model.id_to_piece(model.bos_id()),
                eos_token=model.id_to_piece(model.eos_id()),
                unk_token=model.id_to_piece(model.unk_id()),
                add_bos_token=settings.get("add_bos_token") is not False,
                trust_remote_code=False,
                local_files_only=True,
            )
    except Exception as error:  # sentencepiece raises RuntimeError and OSError, transformers any kind
        raise InvalidCheckpoint(f"{source / 'tokenizer.model'} cannot be read ({error}). Fetch it again.") from error
    backend = tokenizer.backend_tokenizer
    # the published conversions always put the space first; Metaspace leaves it out before a space
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for probe in _PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != model.encode(probe):
            raise InvalidCheckpoint(
                f"tokenizer.model must be of LLaMA's kind, but {source} encodes {probe!r} otherwise. "
                "Put a tokenizer.json there."
            )
    tokenizer.save_pretrained(folder)
