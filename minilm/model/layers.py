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
from ..quantized import QuantizedEmbedding
from .batch import Batch


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the channels, fused with the residual sum before it."""

    def __init__(self, config: ModelConfig, size: int | None = None, *, eps: float | None = None) -> None:
        super().__init__()
        size = config.hidden_size if size is None else size
        self.eps = config.norm_eps if eps is None else eps
        self.rms = config.norm == "rms_norm"
        self.plus_one = config.norm_plus_one
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = None if self.rms or config.norm_without_bias else nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + delta), x + delta); x, delta [T, C]."""
        if delta is None or self.plus_one:
            x = x if delta is None else x + delta
            return self.norm(x), x
        if self.rms:
            return ops.add_rms_norm(delta, x, self.weight, self.eps)
        return ops.add_layer_norm(delta, x, self.weight, self.bias, self.eps)

    def norm(self, x: Tensor) -> Tensor:
        """norm(x), [..., C]."""
        if self.plus_one:
            wide = x if x.dtype == torch.float64 else x.float()
            return ops.rms_norm(wide, 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)
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
        size = config.table_size
        self.tokens = Embedding(config.vocab_size, size, padding_idx=padding)
        learned = config.positions == "learned"
        rows = config.max_positions + config.position_offset
        skipped = config.positions_skip_padding_id
        self.positions = Embedding(rows, size, padding_idx=skipped) if learned else None
        self.types = Embedding(config.type_vocab_size, size) if config.type_vocab_size else None
        self.norm = Norm(config, size) if config.embedding_norm else None

    def forward(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """tokens int64 [T], or float [T, C] already embedded; positions, types int64 [T]. Returns [T, C], C
        those of the tables."""
        if tokens.is_floating_point() or (self.config.types_are_tokens and types is not None):
            return self.by_modules(tokens, positions, types)
        table = self.tokens.like if isinstance(self.tokens, QuantizedEmbedding) else self.tokens.weight
        x: Tensor = ops.run_whole("embed", table.device, table.dtype, self, tokens, positions, types)
        return x

    def by_modules(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Reference definition, module by module; every backend except the native one runs it."""
        x: Tensor = tokens if tokens.is_floating_point() else self.tokens(tokens)
        if self.config.embedding_scale is not None and tokens is not x:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
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
        sizes = (config.q_size, config.kv_size) if config.qk_norm_of_all else (config.head_dim,) * 2
        self.q_norm = Norm(config, sizes[0]) if config.qk_norm else None
        self.k_norm = Norm(config, sizes[1]) if config.qk_norm else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, C] -> q [T, H, D] and k, v [T, Hkv, D], before the rotary embedding."""
        c = self.config
        heads = c.num_heads + 2 * c.num_kv_heads
        qkv: Tensor = self.qkv(x).view(-1, heads, c.head_dim)  # [T, H + 2 Hkv, D]
        if c.qkv_by_head:
            qkv = qkv.view(-1, c.num_heads, 3, c.head_dim).transpose(1, 2).flatten(1, 2)
        q, k, v = torch.split(qkv, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if self.q_norm is None or self.k_norm is None:
            return q, k, v
        if c.qk_norm_of_all:
            return self.q_norm.norm(q.flatten(1)).view_as(q), self.k_norm.norm(k.flatten(1)).view_as(k), v
        return self.q_norm.norm(q), self.k_norm.norm(k), v

    def angles(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """cos and sin of this layer's rope, [T, rotated channels / 2]; None if it has none."""
        if self.layer in self.config.layers_without_rope:
            return None
        return batch.rope if batch.local_rope is None or self.window is None else batch.local_rope

    def turned(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q and k after the rotary embedding."""
        angles, turning = self.angles(batch), self.config.rotated
        if angles is None or turning == self.config.head_dim:
            return ops.rope(q, k, *angles) if angles is not None else (q, k)
        parts = ops.rope(q[..., :turning].contiguous(), k[..., :turning].contiguous(), *angles)
        return torch.cat((parts[0], q[..., turning:]), -1), torch.cat((parts[1], k[..., turning:]), -1)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, C] -> [T, C]."""
        c = self.config
        q, k, v = self.heads(x)
        q, k = self._rope_and_append(q, k, v, batch)
        packed, step = batch.packed, batch.step
        kind = self.kind()
        attending = packed if batch.biased is None else batch.biased.of_layer(self)
        if batch.attentions is not None:
            batch.attentions.append(self._maps(q, k, batch, attending))
        if step is None or step.fresh:
            p = c.attention_dropout if self.training else 0.0
            out = attending.attend(q, k, v, dropout_p=p, **kind)
        elif c.attention_soft_cap is not None:  # the op for pages has none
            assert batch.cache is not None
            k, v = batch.cache.packed(self.layer, batch.rows, q.dtype)
            ends = packed.cu_seqlens, step.ends, packed.max_seqlen, step.max_context
            out = ops.attention(q, k, v, *ends, **kind)
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
        return F.dropout(self.out(out.flatten(1)), c.attention_out_dropout, self.training)

    def _rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.cache is None or batch.step is None:
            return self.turned(q, k, batch)
        pages = batch.cache.k_pages[self.layer], batch.cache.v_pages[self.layer]
        angles, scales = self.angles(batch), batch.cache.scales(self.layer)
        if angles is not None and self.config.rotated == self.config.head_dim:
            return ops.rope_append(q, k, v, *angles, *pages, batch.step.slots, *scales)
        q, k = self.turned(q, k, batch)
        ops.append_kv(k, v, *pages, batch.step.slots, *scales)
        return q, k

    def kind(self) -> dict[str, Any]:
        """The options of `ops.attention` by which layers differ."""
        kind: dict[str, Any] = {"scale": self.scale, "causal": self.config.causal, "window": self.window}
        cap = self.config.attention_soft_cap
        return kind if cap is None else {**kind, "soft_cap": cap}

    def _maps(self, q: Tensor, k: Tensor, batch: Batch, attending: Any) -> Tensor:
        """The attention probabilities in transformers' layout, [B, H, S, context], zero at padding."""
        packed: Any = batch.packed
        kind = self.kind()
        if attending is not packed or isinstance(packed, Padded):
            return attending.maps(q, k, **kind)  # type: ignore[no-any-return]
        context, cu_k = packed.columns, packed.cu_seqlens
        if batch.cache is not None and batch.step is not None and not batch.step.fresh:
            k, cu_k = batch.cache.packed(self.layer, batch.rows, q.dtype)[0], batch.step.ends
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
        self.gated, self.p = config.gated_mlp, config.inner_dropout
        inner = config.intermediate_size
        self.up = Linear(config.hidden_size, 2 * inner if self.gated else inner, bias=config.mlp_bias)
        self.down = Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        h = ops.gated(self.up(x), self.activation) if self.gated else self.up(x, self.activation)
        y: Tensor = self.down(F.dropout(h, self.p, self.training))
        return y


class Block(nn.Module):
    """One layer: attention and MLP, each with a residual sum and a norm before (pre) or after (post) it.

    Families with `output_norm` have a norm of what each sub-layer adds; with `parallel_norms`, both
    sub-layers read the same x.

    The residual stream is passed as a pair (x, delta), and is their sum: each norm adds delta while it reads
    x, so the sum needs no extra pass over memory.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.dropout = config.hidden_dropout
        self.parallel = config.parallel_norms > 0
        first = config.pre_norm or not config.output_norm
        bare = config.bare_first_layer and layer == 0
        self.attention_norm = Norm(config) if first and not bare else None
        self.attention = Attention(config, layer)
        self.attention_out_norm = Norm(config) if config.output_norm else None
        self.mlp_norm = Norm(config) if first and config.parallel_norms != 1 else None
        self.mlp = MLP(config)
        self.mlp_out_norm = Norm(config) if config.output_norm else None

    def forward(self, x: Tensor, delta: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """x, delta [T, C] -> the next x and delta."""
        if self.attention_norm is not None and not self.pre_norm:
            x, _ = self.attention_norm(x, self._drop(self.attention(x, batch)))
            assert self.mlp_norm is not None
            x, _ = self.mlp_norm(x, self._drop(self.mlp(x)))
            return x, None
        h, x = _normed(self.attention_norm, x, delta)
        attended = self._drop(_normed(self.attention_out_norm, self.attention(h, batch))[0])
        if self.parallel:
            h = h if self.mlp_norm is None else self.mlp_norm.norm(x)
            return x, attended + self._drop(self.mlp(h))
        h, x = _normed(self.mlp_norm, x, attended)
        return x, self._drop(_normed(self.mlp_out_norm, self.mlp(h))[0])

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.training and self.dropout else x


def _normed(norm: Norm | None, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(norm(x + delta), x + delta); without a norm, the sum twice."""
    if norm is not None:
        normed: tuple[Tensor, Tensor] = norm(x, delta)
        return normed
    total = x if delta is None else x + delta
    return total, total
