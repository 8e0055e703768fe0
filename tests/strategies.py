"""Hypothesis strategies over the configuration space of each family, and over the batches that a model can
be called with.

A configuration is drawn as the contents of a config.json, in the spelling of transformers 4 or 5, so that
both libraries read the same file and neither can help the other. Sizes are tiny and odd; every option that
is honoured is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

ENCODERS = (
    *("bert", "roberta", "xlm-roberta", "camembert", "distilbert"),
    *("modernbert", "deberta-v2", "nomic_bert", "mpnet", "electra", "albert"),
)
LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "electra", "albert")
"""Families whose options are nearly BERT's."""
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Families whose positions start after the padding index, and count tokens that are not padding."""
GEMMAS = ("gemma", "gemma2", "gemma3_text")
PARTLY_TURNED = ("gpt_neox", "phi")
LATER = ("smollm3", "olmo2", *PARTLY_TURNED, *GEMMAS)
SLOW = (
    *(*LATER, "camembert"),
    *("modernbert", "deberta-v2", "nomic_bert", "mpnet", "electra", "albert"),
)
OWN = ("test_decoders", "test_traits", "test_arena")
"""Families whose cases run with the slow tests, apart from those of these files, which are about them."""

WITHOUT_TABLE = ("modernbert", "deberta-v2", "nomic_bert")
"""Encoders without a position table."""

DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", *LATER)
FAMILIES = (*ENCODERS, *DECODERS)
ROPE_FAMILIES = DECODERS[1:5]  # Phi-3 has but the default type, later ones have options of their own

LONGEST = 11
"""Tokens of the longest sequence that `batches` draws; position tables are at least as long."""

ACTIVATIONS = (
    *(
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
    ),
    *(
        "hardswish",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "swish",
    ),
    "tanh",
)

Config = dict[str, Any]


def examples(count: int) -> settings:
    """`count` examples in the usual profile, and in proportion in one that draws more (see conftest.py)."""
    wanted = max(1, count * settings.default.max_examples // 25)
    # To explain a failure, hypothesis runs it some hundred times more; the small configuration says enough.
    return settings(max_examples=wanted, phases=set(Phase) - {Phase.explain})


def seeds() -> st.SearchStrategy[int]:
    """Seeds for weights and inputs."""
    return st.integers(0, 9999)


def _maybe(options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Config]:
    """Any subset of the options: what is left out has its default."""
    return st.fixed_dictionaries({}, optional=options)


EPSILONS = st.sampled_from([1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.1])
PROBABILITIES = st.sampled_from([0.0, 0.1, 0.5])
VOCABULARY = st.integers(7, 90)


@st.composite
def bert(draw: st.DrawFn, model_type: str = "bert") -> Config:
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MPNet, ELECTRA, ALBERT."""
    heads, head_dim, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(VOCABULARY)
    config = {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": max(2, heads * head_dim) if heads == 1 else heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(0, 3)),
        "intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": draw(st.integers(LONGEST, 20)),
        **draw(
            _maybe(
                {
                    "hidden_act": st.sampled_from(ACTIVATIONS),
                    "layer_norm_eps": EPSILONS,
                    "type_vocab_size": st.integers(1, 3),
                    "tie_word_embeddings": st.booleans(),
                    "hidden_dropout_prob": PROBABILITIES,
                    "attention_probs_dropout_prob": PROBABILITIES,
                    "classifier_dropout": st.none() | PROBABILITIES,
                    "initializer_range": st.just(0.3),
                }
            )
        ),
    }
    if model_type == "albert":
        config["num_hidden_layers"] = draw(st.integers(1, 3))  # else transformers has a block that never runs
        config["num_hidden_groups"] = 1
        config.pop("classifier_dropout", None)
        config |= draw(_maybe({"classifier_dropout_prob": PROBABILITIES, "inner_group_num": st.just(1)}))
    if model_type in ("albert", "electra"):
        config["embedding_size"] = draw(st.integers(2, 9) | st.just(config["hidden_size"]))
    if model_type == "mpnet":
        config.pop("classifier_dropout", None)
        config.pop("type_vocab_size", None)
        config |= draw(_maybe({"relative_attention_num_buckets": st.just(32)}))
        config["max_position_embeddings"] += 2
        config |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    elif model_type in ("bert", "electra", "albert"):
        config |= draw(
            _maybe(
                {
                    "pad_token_id": st.none() | st.integers(0, vocabulary - 1),
                    "position_embedding_type": st.just("absolute"),
                    "is_decoder": st.just(False),
                }
            )
        )
    else:  # positions begin after the padding index, and count tokens that are not padding
        config["pad_token_id"] = draw(st.integers(0, 3))
        config["max_position_embeddings"] += config["pad_token_id"] + 1
        config |= {"bos_token_id": 0, "eos_token_id": 2}
    return config


