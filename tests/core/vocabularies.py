"""Small tokenizers of the families that models use, trained on the spot."""

import json
from collections.abc import Callable
from functools import cache

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from alpaca_core.tokenizer import Tokenizer

SENTENCES = [
    "Each can holds five pierogi, and there are two cans on the table.",
    "Is Paris the capital of France? Yes, it is. No, it is not. Not sure.",
    "World news, Sports, Business and Technology: yes and no, true and false.",
    "### Instruction: write a response that completes the request. ### Response:",
    "Ein Text mit Umlauten: äöü, naïve café, and 1,234 numbers.",
] * 4
CONTROL = ["<unk>", "<s>", "</s>"]
ADDED = ["</think>", "<tool_call>"]


def _finish(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(ADDED)  # not special: flags that split special tokens let these through
    definition = json.loads(tokenizer.to_str())
    return Tokenizer(json.dumps(definition), eos_ids=(tokenizer.token_to_id("</s>"),))


@cache
def byte_level() -> Tokenizer:
    """As of GPT-2, LLaMA 3, SmolLM."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finish(tokenizer)


@cache
def byte_level_with_prefix_space() -> Tokenizer:
    """As of RoBERTa: a space is put before the text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finish(tokenizer)


@cache
def sentencepiece_bpe() -> Tokenizer:
    """As of LLaMA 1 and 2: a dummy prefix, bytes as a last resort, and merges that spell control tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*CONTROL, *bytes_], show_progress=False)
    learnt.train_from_iterator(SENTENCES, trainer)
    model = json.loads(learnt.to_str())["model"]
    for piece in ("<", "/", "s", ">", "</", "s>"):
        model["vocab"].setdefault(piece, len(model["vocab"]))
    merges = [tuple(merge) for merge in model["merges"]] + [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _SENTENCEPIECE_DECODER
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return _finish(tokenizer)


@cache
def sentencepiece_unigram() -> Tokenizer:
    """As of T5 and Gemma's ancestors: the likeliest cut into pieces."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=CONTROL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finish(tokenizer)


@cache
def word_piece() -> Tokenizer:
    """As of BERT: lower case, words cut into pieces."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=CONTROL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finish(tokenizer)


_SENTENCEPIECE_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)

FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, prefix space": byte_level_with_prefix_space,
    "sentencepiece BPE, byte fallback": sentencepiece_bpe,
    "sentencepiece unigram": sentencepiece_unigram,
    "WordPiece": word_piece,
}


def llama_model_proto(pieces: list[str]) -> bytes:
    """LLaMA's sentencepiece model: BPE by rank, byte fallback, identity normalizer, dummy prefix."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    for place, piece in enumerate(pieces):
        added = proto.pieces.add(piece=piece)
        added.type = 2 if place == 0 else 3 if place < 3 else 6 if place < 259 else 1
        added.score = 0.0 if place < 259 else -(place - 259)
    return bytes(proto.SerializeToString())
