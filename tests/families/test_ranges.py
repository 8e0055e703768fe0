"""Numbers of config.json that no model has: each is an error that names the option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

import minilm
from minilm.config import ConfigError
from minilm.families import family_of

INSANE = [math.nan, math.inf, -math.inf, 1e30, -1.0, "0.1", True, [1]]
EPS = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "electra", "albert"), "layer_norm_eps"
    ),
    "gpt2": "layer_norm_epsilon",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), "rms_norm_eps"),
}
ROPE = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def fails(model_type: str, options: dict[str, Any], name: str) -> None:
    config = minilm.AutoConfig.for_model(model_type)
    config.update(options)
    with pytest.raises(ConfigError, match=name):
        family_of(model_type).config(config)


@pytest.mark.parametrize("value", INSANE, ids=repr)
@pytest.mark.parametrize("model_type", EPS)
def test_epsilon_of_norms(model_type: str, value: Any) -> None:
    fails(model_type, {EPS[model_type]: value}, EPS[model_type])


@pytest.mark.parametrize("value", [*INSANE, 0, 0.5, 1e15], ids=repr)
@pytest.mark.parametrize("model_type", ROPE)
def test_theta(model_type: str, value: Any) -> None:
    fails(model_type, {"rope_theta": value}, "rope_theta")
    fails(model_type, {"rope_theta": None, "rope_parameters": {"rope_theta": value}}, "rope_theta")


@pytest.mark.parametrize("value", [*INSANE, 0], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("linear", "factor"),
        ("dynamic", "factor"),
        ("llama3", "factor"),
        ("llama3", "low_freq_factor"),
        ("llama3", "high_freq_factor"),
        ("yarn", "factor"),
        ("yarn", "attention_factor"),
        ("yarn", "beta_fast"),
        ("yarn", "beta_slow"),
        ("yarn", "original_max_position_embeddings"),
    ],
)
def test_rope_scaling(kind: str, name: str, value: Any) -> None:
    sound = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind != "llama3":
        sound = {key: value for key, value in sound.items() if "freq" not in key}
    if name == "original_max_position_embeddings" and value == 0:
        return  # transformers takes it for "not given"
    fails("llama", {"rope_scaling": {**sound, name: value}}, name)


@pytest.mark.parametrize("model_type", EPS)
@pytest.mark.parametrize("value", [math.nan, 1.5, -0.1, "x"], ids=repr)
def test_dropout(model_type: str, value: Any) -> None:
    names = [name for name in family_of(model_type).defaults if "drop" in name]
    assert names
    for name in names:
        config = minilm.AutoConfig.for_model(model_type)
        config.update({name: value})
        with pytest.raises(ConfigError, match=name):
            family_of(model_type).config(config)


@pytest.mark.parametrize("model_type", EPS)
@pytest.mark.parametrize("value", [-1, 0, 2**31, 2**80, 1.5, math.nan, "8", True, None], ids=repr)
def test_sizes(model_type: str, value: Any) -> None:
    for name in ("hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings"):
        config = minilm.AutoConfig.for_model(model_type)
        config.update({name: value})
        with pytest.raises(ConfigError):
            family_of(model_type).config(config)


def test_options_of_rope_that_transformers_ignores(tmp_path: Any) -> None:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
            "attn_factor": 0.878, "finetuned": True,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'yarn' does not know the options attn_factor, finetuned"):
        ours = minilm.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-4
