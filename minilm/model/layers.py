"""The layers of the one Transformer, each built from `ModelConfig`: Embeddings, Attention, MLP, Norm, Block.

Everything here works on packed tokens, [T, ...]; modules hold parameters and call ops of `minilm.ops`. They
are the readable definition of the model, and they run on a GPU, in training and under hooks. On a CPU without
gradients all blocks run in one native call instead (`minilm.native`, csrc/cpu/transformer.cpp; performance
layer, skip on first reading), which computes the same. `minilm.explain()` shows which of the two ran.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import ModelConfig
from ..graphs import Padded
from .batch import Batch
from .quantized import QuantizedEmbedding


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the channels, fused with the residual sum before it."""

    def __init__(self, config: ModelConfig, size: int | None = None, *, eps: float | None = None) -> None:
        super().__init__()
        size = config.hidden_size if size is None else size
        self.eps = config.norm_eps if eps is None else eps
        self.rms = config.norm == "rms_norm"
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + delta), x + delta); x, delta [T, C]."""
        if delta is None:
            return self.norm(x), x
        if self.rms:
            return ops.add_rms_norm(delta, x, self.weight, self.eps)
        return ops.add_layer_norm(delta, x, self.weight, self.bias, self.eps)

    def norm(self, x: Tensor) -> Tensor:
        """norm(x), [..., C]."""
        if self.rms:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{'rms' if self.rms else 'layer'} norm, size={self.weight.shape[0]}, eps={self.eps}"


class Linear(nn.Linear):
    """x W^T + b, with an optional activation, by `minilm.ops.linear`."""

    def reset_parameters(self) -> None:
        """Does nothing: a checkpoint, or `PreTrainedModel.initialise`, fills the weights."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.linear(x, self.weight, self.bias, activation)


class Embedding(nn.Embedding):
    """A lookup table of vectors."""

    def reset_parameters(self) -> None:
        """Does nothing, as in `Linear`. (Random numbers on the meta device would import torch.compile.)"""

    def scores(self, hidden: Tensor) -> Tensor:
        """The table as an output matrix: hidden [T, C] -> [T, V]."""
        return ops.linear(hidden, self.weight)


class Embeddings(nn.Module):
    """Sum of token, position and type embeddings, with a norm if the family has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        padding = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None
        self.tokens = Embedding(config.vocab_size, config.hidden_size, padding_idx=padding)
        learned = config.positions == "learned"
        rows = config.max_positions + config.position_offset
        skipped = config.positions_skip_padding_id
        self.positions = Embedding(rows, config.hidden_size, padding_idx=skipped) if learned else None
        self.types = Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.norm = Norm(config) if config.embedding_norm else None

    def forward(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """tokens int64 [T], or float [T, C] already embedded; positions, types int64 [T]. Returns [T, C]."""
        if tokens.is_floating_point() or (self.config.types_are_tokens and types is not None):
            return self.by_modules(tokens, positions, types)
        table = self.tokens.like if isinstance(self.tokens, QuantizedEmbedding) else self.tokens.weight
        x: Tensor = ops.run_whole("embed", table.device, table.dtype, self, tokens, positions, types)
        return x

    def by_modules(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Reference definition, module by module; every backend except the native one runs it."""
        x: Tensor = tokens if tokens.is_floating_point() else self.tokens(tokens)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.config.types_are_tokens and types is not None:
            x = x + self.tokens(types)
        if self.norm is not None:
            x = self.norm.norm(x)
        return F.dropout(x, self.config.embedding_dropout, self.training)


ops.register_modules("embed", Embeddings.by_modules)


