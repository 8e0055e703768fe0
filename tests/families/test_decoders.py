"""SmolLM3, OLMo 2, GPT-NeoX, Phi and Gemma, each way in which they differ from Llama, against transformers.

(Drawn configurations of these families are among the slow tests of models.)
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from close import assert_close
from native_runs import require_extension
from pairs import class_of, heads_of, pair, randomise
from strategies import LATER
from torch import Tensor

import minilm
from minilm.config import ConfigError, ModelConfig, RopeConfig
from minilm.families import PretrainedConfig, family_of
from minilm.model import pretrained
from minilm.native import blocks
from minilm.ops.quantized import dequantise

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "smollm3": {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_neox": {"rotary_pct": 0.25},
    "phi": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "gemma": {"num_key_value_heads": 1, "head_dim": 10},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 10,
        "sliding_window": 3,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 10,
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "rope_theta": 500.0,
        "rope_local_base_freq": 20.0,
        "final_logit_softcapping": 2.0,
    },
}
TRAITS: dict[str, Any] = {
    "output_norm": True,
    "parallel_norms": 2,
    "norm_plus_one": True,
    "embedding_scale": 3.0,
    "rotary_dim": 2,
    "local_rope": RopeConfig(theta=20.0),
    "layers_without_rope": (1,),
    "qk_norm_of_all": True,
    "qkv_by_head": True,
    "attention_soft_cap": 0.3,
    "head_bias": True,
    "head_soft_cap": 3.0,
}
"""Options of ModelConfig that these families brought."""


def config_of(family: str, **options: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **OWN[family], **options}


@cache
def tokens() -> tuple[Tensor, Tensor]:
    """Rows of 9, 5 and 2 tokens, padded on the left."""
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [7]])).long()
    return ids * mask, mask


def scores(model: Any, **options: Any) -> Tensor:
    ids, mask = tokens()
    with torch.no_grad():
        found: Tensor = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), **options
        )[0]
    return found[mask.bool()]


@pytest.mark.parametrize("family", LATER)
def test_results_are_those_of_transformers(family: str) -> None:
    """Logits, each layer's states and maps; and after half of the tokens, the rest with a cache."""
    ids, mask = tokens()
    with pair(config_of(family), "causal-lm", 3) as p, torch.no_grad():
        place = (mask.cumsum(1) - 1).clamp(0)
        show = {"output_hidden_states": True, "output_attentions": True}
        ours, theirs = (
            m(ids, attention_mask=mask, position_ids=place, **show) for m in (p.model, p.reference)
        )
        seen = mask.bool()
        assert_close(ours.logits[seen], theirs.logits[seen], atol=1e-4)
        assert_close(scores(p.model), theirs.logits[seen], atol=1e-4)  # by whatever is fastest
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert_close(a[seen], b[seen], atol=1e-4)
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            there = seen[:, None, :, None].expand_as(a)
            assert_close(a[there], b[there], atol=1e-4)
        maps = minilm.attention_probs(p.model, ids, mask, layer=1)
        assert_close(maps[1], theirs.attentions[1][1, :, 4:, 4:], atol=1e-4)
        first = p.model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        last = p.model(ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values)
        assert_close(last.logits[:, 0], theirs.logits[:, -1], atol=1e-4)


