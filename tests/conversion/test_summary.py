"""minilm.conversion.summary: what it counts is what loading and running give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_decoders import DECODERS, save_decoder
from tiny_models import save_model
from torch.utils.flop_counter import FlopCounterMode

import minilm
from minilm.conversion.summary import Summary, summarise
from minilm.files.safetensors import SafetensorsCheckpoint
from minilm.model.auto import MODELS


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"])
def test_real_models(name: str) -> None:
    summary = summarise(name)
    model = MODELS[summary.head].from_pretrained(name)
    assert summary.count == model.num_parameters()
    assert {p.name: p.shape for p in summary.parameters} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    assert summary.memory(torch.float32) == model.get_memory_footprint()
    assert summary.spec == model.spec
    assert summary.tokenizer is not None
    assert summary.chat_template == ("Instruct" in name)
    json.dumps(summary.to_dict())


def held(model: Any) -> int:
    """Bytes of a loaded model's parameters and buffers."""
    tensors = {id(t): t for t in (*model.parameters(), *model.state_dict().values())}
    return sum({t.data_ptr(): t.nbytes for t in tensors.values()}.values())


def test_memory_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    """As it is loaded when nothing is said, and in the codes that are stored."""
    name = "SmolLM2-135M-Instruct"
    summary = summarise(name)
    kept = minilm.AutoModelForCausalLM.from_pretrained(name, weights="gguf")
    assert summary.stored_memory == held(kept)
    assert summary.default_memory == summary.memory(torch.float32)  # from_pretrained dequantises
    source = save_decoder(tmp_path / "source", "llama", hidden_size=96, intermediate_size=64)
    for weights in ("int8", "q8_0", "q4_0", "q4_1"):
        folder = tmp_path / weights
        minilm.AutoModelForCausalLM.from_pretrained(source, weights=weights).save_pretrained(folder)
        again = summarise(folder)
        loaded = minilm.AutoModelForCausalLM.from_pretrained(folder)
        assert again.default_memory == again.stored_memory == held(loaded), weights
        assert again.to_dict()["memory_bytes"]["default"] == again.default_memory
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        minilm.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(tmp_path / "plain")
        again = summarise(tmp_path / "plain")
        loaded = minilm.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert (again.dtype, again.stored_memory) == (loaded.dtype, None) == (dtype, None)
        assert again.default_memory == held(loaded)


@pytest.mark.parametrize(
    "head", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"]
)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra"])
def test_the_head_is_the_one_that_the_checkpoint_names(tmp_path: Path, family: str, head: str) -> None:
    folder = save_model(tmp_path, family, head)
    summary = summarise(folder)
    assert summary.class_name == "Auto" + ("Model" if head == "Model" else f"Model{head}")
    assert summary.count == MODELS[summary.head].from_pretrained(folder).num_parameters()
    assert not any(entry.transform == "initialised" for entry in summary.weights)


@pytest.mark.parametrize(
    "head", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_a_head_that_nobody_names_is_found_from_the_tensors(tmp_path: Path, head: str) -> None:
    """As far as tensors can tell: BERT's classifiers of texts and of tokens differ by the pooler alone."""
    folder = save_model(tmp_path, "bert", head)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert summarise(folder).class_name == f"AutoModel{head}"


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, "bert", "ForMaskedLM")

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsCheckpoint, "_read", refuse)
    assert summarise(folder).count > 0
    with pytest.raises(AssertionError):
        minilm.AutoModel.from_pretrained(folder)


def flops_of(summary: Summary, tokens: int, past: int = 0) -> int:
    """What PyTorch counts in a forward pass of one text, after `past` tokens are in the cache."""
    model: Any = MODELS[summary.head].from_pretrained(summary.path)
    ids = torch.randint(2, summary.spec.vocab_size, (1, past + tokens))
    with minilm.backend("reference"), torch.no_grad():
        cache = model(ids[:, :past], use_cache=True).past_key_values if past else None
        with FlopCounterMode(display=False) as counter:
            model(ids[:, past:], past_key_values=cache, use_cache=cache is not None)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", DECODERS)
def test_flops_of_a_decode_step(tmp_path: Path, family: str) -> None:
    """The reference computes all scores before the window hides some, so the window is taken off first."""
    summary = summarise(
        save_decoder(tmp_path, family, **({"sliding_window": None} if family == "mistral" else {}))
    )
    for context in (2, 7, 23):
        assert summary.flops(context) == flops_of(summary, 1, past=context - 1)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra"])
def test_flops_of_an_encoder(tmp_path: Path, family: str, head: str) -> None:
    summary = summarise(save_model(tmp_path, family, head))
    assert 11 * summary.flops(11) == flops_of(summary, 11)


def test_what_runs_once_a_sequence_is_left_out(tmp_path: Path) -> None:
    summary = summarise(save_model(tmp_path, "bert", "ForSequenceClassification"))
    size, labels = summary.spec.hidden_size, summary.config.num_labels
    assert flops_of(summary, 9) - 9 * summary.flops(9) == 2 * size * (size + labels)


def test_a_window_bounds_the_work(tmp_path: Path) -> None:
    summary = summarise(save_decoder(tmp_path, "mistral"))
    assert summary.spec.windows == (5, 5)
    assert summary.flops(5) == summary.flops(40) > summary.flops(4)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_cache(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    summary = summarise(save_decoder(tmp_path, family))
    model: Any = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cache = model.new_cache(1)
    page = cache.page_size
    model(torch.randint(2, 61, (1, page)), past_key_values=cache)
    assert cache.nbytes() == page * summary.kv_bytes(dtype)


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    assert summarise(save_model(tmp_path, "bert")).kv_bytes(torch.float32) == 0


def test_every_tensor_of_the_checkpoint_is_in_the_map(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path, "llama")
    summary = summarise(folder)
    with minilm.weights.loading.open_checkpoint(folder) as checkpoint:
        assert [entry.source for entry in summary.weights] == list(checkpoint.tensors)
    sources = [source for p in summary.parameters for source in p.sources]
    assert sorted(sources) == sorted(entry.source for entry in summary.weights)


def test_errors_are_those_of_loading(tmp_path: Path) -> None:
    with pytest.raises(minilm.HubError, match="no such file or folder"):
        summarise(tmp_path / "nothing/")
    with pytest.raises(minilm.ConfigError, match=r"config\.json"):
        summarise(tmp_path)
    folder = save_model(tmp_path / "bert", "bert")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(minilm.WeightError, match=r"layer\.2"):
        summarise(folder)
