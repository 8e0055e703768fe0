"""`ModelConfig`: every option by which the supported Transformers differ.

Each family has its own names for the options in ``config.json`` (``n_embd`` or ``hidden_size``,
``rope_theta`` at the top level or nested). `minilm.families` translates them into this one configuration, and
the model code reads nothing else. So this file lists all variants of the one Transformer in `minilm.model`;
each field is here because two families differ by it.

Letters for dimensions in all docstrings: B sequences, T packed tokens, S context, H query heads, Hkv
key/value heads, D head size, C channels, F inner channels of the MLP, L layers, P positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


class ConfigError(ValueError):
    """A configuration holds an option, or a combination of them, that minilm does not support; the message
    names it."""


ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "leaky_relu", "linear", "mish", "quick_gelu", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)
"""Names of activation functions; `minilm.ops` has the functions."""


LARGEST = 2**31 - 1
"""Upper limit of every size: positions and lengths are stored in 32 bits."""

NORM_EPS = (0.0, 1.0)
"""Allowed range of `norm_eps`. A larger value would outweigh the variance that it is added to."""

ROPE_RANGES: dict[str, tuple[float, float]] = {
    "theta": (1.0, 1e12),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
}
"""Allowed range of each parameter of the rotary frequencies. Published models have a theta from 1e4 to 5e8
and factors from 1 to 64."""


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise ConfigError, which names the option, unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigError(f"{name} must be a number from {least:g} to {most:g}, and is {value!r:.60}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its variants for longer contexts.

    ``default``: frequencies theta^(-2i/D). ``linear``: divided by `factor` (Chen et al. 2023,
    arXiv:2306.15595). ``dynamic``: theta grows once a sequence is longer than `max_positions` (NTK-aware).
    ``llama3``: low frequencies divided by `factor`, high ones kept, interpolated between. ``yarn``: Peng et
    al. 2023, arXiv:2309.00071.
    """

    theta: float = 10_000.0
    type: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    max_positions: int = 2048
    """The sequence length beyond which `dynamic` raises theta."""
    original_max_positions: int = 2048
    """The context length of pre-training, from which `llama3` and `yarn` interpolate."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    """cos and sin are multiplied by it (`yarn`)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for name, (least, most) in ROPE_RANGES.items():
            check_number(name, getattr(self, name), least, most)
        for name in ("max_positions", "original_max_positions"):
            check_number(name, getattr(self, name), 1, LARGEST)
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ConfigError(f"low_freq_factor {low} must be less than high_freq_factor, which is {high}")
        if self.type == "yarn" and self.beta_slow >= self.beta_fast:
            low, high = self.beta_slow, self.beta_fast
            raise ConfigError(f"beta_slow {low} must be less than beta_fast, which is {high}")


@dataclass(frozen=True)
class DistanceConfig:
    """What scores of attention take from the distance of two tokens in DeBERTa (`minilm.distances`)."""

    span: int
    """Vectors of distances on each side; 0: there are none, only a convolution."""
    max_distance: int | None = None
    """Distances share vectors in logarithmic buckets up to it; None: each has its own, up to `span`."""
    c2p: bool = False
    p2c: bool = False
    shared: bool = False
    """Vectors are projected by the layer's matrices of queries and keys, not by others."""
    norm: bool = False
    conv_kernel: int = 0
    """Width of a convolution beside the first layer (v2 xlarge); 0: there is none."""
    conv_groups: int = 1
    conv_activation: str = "tanh"


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