@st.composite
def distilbert(draw: st.DrawFn) -> Config:
    """DistilBERT."""
    heads, head_dim, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 9)), draw(VOCABULARY)
    return {
        "model_type": "distilbert",
        "vocab_size": vocabulary,
        "dim": heads * head_dim,
        "n_heads": heads,
        "n_layers": draw(st.integers(0, 3)),
        "hidden_dim": draw(st.integers(1, 50)),
        "max_position_embeddings": draw(st.integers(LONGEST, 20)),
        **draw(
            _maybe(
                {
                    "activation": st.sampled_from(ACTIVATIONS),
                    "sinusoidal_pos_embds": st.booleans(),
                    "tie_word_embeddings": st.booleans(),
                    "pad_token_id": st.integers(0, vocabulary - 1),
                    "dropout": PROBABILITIES,
                    "attention_dropout": PROBABILITIES,
                    "qa_dropout": PROBABILITIES,
                    "seq_classif_dropout": PROBABILITIES,
                }
            )
        ),
    }


@st.composite
def modernbert(draw: st.DrawFn) -> Config:
    """ModernBERT, in the spelling of transformers 4 or 5."""
    heads, head_dim, vocabulary = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4)), draw(VOCABULARY)
    layers, thetas = draw(st.integers(1, 4)), st.sampled_from([160_000.0, 500.0, 20.0])
    spelled = draw(
        _maybe(
            {
                "global_attn_every_n_layers": st.integers(1, 3),
                "global_rope_theta": thetas,
                "local_rope_theta": thetas,
                "rope_scaling": st.just({"rope_type": "linear", "factor": 2.0}),
                "layer_norm_eps": st.just(1e-5),
                "position_embedding_type": st.just("absolute"),
                "deterministic_flash_attn": st.booleans(),
            }
        )
        | st.fixed_dictionaries(
            {
                "layer_types": st.lists(
                    st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers
                ),
                "rope_parameters": st.fixed_dictionaries(
                    {
                        "full_attention": st.fixed_dictionaries(
                            {"rope_type": st.just("default"), "rope_theta": thetas}
                        ),
                        "sliding_attention": st.fixed_dictionaries(
                            {"rope_type": st.just("linear"), "factor": st.just(4.0), "rope_theta": thetas}
                        ),
                    }
                ),
            }
        )
    )
    return {
        "model_type": "modernbert",
        "vocab_size": vocabulary,
        "hidden_size": max(2, heads * head_dim),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": draw(st.integers(LONGEST, 20)),
        "local_attention": draw(st.integers(0, 12)),
        "pad_token_id": draw(st.integers(0, vocabulary - 1)),
        **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1),
        **spelled,
        **draw(
            _maybe(
                {
                    "hidden_activation": st.sampled_from(ACTIVATIONS),
                    "classifier_activation": st.sampled_from(ACTIVATIONS),
                    "norm_eps": EPSILONS,
                    "classifier_pooling": st.sampled_from(["cls", "mean"]),
                    **dict.fromkeys(
                        (
                            *("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias"),
                            "tie_word_embeddings",
                        ),
                        st.booleans(),
                    ),
                    **dict.fromkeys(
                        (
                            *("attention_dropout", "embedding_dropout", "mlp_dropout"),
                            "classifier_dropout",
                        ),
                        PROBABILITIES,
                    ),
                }
            )
        ),
    }


