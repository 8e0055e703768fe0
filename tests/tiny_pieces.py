"""Small sentencepiece models, trained once a process, for tokenizers of encoder-decoders."""

from __future__ import annotations

import functools
import io
import random
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