_FACTORS = {
    "attention_scale": -1e6,
    "embedding_scale": 1e-6,
    "attention_soft_cap": 1e-3,
    "head_soft_cap": 1e-3,
}
"""Factors that may be None -> the smallest value."""


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of one Transformer body. Sizes are in elements, probabilities from 0 to 1."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    """Longest sequence: rows of the position table minus `position_offset`, or the context that a rope model
    was trained for."""

    causal: bool
    """True: a token attends to earlier tokens only (decoders); False: to the whole sequence (encoders)."""
    pre_norm: bool
    """True: norms before each sub-layer (GPT-2, Llama); False: after the residual sum (BERT)."""
    norm: Literal["layer_norm", "rms_norm"]
    norm_eps: float
    activation: str
    gated_mlp: bool = False
    """down(act(gate x) * up x), Shazeer 2020, arXiv:2002.05202, instead of down(act(up x))."""
    output_norm: bool = False
    """A norm over the output of each sub-layer before the residual sum, next to `pre_norm` (Gemma 2) or as
    the only one (OLMo 2)."""
    parallel_norms: int = 0
    """0: the MLP reads what attention has added. Otherwise x + attention(norm x) + mlp(norm' x), with 1 norm
    for both (Phi) or 2 (GPT-NeoX)."""
    norm_plus_one: bool = False
    """RMSNorms multiply by 1 + weight, in float32 (Gemma)."""
    norm_without_bias: bool = False
    """LayerNorms have no bias (ModernBERT)."""
    bare_first_layer: bool = False
    """Attention of the first layer has no norm of its own before it (ModernBERT: the embeddings have one)."""

    # Embeddings
    positions: Literal["learned", "rope", "none"] = "learned"
    position_offset: int = 0
    """Row of the position table for the first token (RoBERTa: padding index + 1)."""
    positions_skip_padding_id: int | None = None
    """Tokens with this id get no position, whatever the attention mask (RoBERTa)."""
    rope: RopeConfig | None = None
    rotary_dim: int | None = None
    """Rope rotates the first so many channels of each head (GPT-NeoX, Phi); None: all."""
    local_rope: RopeConfig | None = None
    """Another rope for the layers with a window (Gemma 3)."""
    layers_without_rope: tuple[int, ...] = ()
    """Layers in which attention does not see positions (SmolLM3)."""
    type_vocab_size: int = 0
    types_are_tokens: bool = False
    """Token types are looked up in the token table (GPT-2)."""
    embedding_scale: float | None = None
    """Vectors of the token table are multiplied by it, rounded to their dtype (Gemma: sqrt(C))."""
    embedding_norm: bool = False
    embedding_size: int | None = None
    """Channels of the tables and of their norm, where a projection to `hidden_size` follows (ALBERT, ELECTRA
    small); None: there is no projection."""
    final_norm: bool = False
    shared_layers: bool = False
    """All layers are one block with the same weights (ALBERT)."""

    # Biases, and options of attention
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    """RMSNorm over each head of q and k before rope (Qwen3)."""
    qk_norm_of_all: bool = False
    """The same over all heads at once, H * D channels (OLMo 2)."""
    qkv_by_head: bool = False
    """The rows of the qkv matrix: q, k and v of the first head, then of the next (GPT-NeoX); False: q of all
    heads, then k, then v."""
    attention_scale: float | None = None
    """Scores are multiplied by it; None is 1/sqrt(D)."""
    scale_by_inverse_layer: bool = False
    """Scores of layer i are divided by i + 1 as well (GPT-2's scale_attn_by_inverse_layer_idx)."""
    attention_soft_cap: float | None = None
    """Scores s become cap * tanh(s / cap) (Gemma 2)."""
    distances: DistanceConfig | None = None
    """Scores depend on the distance as well, by learned vectors (DeBERTa)."""
    relative_buckets: int = 0
    """Scores get a learned number per head for each of so many buckets of distances (MPNet); 0: none."""
    windows: tuple[int | None, ...] = ()
    """For each layer, how many keys a query sees, itself included (sliding window), or None for all. () =
    None everywhere."""

    tie_word_embeddings: bool = True
    head_bias: bool = False
    """The causal-lm head has a bias (Phi)."""
    head_soft_cap: float | None = None
    """Its logits x become cap * tanh(x / cap) (Gemma 2)."""
    pad_token_id: int | None = None
    """Row of the token table that gets no gradient as an input (GPT-2 has none)."""

    # Dropout (training only)
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    inner_dropout: float = 0.0
    """Before the second matrix of an MLP (ModernBERT)."""
    attention_out_dropout: float = 0.0
    """After attention's output matrix, next to `hidden_dropout` (ModernBERT)."""

    def __post_init__(self) -> None:
        for f in fields(self):
            kinds = [_KINDS.get(kind) for kind in str(f.type).split(" | ")]
            value = getattr(self, f.name)
            if None not in kinds and not any(type(value) in kind for kind in kinds if kind):
                raise ConfigError(f"{f.name} must be of type {f.type}, and is {value!r}")
        sizes = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for name in (*sizes, "max_positions"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ConfigError(
                    f"{name} must be at least 1 and at most {LARGEST}, and is {getattr(self, name)}"
                )
        check_number("norm_eps", self.norm_eps, *NORM_EPS)
        for name in (f.name for f in fields(self) if f.name.endswith("_dropout")):
            check_number(name, getattr(self, name), 0, 1)
        for name, least in _FACTORS.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least, 1e6)
        if self.embedding_size is not None and not 1 <= self.embedding_size <= LARGEST:
            raise ConfigError(f"embedding_size must be from 1 to {LARGEST}, and is {self.embedding_size}")
        for name in ("position_offset", "type_vocab_size", "relative_buckets"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise ConfigError(f"{name} must be from 0 to {LARGEST}, and is {getattr(self, name)}")
        if self.num_layers < 0:
            raise ConfigError(f"num_layers must not be negative, and is {self.num_layers}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"the activation {self.activation!r} is not supported; supported are {known}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot be shared evenly by {self.num_kv_heads} key/value heads"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(f"{len(self.windows)} attention windows for {self.num_layers} layers")
        if any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(f"each attention window must be at least 1 token, and they are {self.windows}")
        if self.positions == "rope" and (self.rope is None or self.head_dim % 2):
            raise ConfigError(
                f"rope needs a RopeConfig and an even head size, and the head size is {self.head_dim}"
            )
        if self.positions == "rope" and (self.rotated % 2 or not 0 < self.rotated <= self.head_dim):
            raise ConfigError(
                f"rope can rotate an even number of at most {self.head_dim} channels, and rotary_dim is "
                f"{self.rotary_dim}"
            )
        if self.parallel_norms not in (0, 1, 2) or (self.parallel_norms and not self.pre_norm):
            raise ConfigError(f"parallel sub-layers have 1 or 2 norms before them, not {self.parallel_norms}")
        if self.distances is not None and self.relative_buckets:
            raise ConfigError("scores take distances or relative_buckets, and both are given")
        if self.causal and (self.distances is not None or self.relative_buckets):
            raise ConfigError("scores by distances are for encoders, and the model is causal")

    def window(self, layer: int) -> int | None:
        """Number of keys that a query of `layer` sees, itself included; None: all."""
        return self.windows[layer] if self.windows else None

    def scale(self, layer: int) -> float:
        """Factor of the attention scores of `layer` before the softmax."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_inverse_layer else scale

    @property
    def rotated(self) -> int:
        """Number of channels of each head that rope rotates."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def table_size(self) -> int:
        """Channels of the tables, and of `inputs_embeds`."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def q_size(self) -> int:
        """H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Hkv * D."""
        return self.num_kv_heads * self.head_dim