@st.composite
def deberta(draw: st.DrawFn) -> Config:
    """DeBERTa v2 and v3."""
    heads, head_dim, vocabulary = draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(VOCABULARY)
    relative = draw(st.booleans())
    config: Config = {
        "model_type": "deberta-v2",
        "vocab_size": vocabulary,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": draw(st.integers(LONGEST, 20)),
        "pad_token_id": draw(st.integers(0, vocabulary - 1)),
        "type_vocab_size": draw(st.integers(0, 3)),
        "relative_attention": relative,
        **draw(
            _maybe(
                {
                    "hidden_act": st.sampled_from(ACTIVATIONS),
                    "pooler_hidden_act": st.sampled_from(ACTIVATIONS),
                    "layer_norm_eps": EPSILONS,
                    "position_biased_input": st.booleans(),
                    "pos_att_type": st.sampled_from(
                        ["c2p|p2c", "p2c", ["c2p"], ["p2c", "c2p"], [], "C2P | p2c"]
                    ),
                    "share_att_key": st.booleans(),
                    "legacy": st.booleans(),
                    "tie_word_embeddings": st.booleans(),
                    "hidden_dropout_prob": PROBABILITIES,
                    "attention_probs_dropout_prob": PROBABILITIES,
                    "pooler_dropout": PROBABILITIES,
                    "cls_dropout": PROBABILITIES,
                }
            )
        ),
    }
    if relative:
        limits = st.sampled_from(
            [{"position_buckets": 4, "max_relative_positions": 9}, {"position_buckets": -1}]
        )
        config |= draw(limits | st.just({"position_buckets": 5}) | st.just({"max_relative_positions": 3}))
        config |= draw(_maybe({"norm_rel_ebd": st.sampled_from(["layer_norm", "none", "Layer_Norm | x"])}))
    if draw(st.integers(0, 3)) == 0:
        config |= {
            "conv_kernel_size": draw(st.sampled_from([1, 3, 5])),
            "conv_act": draw(st.sampled_from(ACTIVATIONS)),
        }
        config["conv_groups"] = draw(st.sampled_from([1, heads]))
    return config


@st.composite
def nomic(draw: st.DrawFn) -> Config:
    """NomicBERT."""
    heads, usual, vocabulary = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4)), draw(VOCABULARY)
    head_dim, positions = draw(st.sampled_from([None, 2, 6])), draw(st.integers(LONGEST, 20))
    return {
        "model_type": "nomic_bert",
        "vocab_size": vocabulary,
        "hidden_size": heads * usual,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(0, 3)),
        "intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": positions,
        "pad_token_id": draw(st.integers(0, vocabulary - 1)),
        **({} if head_dim is None else {"head_dim": head_dim}),
        **draw(
            _maybe(
                {
                    "hidden_act": st.sampled_from(ACTIVATIONS),
                    "layer_norm_eps": EPSILONS,
                    "type_vocab_size": st.integers(1, 3),
                    "hidden_dropout_prob": PROBABILITIES,
                    "attention_probs_dropout_prob": PROBABILITIES,
                    "classifier_dropout": st.none() | PROBABILITIES,
                    "rope_parameters": st.sampled_from(
                        [
                            {"rope_type": "default", "rope_theta": 50.0},
                            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                        ]
                    ),
                }
            )
        ),
    }


