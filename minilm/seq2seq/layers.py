"""The layers of an encoder-decoder, on packed tokens: attention with a relative bias or over the source, and
the two stacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import ModelConfig
from ..distances import Biased, RelativeBias
from ..families.encoder_decoder import EncoderDecoderConfig
from ..model import Batch, Embedding, Linear, Norm, Packed
from .cache import EncoderDecoderCache


@dataclass
class Pass:
    """What the layers of one stack share about one call."""

    packed: Packed
    """The tokens that run."""
    keys: Packed
    """The tokens that self-attention sees: with a cache, also those in it."""
    source: Packed | None = None
    memory: Tensor | None = None
    """The encoder's hidden states, [Ts, C]; None: the cache has their keys and values."""
    cache: EncoderDecoderCache | None = None
    biased: Biased | None = None
    """Self-attention with the bias that all layers share, or without one."""
    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None


@dataclass
class Reading(Batch):
    """Packed texts to read, without writing one: for encoders, and for classifiers (BART)."""

    written: Tensor | None = None
    """The decoder's input, int64 [T]: the texts themselves, shifted to the right."""


def _relative_bias(both: EncoderDecoderConfig, config: ModelConfig) -> RelativeBias | None:
    """The bias of one side; None for a family without one."""
    if not both.buckets:
        return None
    ways, most = not config.causal, both.max_distance
    return RelativeBias(both.buckets, config.num_heads, both_ways=ways, max_distance=most)


