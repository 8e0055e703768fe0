"""The one Transformer: embeddings, L blocks and, if the family has one, a final norm; on packed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import ModelConfig
from .batch import Batch
from .layers import Block, Embedding, Embeddings, Linear, Norm


class Transformer(ops.Whole, nn.Module):
    """The body of every model: takes a `Batch`, returns its last hidden states [T, C]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.project = Linear(config.table_size, config.hidden_size) if config.embedding_size else None
        layers = range(config.num_layers)
        shared = [Block(config, 0)] * len(layers) if config.shared_layers else None
        self.layers = nn.ModuleList(shared or (Block(config, layer) for layer in layers))
        self.norm = Norm(config) if config.final_norm else None
        self.distances: Any = None
        self.conv: Any = None
        if config.relative_buckets or config.distances is not None:
            from ..distances import shared_parts

            self.distances, self.conv = shared_parts(config, Embedding, Linear, Norm)
        self.gradient_checkpointing = False

    def forward(self, batch: Batch) -> Tensor:
        """Returns the last hidden states, [T, C]; fills `batch.hidden_states` and `batch.attentions` if they
        are lists."""
        x: Tensor = self.embeddings(batch.tokens, batch.positions, batch.types)
        if self.project is not None:
            x = self.project(x)
        batch.biased = None if self.distances is None else self.distances.biased(batch.packed)
        result: Tensor = ops.run_whole("blocks", x.device, x.dtype, self, x, batch)
        return result

    def run_blocks(self, x: Tensor, batch: Batch) -> Tensor:
        """All blocks, one by one, and the final norm: embedded tokens [T, C] -> hidden states [T, C].

        Reference definition. Every backend except the native one runs it, with an implementation chosen for
        each op; the native one runs all blocks in one call (`minilm.native.blocks`). With `batch.stop`,
        returns the residual stream before that block.
        """
        delta: Tensor | None = None
        embedded = x
        for block in self.layers if batch.stop is None else self.layers[: batch.stop]:
            if batch.hidden_states is not None:
                batch.hidden_states.append(x if delta is None else x + delta)
            if self.gradient_checkpointing and torch.is_grad_enabled() and batch.cache is None:
                x, delta = checkpoint(block, x, delta, batch, use_reentrant=False)
            else:
                x, delta = block(x, delta, batch)
            if self.conv is not None and block is self.layers[0]:
                x = self.conv(embedded, x, batch.packed)
        if batch.stop is not None:
            return x if delta is None else x + delta
        if self.norm is not None:
            x, _ = self.norm(x, delta)
        if batch.hidden_states is not None:
            batch.hidden_states.append(x)
        return x


ops.register_modules("blocks", Transformer.run_blocks)