@st.composite
def gpt2(draw: st.DrawFn) -> Config:
    """GPT-2."""
    heads, head_dim, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 9)), draw(VOCABULARY)
    return {
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_embd": heads * head_dim,
        "n_head": heads,
        "n_layer": draw(st.integers(0, 3)),
        "n_positions": draw(st.integers(LONGEST, 20)),
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": draw(st.integers(0, vocabulary - 1)),
        **draw(
            _maybe(
                {
                    "n_inner": st.none() | st.integers(1, 50),
                    "n_ctx": st.just(20),
                    "activation_function": st.sampled_from(ACTIVATIONS),
                    "layer_norm_epsilon": EPSILONS,
                    "scale_attn_weights": st.booleans(),
                    "scale_attn_by_inverse_layer_idx": st.booleans(),
                    "reorder_and_upcast_attn": st.booleans(),
                    "tie_word_embeddings": st.booleans(),
                    "resid_pdrop": PROBABILITIES,
                    "embd_pdrop": PROBABILITIES,
                    "attn_pdrop": PROBABILITIES,
                    "summary_type": st.sampled_from(["cls_index", "last"]),
                }
            )
        ),
    }


@st.composite
def rope(draw: st.DrawFn, head_dim: int, positions: int) -> Config:
    """The rope options of a config.json, in one of the spellings that are around."""
    kinds = ["default", "linear", "llama3", "yarn"] + (["dynamic"] if head_dim > 2 else [])
    kind = draw(st.sampled_from(kinds))
    theta = draw(st.sampled_from([None, 10000.0, 10000, 500000.0, 50.0]))
    options: Config = {}
    if kind != "default":
        options["factor"] = draw(st.sampled_from([1.0, 1.5, 2, 4.0, 8.0]))
    if kind == "llama3":
        low = draw(st.sampled_from([1, 1.0, 2.0]))
        options |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.sampled_from([0.5, 3.0]))}
        options["original_max_position_embeddings"] = draw(st.integers(2, positions))
    if kind == "yarn":
        options |= draw(
            _maybe(
                {
                    "original_max_position_embeddings": st.integers(2, positions),
                    "attention_factor": st.sampled_from([0.7, 1.0, 1.4]),
                    "beta_fast": st.sampled_from([32, 8.0, 1.5]),
                    "beta_slow": st.sampled_from([1, 0.5, 0.05]),
                    "mscale": st.sampled_from([1.0, 0.7]),
                    "mscale_all_dim": st.sampled_from([0.5, 1.0]),
                    "truncate": st.booleans(),
                }
            )
        )
    spelling = draw(st.sampled_from(["rope_parameters", "rope_scaling", "rope_scaling, type"]))
    if spelling == "rope_parameters":  # transformers 5: everything in one place
        if kind == "default" and theta is None:
            return draw(st.sampled_from([{}, {"rope_parameters": None}]))
        theta = 10000.0 if theta is None and kind == "llama3" else theta  # which insists on it
        return {
            "rope_parameters": {
                "rope_type": kind,
                **options,
                **({} if theta is None else {"rope_theta": theta}),
            }
        }
    name = "rope_type" if spelling == "rope_scaling" else "type"
    spelled: Config = {} if theta is None else {"rope_theta": theta}
    if kind == "default":
        return {**spelled, **draw(st.sampled_from([{}, {"rope_scaling": None}]))}
    if "original_max_position_embeddings" in options and draw(
        st.booleans()
    ):  # some keep it beside the others
        spelled["original_max_position_embeddings"] = options.pop("original_max_position_embeddings")
        if kind == "llama3":
            options["original_max_position_embeddings"] = 3  # and then it is this one that counts for nothing
    return {**spelled, "rope_scaling": {name: kind, **options}}


