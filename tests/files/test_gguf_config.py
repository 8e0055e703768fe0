"""From GGUF metadata to config.json: sizes, rope scaling, token ids, and what is not supported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import (
    SMALL,
    divisors,
    small,
    small_tensors,
    write_gguf,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilm.files.checkpoint import WeightError
from minilm.files.gguf import GGUFCheckpoint


def config_of(path: Path, **metadata: Any) -> dict[str, Any]:
    with GGUFCheckpoint(small(path, **metadata)) as checkpoint:
        return checkpoint.hf_config()


def test_config(tmp_path: Path) -> None:
    assert config_of(tmp_path / "x") == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 5,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_defaults_of_llama_cpp(tmp_path: Path) -> None:
    tensors = small_tensors() | {"blk.0.attn_k.weight": np.zeros((8, 8), np.float32)}
    left_out = ("head_count_kv", "freq_base", "dimension_count")
    metadata = {key: value for key, value in SMALL.items() if not key.endswith(left_out)}
    config = GGUFCheckpoint(write_gguf(tmp_path / "x", "llama", tensors, metadata)).hf_config()
    assert (config["num_key_value_heads"], config["rope_theta"], config["head_dim"]) == (2, 10000.0, 4)


def test_several_ends(tmp_path: Path) -> None:
    ids = {
        f"tokenizer.ggml.{name}_token_id": number for name, number in (("eot", 4), ("eom", 2), ("padding", 3))
    }
    path = write_gguf(tmp_path / "x", "llama", small_tensors(), SMALL | ids)
    config = GGUFCheckpoint(path).hf_config()
    assert config["eos_token_id"] == [2, 4]
    assert config["pad_token_id"] == 3


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_scaling_in_metadata(
    tmp_path: Path, metadata: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    assert config_of(tmp_path / "x", **metadata)["rope_scaling"] == scaling


def test_options_without_effect(tmp_path: Path) -> None:
    plain = config_of(tmp_path / "x")
    assert plain == config_of(
        tmp_path / "y",
        expert_count=0,
        attention__causal=True,
        rope__scaling__attn_factor=1.0,
        vocab_size=5,
        rope__scaling__finetuned=True,
        attention__head_count=[2],
        attention__value_length=4,
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count = 8 is not supported, only 0"),
        ({"attention__causal": False}, r"llama\.attention\.causal = False is not supported"),
        ({"rope__scaling__attn_factor": 1.5}, r"\.attn_factor = 1\.5 is not supported, only 1\.0"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"rope__scaling__type": "longrope"}, r"rope\.scaling\.type = 'longrope' is not supported"),
        ({"rope__scaling__type": [1, 2]}, r"rope\.scaling\.type = \[1, 2\]"),
        ({"logit_scale": 0.5}, r"llama\.logit_scale = 0\.5 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention__key_length": 6}, r"llama\.rope\.dimension_count = 4 is not supported, only 6"),
        ({"attention__value_length": 6}, r"llama\.attention\.value_length = 6 is not supported, only 4"),
        ({"attention__key_length": 5, "rope__dimension_count": 5}, "heads of 5 channels, an odd number"),
        ({"attention__head_count_kv": [1, 2]}, r"head_count_kv: expected a whole number .*, got \[1, 2\]"),
        ({"feed_forward_length": 0}, r"feed_forward_length: expected a whole number from 1 on, got 0"),
        ({"feed_forward_length": True}, "feed_forward_length: expected a whole number"),
        ({"feed_forward_length": "big"}, "feed_forward_length: expected a whole number from 1 on, got 'big'"),
        ({"attention__layer_norm_rms_epsilon": math.nan}, "rms_epsilon: expected a positive number"),
        ({"block_count": 2}, r"llama\.block_count is 2, but there are 1 layers"),
        ({"block_count": 2**32 - 1}, r"llama\.block_count is 4294967295, but there are 1 layers"),
        ({"embedding_length": 16}, r"token_embd\.weight has shape \[5, 8\], expected \[vocabulary, 16\]"),
        ({"without": "context_length"}, r"metadata llama\.context_length is missing"),
        ({"without": "attention.layer_norm_rms_epsilon"}, "layer_norm_rms_epsilon is missing"),
    ],
)
def test_config_that_cannot_be(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        config_of(tmp_path / "x.gguf", **metadata)


def test_sliding_window_is_llamas_only(tmp_path: Path) -> None:
    metadata = {key.replace("llama.", "qwen2."): value for key, value in SMALL.items()}
    path = write_gguf(
        tmp_path / "x", "qwen2", small_tensors(), metadata | {"qwen2.attention.sliding_window": 9}
    )
    with pytest.raises(WeightError, match=r"qwen2\.attention\.sliding_window is not supported"):
        GGUFCheckpoint(path).hf_config()


def llama3_config(head_dim: int, **rope: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3"} | rope,
    )


@given(
    head_dim=st.sampled_from([64, 96, 128]),
    theta=st.sampled_from([1e5, 5e5, 1e6]),
    factor=st.floats(1.5, 40, width=32),
    bounds=st.sampled_from([(1.0, 4.0), (0.5, 4.0), (2.0, 8.0), (1.0, 16.0)]),
    original=st.sampled_from([2048, 4096, 8192, 16384]),
)
@example(head_dim=128, theta=5e5, factor=8.0, bounds=(1.0, 4.0), original=8192)  # Llama 3.1
@example(head_dim=64, theta=5e5, factor=32.0, bounds=(1.0, 4.0), original=8192)  # Llama 3.2
@settings(deadline=None, max_examples=50)
def test_llama3_scaling_is_found_again(
    tmp_path_factory: pytest.TempPathFactory,
    head_dim: int,
    theta: float,
    factor: float,
    bounds: tuple[float, float],
    original: int,
) -> None:
    rope = {
        "factor": factor,
        "low_freq_factor": bounds[0],
        "high_freq_factor": bounds[1],
        "original_max_position_embeddings": original,
    }
    want = divisors(llama3_config(head_dim, rope_theta=theta, **rope))
    embeddings = np.zeros((5, 2 * head_dim), np.float32)
    tensors = small_tensors() | {"token_embd.weight": embeddings, "rope_freqs.weight": want}
    metadata = SMALL | {
        "llama.embedding_length": 2 * head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.attention.key_length": head_dim,
        "llama.rope.freq_base": theta,
        "llama.context_length": 131072,
    }
    path = write_gguf(tmp_path_factory.getbasetemp() / "rope.gguf", "llama", tensors, metadata)
    with GGUFCheckpoint(path) as checkpoint:
        found = checkpoint.hf_config()["rope_scaling"]
    assert found.pop("rope_type") == "llama3"
    np.testing.assert_allclose(divisors(llama3_config(head_dim, rope_theta=theta, **found)), want, rtol=1e-4)
    if bounds == (1.0, 4.0) and original == 8192:
        assert found == rope | {"factor": pytest.approx(factor, rel=1e-6)}


def with_rope_freqs(path: Path, values: Any, **metadata: Any) -> GGUFCheckpoint:
    return GGUFCheckpoint(small(path, {"rope_freqs.weight": np.asarray(values, np.float32)}, **metadata))


def test_rope_freqs_that_say_little(tmp_path: Path) -> None:
    assert with_rope_freqs(tmp_path / "a", [1, 1]).hf_config()["rope_scaling"] is None
    linear = {"rope_type": "linear", "factor": 3.0}
    assert with_rope_freqs(tmp_path / "b", [3, 3]).hf_config()["rope_scaling"] == linear


@pytest.mark.parametrize(
    "values", [[1, 2, 3], [0, 1], [-1, 1], [math.nan, 1], [8, 1], [1.5, 1.25], [1e-45, 3e38]]
)
def test_rope_freqs_that_are_not_llama3s(tmp_path: Path, values: list[float]) -> None:
    with pytest.raises(WeightError, match=r"rope_freqs\.weight"):
        with_rope_freqs(tmp_path / "x", values).hf_config()


def test_rope_freqs_and_another_scaling(tmp_path: Path) -> None:
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
    with pytest.raises(
        WeightError, match=r"both llama\.rope\.scaling\.type = 'linear' and rope_freqs\.weight"
    ):
        with_rope_freqs(tmp_path / "x", [1, 8], **scaling).hf_config()
