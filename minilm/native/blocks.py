"""All blocks of a Transformer in one call of the native extension (csrc/cpu/transformer.cpp).

`layers.Block` defines a block, op by op; this module passes the same weights to a kernel that runs all blocks
in one parallel region. It is an implementation of the op `blocks` in the dispatch table, selected for
inference on a CPU. For calls that need the modules (gradients, hooks, ...), it is skipped, and the reason
recorded: the *obstacle*.

The weights are packed into one tensor, the *arena*, when a model first runs, and again if one was replaced or
written to (`minilm.ops.backends.watch`); layers that run one by one use the same packed copies. Everything
else that affects the result is checked at each call (`state`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model import MLP, Attention, Batch, Block, Linear, Norm, Packed, Transformer
from ..ops.backends import native, packed, watch
from ..quantized import QuantizedLinear
from . import released
from .arena import Arena, Writer, eps_of, first_blocks, linears_of
from .state import Structure, hooked, made_of, other_code, own_code

CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Supported dtypes of keys and values."""

UNKNOWN: dict[str, str] = {
    "distances": "scores by distances",
    "relative_buckets": "bias of the scores by distance",
}
"""Traits of `ModelConfig` that csrc/cpu/transformer.cpp lacks, and what they are: a model with one runs by
its modules."""


def obstacle(body: Transformer, x: Tensor, batch: Batch) -> str | Callable[..., Tensor]:
    """Why this call on the embedded tokens x needs the modules; if nothing, the function to call."""
    if native.unavailable is not None:
        return native.unavailable
    if type(batch.packed) is not Packed:
        return "the batch has its padding, as in a graph"
    if batch.hidden_states is not None or batch.attentions is not None:
        return "the outputs of each layer are requested"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in body.parameters())):
        return "gradients are enabled (torch.inference_mode() or torch.no_grad() disables them)"
    if batch.cache is not None and batch.cache.dtype not in CACHES:
        return f"the extension has no kernel for a cache in {batch.cache.dtype}"
    found = look(body)
    return found if isinstance(found, str) else partial(run_blocks, arena=found)


def look(body: Transformer, trusting: bool = False) -> str | Arena:
    """The packed blocks for the current state of the body, or the reason why it needs the modules.

    trusting: check only global hooks and calls of `weights_changed`.
    """
    reason = other_code()
    if reason is not None:
        return reason
    made = made_of(body)
    with made.lock:
        blocks: _Blocks | None = made.blocks
        if blocks is None or not blocks.is_current(trusting):
            blocks = made.blocks = _Blocks(body, blocks)
        return blocks.pack(body) if blocks.obstacle is None else blocks.obstacle


def release_beside(body: Transformer, layer: nn.Module, form: packed.Packed) -> None:
    """See `_Blocks.release_beside`; after a `look`."""
    made = made_of(body)
    with made.lock:
        if made.blocks is not None:
            made.blocks.release_beside(body, layer, form)


def run_blocks(body: Transformer, x: Tensor, batch: Batch, *, arena: Arena | None = None) -> Tensor:
    """Embedded tokens [T, C] -> hidden states after the final norm [T, C]; `arena`: result of `look`."""
    found = look(body) if arena is None else arena
    if isinstance(found, str):
        raise RuntimeError(f"the blocks cannot run natively: {found}")
    weights, layout = found
    cos, sin = batch.rope if batch.rope is not None else (None, None)
    local_cos, local_sin = batch.local_rope if batch.local_rope is not None else (None, None)
    cache, step = batch.cache, batch.step
    stored: tuple[Tensor | None, ...] = (None,) * 5
    if cache is not None and step is not None:
        stored = (*cache.stores(), step.slots, step.block_table, step.context_lens)
    y: Tensor = torch.ops.minilm.transformer.default(
        x.float().contiguous(),
        weights,
        layout if batch.stop is None else first_blocks(layout, batch.stop),
        batch.packed.cu_seqlens,
        cos,
        sin,
        *stored,
        step is None or step.fresh,
        *(() if cache is None else cache.scale_stores()),
        local_cos=local_cos,
        local_sin=local_sin,
    )
    return y.to(x.dtype)