class Attention(nn.Module):
    """Multi-head attention with one projection for q, k and v; grouped-query heads, rope, sliding window and
    KV cache as configured.

    On a CPU without gradients the native call replaces `forward`; see the top of this file.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.scale = config.scale(layer)
        self.window = config.window(layer)
        self.qkv = Linear(config.hidden_size, config.q_size + 2 * config.kv_size, bias=config.qkv_bias)
        self.out = Linear(config.q_size, config.hidden_size, bias=config.out_bias)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, C] -> q [T, H, D] and k, v [T, Hkv, D], before the rotary embedding."""
        c = self.config
        heads = c.num_heads + 2 * c.num_kv_heads
        qkv: Tensor = self.qkv(x).view(-1, heads, c.head_dim)  # [T, H + 2 Hkv, D]
        q, k, v = torch.split(qkv, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.norm(q), self.k_norm.norm(k)
        return q, k, v

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, C] -> [T, C]."""
        c = self.config
        q, k, v = self.heads(x)
        q, k = self._rope_and_append(q, k, v, batch)
        if batch.attentions is not None:
            batch.attentions.append(self._maps(q, k, batch))
        packed, step = batch.packed, batch.step
        if step is None or step.fresh:
            out = packed.attend(
                q,
                k,
                v,
                scale=self.scale,
                causal=c.causal,
                window=self.window,
                dropout_p=c.attention_dropout if self.training else 0.0,
            )
        else:
            assert batch.cache is not None
            k_scales, v_scales = batch.cache.scales(self.layer)
            out = ops.paged_attention(
                q,
                batch.cache.k_pages[self.layer],
                batch.cache.v_pages[self.layer],
                step.block_table,
                packed.cu_seqlens,
                step.context_lens,
                packed.max_seqlen,
                step.max_context,
                scale=self.scale,
                window=self.window,
                k_scales=k_scales,
                v_scales=v_scales,
            )
        projected: Tensor = self.out(out.flatten(1))
        return projected

    def _rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.cache is None or batch.step is None:
            return ops.rope(q, k, *batch.rope) if batch.rope is not None else (q, k)
        pages = batch.cache.k_pages[self.layer], batch.cache.v_pages[self.layer]
        scales = batch.cache.scales(self.layer)
        if batch.rope is not None:
            return ops.rope_append(q, k, v, *batch.rope, *pages, batch.step.slots, *scales)
        ops.append_kv(k, v, *pages, batch.step.slots, *scales)
        return q, k

    def _maps(self, q: Tensor, k: Tensor, batch: Batch) -> Tensor:
        """The attention probabilities in transformers' layout, [B, H, S, context], zero at padding."""
        packed: Any = batch.packed
        kind: dict[str, Any] = {"scale": self.scale, "causal": self.config.causal, "window": self.window}
        if isinstance(packed, Padded):
            return packed.maps(q, k, **kind)
        context, cu_k = packed.columns, packed.cu_seqlens
        if batch.cache is not None and batch.step is not None and not batch.step.fresh:
            k = torch.cat([batch.cache.keys(self.layer, row) for row in batch.rows]).to(q.dtype)
            cu_k = F.pad(batch.step.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
            context = batch.step.max_context
        maps = ops.attention_probs(q, k, packed.cu_seqlens, cu_k, **kind)
        full = q.new_zeros(packed.batch, self.config.num_heads, packed.columns, context)
        columns = torch.split(packed.flat_indices() % max(packed.columns, 1), packed.lengths)
        for row, (p, at) in enumerate(zip(maps, columns, strict=True)):
            seen = at if p.shape[2] == p.shape[1] else torch.arange(p.shape[2], device=q.device)
            full[row, :, at[:, None], seen] = p
        return full


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) with gate and up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gated = config.gated_mlp
        inner = config.intermediate_size
        self.up = Linear(config.hidden_size, 2 * inner if self.gated else inner, bias=config.mlp_bias)
        self.down = Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        h = ops.gated(self.up(x), self.activation) if self.gated else self.up(x, self.activation)
        y: Tensor = self.down(h)
        return y


class Block(nn.Module):
    """One layer: attention and MLP, each with a residual sum and a norm before (pre) or after (post) it.

    The residual stream is passed as a pair (x, delta), and is their sum: each norm adds delta while it reads
    x, so the sum needs no extra pass over memory.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.dropout = config.hidden_dropout
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, delta: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """x, delta [T, C] -> the next x and delta."""
        if self.pre_norm:
            h, x = self.attention_norm(x, delta)
            h, x = self.mlp_norm(x, self._drop(self.attention(h, batch)))
            return x, self._drop(self.mlp(h))
        x, _ = self.attention_norm(x, self._drop(self.attention(x, batch)))
        x, _ = self.mlp_norm(x, self._drop(self.mlp(x)))
        return x, None

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.training and self.dropout else x
