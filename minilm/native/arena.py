"""The weights of all blocks of a Transformer, packed into one tensor for csrc/cpu/transformer.cpp, and the
layout that says where each part is and how a layer computes.

The layout is a vector of numbers: a header, then as many for each layer. Their names are listed once here
and once in csrc/arena.h, in the same order (a test compares them).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model import Attention, Block, Linear, Norm, Transformer
from ..ops.backends import packed
from ..quantized import QuantizedLinear

ALIGNMENT = 64
HEADER = (
    *("layers", "channels", "heads", "kv_heads", "head_dim", "rotated", "inner", "activation", "gated"),
    *("rms", "causal", "parallel", "qk_norm_of_all", "eps", "soft_cap"),
    *("final_norm_weight", "final_norm_bias"),
)
"""Numbers of the header. Flags are 0 or 1, real numbers the bits of a float32; a vector or matrix is its
offset in bytes, -1 if there is none."""
LINEARS = ("qkv", "out", "up", "down")
NORMS = tuple(f"{layer}_{place}" for layer in ("attention", "mlp") for place in ("read", "added", "sum"))
"""The norms of a sub-layer f: x = sum(x + added(f(read(x))))."""
LAYER = (
    *(f"{name}_{number}" for name in LINEARS for number in ("format", "places", "at")),
    *(f"{name}_{vector}" for name in NORMS for vector in ("weight", "bias")),
    *("q_norm", "k_norm", "window", "scale", "turns"),
)
"""Numbers of a layer. `turns`: 0 without rope, 1 by the model's rope, 2 by that of layers with a window."""


class Arena(NamedTuple):
    """The packed weights of all blocks of a body, in one buffer."""

    weights: Tensor
    """uint8."""
    layout: Tensor
    """int64: see `HEADER` and `LAYER`."""


def first_blocks(layout: Tensor, blocks: int) -> Tensor:
    """The layout of the first blocks, without a final norm."""
    part = layout[: len(HEADER) + len(LAYER) * blocks].clone()
    part[HEADER.index("layers")] = blocks
    part[HEADER.index("final_norm_weight")] = part[HEADER.index("final_norm_bias")] = -1
    return part


def linears_of(block: Block) -> tuple[nn.Module, ...]:
    """The linear layers of a block, in the order of `LINEARS`."""
    return block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down


def eps_of(block: Block) -> float:
    """The eps of a block's norms, which are alike."""
    norm = block.attention_norm or block.attention_out_norm or block.mlp_norm
    assert norm is not None
    return norm.eps