class _Blocks:
    """The last checked state of a body, and its packed blocks."""

    def __init__(self, body: Transformer, before: _Blocks | None) -> None:
        modules = list(body.modules())
        self.structure = Structure(modules)
        self.kinds = self.structure.kinds()
        self.obstacle = _obstacle(body, modules)
        self.arena: Arena | None = None
        self.keys: list[Tensor] = []
        """The tensors by which `packed.kept` finds the parts of the arena."""
        self.tensors: list[Tensor] = []
        self.settings: list[object] = []
        self.forms: list[released.Form | None] = []
        """Of each linear layer, None where it has its planes: what stands for them in `tensors`."""
        self.watch: watch.Watch | None = None
        if before is not None:  # for a while something stood in the way, or a name was put somewhere
            self.arena, self.keys, self.watch = before.arena, before.keys, before.watch
            self.tensors, self.settings, self.forms = before.tensors, before.settings, before.forms
            before.arena = None
        if self.obstacle is None:
            tensors, settings, forms = _sources(body), _settings(body), _forms(body)
            same = _same_objects(tensors, self.tensors) and settings == self.settings
            same = same and _same_objects(forms, self.forms)
            if not same or not self._weights_hold():
                self.drop()  # free its memory before allocating the new one
            self.tensors, self.settings, self.forms = tensors, settings, forms

    def drop(self) -> None:
        """Free the arena's memory."""
        packed.forget_kept(self.keys)
        self.arena, self.keys = None, []

    def is_current(self, trusting: bool) -> bool:
        """Whether the body is unchanged; if it is refused anyway, the values of weights do not matter."""
        if trusting and self.arena is not None and self.watch is not None:
            return not self.watch.told
        if not self.structure.stands():
            return False
        return self._weights_hold() if self.obstacle is None else self.structure.kinds() == self.kinds

    def _weights_hold(self) -> bool:
        return self.arena is not None and self.watch is not None and self.watch.holds(self.tensors)

    def pack(self, body: Transformer) -> Arena:
        """The arena; packs it if there is none."""
        if self.arena is None:
            self._restore(body)
            self.watch = watch.Watch(self.tensors)
            writer = Writer(body)
            self.arena = writer.write()
            self.keys = writer.share(self.arena.weights)
            self._release(body, writer.layers)
        return self.arena

    def _restore(self, body: Transformer) -> None:
        """Unpack the planes that were released when the blocks were packed before."""
        layers = [layer for layer in body.modules() if released.form_of(layer) is not None]
        if layers:
            for layer in layers:
                released.restore(layer, asked=False)
            self._note(body)

    def _release(self, body: Transformer, layers: list[tuple[nn.Module, packed.Packed]]) -> None:
        """Drop the planes of quantised layers: the arena has them."""
        assert self.watch is not None
        layers = [(layer, form) for layer, form in layers if released.may_release(layer)]
        if not layers or not self.watch.holds(self.tensors):
            return
        places = {id(tensor): place for place, tensor in enumerate(self.tensors)}
        keys = {id(key) for key in self.keys}
        # What is noted here would count as somebody who holds the planes.
        self.tensors, self.keys, self.structure = [], [], Structure(())
        if sum(released.release(layer, form) for layer, form in layers):
            packed.trim()
        self._note(body)
        self.keys = [tensor for tensor in self.tensors if id(tensor) in keys]
        if all(id(tensor) in places for tensor in self.tensors):
            self.watch = self.watch.part(self.tensors, [places[id(tensor)] for tensor in self.tensors])
        else:  # another thread asked for planes meanwhile, and may write to them
            self.watch.forget()

    def release_beside(self, body: Transformer, layer: nn.Module, form: packed.Packed) -> None:
        """Drop the planes of a layer that may be in the body but not in a block, and was packed as `form`."""
        if self.structure.stands():
            self.structure = Structure(())  # it holds planes
            if released.release(layer, form):
                packed.trim()
            self._note(body)

    def _note(self, body: Transformer) -> None:
        self.tensors, self.forms = _sources(body), _forms(body)
        self.structure = Structure(body.modules())
        self.kinds = self.structure.kinds()


def _forms(body: Transformer) -> list[released.Form | None]:
    return [released.form_of(m) for block in body.layers for m in block.modules()]


