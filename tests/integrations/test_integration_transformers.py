"""transformers' models with minilm's attention: the same logits, tokens and gradients as with eager
attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from close import assert_close
from pairs import randomise
from torch import Tensor

import minilm
from minilm.integrations.transformers import Mask, register

register()

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "intermediate_size": 40, "max_position_embeddings": 64}
DECODER = {**SIZES, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 60}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "hidden_size": 24, "num_attention_heads": 3},
    "roberta": {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "pad_token_id": 0},
    "gpt2": {"vocab_size": 61, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64, "bos_token_id": 1},
    "llama": {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 5},
    "qwen2": {
        **DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True,
        "sliding_window": 3, "max_window_layers": 1,
    },
    "gemma2": {
        **DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
        "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5,
    },
}  # fmt: skip
DECODERS = tuple(CONFIGS)[2:]
GPT2_PADS = {"pad_token_id": 0, "eos_token_id": 60}


def models(family: str, **options: Any) -> tuple[Any, Any]:
    """The same random model on eager attention and on minilm's."""
    extra = GPT2_PADS if family == "gpt2" else {}
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **extra, **options})
    kind = transformers.AutoModelForMaskedLM if family not in DECODERS else transformers.AutoModelForCausalLM
    eager = kind.from_config(config, attn_implementation="eager").eval()
    randomise(eager, 0)
    ours = kind.from_config(config, attn_implementation="minilm").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def batch(lengths: list[int], *, left: bool, columns: int | None = None) -> dict[str, Tensor]:
    """Random ids of rows of these lengths, their mask and their positions."""
    width = columns or max(lengths)
    column, sizes = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = ((column >= width - sizes) if left else (column < sizes)).long()
    ids = torch.randint(2, 60, mask.shape, generator=torch.Generator().manual_seed(width)) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**call).logits[call["attention_mask"].bool()]
    return result


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_a_padded_batch(family: str, left: bool) -> None:
    eager, ours = models(family)
    call = batch([9, 4, 1, 12], left=left, columns=13)
    if family == "roberta":  # counts its own positions from the ids
        del call["position_ids"]
    with torch.no_grad():
        minilm.explain(reset=True)
        assert_close(logits(ours, call), logits(eager, call), atol=2e-5)
    assert [d.calls for d in minilm.explain().decisions if d.op == "attention"] != []


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_without_a_mask(family: str) -> None:
    eager, ours = models(family)
    ids = batch([11, 11], left=False)["input_ids"]
    with torch.no_grad():
        assert_close(ours(ids).logits, eager(ids).logits, atol=2e-5)


GENERATIONS = [
    (family, left, cache)
    for family in DECODERS
    for left in (False, True)
    for cache in (None, "static")
    # Windows refuse padding between tokens, and transformers' GPT-2 takes no prepared masks.
    if (left or family in ("gpt2", "llama")) and (cache is None or family != "gpt2")
]


@pytest.mark.parametrize(("family", "left", "cache"), GENERATIONS)
def test_generation_with_a_cache(family: str, left: bool, cache: str | None) -> None:
    """The same tokens, with the prompt's padding on either side, in a growing and in a static cache."""
    eager, ours = models(family)
    call = batch([3, 7], left=left)
    del call["position_ids"]
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    expected = eager.generate(**call, **options)
    assert torch.equal(ours.generate(**call, **options), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_more_keys_than_queries(family: str) -> None:
    """A prompt read in two parts; the second sees the first through the cache."""
    eager, ours = models(family)
    call = batch([12, 10], left=True)
    first = {name: x[:, :7] for name, x in call.items()}
    second = {"input_ids": call["input_ids"][:, 7:], "attention_mask": call["attention_mask"]}
    second["position_ids"] = call["position_ids"][:, 7:]
    outs = []
    with torch.no_grad():
        for model in (eager, ours):
            past = model(**first, use_cache=True).past_key_values
            outs.append(model(**second, past_key_values=past).logits)
    assert_close(outs[1], outs[0], atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "mistral"])
def test_gradients_of_training(family: str) -> None:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    found = []
    for model in models(family, **none):
        call = batch([9, 4, 12], left=False)
        labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
        model.train()
        model(**call, labels=labels).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert_close(found[1][name], expected, atol=1e-5 * max(1.0, float(expected.abs().max())), what=name)