class Writer:
    """Packs the weights of a body into an arena, and records their offsets in its layout."""

    def __init__(self, body: Transformer) -> None:
        self.body = body
        self.numbers: dict[str, int] = {}
        """Of the header or the layer that is written."""
        self.pieces: list[tuple[int, Callable[[], Tensor]]] = []
        """Size in bytes, and what makes it."""
        self.size = 0
        self.shared: list[tuple[nn.Module, packed.Sources, packed.Packed, int, int]] = []
        """Per linear layer: it, its tensors, how it is packed, its offset and size in bytes."""
        self.layers: list[tuple[nn.Module, packed.Packed]] = []
        """The linear layers, and their parts of the arena."""

    def write(self) -> Arena:
        """Pack everything; the body is one that `blocks` does not refuse."""
        layout = self.header()
        written: dict[Block, list[int]] = {}
        for block in self.body.layers:
            assert isinstance(block, Block)
            if block not in written:  # layers that are one block share their place (ALBERT)
                written[block] = self.layer(block)
            layout += written[block]
        arena = torch.empty(self.size, dtype=torch.uint8)
        packed.prefer_large_pages(arena)
        at = 0
        while self.pieces:
            size, make = self.pieces.pop(0)  # one after the other, so that none is twice for long
            arena[at : at + size] = make()
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return Arena(arena, torch.tensor(layout))

    def header(self) -> list[int]:
        """What all layers share."""
        c, block = self.body.config, self.body.layers[0]
        assert isinstance(block, Block)
        self.numbers = {
            "layers": c.num_layers,
            "channels": c.hidden_size,
            "heads": c.num_heads,
            "kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "rotated": c.rotated,
            "inner": c.intermediate_size,
            "activation": packed.ACTIVATIONS[block.mlp.activation],
            "gated": c.gated_mlp,
            "rms": c.norm == "rms_norm",
            "causal": c.causal,
            "parallel": c.parallel_norms > 0,
            "qk_norm_of_all": c.qk_norm_of_all,
            "eps": bits_of(eps_of(block)),
            "soft_cap": bits_of(c.attention_soft_cap or 0.0),
        }
        self.norm("final_norm", self.body.norm)
        return self.in_order(HEADER)

    def layer(self, block: Block) -> list[int]:
        """One block: its weights, and the settings that differ between layers."""
        c, attention = self.body.config, block.attention
        self.numbers = {
            "window": attention.window or 0,
            "scale": bits_of(attention.scale),
            "turns": self.turns(attention),
        }
        for name, linear in zip(LINEARS, linears_of(block), strict=True):
            heads = c.num_heads if name == "qkv" and c.qkv_by_head else 0
            self.weight(name, linear, gated=name == "up" and c.gated_mlp, heads=heads)
        one, two = block.attention_norm, block.mlp_norm
        read, summed = ((one, two), (None, None)) if block.pre_norm else ((None, None), (one, two))
        if block.parallel:  # with one norm for both
            read = one, one if two is None else two
        added = block.attention_out_norm, None if block.parallel else block.mlp_out_norm
        for place, norms in (("read", read), ("added", added), ("sum", summed)):
            for layer, norm in zip(("attention", "mlp"), norms, strict=True):
                self.norm(f"{layer}_{place}", norm)
        self.scale("q_norm", attention.q_norm)
        self.scale("k_norm", attention.k_norm)
        return self.in_order(LAYER)

    def turns(self, attention: Attention) -> int:
        """By which rope a layer turns q and k (see `Attention.angles`)."""
        c = self.body.config
        if attention.layer in c.layers_without_rope:
            return 0
        return 2 if c.local_rope is not None and attention.window is not None else 1

    def in_order(self, names: tuple[str, ...]) -> list[int]:
        """The numbers that were written, one for each name."""
        assert self.numbers.keys() == set(names)
        return [int(self.numbers[name]) for name in names]

    def share(self, arena: Tensor) -> list[Tensor]:
        """Let layers that run one by one use the arena; returns the keys of its parts in `packed.kept`."""
        keys = []
        for linear, sources, made, at, size in self.shared:
            form = made._replace(data=arena[at : at + size])
            packed.share(sources, form)
            self.layers.append((linear, form))
            keys.append(sources[0])
        self.shared.clear()
        return keys

    def weight(self, name: str, linear: nn.Module, *, gated: bool, heads: int) -> None:
        """A linear layer; `gated`, `heads`: see `packed.pack`."""
        assert isinstance(linear, Linear | QuantizedLinear)
        matrix = linear.weight if isinstance(linear, Linear) else linear.quantized
        made, size = packed.shape_of(matrix, gated=gated, heads=heads)
        numbers = {"format": made.format, "places": made.places, "at": self.size}
        self.numbers |= {f"{name}_{number}": value for number, value in numbers.items()}
        sources, bias = packed.sources_of(matrix, linear.bias), linear.bias
        self.shared.append((linear, sources, made, self.size, size))
        self.piece(size, lambda: packed.pack(matrix, bias, gated=gated, heads=heads).data)

    def norm(self, name: str, norm: Norm | None) -> None:
        """Weight and bias of a norm."""
        self.scale(f"{name}_weight", norm)
        self.vector(f"{name}_bias", None if norm is None else norm.bias)

    def scale(self, name: str, norm: Norm | None) -> None:
        """What a norm multiplies by."""
        plus = 1.0 if norm is not None and norm.plus_one else 0.0
        self.vector(name, None if norm is None else norm.weight, plus)

    def vector(self, name: str, vector: Tensor | None, plus: float = 0.0) -> None:
        """A vector, in float32."""
        self.numbers[name] = -1 if vector is None else self.size
        if vector is not None:
            given = vector.detach()
            self.piece(4 * given.numel(), lambda: (given.float() + plus).contiguous().view(torch.uint8))

    def piece(self, size: int, make: Callable[[], Tensor]) -> None:
        """The next part of the arena."""
        self.pieces.append((size, make))
        self.size += -(-size // ALIGNMENT) * ALIGNMENT


def bits_of(value: float) -> int:
    """The bits of a real number as float32."""
    return int(struct.unpack("I", struct.pack("f", value))[0])