def _same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _sources(body: Transformer) -> list[Tensor]:
    """The tensors of the blocks and of the final norm."""
    parts = [*body.layers, *(() if body.norm is None else (body.norm,))]
    return [tensor for part in parts for m in part.modules() for tensor in _tensors(m)]


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without the planes of a released layer (which `_buffers` would unpack)."""
    held = module.__dict__
    return [t for t in (*held["_parameters"].values(), *held["_buffers"].values()) if t is not None]


def _settings(body: Transformer) -> list[object]:
    """The settings in the layout, apart from the offsets of weights."""
    found: list[object] = [body.config, *_first_settings(body)]
    for block in body.layers:
        assert isinstance(block, Block)
        found += [block.attention.scale, block.attention.window, block.attention.layer]
    return found


def _first_settings(body: Transformer) -> tuple[str, float]:
    """Activation and eps, which the kernels share between all layers."""
    block = body.layers[0]
    assert isinstance(block, Block)
    return block.mlp.activation, eps_of(block)


def _obstacle(body: Transformer, modules: list[nn.Module]) -> str | None:
    """Why the body needs the modules, apart from the values of its weights; or None."""
    config = body.config
    reason = _refusal(body)
    if reason is None:
        reason = own_code(m for m in modules if m is not body)
    if reason is None and hooked(modules):
        reason = "a module has forward hooks"
    if reason is None and any(m.training for m in modules):
        rates = [config.hidden_dropout, config.attention_dropout, config.attention_out_dropout]
        rates += [rate for b in body.layers if isinstance(b, Block) for rate in (b.dropout, b.mlp.p)]
        if any(rates):
            reason = "dropout is on (model.eval() turns it off)"
    return reason


def _parts(config: ModelConfig, number: int) -> dict[str, type]:
    """The parts of the block with this number, and what they are."""
    first = config.pre_norm or not config.output_norm
    bare = config.bare_first_layer and number == 0
    kinds: dict[bool, type] = {True: Norm, False: type(None)}
    return {
        "attention": Attention,
        "mlp": MLP,
        "attention_norm": kinds[first and not bare],
        "attention_out_norm": kinds[config.output_norm],
        "mlp_norm": kinds[first and config.parallel_norms != 1],
        "mlp_out_norm": kinds[config.output_norm],
    }


def _refusal(body: Transformer) -> str | None:
    config = body.config
    if not body.layers:
        return "there are no layers"
    for name, what in UNKNOWN.items():
        if getattr(config, name):
            return f"the extension has no {what}"
    if config.qk_norm and config.norm != "rms_norm":
        return "the extension has no LayerNorm of q and k"
    if len(body.layers) != config.num_layers:
        return f"there are {len(body.layers)} layers, and the configuration has {config.num_layers}"
    if body.norm is not None and type(body.norm) is not Norm:
        return f"the final norm was replaced by a {type(body.norm).__name__}"
    if (body.norm is not None) != config.final_norm:
        return "the final norm is not the configuration's"
    for number, block in enumerate(body.layers):
        if type(block) is not Block:
            return f"a layer was replaced by a {type(block).__name__}"
        for part, kind in _parts(config, number).items():
            if type(getattr(block, part)) is not kind:
                return f"a layer's {part} was replaced by a {type(getattr(block, part)).__name__}"
        reason = _refused_settings(body, block)
        if reason is not None:
            return reason
        for linear in linears_of(block):
            reason = _refused_linear(linear)
            if reason is not None:
                return reason
    activation, _ = _first_settings(body)
    if activation not in packed.ACTIVATIONS:
        return f"the extension does not have the activation {activation}"
    for norm in (m for m in body.modules() if type(m) is Norm):
        if not isinstance(norm._parameters.get("weight"), nn.Parameter):
            return "a norm's weight is not a parameter"
        if norm.bias is not norm._parameters.get("bias"):
            return "a norm's bias is not a parameter"
    return None


def _refused_settings(body: Transformer, block: Block) -> str | None:
    """Why a block's settings need the modules: those that the kernels share between all blocks differ."""
    config, attention, mlp = body.config, block.attention, block.mlp
    activation, eps = _first_settings(body)
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None and type(norm) is not Norm:
            return f"a norm of q or k was replaced by a {type(norm).__name__}"
    if (attention.q_norm is not None, attention.k_norm is not None) != (config.qk_norm,) * 2:
        return "the norms of q and k are not the configuration's"
    if attention.config is not config and attention.config != config:
        return "a layer's attention has another configuration"
    if mlp.activation != activation:
        return f"a layer has the activation {mlp.activation}, and another {activation}"
    placed = block.pre_norm, block.parallel
    if mlp.gated != config.gated_mlp or placed != (config.pre_norm, config.parallel_norms > 0):
        return "a layer's MLP or the place of its norms is not the configuration's"
    norms = [block.attention_norm, block.attention_out_norm, block.mlp_norm, block.mlp_out_norm]
    for norm in (*norms, attention.q_norm, attention.k_norm, body.norm):
        if norm is not None and norm.eps != eps:
            return f"a norm has the eps {norm.eps}, and another {eps}"
        if norm is not None and (norm.rms, norm.plus_one) != (
            config.norm == "rms_norm",
            config.norm_plus_one,
        ):
            return "a norm is not of the configuration's kind"
    return None


def _refused_linear(linear: nn.Module) -> str | None:
    weight: Tensor | None
    if type(linear) is Linear:
        weight = linear._parameters.get("weight")
        if not isinstance(
            weight, nn.Parameter
        ):  # passed for one call (torch.func.functional_call), or computed
            return "a weight is not a parameter"
        if weight.dtype not in packed.FORMATS:
            return f"the extension has no kernel for weights in {weight.dtype}"
    elif released.type_of(linear) is QuantizedLinear:
        weight = linear.__dict__["_buffers"].get("codes")  # None: released, and it was on the CPU
    else:
        return f"a linear layer was replaced by a {type(linear).__name__}"
    bias = linear._parameters.get("bias")
    if getattr(linear, "bias", None) is not bias or not isinstance(bias, nn.Parameter | None):
        return "a bias is not a parameter"
    if weight is not None and weight.device.type != "cpu":
        return "the weights are not on the CPU"
    return None
