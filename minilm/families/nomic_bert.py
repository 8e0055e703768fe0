"""NomicBERT (Nussbaum et al. 2024, arXiv:2402.01613), the encoder of nomic-embed-text: BERT with rotary
positions and a gated MLP (SwiGLU), and without biases of linear layers in the body.

Norms stand after the residual sums, as in BERT. The pooler belongs to sequence classification only. Older
files have options named as in GPT-2 (n_embd) and other names of weights (encoder.layers.0.attn.Wqkv); both
are read. A mixture of experts (nomic-embed-text-v2-moe) is not supported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from ..weights import Rule, affine, copy, fuse, older, tied
from . import bert
from .family import NOT_A_DECODER, Family, Options, SequenceHead, equal_heads
from .positions import rope_config

DEFAULTS: dict[str, Any] = {
    **bert.DEFAULTS,
    "vocab_size": 30528,
    "hidden_act": "silu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 2048,
    "head_dim": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "rotary_emb_base": None,
    # In older files, without effect.
    "dense_seq_output": None,
    "fused_bias_fc": None,
    "fused_dropout_add_ln": None,
    "last_layer_subset": None,
    "max_trained_positions": None,
    "pad_vocab_size_multiple": None,
    "reorder_and_upcast_attn": None,
    "rotary_emb_scale_base": None,
    "scale_attn_weights": None,
    "summary_activation": None,
    "summary_first_dropout": None,
    "summary_proj_to_labels": None,
    "summary_type": None,
    "summary_use_proj": None,
    "use_flash_attn": None,
    "use_xentropy": None,
}


def translate(hf: Options) -> ModelConfig:
    """NomicBERT's options -> ModelConfig."""
    return replace(
        bert.translate(hf),
        head_dim=hf.get("head_dim") or equal_heads(hf),
        gated_mlp=True,
        positions="rope",
        rope=rope_config(hf, hf.get("rotary_emb_base", 1000.0)),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )


NEW, OLD, OURS = "layers.{i}", "encoder.layers.{i}", "body.layers.{i}"


def _either(source: str, before: str, target: str, *, bias: bool = False) -> tuple[Rule, ...]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return tuple(copy(f"{source}.{kind}", f"{target}.{kind}", also=(f"{before}.{kind}",)) for kind in kinds)


BODY = (
    copy("embeddings.word_embeddings.weight", "body.embeddings.tokens.weight"),
    copy("embeddings.token_type_embeddings.weight", "body.embeddings.types.weight"),
    *_either("embeddings.LayerNorm", "emb_ln", "body.embeddings.norm", bias=True),
    fuse(
        [f"{NEW}.self_attn.{name}_proj.weight" for name in "qkv"], f"{OURS}.attention.qkv.weight", sizes="qkv"
    ),
    older(copy(f"{OLD}.attn.Wqkv.weight", f"{OURS}.attention.qkv.weight")),
    *_either(f"{NEW}.self_attn.o_proj", f"{OLD}.attn.out_proj", f"{OURS}.attention.out"),
    *_either(f"{NEW}.post_attention_layernorm", f"{OLD}.norm1", f"{OURS}.attention_norm", bias=True),
    fuse(
        [f"{NEW}.mlp.{name}_proj.weight" for name in ("gate", "up")],
        f"{OURS}.mlp.up.weight",
        sizes="gate_up",
    ),
    older(
        fuse(
            [f"{OLD}.mlp.{name}.weight" for name in ("fc12", "fc11")],
            f"{OURS}.mlp.up.weight",
            sizes="gate_up",
        )
    ),
    *_either(f"{NEW}.mlp.down_proj", f"{OLD}.mlp.fc2", f"{OURS}.mlp.down"),
    *_either(f"{NEW}.post_mlp_layernorm", f"{OLD}.norm2", f"{OURS}.mlp_norm", bias=True),
)

FAMILY = Family(
    model_type="nomic_bert",
    class_prefix="NomicBert",
    defaults=DEFAULTS,
    translate=translate,
    prefixes=("nomic_bert.", "bert."),
    attribute_map={
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
        "resid_pdrop": "hidden_dropout_prob",
        "attn_pdrop": "attention_probs_dropout_prob",
    },
    body=BODY,
    pooler=bert.POOLER,
    base_pooler=False,
    heads={
        "masked-lm": (
            *affine("cls.predictions.transform.dense", "head.dense"),
            *affine("cls.predictions.transform.layer_norm", "head.norm"),
            tied("cls.predictions.decoder.weight", "head.decoder.weight", "tied to the token embeddings"),
            bert.MASKED_LM[-1],
        ),
        "sequence-classification": affine("classifier", "head.out"),
        "token-classification": affine("classifier", "head.out"),
    },
    rejected={
        **NOT_A_DECODER,
        "activation_function": ("swiglu",),
        "causal": (False,),
        "embd_pdrop": (0.0,),
        "mlp_fc1_bias": (False,),
        "mlp_fc2_bias": (False,),
        "moe_every_n_layers": (0,),
        "parallel_block": (False,),
        "prenorm": (False,),
        "qkv_proj_bias": (False,),
        "rotary_emb_fraction": (1.0,),
        "rotary_emb_interleaved": (False,),
        "rotary_scaling_factor": (),
        "scale_attn_by_inverse_layer_idx": (False,),
        "use_rms_norm": (False,),
    },
    sequence_head=SequenceHead(hidden="pooler"),
    head_dropout=bert.FAMILY.head_dropout,
)
