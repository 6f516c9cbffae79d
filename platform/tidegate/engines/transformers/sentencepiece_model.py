"""Loads tokenizers that are a `tokenizer.model` alone, as Llama's first generation and its kin have it.

transformers 5 rebuilds such a file by rules of its own: without `tokenizer_config.json` it leaves out the
start token and the space before the first word, a text's own first space is lost, and a unigram model is read
as BPE. Here the file becomes a fast tokenizer by what it says itself, and must give the ids that the
sentencepiece library gives.
"""

from __future__ import annotations

import json
import re
import shutil
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
BESIDE = ("special_tokens_map.json", "chat_template.jinja")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # ModelProto.SentencePiece.Type
PROBES = (
    "Tides rise twice a day: 12 h 25 min apart.\n\n  naïve café, 潮汐 🌊!",
    "a  b   c\td ",
    "def f(x):\n    return 'ﬁne ½' + 1234567890000",
    "DON'T Re-use e\N{COMBINING ACUTE ACCENT}, it's X_1/y%",
)
BEGINNINGS = (" one space", "   three")  # a tokenizer that is not `legacy` takes the first space for its own


def load(folder: Path) -> Any | None:
    """Load the folder's `tokenizer.model`; None where it is not there alone, or of another class."""
    config = read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") not in CLASSES or (proto := parsed(folder)) is None:
        return None
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as made:
        for name in BESIDE:
            if (folder / name).is_file():
                shutil.copy(folder / name, made)
        fast = converted(
            proto, is_legacy=is_legacy(config), adds_start=config.get("add_bos_token") is not False
        )
        for token, token_id in sorted(read_json(folder / "added_tokens.json").items(), key=itemgetter(1)):
            fast.add_tokens([AddedToken(token, normalized=False)])
            if fast.token_to_id(token) != token_id:
                raise ValueError(f"added_tokens.json leaves holes before {token!r} ({token_id})")
        fast.save(str(Path(made) / "tokenizer.json"))
        named = {**names(proto), **config, "tokenizer_class": PreTrainedTokenizerFast.__name__}
        (Path(made) / "tokenizer_config.json").write_text(json.dumps(named))
        return PreTrainedTokenizerFast.from_pretrained(made, clean_up_tokenization_spaces=False)


def check(folder: Path, tokenizer: Any) -> None:
    """Raise `ValueError` where the folder's `tokenizer.model` is there alone and `tokenizer`, however it was
    loaded, gives other ids than the sentencepiece library."""
    if parsed(folder) is None:
        return
    from sentencepiece import SentencePieceProcessor

    config = read_json(folder / "tokenizer_config.json")
    has_all = config.get("tokenizer_class") in CLASSES and is_legacy(config)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (*PROBES, *BEGINNINGS) if has_all else PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != original.encode(text):
            raise ValueError(
                f"{text!r} becomes other tokens than sentencepiece's own; convert it to a tokenizer.json"
            )


def is_legacy(config: dict[str, Any]) -> bool:
    return config.get("legacy") is not False


def parsed(folder: Path) -> Any | None:
    """Parse a sentencepiece model that is there alone; None where the file is something else (tiktoken's have
    this name too)."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not file.is_file():
        return None
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        return None
    return proto if proto.trainer_spec.model_type in (UNIGRAM, BPE) and proto.pieces else None


def converted(proto: Any, *, is_legacy: bool, adds_start: bool) -> Tokenizer:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    fast = Tokenizer(word_model(proto))
    steps: list[Any] = (
        [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    )
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if is_legacy:  # a space before what follows each special token, too
        if rules.add_dummy_prefix:  # but none before a symbol: these are looked for behind this step
            alone = "|".join(map(re.escape, symbols))
            steps += [normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)"), SPACE)]
        steps += [normalizers.Replace(" ", SPACE)]
    else:
        scheme = "first" if rules.add_dummy_prefix else "never"
        fast.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    fast.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    fast.add_tokens(
        [
            *(AddedToken(symbol, normalized=True, special=False) for symbol in symbols),
            *(
                AddedToken(piece.piece, normalized=False, special=True)
                for piece in proto.pieces
                if piece.type in (UNKNOWN, CONTROL)
            ),
        ]
    )
    if adds_start and (start := names(proto).get("bos_token")):
        fast.post_processor = processors.TemplateProcessing(
            f"{start} $A", f"{start} $A {start} $B", [(start, trainer.bos_id)]
        )
    return fast


def word_model(proto: Any) -> models.Model:
    from transformers.tokenization_utils_base import generate_merges

    trainer = proto.trainer_spec
    if trainer.model_type == UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    ids = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    return models.BPE(
        ids,
        generate_merges(ids),
        unk_token=proto.pieces[trainer.unk_id].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def names(proto: Any) -> dict[str, str]:
    """Return the model's own start, end and unknown token."""
    trainer = proto.trainer_spec
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return {name: proto.pieces[at].piece for name, at in ids.items() if 0 <= at < len(proto.pieces)}


def read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}
