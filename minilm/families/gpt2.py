"""GPT-2 (Radford et al. 2019).

A decoder: each token attends to itself and earlier tokens. Positions are a learned table. Norms come *before*
the sub-layers, x = x + attention(norm(x)), x = x + mlp(norm(x)), with a final norm at the end, so the
residual stream itself is never normalised. LayerNorm, the tanh form of GELU, biases everywhere. The output
matrix is the token table. Checkpoints store matrices as [in, out] (the "Conv1D" of the first release), q, k
and v already fused, and the causal mask as a buffer.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..weights import affine, copy, ignore, tied, transpose
from .family import DECODER_ONLY, Family, Options, SequenceHead, equal_heads

DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
    "classifier_dropout": None,
    "hidden_dropout": None,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}


def translate(hf: Options) -> ModelConfig:
    """GPT-2's options -> ModelConfig. (reorder_and_upcast_attn means a float32 softmax, which minilm always
    uses; the summary_* options belong to a multiple-choice head.)"""
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.n_embd,
        num_layers=hf.n_layer,
        num_heads=hf.n_head,
        num_kv_heads=hf.n_head,
        head_dim=equal_heads(hf),
        intermediate_size=hf.get("n_inner", 4 * hf.n_embd),
        max_positions=hf.n_positions,
        causal=True,
        pre_norm=True,
        norm="layer_norm",
        norm_eps=hf.layer_norm_epsilon,
        activation=hf.activation_function,
        types_are_tokens=True,
        final_norm=True,
        attention_scale=None if hf.scale_attn_weights else 1.0,
        scale_by_inverse_layer=hf.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        embedding_dropout=hf.embd_pdrop,
        attention_dropout=hf.attn_pdrop,
        hidden_dropout=hf.resid_pdrop,
    )


FAMILY = Family(
    model_type="gpt2",
    class_prefix="GPT2",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("transformer.",),
    attribute_map={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    body=(
        copy("wte.weight", "body.embeddings.tokens.weight"),
        copy("wpe.weight", "body.embeddings.positions.weight"),
        *affine("h.{i}.ln_1", "body.layers.{i}.attention_norm"),
        transpose("h.{i}.attn.c_attn.weight", "body.layers.{i}.attention.qkv.weight"),
        copy("h.{i}.attn.c_attn.bias", "body.layers.{i}.attention.qkv.bias"),
        transpose("h.{i}.attn.c_proj.weight", "body.layers.{i}.attention.out.weight"),
        copy("h.{i}.attn.c_proj.bias", "body.layers.{i}.attention.out.bias"),
        *affine("h.{i}.ln_2", "body.layers.{i}.mlp_norm"),
        transpose("h.{i}.mlp.c_fc.weight", "body.layers.{i}.mlp.up.weight"),
        copy("h.{i}.mlp.c_fc.bias", "body.layers.{i}.mlp.up.bias"),
        transpose("h.{i}.mlp.c_proj.weight", "body.layers.{i}.mlp.down.weight"),
        copy("h.{i}.mlp.c_proj.bias", "body.layers.{i}.mlp.down.bias"),
        *affine("ln_f", "body.norm"),
        ignore("h.{i}.attn.bias", "the causal mask, which needs no storage"),
        ignore("h.{i}.attn.masked_bias", "the value of masked scores"),
    ),
    heads={
        "causal-lm": (tied("lm_head.weight", "head.decoder.weight", "tied to the token embeddings"),),
        "sequence-classification": (copy("score.weight", "head.out.weight"),),
        "token-classification": affine("classifier", "head.out"),
        "question-answering": affine("qa_outputs", "head.out"),
    },
    rejected=DECODER_ONLY,
    sequence_head=SequenceHead(pool="last", bias=False),
    head_dropout={"token-classification": ("classifier_dropout", "hidden_dropout", 0.1)},
    class_names={"causal-lm": "GPT2LMHeadModel"},
)