@st.composite
def llama(draw: st.DrawFn, model_type: str = "llama") -> Config:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, vocabulary = kv_heads * group, draw(VOCABULARY)
    layers = draw(st.integers(0, 3))
    usual_head_dim = 2 * draw(st.integers(1, 4))
    head_dim = None if model_type == "phi3" else draw(st.sampled_from([None, 2, 4, 6, 10]))
    positions = draw(st.integers(3, 20))
    config: Config = {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": heads * usual_head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": draw(st.integers(0, vocabulary - 1)),
        **({} if model_type == "phi3" else draw(rope(head_dim or usual_head_dim, positions))),
        **draw(
            _maybe(
                {
                    "hidden_act": st.sampled_from(ACTIVATIONS),
                    "rms_norm_eps": EPSILONS,
                    "tie_word_embeddings": st.booleans(),
                    "attention_dropout": PROBABILITIES,
                    "initializer_range": st.just(0.3),
                }
            )
        ),
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    elif model_type == "qwen3":  # its default is 128, whatever the width
        config["head_dim"] = usual_head_dim
    elif model_type not in ("qwen2", "phi3") and draw(st.booleans()):
        config["head_dim"] = None
    if group == 1 and model_type == "llama" and draw(st.booleans()):
        del config["num_key_value_heads"]
    if model_type == "llama":
        config |= draw(
            _maybe({"attention_bias": st.booleans(), "mlp_bias": st.booleans(), "pretraining_tp": st.just(1)})
        )
    if model_type == "qwen3":
        config |= draw(_maybe({"attention_bias": st.booleans()}))
    if model_type in ("mistral", "phi3"):
        config |= draw(_maybe({"sliding_window": st.none() | st.integers(1, 8)}))
    if model_type in ("qwen2", "qwen3"):
        config |= draw(_windows(layers))
    return config


@st.composite
def _windows(draw: st.DrawFn, layers: int) -> Config:
    """Sliding windows of some layers, by layer_types or by max_window_layers."""
    if not draw(st.booleans()):
        return draw(
            _maybe({"use_sliding_window": st.just(False), "sliding_window": st.none() | st.integers(1, 8)})
        )
    config: Config = {"use_sliding_window": True, "sliding_window": draw(st.none() | st.integers(1, 8))}
    if config["sliding_window"] is None or draw(st.booleans()):
        return {**config, "max_window_layers": draw(st.integers(0, layers + 1))}
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    return {**config, "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers))}


@st.composite
def later(draw: st.DrawFn, model_type: str) -> Config:
    """SmolLM3, OLMo 2, GPT-NeoX, Phi, Gemma."""
    own_kv = model_type != "gpt_neox"
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * (draw(st.integers(1, 3)) if own_kv else 1)
    layers, vocabulary = draw(st.integers(0, 3)), draw(VOCABULARY)
    partly = model_type in PARTLY_TURNED
    usual, positions = 2 * draw(st.integers(4 if partly else 1, 4)), draw(st.integers(3, 20))
    config: Config = {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": heads * usual,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": draw(st.integers(0, vocabulary - 1)),
        **({"num_key_value_heads": kv_heads} if own_kv else {}),
        **draw(
            _maybe(
                {
                    "tie_word_embeddings": st.booleans(),
                    "attention_dropout": PROBABILITIES,
                    "initializer_range": st.just(0.3),
                    "layer_norm_eps" if partly else "rms_norm_eps": EPSILONS,
                    "hidden_activation" if model_type in GEMMAS[1:] else "hidden_act": st.sampled_from(
                        ACTIVATIONS
                    ),
                    **({} if model_type == "phi" else {"attention_bias": st.booleans()}),
                }
            )
        ),
    }
    windows = st.none() | st.integers(1, 8)
    if model_type in ("smollm3", "olmo2"):
        config |= draw(rope(usual, positions))
    if model_type == "smollm3":
        window = draw(windows)
        config |= draw(
            _maybe(
                {
                    "no_rope_layers": st.none() | st.lists(st.integers(0, 1), min_size=layers, max_size=5),
                    "no_rope_layer_interval": st.integers(1, 4),
                    "mlp_bias": st.booleans(),
                }
            )
        )
        config |= {"use_sliding_window": window is not None, "sliding_window": window}
    if model_type == "gpt_neox":
        share = st.sampled_from([0.25, 0.5, 1.0])
        config |= draw(
            _maybe(
                {
                    "rotary_pct": share,
                    "rotary_emb_base": st.sampled_from([10000, 50.0]),
                    "use_parallel_residual": st.booleans(),
                    "hidden_dropout": PROBABILITIES,
                    "rope_parameters": st.fixed_dictionaries(
                        {
                            "rope_type": st.just("linear"),
                            "factor": st.just(2.0),
                            "partial_rotary_factor": share,
                        }
                    ),
                }
            )
        )
    if model_type == "phi":
        config |= draw(_maybe({"resid_pdrop": PROBABILITIES, "embd_pdrop": PROBABILITIES}))
        config |= draw(
            _maybe(
                {
                    "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0]),
                    "rope_theta": st.sampled_from([10000.0, 50.0]),
                    "qk_layernorm": st.just(False),
                }
            )
        )
    if model_type in GEMMAS:
        config["head_dim"] = draw(st.sampled_from([2, 4, 10]))
    if model_type == "gemma":
        config |= draw(_maybe({"rope_theta": st.sampled_from([10000.0, 50.0])}))
    if model_type in GEMMAS[1:]:
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        caps = st.none() | st.sampled_from([0.5, 30.0])
        config["sliding_window"] = draw(st.integers(1, 8))
        config |= draw(
            _maybe(
                {
                    "query_pre_attn_scalar": st.integers(1, 20),
                    "layer_types": st.lists(kinds, min_size=layers, max_size=layers),
                    "final_logit_softcapping": caps,
                    **({"attn_logit_softcapping": caps} if model_type == "gemma2" else {}),
                }
            )
        )
    if model_type == "gemma3_text":
        linear = {"rope_type": "linear", "factor": 8.0}
        config |= draw(
            _maybe(
                {
                    "sliding_window_pattern": st.integers(1, 3),
                    "rope_theta": st.sampled_from([1e6, 500.0]),
                    "rope_local_base_freq": st.sampled_from([10000.0, 50.0]),
                    "rope_scaling": st.none() | st.just(linear),
                }
            )
            | st.just(
                {
                    "rope_parameters": {
                        "full_attention": {**linear, "rope_theta": 500.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
                    }
                }
            )
        )
    return config


def configs(family: str) -> st.SearchStrategy[Config]:
    """Contents of a config.json of one family (a model_type)."""
    if family in LATER:
        return later(family)
    if family in LIKE_BERT:
        return bert(family)
    own = {
        "distilbert": distilbert,
        "gpt2": gpt2,
        "modernbert": modernbert,
        "deberta-v2": deberta,
        "nomic_bert": nomic,
    }
    return own[family]() if family in own else llama(family)


SMALL: dict[str, Config] = {
    "bert": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "roberta": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "xlm-roberta": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
    },
    "camembert": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
    },
    "modernbert": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "intermediate_size": 17,
        "local_attention": 5,
        "pad_token_id": 0,
        **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1),
    },
    "deberta-v2": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
        "relative_attention": True,
        "position_buckets": 8,
        "max_relative_positions": 20,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
    },
    "nomic_bert": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
        "pad_token_id": 0,
    },
    "mpnet": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "electra": {
        "embedding_size": 7,
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
    },
    "albert": {
        "embedding_size": 7,
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
    },
    "distilbert": {"dim": 12, "n_heads": 3, "n_layers": 2, "hidden_dim": 17},
    "gpt2": {
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 30,
        "pad_token_id": 0,
        "eos_token_id": 3,
    },
    "llama": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "mistral": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    },
    "qwen2": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 2},
    "qwen3": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "phi3": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "smollm3": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "no_rope_layer_interval": 2,
    },
    "olmo2": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "gpt_neox": {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2},
    "phi": {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2},
    "gemma": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "gemma2": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "sliding_window": 4,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 1.5,
    },
    "gemma3_text": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "sliding_window": 4,
        "query_pre_attn_scalar": 5,
        "sliding_window_pattern": 2,
    },
}
"""One configuration of each family, for tests whose subject is not the configuration."""


