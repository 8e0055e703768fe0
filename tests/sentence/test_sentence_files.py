"""Sentence encoders whose files are damaged, hostile, or of older releases."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_sentence import build

from minilm.files import FileError
from minilm.files.checkpoint import WeightError
from minilm.sentence.encoder import SentenceEncoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build(folder, Pooling(24), lambda: Dense(24, 9))
    return folder / "model"


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps({k: v for k, v in value.items() if v != "drop"}))


def broken(folder: Path, what: str) -> None:
    modules = folder / "modules.json"
    listed = json.loads(modules.read_text())
    if what == "custom":
        listed[1]["type"] = "modeling_mine.MyPooling"
    elif what == "unknown":
        listed[1]["type"] = "sentence_transformers.models.LSTM"
    elif what == "outside":
        listed[1]["path"] = "../1_Pooling"
    elif what == "order":
        listed.reverse()
    elif what == "empty":
        listed = []
    modules.write_text(json.dumps(listed))
    if what == "json":
        modules.write_text('[{"idx": 0')
    elif what == "object":
        modules.write_text('{"idx": 0}')
    elif what == "mode":
        edit(folder / "1_Pooling" / "config.json", pooling_mode="median")
    elif what == "size":
        edit(folder / "1_Pooling" / "config.json", embedding_dimension="drop")
    elif what == "option":
        edit(folder / "1_Pooling" / "config.json", pooling_temperature=2)
    elif what == "activation":
        edit(folder / "2_Dense" / "config.json", activation_function="os.system")
    elif what == "dense option":
        edit(folder / "2_Dense" / "config.json", out_features="drop")
    elif what == "dense shape":
        edit(folder / "2_Dense" / "config.json", out_features=8)
    elif what == "dense bias":
        edit(folder / "2_Dense" / "config.json", bias=False)
    elif what == "pickle":
        (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    elif what == "sparse":
        edit(folder / "config_sentence_transformers.json", model_type="SparseEncoder")
    elif what == "query expansion":
        edit(folder / "sentence_bert_config.json", query_expansion={"length": 3})
    elif what == "chat":
        edit(folder / "sentence_bert_config.json", modality_config={"message": {"method": "forward"}})
    elif what == "method":
        text = {"method": "get_text_features", "method_output_name": "pooler_output"}
        edit(folder / "sentence_bert_config.json", modality_config={"text": text})
    elif what == "task":
        edit(folder / "sentence_bert_config.json", transformer_task="fill-mask")


BROKEN = {
    "custom": (FileError, "modules.json: the module modeling_mine.MyPooling is the model's own code"),
    "unknown": (
        FileError,
        "the module sentence_transformers.models.LSTM is not supported; supported are Transf",
    ),
    "outside": (FileError, "the path '../1_Pooling' leads out of the model's folder"),
    "order": (FileError, "expected one Transformer, as the first module, but number 0 is Dense"),
    "empty": (FileError, "lists no modules"),
    "json": (FileError, "modules.json: (not JSON|expected a list of modules)"),
    "object": (FileError, "modules.json: (not JSON|expected a list of modules)"),
    "mode": (FileError, "config.json: pooling_mode must be one or several of .*, and is 'median'"),
    "size": (FileError, "embedding_dimension must be a number, and is None"),
    "option": (FileError, "Pooling with pooling_temperature is not supported"),
    "activation": (FileError, "the activation function 'os.system' is not one of"),
    "dense option": (FileError, "2_Dense.config.json: .*out_features"),
    "dense shape": (WeightError, r"linear.weight has shape \[9, 24\], not \[8, 24\]"),
    "dense bias": (WeightError, "expected the tensors linear.weight, found linear.bias, linear.weight"),
    "pickle": (WeightError, "pytorch_model.bin"),
    "sparse": (FileError, "the model is a SparseEncoder"),
    "query expansion": (FileError, "a Transformer with query_expansion is not supported"),
    "chat": (FileError, "texts written as chat messages .* is not supported"),
    "method": (FileError, "get_text_features.* is not supported"),
    "task": (FileError, "another transformer_task"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(tmp_path: Path, saved: Path, what: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    SentenceEncoder(folder, device="cpu")
    broken(folder, what)
    error, message = BROKEN[what]
    with pytest.raises(error, match=message):
        SentenceEncoder(folder, device="cpu")


def test_older_spelling_of_pooling(tmp_path: Path, saved: Path) -> None:
    """Flags, in any order of the file, stand for a concatenation in a fixed order."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    flags = ["pooling_mode_mean_sqrt_len_tokens", "pooling_mode_lasttoken", "pooling_mode_cls_token"]
    for chosen in itertools.chain.from_iterable(itertools.combinations(flags, n) for n in range(4)):
        listed = {flag: flag in chosen for flag in flags}
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 24, **listed})
        )
        modules = json.loads((saved / "modules.json").read_text())[:2]
        (folder / "modules.json").write_text(json.dumps(modules))
        reference = SentenceTransformer(str(folder), device="cpu")
        model = SentenceEncoder(folder, device="cpu")
        np.testing.assert_allclose(
            model.encode("anna lives"), reference.encode("anna lives"), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("wrong", [["bert"], {"name": "bert"}, 3])
def test_a_model_type_that_is_no_name(wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": wrong}))
    with pytest.raises(ValueError, match="model_type"):
        SentenceEncoder(str(tmp_path))
