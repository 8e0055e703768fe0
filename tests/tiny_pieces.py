"""Small sentencepiece models, trained once a process, for tokenizers of encoder-decoders."""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

_EN = "the cat sat on a mat while dogs ran over hills and far away under green trees near water"
_FR = "le chat est assis sur un tapis pendant que les chiens courent loin des collines vertes été"
ENGLISH, FRENCH = _EN.split(), _FR.split()
ODD = "ﬁne Ünïcode – “quotes” 日本語 123 4567 , . ! ? (x) [y] >>"

TEXTS = [
    "the cat sat on a mat.",
    "  two  spaces\tand\na new line  ",
    "",
    " ",
    "ﬁne “quotes”, – 日本語 ẞ xyz",
    "le chat </s> est <unk> assis<pad>é",
    "été e\u0301te\u0301 non\u00a0breaking ​zero",
    "🚨 emoji 12 345 !?",
]


@functools.cache
def model(language: str = "en", **options: Any) -> bytes:
    """A unigram model over words of one language. Options: of sentencepiece's trainer."""
    import sentencepiece

    words = {"en": ENGLISH, "fr": FRENCH, "both": [*ENGLISH, *FRENCH]}[language]
    draw = random.Random(language)
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(150)] + [ODD] * 4
    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=found,
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return found.getvalue()


T5: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
"""The first pieces of T5's models."""

CODES = [">>fr<<", ">>pt_br<<"]


def pieces(content: bytes) -> list[str]:
    """The pieces of a model."""
    import sentencepiece

    found = sentencepiece.SentencePieceProcessor(model_proto=content)
    return [found.id_to_piece(index) for index in range(found.get_piece_size())]


def marian(folder: Path, lacks: tuple[str, ...] = (), codes: list[str] = CODES, **settings: Any) -> Path:
    """A folder of an OPUS-MT model; vocab.json is in no model's order and lacks some pieces."""
    folder.mkdir(exist_ok=True)
    both: list[str] = []
    for name, language in (("source", "en"), ("target", "fr")):
        (folder / f"{name}.spm").write_bytes(model(language))
        both += pieces(model(language))
    own = [piece for piece in dict.fromkeys(both) if piece not in ("<s>", "</s>", "<unk>", *lacks)]
    random.Random(3).shuffle(own)
    vocab = ["</s>", "<unk>", *codes, *own, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocab)}))
    (folder / "config.json").write_text('{"model_type": "marian"}')
    settings = {"source_lang": "en", "target_lang": "fr", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def mbart(folder: Path, name: str = "MBartTokenizer", **settings: Any) -> Path:
    """A folder of an mBART tokenizer with only its sentencepiece model."""
    folder.mkdir(exist_ok=True)
    (folder / "sentencepiece.bpe.model").write_bytes(model("both"))
    (folder / "config.json").write_text('{"model_type": "mbart"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **settings}))
    return folder


def t5(folder: Path, **settings: Any) -> Path:
    """A folder of a T5 tokenizer with only spiece.model."""
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model(**T5))
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 40, "extra_ids": 5, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
