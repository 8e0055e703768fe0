"""minilm.conversion.checkpoints: what is written loads in transformers and means the same; failures leave
nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from close import assert_as_good_as_eager
from safetensors.torch import load_file, save_file
from saved_decoders import save_decoder
from tiny_models import TEXTS, save_model

import minilm
from minilm.conversion import checkpoints as module
from minilm.conversion.checkpoints import convert


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_becomes_a_folder_that_transformers_loads(tmp_path: Path, dtype: str) -> None:
    name = "SmolLM2-135M-Instruct"
    done = convert(name, tmp_path / "out", dtype=dtype)
    assert done.architecture == "LlamaForCausalLM"
    assert done.files == {f: len(data) for f, data in everything(tmp_path / "out").items()}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = minilm.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    assert theirs.dtype == ours.dtype == done.dtype == getattr(torch, dtype)
    assert done.parameters == theirs.num_parameters() == ours.num_parameters()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    own = minilm.AutoTokenizer.from_pretrained(name)
    messages = [{"role": "user", "content": "Why is the sky blue? Ünïcode 北京"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([own(text)["input_ids"]])
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        eager, kernels = theirs.float()(ids).logits, ours.float()(ids).logits
        with minilm.backend("reference"):
            same = ours(ids).logits
        exact = theirs.double()(ids).logits
    assert (eager - same).abs().max() <= 1e-4
    assert_as_good_as_eager(kernels, eager, exact)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
def test_a_head_comes_along(tmp_path: Path, head: str) -> None:
    source = save_model(tmp_path / "in", "bert", head)
    done = convert(source, tmp_path / "out")
    assert done.architecture == f"Bert{head}"
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    theirs = getattr(transformers, done.architecture)
    _, loading = theirs.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_decoders_and_shards(tmp_path: Path, family: str) -> None:
    source = save_decoder(tmp_path / "in", family)
    done = convert(source, tmp_path / "out", max_shard_size="10KB")
    assert "model.safetensors.index.json" in done.files
    assert not done.tokenizer
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(f) for f in (source, tmp_path / "out")]
    ids = torch.randint(2, 61, (2, 9))
    with torch.no_grad():
        assert torch.equal(theirs[0](ids).logits, theirs[1](ids).logits)


def test_the_modules_of_sentence_transformers_come_along(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    convert("all-MiniLM-L6-v2", tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Normalize"]
    ours = minilm.SentenceEncoder("all-MiniLM-L6-v2", device="cpu").encode(TEXTS)
    assert np.abs(theirs.encode(TEXTS) - ours).max() <= 1e-5


def test_a_pooler_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", "bert")
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == kept.keys()


def test_a_head_that_is_named_and_missing_is_not_made_up(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", "bert", "ForMaskedLM")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["BertForQuestionAnswering"]
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out").architecture == "BertForMaskedLM"


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", "bert", "ForPreTraining")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (source / "config.json").write_text(json.dumps(config))
    done = convert(source, tmp_path / "out")
    assert "cls.seq_relationship.weight" in done.left_out
    assert "next-sentence" in done.left_out["cls.seq_relationship.weight"]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", "bert")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert(source, tmp_path / "out")
    assert everything(tmp_path / "out") == {"thesis.txt": b"mine"}
    with pytest.raises(ValueError, match="this is a file"):
        convert(source, tmp_path / "out" / "thesis.txt", force=True)
    with pytest.raises(ValueError, match="the folder of the source"):
        convert(source, tmp_path / "out" / ".." / "in", force=True)


def test_force_replaces_the_model_and_leaves_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(save_decoder(tmp_path / "first", "llama"), out, max_shard_size="10KB")
    (out / "thesis.txt").write_text("mine")
    (out / "chat_template.jinja").write_text("of the model before")
    source = save_model(tmp_path / "second", "bert", "ForMaskedLM")
    done = convert(source, out, force=True)
    convert(source, tmp_path / "fresh")
    assert everything(out) == {**everything(tmp_path / "fresh"), "thesis.txt": b"mine"}
    assert set(done.files) == set(everything(tmp_path / "fresh"))


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(save_decoder(tmp_path / "in", "gpt2"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source = save_model(tmp_path / "in", "bert")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.safetensors").write_bytes(b"the one before")

    def fail(path: Path, folder: Path) -> bool:
        assert (folder / "model.safetensors").is_file()  # the weights are written by then
        raise error

    monkeypatch.setattr(module, "_write_tokenizer", fail)
    for out, force in (("new", False), ("deep/er/new", False), ("there", True)):
        with pytest.raises(type(error)):
            convert(source, tmp_path / out, force=force)
    assert sorted(os.listdir(tmp_path)) == ["in", "there"]
    assert everything(tmp_path / "there") == {"model.safetensors": b"the one before"}


def test_damaged_sources(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", "bert")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(minilm.WeightError, match=r"model\.safetensors"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("dtype", ["int8", "bf16", ""])
def test_a_dtype_that_is_none(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype"):
        convert(save_decoder(tmp_path / "in", "gpt2"), tmp_path / "out", dtype=dtype)
    assert os.listdir(tmp_path) == ["in"]
