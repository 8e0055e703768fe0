"""DeBERTa's tokenizer from spm.model, against transformers and the sentencepiece library."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tiny_models import CORPUS

import minilm

TEXTS = [
    "John Smith lives in Paris.",
    " leading  two   spaces \n\t x  ",
    "",
    "[MASK] the [CLS] x[SEP]y",
    "a<unk>b [UNK]",
    "a_b, don't! (D.C.)",
    "the [MASK] is",
    "LONDON trailing ",
    "Éric e\u0301",
]
WIDE = ["ﬁ ＡＢＣ １２", "北京 😀 \u00a0 \u200b", "a\u2028b"]
"""Characters that a usual model file replaces."""


@cache
def model_file(rule: str) -> bytes:
    """A unigram model with DeBERTa's special pieces; [MASK] is none of them."""
    written = io.BytesIO()
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS * 5, *WIDE]),
        model_writer=written,
        vocab_size=140,
        model_type="unigram",
        normalization_rule_name=rule,
        hard_vocab_limit=False,
        minloglevel=2,
        **{f"{name}_id": index for index, name in enumerate(pieces)},
        **{f"{name}_piece": piece for name, piece in pieces.items()},
    )
    return written.getvalue()


def save(folder: Path, rule: str, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "spm.model").write_bytes(model_file(rule))
    (folder / "config.json").write_text('{"model_type": "deberta-v2"}')
    named = {"tokenizer_class": "DebertaV2Tokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.mark.parametrize(
    "settings", [{}, {"do_lower_case": True, "split_by_punct": True}, {"add_prefix_space": False}]
)
def test_ids_are_those_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    """From the model file, and from what transformers saves; single texts, pairs, and back to text."""
    folder = save(tmp_path, "identity", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")
    for tokenizer in map(minilm.AutoTokenizer.from_pretrained, (folder, tmp_path / "saved")):
        assert len(tokenizer) == len(theirs)
        assert tokenizer.mask_token_id == theirs.mask_token_id == len(theirs) - 1
        for text in (*TEXTS, *WIDE):
            expected = theirs(text)
            assert dict(tokenizer(text)) == dict(expected), text
            assert dict(tokenizer(text, "Anna lives")) == dict(theirs(text, "Anna lives")), text
            assert tokenizer.decode(expected["input_ids"]) == theirs.decode(expected["input_ids"])


def test_characters_that_the_file_replaces(tmp_path: Path) -> None:
    """As the sentencepiece library does; transformers 5 leaves them as they are."""
    folder = save(tmp_path, "nmt_nfkc")
    library = sentencepiece.SentencePieceProcessor(model_proto=model_file("nmt_nfkc"))
    ours = minilm.DebertaV2Tokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    different = 0
    for text in (*TEXTS[:3], *TEXTS[5:6], *WIDE):
        expected = [1, *library.encode(text), 2]
        assert ours(text)["input_ids"] == expected, text
        different += theirs(text)["input_ids"] != expected
    assert different
    ours.save_pretrained(tmp_path / "again")
    again = minilm.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(dict(again(text)) == dict(ours(text)) for text in (*TEXTS, *WIDE))