class SelfAttention(nn.Module):
    """Attention within the sequences of one side."""

    def __init__(self, both: EncoderDecoderConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, config.scale(layer)
        self.qkv = Linear(config.hidden_size, 3 * config.q_size, bias=config.qkv_bias)
        self.out = Linear(config.q_size, config.hidden_size, bias=config.out_bias)
        self.relative = _relative_bias(both, config) if both.bias_per_layer else None

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """x [T, C] -> [T, C]."""
        c = self.config
        q, k, v = self.qkv(x).view(-1, 3, c.num_heads, c.head_dim).unbind(1)  # [T, H, D]
        if run.cache is not None:
            k, v = run.cache.append(self.layer, k, v, run.packed, run.keys)
        biased = run.biased if self.relative is None else self.relative.biased(run.packed, run.keys)
        assert biased is not None
        kind: dict[str, Any] = {"scale": self.scale, "causal": c.causal}
        if run.attentions is not None:
            run.attentions.append(biased.maps(q, k, **kind))
        kind["dropout_p"] = c.attention_dropout if self.training else 0.0
        out: Tensor = self.out(biased.attend(q, k, v, **kind).flatten(1))
        return out


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the source."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, config.scale(layer)
        self.q = Linear(config.hidden_size, config.q_size, bias=config.qkv_bias)
        self.kv = Linear(config.hidden_size, 2 * config.q_size, bias=config.qkv_bias)
        self.out = Linear(config.q_size, config.hidden_size, bias=config.out_bias)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """x [T, C] -> [T, C]."""
        c, cache = self.config, run.cache
        assert run.source is not None
        q = self.q(x).view(-1, c.num_heads, c.head_dim)
        kept = None if cache is None else cache.cross[self.layer]
        if kept is None:
            assert run.memory is not None
            k, v = self.kv(run.memory).view(-1, 2, c.num_heads, c.head_dim).unbind(1)
            kept = (k.contiguous(), v.contiguous())
            if cache is not None:
                cache.cross[self.layer] = kept
        kind: dict[str, Any] = {"scale": self.scale, "causal": False}
        across = Biased(None, run.packed, run.source)
        if run.cross_attentions is not None:
            run.cross_attentions.append(across.maps(q, kept[0], **kind))
        kind["dropout_p"] = c.attention_dropout if self.training else 0.0
        out: Tensor = self.out(across.attend(q, *kept, **kind).flatten(1))
        return out


class FeedForward(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x); with dropout before the second matrix.

    In float16 the second matrix multiplies in float32: the sums of T5's MLP exceed the range of float16.
    """

    def __init__(self, both: EncoderDecoderConfig, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.p, self.gated = config.activation, both.inner_dropout, config.gated_mlp
        width, inner = config.hidden_size, config.intermediate_size
        if config.gated_mlp:
            self.gate_up = Linear(width, 2 * inner, bias=config.mlp_bias)
        else:
            self.up = Linear(width, inner, bias=config.mlp_bias)
        self.down = Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] -> [T, C], float32 for float16."""
        h = ops.gated(self.gate_up(x), self.activation) if self.gated else self.up(x, self.activation)
        h = F.dropout(h, self.p, self.training)
        if h.dtype == torch.float16 and not hasattr(self.down, "quantized"):
            bias = None if self.down.bias is None else self.down.bias.float()
            return ops.linear(h.float(), self.down.weight.float(), bias)
        y: Tensor = self.down(h)
        return y


class Layer(nn.Module):
    """Self-attention, in a decoder attention to the source, and the MLP, each with a residual sum and a norm
    before (T5) or after (BART) it."""

    def __init__(self, both: EncoderDecoderConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm, self.p = config.pre_norm, config.hidden_dropout
        self.attention_norm, self.attention = Norm(config), SelfAttention(both, config, layer)
        if config.causal:
            self.cross_norm, self.cross = Norm(config), CrossAttention(config, layer)
        self.mlp_norm, self.mlp = Norm(config), FeedForward(both, config)
        self.crosses = config.causal

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """x [T, C] -> [T, C]."""
        x = self._add(x, self.attention_norm, self.attention, run)
        if self.crosses:
            x = self._add(x, self.cross_norm, self.cross, run)
        return self._add(x, self.mlp_norm, self.mlp)

    def _add(self, x: Tensor, norm: Norm, part: nn.Module, *run: Pass) -> Tensor:
        delta = part(normed(norm, x) if self.pre_norm else x, *run)
        x = x + F.dropout(delta, self.p, self.training)
        return x if self.pre_norm else normed(norm, x)


def normed(norm: Norm, x: Tensor) -> Tensor:
    """norm(x) in the dtype of the weights; a float32 residual stream beside float16 weights stays exact."""
    if x.dtype == norm.weight.dtype:
        return norm.norm(x)
    weight = norm.weight.to(x.dtype)
    if norm.rms:
        return ops.rms_norm(x, weight, norm.eps).to(norm.weight.dtype)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return ops.layer_norm(x, weight, bias, norm.eps).to(norm.weight.dtype)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Positions int64 [T] -> float64 [T, width]: sines of position / 10000^(2i / width), then cosines; one
    sine more if the width is odd."""
    pairs = torch.arange((width + 1) // 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None] / 10_000.0 ** (2 * pairs / width)
    return torch.cat((angles.sin(), angles[:, : width // 2].cos()), 1)


class Stack(nn.Module):
    """One side: positions, layers and norm."""

    def __init__(self, both: EncoderDecoderConfig, config: ModelConfig) -> None:
        super().__init__()
        self.both, self.config = both, config
        learned = not both.buckets and not both.sinusoids
        rows = config.max_positions + config.position_offset
        self.positions = Embedding(rows, config.hidden_size) if learned else None
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.relative = None if both.bias_per_layer else _relative_bias(both, config)
        self.layers = nn.ModuleList(Layer(both, config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config) if config.final_norm else None
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """Embedded tokens [T, C] -> hidden states [T, C]."""
        c = self.config
        if self.positions is not None:
            x = x + self.positions(run.packed.positions + c.position_offset)
        elif self.both.sinusoids:
            x = x + sinusoids(run.packed.positions, c.hidden_size).to(x.dtype)
        x = x if self.embedding_norm is None else normed(self.embedding_norm, x)
        x = F.dropout(x, c.embedding_dropout, self.training)
        bias = None if self.relative is None else self.relative(run.packed, run.keys)
        run.biased = Biased(bias, run.packed, run.keys)
        again = self.gradient_checkpointing and torch.is_grad_enabled() and run.cache is None
        for layer in self.layers:
            if run.hidden_states is not None:
                run.hidden_states.append(x)
            if again and run.attentions is None:
                x = checkpoint(layer, x, run, use_reentrant=False)
            else:
                x = layer(x, run)
        if self.norm is not None:
            x = F.dropout(normed(self.norm, x), self.both.last_dropout, self.training)
        if run.hidden_states is not None:
            run.hidden_states.append(x)
        return x


class Tables(nn.Module):
    """The token table of both sides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        padding = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None
        self.tokens = Embedding(config.vocab_size, config.hidden_size, padding_idx=padding)


class EncoderDecoder(nn.Module):
    """The body: the token table, the encoder and, unless it is an encoder alone, the decoder."""

    def __init__(self, both: EncoderDecoderConfig, *, decoder: bool = True) -> None:
        super().__init__()
        self.both, self.embeddings = both, Tables(both.encoder)
        self.encoder = Stack(both, both.encoder)
        self.decoder = Stack(both, both.decoder) if decoder else None

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, C]."""
        found: Tensor = self.embeddings.tokens(tokens)
        return found if self.both.embedding_scale == 1 else found * self.both.embedding_scale

    def forward(self, batch: Reading) -> Tensor:
        """Hidden states [T, C] of the encoder or, if there is one, of the decoder."""
        packed = batch.packed
        memory: Tensor = self.encoder(self.embed(batch.tokens), Pass(packed, packed))
        if self.decoder is None or batch.written is None:
            return memory
        hidden: Tensor = self.decoder(self.embed(batch.written), Pass(packed, packed, packed, memory))
        return hidden

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are run again in the backward pass."""
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.gradient_checkpointing = value
