"""NomicBERT against transformers, in both spellings of its files.

(Drawn configurations are among the slow tests of models.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_close
from native_runs import require_extension
from pairs import fields, heads_of, pair
from safetensors.torch import load_file, save_file
from strategies import small
from torch import Tensor
from transformers import NomicBertForMaskedLM

import minilm
from minilm.config import ConfigError
from minilm.families import PretrainedConfig, family_of


def inputs() -> dict[str, Tensor]:
    """Rows of 11, 7 and 2 tokens, of two types."""
    generator = torch.Generator().manual_seed(0)
    ids, types = torch.randint(3, 41, (3, 11), generator=generator), torch.arange(11).expand(3, -1) % 2
    mask = (torch.arange(11) < torch.tensor([[11], [7], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types * mask}


def real(x: Tensor) -> Tensor:
    mask = inputs()["attention_mask"].bool()
    return x[mask] if x.shape[:2] == mask.shape else x


@pytest.mark.parametrize("head", heads_of("nomic_bert"))
def test_results_are_those_of_transformers(head: Any) -> None:
    """By the native blocks and by the modules; saved, transformers reads the same again."""
    require_extension()
    with pair(small("nomic_bert", head_dim=6), head, 3, num_labels=3) as p, torch.no_grad():
        theirs = p.reference(**inputs(), output_hidden_states=True)
        minilm.explain(reset=True)
        ours = p.model(**inputs())
        assert minilm.explain().backends("blocks") == {"native"}
        shown = p.model(**inputs(), output_hidden_states=True)
        for name in fields(head, theirs):
            assert_close(real(ours[name]), real(theirs[name]), atol=1e-4)
            assert_close(real(shown[name]), real(theirs[name]), atol=1e-4)
        for a, b in zip(shown.hidden_states, theirs.hidden_states, strict=True):
            assert_close(real(a), real(b), atol=1e-4)
        p.model.save_pretrained(p.folder / "again")
        again = type(p.reference).from_pretrained(p.folder / "again", attn_implementation="eager")
        for name in fields(head, theirs):
            assert_close(real(again(**inputs())[name]), real(theirs[name]), atol=1e-5)


NAMES = {
    "nomic_bert.embeddings.LayerNorm.": "bert.emb_ln.",
    "nomic_bert.layers.": "bert.encoder.layers.",
    "nomic_bert.": "bert.",
    "self_attn.o_proj": "attn.out_proj",
    "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2",
    "up_proj": "fc11",
    "gate_proj": "fc12",
    "down_proj": "fc2",
}


def test_older_files(tmp_path: Path) -> None:
    """nomic-embed-text-v1.5 as it was published: GPT-2's names of options, and one matrix for q, k and v."""
    with pair(small("nomic_bert"), "masked-lm", 4) as p, torch.no_grad():
        assert isinstance(p.reference, NomicBertForMaskedLM)
        expected = real(p.reference(**inputs()).logits)
        tensors: dict[str, Tensor] = {}
        stored = load_file(p.folder / "model.safetensors")
    for name, value in stored.items():
        older = name
        for new, old in NAMES.items():
            older = older.replace(new, old)
        if ".q_proj." in older:
            parts = [stored[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            tensors[older.replace("self_attn.q_proj", "attn.Wqkv")] = torch.cat(parts)
        elif ".k_proj." not in older and ".v_proj." not in older:
            tensors[older] = value.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "model_type": "nomic_bert",
        "vocab_size": 41,
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 2,
        "n_inner": 17,
        "n_positions": 33,
        "layer_norm_epsilon": 1e-12,
        "rotary_emb_base": 1000,
        "activation_function": "swiglu",
        "prenorm": False,
        "qkv_proj_bias": False,
        "causal": False,
        "rotary_emb_fraction": 1.0,
        "rotary_scaling_factor": None,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = minilm.AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(real(model(**inputs()).logits), expected, atol=1e-4)
        model.save_pretrained(tmp_path / "again")
        again = NomicBertForMaskedLM.from_pretrained(tmp_path / "again")
        assert_close(real(again(**inputs()).logits), expected, atol=1e-4)
        model.unfuse()
        assert_close(real(model(**inputs()).logits), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prenorm": True}, "prenorm=True is not supported"),
        ({"moe_every_n_layers": 2}, "moe_every_n_layers=2 is not supported"),
        ({"rotary_scaling_factor": 2}, "rotary_scaling_factor=2 is not supported"),
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction=0.5 is not supported"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        family_of("nomic_bert").config(PretrainedConfig.from_dict(small("nomic_bert", **options)))
