"""Settings in the files of a sentence model that make no sense: errors that name file and setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_model

from minilm.files import FileError
from minilm.sentence import SentenceEncoder

CASES: list[tuple[str, dict[str, Any]]] = [
    ("config_sentence_transformers.json", {"similarity_fn_name": {"a": 1}}),
    ("config_sentence_transformers.json", {"similarity_fn_name": [1]}),
    ("config_sentence_transformers.json", {"default_prompt_name": 3}),
    ("config_sentence_transformers.json", {"prompts": ["query"]}),
    ("config_sentence_transformers.json", {"prompts": {"query": 3}}),
    ("config_sentence_transformers.json", {"truncate_dim": -1}),
    ("config_sentence_transformers.json", {"truncate_dim": "8"}),
    ("sentence_bert_config.json", {"max_seq_length": [1]}),
    ("sentence_bert_config.json", {"max_seq_length": 0}),
    ("sentence_bert_config.json", {"max_seq_length": 10**40}),
    ("sentence_bert_config.json", {"max_seq_length": 1.5}),
    ("sentence_bert_config.json", {"modality_config": [1]}),
    ("sentence_bert_config.json", {"modality_config": {"text": 3}}),
]


@pytest.mark.parametrize(("name", "changed"), CASES, ids=str)
def test_settings(tmp_path: Path, name: str, changed: dict[str, Any]) -> None:
    SentenceEncoder(save_model(tmp_path / "in", "bert"), device="cpu").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(FileError, match=rf"{name}: {next(iter(changed))}"):
        SentenceEncoder(tmp_path / "m", device="cpu")
