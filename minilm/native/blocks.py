"""All blocks of a Transformer in one call of the native extension (csrc/cpu/transformer.cpp).

`layers.Block` says what a block computes, op by op; this module hands the same weights to a kernel that runs
all of them in one parallel region. It is one more implementation behind the dispatch table, of the op
`blocks`: chosen for inference on a CPU, and left, with the reason, for whatever only the modules can do.

The weights are packed once into one tensor, the arena, when a model first runs; `current` makes them anew
when a parameter or a module was exchanged or written to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from ..model import MLP, Attention, Batch, Block, Linear, Norm, QuantizedLinear, Transformer
from ..ops.backends import native, packed

ALIGNMENT = 64
CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Dtypes of keys and values that the extension reads."""
HEADER = 14
"""Numbers of the layout before those of the blocks; the last two are the places of the final norm."""


def obstacle(body: Transformer, x: Tensor, batch: Batch) -> str | None:
    """What in this call, on the embedded tokens x, only the modules can do."""
    if not batch.unchanged:
        body.__dict__.pop("_fused_obstacle", None)
    if native.unavailable is not None:
        return native.unavailable
    if batch.hidden_states is not None or batch.attentions is not None:
        return "the results of each layer are asked for"
    cache = batch.cache
    if cache is not None and cache.dtype not in CACHES:
        return f"the extension has no kernel for a cache in {cache.dtype}"
    if "_fused_obstacle" not in body.__dict__:
        body.__dict__["_fused_obstacle"] = _look(body, x)
    reason: str | None = body.__dict__["_fused_obstacle"]
    return reason


def standing_obstacle(body: Transformer, cache: torch.dtype) -> str | None:
    """What `obstacle` found when the body was last looked at, for a call with a cache of this dtype."""
    if cache not in CACHES:
        return f"the extension has no kernel for a cache in {cache}"
    reason: str | None = body.__dict__.get("_fused_obstacle", "the blocks have not run yet")
    return reason


def arena(body: Transformer) -> tuple[Tensor, Tensor]:
    """The packed blocks of a body that has no obstacle, and the layout that says where they are."""
    plan: _Plan = body.__dict__["_fused_plan"]
    assert plan.arena is not None
    assert plan.layout is not None
    return plan.arena, plan.layout