def small(family: str, **options: Any) -> Config:
    """The small configuration of a family, with other options."""
    config = {"model_type": family, "vocab_size": 41, **SMALL[family]}
    if family in DECODERS[1:]:
        config |= {"intermediate_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config |= {"max_position_embeddings": 64, **({} if family in PARTLY_TURNED else {"head_dim": 4})}
    elif family != "gpt2":
        config["max_position_embeddings"] = 33
    return {**config, **options}


def is_dynamic(config: Config) -> bool:
    """Whether the rope's frequencies change with the length of the sequence."""
    options = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return options.get("rope_type", options.get("type")) == "dynamic"


@dataclass(frozen=True)
class Batch:
    """What a model is called with. `seed` decides what the rows hold, on whatever side they are padded."""

    lengths: tuple[int, ...]
    left: bool
    """Padding stands on the left."""
    extra: int
    """Columns in which no row has a token."""
    seed: int
    with_types: bool = False
    with_positions: bool = False
    embedded: bool = False

    @property
    def columns(self) -> int:
        """S."""
        return max(self.lengths) + self.extra

    def mask(self) -> Tensor:
        """attention_mask, int64 [B, S]."""
        column = torch.arange(self.columns)
        lengths = torch.tensor(self.lengths)[:, None]
        return ((column >= self.columns - lengths) if self.left else (column < lengths)).long()

    def lay_out(self, rows: Tensor, padding: float = 0) -> Tensor:
        """Contents of the rows, [B, longest row, ...], in their columns: [B, S, ...]."""
        full = torch.full((len(self.lengths), self.columns, *rows.shape[2:]), padding, dtype=rows.dtype)
        for row, length in enumerate(self.lengths):
            start = self.columns - length if self.left else 0
            full[row, start : start + length] = rows[row, :length]
        return full

    def integers(self, low: int, high: int, what: int) -> Tensor:
        """Random numbers below `high`, int64 [B, longest row]; `what` numbers the things that are drawn."""
        generator = torch.Generator().manual_seed(self.seed + 10007 * what)
        return torch.randint(low, high, (len(self.lengths), max(self.lengths)), generator=generator)

    def vectors(self, size: int) -> Tensor:
        """inputs_embeds, float32 [B, S, size]."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return self.lay_out(torch.randn(len(self.lengths), max(self.lengths), size, generator=generator) / 2)

    def ids(self, config: Config) -> Tensor:
        """input_ids, int64 [B, S]: never the padding id where there is a token, and nothing else where there
        is none."""
        padding = padding_id(config)
        ids = self.integers(0, config["vocab_size"] - 1, 0)
        return self.lay_out(ids + (ids >= padding), padding)

    def positions(self, first: int = 0) -> Tensor:
        """Each token's place in its own row, int64 [B, S]."""
        return self.lay_out(
            torch.arange(first, first + max(self.lengths)).expand(len(self.lengths), -1), first
        )


def padding_id(config: Config) -> int:
    """The id at padding: the configuration's, by its own word or by default."""
    default = 1 if config["model_type"] in LIKE_ROBERTA else 0
    return config.get("pad_token_id", default) or 0


@st.composite
def batches(draw: st.DrawFn, *, longest: int = LONGEST, even: bool = False) -> Batch:
    """Batches of up to four rows, padded on either side. `even`: all rows are of one length."""
    if even:
        lengths = (draw(st.integers(1, longest)),) * draw(st.integers(1, 3))
    else:
        lengths = tuple(draw(st.lists(st.integers(1, longest), min_size=1, max_size=4)))
    return Batch(
        lengths,
        left=draw(st.booleans()),
        extra=0 if even else draw(st.integers(0, min(2, longest - max(lengths)))),
        seed=draw(seeds()),
        with_types=draw(st.booleans()),
        with_positions=draw(st.booleans()),
        embedded=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn, family: str, **options: Any) -> tuple[Config, Batch]:
    """A configuration and a batch for it. For `dynamic` rope all rows have one length: transformers lets the
    longest row of a batch stretch the others, minilm each row by itself."""
    config = draw(configs(family))
    return config, draw(batches(even=options.pop("even", False) or is_dynamic(config), **options))