@pytest.mark.parametrize("family", LATER)
def test_generation_is_that_of_transformers(family: str) -> None:
    ids, mask = tokens()
    with pair(config_of(family), "causal-lm", 5) as p, torch.no_grad():
        options = {"max_new_tokens": 8, "do_sample": False}
        theirs = p.reference.generate(ids, attention_mask=mask, **options)
        ours = p.model.generate(ids, attention_mask=mask, **options)
        assert ours.tolist() == theirs.tolist()
        cache = p.model.new_cache(1, dtype=torch.int8)
        exact = p.model(ids[:1]).logits[:, -1]
        p.model(ids[:1, :8], past_key_values=cache)
        assert_close(p.model(ids[:1, 8:], past_key_values=cache).logits[:, -1], exact, atol=0.25)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("smollm3", "gemma") else f for f in LATER]
)
def test_files_and_names(family: str, tmp_path: Path) -> None:
    """Both libraries read what is saved; unfused, the modules have transformers' names."""
    with pair(config_of(family), "causal-lm", 7) as p:
        expected = scores(p.reference)
        p.model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        assert_close(scores(again), expected, atol=1e-4)
        assert type(again).__name__ == type(p.model).__name__
        stored = p.model.checkpoint_state_dict()
        spelled = {name.replace("embed_out", "lm_head") for name in stored}
        lacking = set(p.reference.state_dict()) - spelled
        assert lacking <= ({"lm_head.weight"} if p.model.spec.tie_word_embeddings else set())
        p.model.unfuse()
        assert_close(scores(p.model), expected, atol=1e-4)
        theirs = dict(p.reference.named_modules())
        assert "model.layers.1.self_attn.q_proj" in theirs or family == "gpt_neox"
        modules = dict(p.model.named_modules())
        named = {name for name, module in theirs.items() if isinstance(module, torch.nn.Linear)}
        assert {name.replace("embed_out", "lm_head") for name in modules} >= named
        p.model.fuse()
        assert_close(scores(p.model), expected, atol=1e-4)
        p.model.resize_token_embeddings(70)
        assert_close(scores(p.model)[:, :64], expected, atol=1e-4)


@pytest.mark.parametrize(
    "family", [f if f in ("gpt_neox", "gemma2") else pytest.param(f, marks=pytest.mark.slow) for f in LATER]
)
def test_other_dtypes_of_weights(family: str) -> None:
    """bfloat16 is as near to float32 as transformers' is; quantised weights count as what they stand for."""
    with pair(config_of(family), "causal-lm", 9) as p:
        exact = scores(p.reference)
        theirs = scores(p.reference.to(torch.bfloat16)).float()
        ours = class_of(minilm, family, "causal-lm").from_pretrained(p.folder, dtype=torch.bfloat16)
        usual = float((theirs - exact).abs().mean())
        assert float((scores(ours).float() - exact).abs().mean()) < 1.5 * usual + 1e-3
        model = class_of(minilm, family, "causal-lm").from_pretrained(p.folder, weights="q4_0")
        with minilm.backend("reference"):
            found = scores(model)
        for name, module in list(p.model.named_modules()):
            layer = model.get_submodule(name)
            if hasattr(layer, "quantized"):
                with torch.no_grad():
                    module.weight.copy_(dequantise(layer.quantized, torch.float32))
        with minilm.backend("reference"):
            assert_close(found, scores(p.model), atol=1e-4)
        int8 = class_of(minilm, family, "causal-lm").from_pretrained(p.folder, weights="int8")
        assert float((scores(int8) - exact).abs().mean()) < 0.1 * float(exact.abs().mean()) + 0.02


def model_with(trait: str | None) -> Any:
    """A Llama with one trait more, and the windows and norms without which it would be none."""
    config = {**SIZES, "model_type": "llama", "head_dim": 16, "tie_word_embeddings": True}
    model = minilm.AutoModelForCausalLM.from_config(PretrainedConfig.from_dict(config)).eval()
    whole = {"qk_norm": True, "windows": (3, None, None)}
    spec = replace(model.spec, **whole, **({} if trait is None else {trait: TRAITS[trait]}))

    kind = replace(model.family, translate=lambda hf: spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "family_of", lambda name: kind)
        made: Any = type(model)(model.config)
    randomise(made, 1)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("trait", TRAITS)
def test_no_fast_path_ignores_a_trait(trait: str) -> None:
    """Whole native passes compute the trait or are refused; so do decoding steps and the graph's batches."""
    model, plain = model_with(trait), model_with(None)
    ids = tokens()[0][:1]

    def answers(model: Any) -> list[Tensor]:
        with torch.inference_mode():
            cache = model.new_cache(1)
            found = [model(ids).logits, model(ids[:, :6], past_key_values=cache).logits]
            rows = list(cache.rows)
            found += [model.step(ids[:, 6], rows, cache)[0], model.steps(ids[0, 7:8], rows, cache, 2)[0]]
        return found

    fast, usual = answers(model), answers(plain)
    with minilm.backend("reference"):
        expected = answers(model)
    for a, b in zip(fast, expected, strict=True):
        assert_close(a, b, atol=1e-4)
    assert any(float((a - b).abs().max()) > 1e-2 for a, b in zip(expected, usual, strict=True))
    if trait not in ("attention_soft_cap", "local_rope", "rotary_dim"):
        return  # no code of graphs alone is about the others
    program = torch.export.export(model, (ids,), strict=False)
    assert_close(program.module()(ids).logits, expected[0], atol=1e-4)