def test_dropout_is_drawn_in_training_alone() -> None:
    _, model = models("llama", attention_dropout=0.5)
    call = batch([8, 5], left=False)
    with torch.no_grad():
        assert torch.equal(logits(model, call), logits(model, call))
        model.train()
        assert not torch.equal(logits(model, call), logits(model, call))


def test_packed_rows() -> None:
    """Position ids that start again are the beginnings of sequences in one row."""
    eager, ours = models("llama")
    ids = batch([12, 12], left=False)["input_ids"]
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    with torch.no_grad():
        expected = eager(ids, position_ids=positions, use_cache=False).logits
        found = ours(ids, position_ids=positions, use_cache=False).logits
        apart = ours(ids[:1, 5:], use_cache=False).logits
    assert_close(found, expected, atol=2e-5)
    assert_close(found[:1, 5:], apart, atol=2e-5)


def test_encoder_and_decoder_of_t5() -> None:
    """Position bias with gradient, cross-attention to a padded text, and no scale."""
    config = transformers.T5Config(
        vocab_size=61, d_model=24, d_kv=8, num_heads=3, num_layers=2, d_ff=40, decoder_start_token_id=0
    )
    eager = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomise(eager, 0)
    ours = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="minilm").eval()
    ours.load_state_dict(eager.state_dict())
    call = batch([9, 4, 12], left=False)
    del call["position_ids"]
    call["labels"] = call["input_ids"][:, :6].contiguous()
    outs = [model(**call) for model in (eager, ours)]
    assert_close(outs[1].logits, outs[0].logits, atol=5e-5)
    outs[0].loss.backward()
    outs[1].loss.backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert a.grad is not None
        assert_close(a.grad, b.grad, atol=2e-5 * max(1.0, float(b.grad.abs().max())), what=name)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_on_the_triton_kernels(family: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    eager, ours = models(family)
    call = batch([3, 9], left=False)
    minilm.explain(reset=True)
    with torch.no_grad(), minilm.backend(attention="triton"):
        assert_close(logits(ours, call), logits(eager, call), atol=2e-5)
    assert minilm.explain().backends("attention") == {"triton"}


def test_from_pretrained(tmp_path: Path) -> None:
    eager, _ = models("bert")
    eager.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="minilm")
    assert loaded.config._attn_implementation == "minilm"
    call = batch([5, 2], left=False)
    with torch.no_grad():
        assert_close(logits(loaded, call), logits(eager, call), atol=2e-5)


# --- refusals ---


def test_what_cannot_be_done_is_said() -> None:
    _, ours = models("llama")
    ids = batch([4, 4], left=False)["input_ids"]
    by_hand = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"supports masks \[batch, tokens\].*bool \[2, 1, 4, 4\]"):
        ours(ids, attention_mask=by_hand)
    with pytest.raises(ValueError, match="does not return attention maps"):
        ours(ids, output_attentions=True)


def test_padding_between_tokens_under_a_window() -> None:
    eager, ours = models("mistral")
    call = batch([8, 8], left=False)
    call["attention_mask"][0, 3] = 0
    del call["position_ids"]
    with pytest.raises(ValueError, match="padding between tokens"):
        ours(**call)
    eager, ours = models("llama")  # without a window a hole is left out
    with torch.no_grad():
        assert_close(logits(ours, call), logits(eager, call), atol=2e-5)


def test_unknown_masks_are_refused() -> None:
    from transformers import masking_utils

    _, ours = models("llama")
    ids = torch.ones(1, 4, 24)
    sizes = {"config": ours.config, "inputs_embeds": ids, "attention_mask": None, "past_key_values": None}
    ours.config.attention_chunk_size = 2
    with pytest.raises(ValueError, match="not the mask chunked_overlay"):
        masking_utils.create_chunked_causal_mask(**sizes)
    with pytest.raises(ValueError, match="or_masks"):
        masking_utils.create_causal_mask(**sizes, or_mask_function=lambda b, h, q, k: q >= 0)
    with pytest.raises(ValueError, match="does not support the custom mask"):
        masking_utils.create_causal_mask(**sizes, and_mask_function=lambda b, h, q, k: q >= 0)
    kept = masking_utils.create_causal_mask(**sizes)
    assert isinstance(kept, Mask)
    assert (kept.causal, kept.window, kept.packing) == (True, None, None)
