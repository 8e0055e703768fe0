"""Saving: that what was loaded is saved byte for byte, and nothing partial is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_family import (
    RULES,
    C,
    Model,
    V,
    load,
    on_meta,
    stored,
    write,
)
from torch import Tensor, nn

from minilm.files.checkpoint import WeightError
from minilm.weights.loading import affine, save_weights
from minilm.weights.rules import copy, fuse


@given(
    layers=st.integers(1, 3),
    prefix=st.sampled_from(["", "base."]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    head=st.sampled_from(
        [{}, {"pooler": True}, {"labels": 3, "pooler": True}, {"lm": "untied"}, {"lm": "shared"}]
    ),
    shard=st.sampled_from(["5GB", "300", "0.5kB", 1]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=40)
def test_save_load_save_is_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int,
    prefix: str,
    dtype: torch.dtype,
    head: dict[str, Any],
    shard: int | str,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("roundtrip")
    torch.manual_seed(seed)
    model = Model(layers=layers, **head).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    first = save_weights(model, folder / "a", RULES, prefix, max_shard_size=shard)
    again = on_meta(layers=layers, **head)
    report = load(folder / "a", again, dtype=dtype)
    assert not report.skipped
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    second = save_weights(again, folder / "b", RULES, prefix, max_shard_size=shard)
    assert [file.name for file in first] == [file.name for file in second]
    assert sorted(first) == sorted((folder / "a").iterdir())
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_saved_names_and_values(tmp_path: Path) -> None:
    tensors = stored(prefix="base.", seed=3)
    heads = {
        "base.pooler.dense.weight": torch.rand(C, C), "base.pooler.dense.bias": torch.rand(C),
        "cls.out.weight": torch.rand(V, C), "cls.bias": torch.rand(V),
        "classifier.weight": torch.rand(2, C), "classifier.bias": torch.rand(2),
    }  # fmt: skip
    model = on_meta(pooler=True, labels=2, lm="untied")
    load(write(tmp_path / "m", tensors | heads), model)
    (file,) = save_weights(model, tmp_path / "out", RULES, "base.")
    saved = load_file(file)
    heads["cls.out.bias"] = heads.pop("cls.bias")
    want = tensors | heads
    assert saved.keys() == want.keys()
    assert all(torch.equal(saved[name], want[name]) for name in want)
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_all_names_are_written_where_the_rule_says_so(tmp_path: Path) -> None:
    rules = tuple(replace(rule, write_also=bool(rule.also)) for rule in RULES)
    model = Model(lm="tied")
    nn.init.normal_(model.head.bias)
    (file,) = save_weights(model, tmp_path / "a", rules, "base.")
    saved = load_file(file)
    for name in ("cls.out.bias", "cls.bias", "cls.old.bias"):
        assert torch.equal(saved[name], model.head.bias)
    again = on_meta(lm="tied")
    assert load(tmp_path / "a", again, rules=rules).skipped.keys() == {"cls.bias", "cls.old.bias"}
    (other,) = save_weights(again, tmp_path / "b", rules, "base.")
    assert file.read_bytes() == other.read_bytes()


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = stored()
    model = on_meta()
    load(write(tmp_path / "m", tensors), model)
    files = save_weights(model, tmp_path / "out", RULES, "", max_shard_size=300)
    count = len(files) - 1
    assert count > 3
    assert [file.name for file in files[:2]] == [f"model-0000{n}-of-{count:05d}.safetensors" for n in (1, 2)]
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    assert index["weight_map"].keys() == tensors.keys()
    for file in files[:-1]:
        shard = load_file(file)
        assert shard.keys() == {name for name, where in index["weight_map"].items() if where == file.name}
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 300


def test_earlier_save_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    model = Model()
    save_weights(model, folder, RULES, "", max_shard_size=300)
    (folder / "model-of-mine.safetensors").write_text("not of this save")
    save_weights(model, folder, RULES, "")
    assert sorted(file.name for file in folder.iterdir()) == [
        "model-of-mine.safetensors",
        "model.safetensors",
    ]
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    save_weights(model, folder, RULES, "", max_shard_size=400)
    assert not (folder / "model.safetensors").exists()
    again = on_meta()
    load(folder, again)
    assert bool((again.body.embeddings.tokens.weight == 1).all())


def test_failed_save_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    folder = tmp_path / "out"
    save_weights(Model(), folder, RULES, "")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calls = []

    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half a f")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(WeightError, match=r"cannot be written: .*No space left"):
        save_weights(Model(), folder, RULES, "", max_shard_size=300)
    assert len(calls) == 3
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"body.embeddings.tokens.weight .*meta device"):
        save_weights(on_meta(), tmp_path, RULES, "")
    with pytest.raises(WeightError, match=r"body.embeddings.tokens.weight cannot be saved: no rule gives"):
        save_weights(Model(), tmp_path, RULES[1:], "")
    with pytest.raises(WeightError, match="more than one rule gives"):
        save_weights(Model(), tmp_path, (*RULES, copy("e", "body.embeddings.tokens.weight")), "")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightError, match="cannot be written"):
        save_weights(Model(), tmp_path / "file", RULES, "")
    for size in ("", "5 apples", "-1", 0, "GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            save_weights(Model(), tmp_path, RULES, "", max_shard_size=size)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


BERT_RULES = (
    copy("embeddings.word_embeddings.weight", "body.tokens"),
    copy("embeddings.position_embeddings.weight", "body.positions"),
    copy("embeddings.token_type_embeddings.weight", "body.types"),
    *affine("embeddings.LayerNorm", "body.norm"),
    *(
        fuse([f"encoder.layer.{{i}}.attention.self.{part}.{kind}" for part in ("query", "key", "value")],
             f"body.layers.{{i}}.qkv.{kind}")
        for kind in ("weight", "bias")
    ),
    *affine("encoder.layer.{i}.attention.output.dense", "body.layers.{i}.out"),
    *affine("encoder.layer.{i}.attention.output.LayerNorm", "body.layers.{i}.norm1"),
    *affine("encoder.layer.{i}.intermediate.dense", "body.layers.{i}.up"),
    *affine("encoder.layer.{i}.output.dense", "body.layers.{i}.down"),
    *affine("encoder.layer.{i}.output.LayerNorm", "body.layers.{i}.norm2"),
    *affine("pooler.dense", "pooler.dense"),
)  # fmt: skip


def bert_like(channels: int, hidden: int, layers: int, vocab: int, positions: int) -> nn.Module:
    with torch.device("meta"):
        model = nn.Module()
        model.body = nn.Module()
        for name, rows in (("tokens", vocab), ("positions", positions), ("types", 2)):
            model.body.register_parameter(name, nn.Parameter(torch.empty(rows, channels)))
        model.body.norm = nn.LayerNorm(channels)
        model.body.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.qkv, layer.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
            layer.up, layer.down = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
            layer.norm1, layer.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
            model.body.layers.append(layer)
        model.pooler = nn.Module()
        model.pooler.dense = nn.Linear(channels, channels)
    return model


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_file_of_transformers_comes_back_byte_for_byte(tmp_path: Path, shard: str) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=52,
        max_position_embeddings=19,
    )  # fmt: skip
    theirs = BertModel(config)
    theirs.save_pretrained(tmp_path / "a", max_shard_size=shard)
    model = bert_like(24, 52, 3, 101, 19)
    load(tmp_path / "a", model, rules=BERT_RULES)
    save_weights(model, tmp_path / "b", BERT_RULES, "", max_shard_size=shard)
    if shard == "5GB":
        name = "model.safetensors"
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    else:
        assert len(list((tmp_path / "b").iterdir())) > 2
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    again = BertModel.from_pretrained(tmp_path / "b").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())