def test_every_trait_is_known_to_the_native_passes() -> None:
    """A new field of ModelConfig must be put into one of these lists."""
    computed = {
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
        *("intermediate_size", "max_positions", "causal", "pre_norm", "norm", "norm_eps", "activation"),
        *("gated_mlp", "norm_plus_one", "positions", "position_offset", "positions_skip_padding_id", "rope"),
        *("type_vocab_size", "types_are_tokens", "embedding_norm", "final_norm", "qkv_bias", "out_bias"),
        *("mlp_bias", "qk_norm", "attention_scale", "scale_by_inverse_layer", "windows", "output_norm"),
        *("parallel_norms", "rotary_dim", "local_rope", "layers_without_rope", "qk_norm_of_all"),
        *("qkv_by_head", "attention_soft_cap", "embedding_scale", "head_bias", "head_soft_cap"),
        *("tie_word_embeddings", "pad_token_id", "embedding_dropout", "attention_dropout", "hidden_dropout"),
        *("inner_dropout", "attention_out_dropout", "embedding_size", "shared_layers"),
        *("norm_without_bias", "bare_first_layer"),
    }
    refused = set(blocks.UNKNOWN)
    assert computed | refused == {field.name for field in fields(ModelConfig)}
    assert not computed & refused


@pytest.mark.parametrize("family", LATER)
def test_prompts_and_steps_run_natively(family: str) -> None:
    require_extension()
    model = class_of(minilm, family, "causal-lm")(PretrainedConfig.from_dict(config_of(family))).eval()
    randomise(model, 0)
    minilm.explain(reset=True)
    scores(model)
    with torch.no_grad():
        model.generate(tokens()[0][:1], max_new_tokens=4, eos_token_id=None)
    told = minilm.explain()
    for op in ("embed", "blocks", "decode_step"):
        assert told.backends(op) == {"native"}


def test_fresh_norms_change_nothing() -> None:
    """Gemma's norm weights begin with 0, since 1 is added."""
    for family, value in (("gemma3_text", 0.0), ("olmo2", 1.0)):
        model = class_of(minilm, family, "base")(PretrainedConfig.from_dict(config_of(family)))
        norms = {n: p for n, p in model.named_parameters() if n.endswith("norm.weight")}
        assert len(norms) > 6
        assert all(bool((weight == value).all()) for weight in norms.values())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "no_rope_layers must be a list of 0 or 1 for each of the 3 layers",
    ),
    ("smollm3", {"no_rope_layers": "all"}, "no_rope_layers"),
    ("smollm3", {"no_rope_layer_interval": 0}, "cannot be read"),
    ("gpt_neox", {"rope_theta": 5.0, "rotary_emb_base": 10000}, "must agree"),
    ("gpt_neox", {"rotary_pct": 0.2}, "rope rotates an even number"),
    ("gpt_neox", {"rotary_pct": 1.5}, "rotary_pct must be a number from 0 to 1"),
    ("gpt_neox", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("phi", {"partial_rotary_factor": 0.0}, "rope rotates an even number"),
    ("olmo2", {"mlp_bias": True}, "mlp_bias"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"sliding_window": None}, "there is no sliding_window"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attention_soft_cap"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "head_soft_cap"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "full_attention"),
]


@pytest.mark.parametrize(("family", "options", "said"), REFUSED)
def test_what_cannot_be_is_refused(family: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        family_of(family).config(
            PretrainedConfig.from_dict(json.loads(json.dumps(config_of(family, **options))))
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", LATER)
def test_heads(family: str) -> None:
    for head in heads_of(family):
        with pair(config_of(family), head, 1) as p, torch.no_grad():
            ids = tokens()[0][:1]
            theirs, ours = p.reference(ids), p.model(ids)
            for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
                if theirs.get(name) is not None:
                    assert_close(ours[name], theirs[name], atol=1e-4)