def _look(body: Transformer, x: Tensor) -> str | None:
    """What the state of the body leaves to the modules."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in body.parameters())):
        return "gradients are wanted (torch.inference_mode() or torch.no_grad() says that they are not)"
    if body.training and any((body.config.hidden_dropout, body.config.attention_dropout)):
        return "dropout is on (model.eval() turns it off)"
    if body.config.activation not in packed.ACTIVATIONS:
        return f"the extension does not have the activation {body.config.activation}"
    return _plan(body).obstacle


def run_blocks(body: Transformer, x: Tensor, batch: Batch) -> Tensor:
    """Embedded tokens [T, C] -> hidden states after the final norm [T, C]."""
    weights, layout = arena(body)  # as `obstacle` found them a moment ago
    cos, sin = batch.rope if batch.rope is not None else (None, None)
    cache, step = batch.cache, batch.step
    stored: tuple[Tensor | None, ...] = (None,) * 5
    if cache is not None and step is not None:
        stored = (*cache.stores(), step.slots, step.block_table, step.context_lens)
    y: Tensor = torch.ops.minilm.transformer.default(
        x.float().contiguous(),
        weights,
        layout if batch.stop is None else _first(layout, batch.stop, len(body.layers)),
        batch.packed.cu_seqlens,
        cos,
        sin,
        *stored,
        step is None or step.fresh,
        *(() if cache is None else cache.scale_stores()),
    )
    return y.to(x.dtype)


def _first(layout: Tensor, blocks: int, of: int) -> Tensor:
    """The layout of the first blocks, without a final norm."""
    part = layout[: HEADER + (len(layout) - HEADER) // of * blocks].clone()
    part[0], part[HEADER - 2 : HEADER] = blocks, -1
    return part


_VERSION = attrgetter("_version")


class _Plan:
    """The packed blocks of one body, and what they were packed from."""

    def __init__(self, body: Transformer) -> None:
        owners, keys, things = zip(*_watched(body), strict=True)
        self.owners: tuple[dict[str, object], ...] = owners
        self.keys: tuple[str, ...] = keys
        self.things: tuple[object, ...] = things
        self.tensors = [thing for thing in things if isinstance(thing, Tensor)]
        self.counting = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.stamp = self._stamp()
        self.hooks = [hooks for m in body.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.arena: Tensor | None = None
        self.layout: Tensor | None = None
        self.refusal = _refusal(body)
        if self.refusal is None:
            self.arena, self.layout = _Writer(body).write()

    @property
    def obstacle(self) -> str | None:
        """Why this body cannot run fused."""
        if self.refusal is None and any(self.hooks):
            return "a module has forward hooks"
        return self.refusal

    def _stamp(self) -> tuple[list[int], list[int]]:
        """What changes when a tensor is written to, or given other memory."""
        return list(map(_VERSION, self.counting)), list(map(Tensor.data_ptr, self.tensors))

    def is_current(self) -> bool:
        """Whether every module and tensor is the one that was packed, unchanged. It looks at
        every one of them, and is asked once a call: loops that stay in C make it a tenth of the time."""
        present = map(dict.get, self.owners, self.keys)
        return all(map(is_, present, self.things)) and self._stamp() == self.stamp


def _watched(body: nn.Module) -> Iterator[tuple[dict[str, object], str, object]]:
    """(dict, key, value) of everything that a module holds, but for the embeddings."""
    for name, module in body.named_modules():
        if name.startswith("embeddings"):
            continue
        for held in (module._parameters, module._buffers, module._modules):
            for key, value in held.items():
                yield held, key, value


def _plan(body: Transformer) -> _Plan:
    plan: _Plan | None = body.__dict__.get("_fused_plan")
    if plan is None or not plan.is_current():
        body.__dict__.pop("_fused_plan", None)  # its memory goes before the new one's comes
        plan = body.__dict__["_fused_plan"] = _Plan(body)
    return plan


_PARTS = {"attention": Attention, "mlp": MLP, "attention_norm": Norm, "mlp_norm": Norm}


def _refusal(body: Transformer) -> str | None:
    if not body.layers:
        return "there are no layers"
    if len(body.layers) != body.config.num_layers:
        return f"there are {len(body.layers)} layers, and the configuration has {body.config.num_layers}"
    for block in body.layers:
        if type(block) is not Block:
            return f"a layer was replaced by a {type(block).__name__}"
        for part, kind in (
            ("attention", Attention),
            ("mlp", MLP),
            ("attention_norm", Norm),
            ("mlp_norm", Norm),
        ):
            if type(getattr(block, part)) is not kind:
                return f"a layer's {part} was replaced by a {type(getattr(block, part)).__name__}"
        for linear in _linears(block):
            if type(linear) is Linear:
                weight = linear.weight
                if weight.dtype not in packed.FORMATS:
                    return f"the extension has no kernel for weights in {weight.dtype}"
            elif type(linear) is QuantizedLinear:
                weight = linear.codes
            else:
                return f"a linear layer was replaced by a {type(linear).__name__}"
            if weight.device.type != "cpu":
                return "the weights are not on the CPU"
    return None


def _linears(block: Block) -> tuple[nn.Module, ...]:
    return block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down


class _Writer:
    """Lays the weights of a body out in an arena, and writes down where they are, in the order in which
    csrc/bindings_transformer.cpp reads it."""

    def __init__(self, body: Transformer) -> None:
        self.body = body
        self.numbers: list[int] = []
        self.pieces: list[Tensor] = []
        self.size = 0

    def write(self) -> tuple[Tensor, Tensor]:
        c = self.body.config
        self.numbers += [
            c.num_layers,
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.intermediate_size,
        ]
        self.numbers += [
            packed.ACTIVATIONS[c.activation],
            c.gated_mlp,
            c.pre_norm,
            c.norm == "rms_norm",
            c.causal,
        ]
        self.real(c.norm_eps)
        self.norm(self.body.norm)
        for block in self.body.layers:
            assert isinstance(block, Block)
            attention = block.attention
            for linear in _linears(block):
                self.weight(linear, gated=linear is block.mlp.up and c.gated_mlp)
            self.norm(block.attention_norm)
            self.norm(block.mlp_norm)
            for norm in (attention.q_norm, attention.k_norm):
                self.vector(None if norm is None else norm.weight)
            self.numbers.append(attention.window or 0)
            self.real(attention.scale)
        arena = torch.empty(self.size, dtype=torch.uint8)
        packed.prefer_large_pages(arena)
        at = 0
        while self.pieces:
            piece = self.pieces.pop(0)
            arena[at : at + piece.numel()] = piece
            at += -(-piece.numel() // ALIGNMENT) * ALIGNMENT
        return arena, torch.tensor(self.numbers)

    def weight(self, linear: nn.Module, *, gated: bool) -> None:
        assert isinstance(linear, Linear | QuantizedLinear)
        matrix = linear.weight if isinstance(linear, Linear) else linear.quantized
        made = packed.pack(matrix, linear.bias, gated=gated)
        self.numbers += [made.format, made.places, self.size]
        self.piece(made.data)

    def norm(self, norm: Norm | None) -> None:
        self.vector(None if norm is None else norm.weight)
        self.vector(None if norm is None else norm.bias)

    def vector(self, vector: Tensor | None) -> None:
        self.numbers.append(-1 if vector is None else self.size)
        if vector is not None:
            self.piece(vector.detach().float().contiguous().view(torch.uint8))

    def real(self, value: float) -> None:
        self.numbers.append(struct.unpack("I", struct.pack("f", value))[0])

    def piece(self, piece: Tensor) -> None:
        self.pieces.append(piece)
        self.size += -(-piece.numel() // ALIGNMENT) * ALIGNMENT
