"""GGUF files of SmolLM3, OLMo 2 and Gemma: random models of transformers, written by the `gguf` package with
its names, and read by minilm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from close import assert_close
from gguf_files import permuted, write_gguf
from pairs import randomise

import minilm
from minilm.files import WeightError

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}, {"rope.freq_base": 2e6}),
    "olmo2": ("olmo2", {"num_hidden_layers": 2, "rms_norm_eps": 1e-5}, {"rope.freq_base": 1e4}),
    "gemma": ("gemma", {"num_hidden_layers": 2, "head_dim": 10}, {}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 2,
            "head_dim": 10,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
        {
            "attention.sliding_window": 4,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 10,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "attention.sliding_window": 4,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}
"""llama.cpp's architecture -> transformers' model_type, options of the model, and what its file says."""


def written(folder: Path, arch: str, **more: Any) -> tuple[Any, Path]:
    """A random model, and the file that llama.cpp's converter would make of it."""
    kind, options, metadata = CASES[arch]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, 4)
    key = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, part = tensor.numpy(), name.split(".")[-2]
        if arch == "smollm3" and part in heads:
            array = permuted(array, heads[part])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        tensors[found] = array
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **({f"attention.{x}_length": 10 for x in ("key", "value")} if arch.startswith("gemma") else {}),
        **metadata,
        **more,
    }
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    whole = {f"{arch}.{key}": value for key, value in said.items()} | ids
    return model, write_gguf(folder / "model.gguf", arch, tensors, whole)


@pytest.mark.parametrize("arch", CASES)
def test_a_file_is_the_model_it_was_made_of(arch: str, tmp_path: Path) -> None:
    theirs, file = written(tmp_path, arch)
    ours = minilm.AutoModelForCausalLM.from_pretrained(file)
    assert ours.config.model_type == CASES[arch][0]
    assert type(ours).__name__ == type(theirs).__name__
    ids = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4)


def test_attention_of_the_largest_gemmas(tmp_path: Path) -> None:
    """llama.cpp tells them by their layers: scores are divided by sqrt(C / H) there."""
    for arch, layers in (("gemma2", 46), ("gemma3", 62)):
        folder = tmp_path / arch
        folder.mkdir()
        kind, options, metadata = CASES[arch]
        CASES["large"] = kind, {**options, "num_hidden_layers": layers}, metadata
        try:
            CASES[arch], before = CASES.pop("large"), CASES[arch]
            _, file = written(folder, arch)
        finally:
            CASES[arch] = before
        assert minilm.AutoConfig.from_pretrained(file).query_pre_attn_scalar == 32 // 4


@pytest.mark.parametrize(
    ("arch", "option"), [("gemma", "attn_logit_softcapping"), ("gemma3", "attn_logit_softcapping")]
)
def test_an_option_of_another_architecture(arch: str, option: str, tmp_path: Path) -> None:
    _, file = written(tmp_path, arch, **{option: 2.0})
    with pytest.raises(WeightError, match=f"{arch}.{option} = 2.0 is not supported"):
        minilm.AutoModelForCausalLM.from_pretrained(file)
