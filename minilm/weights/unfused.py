"""Models whose modules have the checkpoint's names, such as `bert.encoder.layer.0.attention.self.query`.

A model of minilm has one matrix for query, key and value, and one for gate and up. Libraries that look for
modules by name (PEFT) need those of transformers. `unfuse_modules` builds them from the family's weight
rules: a tree of modules with one linear layer, norm or table for each tensor of the checkpoint. It registers
the tree instead of the body and the head. Body and head still compute, but are no longer registered, and each
of their layers becomes a `Relay`, which calls the module that has its name in the tree at that moment. So the
model uses whatever others put into the tree: an adapter around `query`, or a trained copy of `classifier`.
The native passes do not support relays, so the modules run instead.

`fuse_modules` reverses this, once the tree holds nothing but the layers it was built with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .. import ops
from .plan import POOLER, UNFUSED, fused_sizes
from .relays import (
    OWN,
    BaseNode,
    JoinedRelay,
    LayerNorm,
    LinearRelay,
    MaskedLM,
    Node,
    NormRelay,
    OutputMatrix,
    Path,
    PoolerNode,
    Relay,
    RMSNorm,
    TableRelay,
    linear_of,
    walk,
)
from .rules import Rule

PARTS = ("body", "pooler", "head")


@dataclass
class Replaced:
    """A layer of the body or the head, and the modules of the tree that replace it."""

    parent: nn.Module
    name: str
    module: nn.Module
    relay: nn.Module
    paths: tuple[Path, ...]


@dataclass
class Record:
    """What `fuse_modules` needs to restore the model."""

    parts: dict[str, nn.Module | None]
    replaced: list[Replaced] = field(default_factory=list)
    output: Path | None = None
    """The path of the output matrix."""


def unfuse_modules(model: Any) -> None:
    """Give the modules of `model` the checkpoint's names, in place. Its parameters are new objects, so create
    the optimizer afterwards. Does nothing to an unfused model; raises ValueError for a quantised one."""
    if UNFUSED in model.__dict__:
        return
    if any(hasattr(module, "quantized") for module in model.modules()):
        raise ValueError(
            "a quantised model has no separate query, key and value matrices that could be trained or take "
            "adapters: load it without weights=, or with weights='float'"
        )
    _Unfusing(model).run()


class _Unfusing:
    def __init__(self, model: Any) -> None:
        self.model = model
        family, head = model.family, model.head_kind
        self.rules: tuple[Rule, ...] = family.rules(head)
        self.prefix: str = family.prefix(head)
        self.linear: type[nn.Linear] = type(model.body.layers[0].attention.out)
        self.tokens = model.body.embeddings.tokens
        OWN.update((self.linear, type(self.tokens), type(model.body.distances), nn.Conv1d))
        base = BaseNode(model) if self.prefix else Node()
        self.base = base
        self.top = Node()
        if self.prefix:
            self._put(tuple(self.prefix.rstrip(".").split(".")), base)
        self.record = Record({name: model._modules[name] for name in PARTS if name in model._modules})

    def run(self) -> None:
        """Build the tree, and register it instead of the parts."""
        model, parts = self.model, self.record.parts
        body, pooler, head = (parts.get(name) for name in PARTS)
        owners = [
            (name, module)
            for name, module in model.named_modules()
            if module is not head and any(p is not None for p in module._parameters.values())
        ]
        first: Path = ()
        for name, module in owners:
            path = self._paths(f"{name}.weight")[0][0] if name.startswith("pooler.") else ()
            if path[-1:] == ("dense",):  # BERT's pooler; that of ALBERT has the name of its layer
                first = path[:-1]
                self._put(first, PoolerNode())
            if name != "head.decoder":
                parent, _, leaf = name.rpartition(".")
                self._replace(model.get_submodule(parent), leaf, module, name)
        if hasattr(head, "decoder"):
            self._output(head)
        tree = Node()
        tree._modules.update(self.base._modules if self.prefix else self.top._modules)
        model._modules.clear()
        model._modules.update(self.top._modules)
        assert body is not None
        body._modules["tree"] = self.base if self.prefix else tree
        model.__dict__["body"] = body
        if head is not None:
            model.__dict__["head"] = self._head(head)
        if pooler is not None and (self.prefix or not first):
            model.__dict__["pooler" if self.prefix else POOLER] = Relay(model, first) if first else pooler
        model.__dict__[UNFUSED] = self.record
        changed(model)
        model.train(model.training)

    def _head(self, head: nn.Module) -> nn.Module:
        """The head, with relays for its layers."""
        if self.record.output is None:
            return head
        relay = LinearRelay(self.model, self.record.output)
        if "dense" in head._modules:
            return MaskedLM(head, relay)
        head.__dict__.pop("decoder", None)
        head._modules["decoder"] = relay
        if "bias" in head._parameters:  # now the output matrix adds it
            head._parameters["bias"] = None
        return head

    def _paths(self, target: str) -> tuple[tuple[Path, ...], Rule, str]:
        """The paths in the tree of the parts of minilm's parameter `target`, and its kind (weight or
        bias)."""
        for rule in self.rules:
            found = rule.match_target(target)
            if found is not None and rule.transform != "ignore":
                prefix = self.prefix if rule.in_base else ""
                names = [(prefix + source).split(".") for source in found[0]]
                return tuple(tuple(name[:-1]) for name in names), rule, names[0][-1]
        raise ValueError(f"no weight rule gives the name of {target} in a checkpoint")

    def _put(self, path: Path, module: nn.Module) -> None:
        """Register a module at a path, with `Node`s along the path."""
        at: nn.Module = self.top
        for name in path[:-1]:
            at = at._modules.setdefault(name, Node())  # type: ignore[assignment]
        at._modules[path[-1]] = module

    def _replace(self, parent: nn.Module, name: str, module: Any, full: str) -> None:
        paths, rule, _ = self._paths(f"{full}.weight")
        relay: nn.Module
        if isinstance(module, nn.Linear):
            if rule.transform == "fuse":
                self._split(module, paths, rule, full)
                relay = JoinedRelay(self.model, paths)
            else:
                self._put(paths[0], module)
                relay = LinearRelay(self.model, paths[0])
        elif isinstance(module, (nn.Embedding, nn.Conv1d)):
            self._put(paths[0], module)
            relay = (TableRelay if name == "types" else Relay)(self.model, paths[0])
        else:
            self._put(paths[0], _norm(module))
            relay = NormRelay(self.model, paths[0])
        parent._modules[name] = relay
        self.record.replaced.append(Replaced(parent, name, module, relay, paths))

    def _split(self, module: nn.Linear, paths: tuple[Path, ...], rule: Rule, full: str) -> None:
        sizes = list(fused_sizes(rule, self.model, f"{full}.weight", module.weight.shape[0]))
        parts: list[dict[str, nn.Parameter | None]] = [{} for _ in paths]
        for kind, parameter in module._parameters.items():
            pieces: Sequence[Any] = [None] * len(paths)
            if parameter is not None:
                pieces = [
                    nn.Parameter(piece.clone(), parameter.requires_grad)
                    for piece in torch.split(parameter.detach(), sizes)
                ]
            for part, piece in zip(parts, pieces, strict=True):
                part[kind] = piece
        for path, part in zip(paths, parts, strict=True):
            self._put(path, linear_of(self.linear, part))
        module._parameters.update(dict.fromkeys(module._parameters))

    def _output(self, head: Any) -> None:
        rule = next(r for r in self.rules if r.target == "head.decoder.weight")
        path = tuple(rule.sources[0].split(".")[:-1])
        matrix = OutputMatrix(self.linear)
        own = self.tokens if head.decoder is None else head.decoder
        matrix._parameters["weight"] = own.weight
        if "bias" in head._parameters:
            matrix._parameters["bias"] = head._parameters["bias"]
        self._put(path, matrix)
        self.record.output = path


def _norm(module: Any) -> nn.Module:
    """The norm for the tree, with the parameters of one of minilm's."""
    made: nn.Module
    if module.rms:
        made = RMSNorm(module.eps, module.plus_one)
    else:
        made = LayerNorm(module.weight.shape, eps=module.eps, device="meta")
        made._parameters["bias"] = module._parameters.get("bias")
    made._parameters["weight"] = module._parameters["weight"]
    return made


def tied_names(model: Any) -> dict[str, str] | None:
    """transformers' `_tied_weights_keys`: the name of the output matrix -> that of the token table, if an
    unfused model has one tensor for both."""
    record: Record | None = model.__dict__.get(UNFUSED)
    if record is None or record.output is None or not model.spec.tie_word_embeddings:
        return None
    table = next(old.paths[0] for old in record.replaced if old.name == "tokens")
    return {".".join((*record.output, "weight")): ".".join((*table, "weight"))}


def changed(model: Any) -> None:
    """Discard what was prepared from the weights, after a model has been rebuilt."""
    for module in (model, model.body):
        module.__dict__.pop(ops.MADE, None)
    model.weights_changed()


def foreign(model: Any) -> str | None:
    """The name of the first module in the tree of an unfused model that minilm did not put there: an adapter,
    a trained copy, a layer with hooks. None if there is none."""
    record: Record = model.__dict__[UNFUSED]
    paths = [path for old in record.replaced for path in old.paths]
    paths += [] if record.output is None else [record.output]
    known = set()
    for path in paths:
        for end in range(1, len(path) + 1):
            place = walk(model, path[:end])
            own = isinstance(place, Node) if end < len(path) else _is_plain(place)
            if not own or place._forward_hooks or place._forward_pre_hooks or "forward" in place.__dict__:
                return ".".join(path[:end])
            known.add(place)
    return next((name for name, m in model.named_modules() if m is not model and m not in known), None)


def _is_plain(place: nn.Module) -> bool:
    return type(place) in (LayerNorm, RMSNorm, OutputMatrix) or type(place) in OWN


def fuse_modules(model: Any) -> None:
    """Reverse `unfuse_modules`, in place; the native passes run again. Parameters are new objects again. Does
    nothing to a fused model; raises ValueError for one that contains adapters."""
    record: Record | None = model.__dict__.get(UNFUSED)
    if record is None:
        return
    name = foreign(model)
    if name is not None:
        kind = type(walk(model, tuple(name.split("."))))
        raise ValueError(
            f"{name} is a {kind.__name__} of {kind.__module__}, or has hooks: a fused model cannot contain "
            "it. merge_and_unload() of the PEFT model merges adapters, its save_pretrained saves them"
        )
    head: Any = record.parts.get("head")
    tied = True
    if record.output is not None:
        matrix: Any = walk(model, record.output)
        weight = matrix._parameters["weight"]
        tied = weight is model.body.embeddings.tokens.weight
        head._modules["decoder"] = None if tied else linear_of(_kind(matrix), {"weight": weight})
        if "bias" in head._parameters:
            head._parameters["bias"] = matrix._parameters["bias"]
    for old in record.replaced:
        old.parent._modules[old.name] = _restored(old, [walk(model, path) for path in old.paths])
    body: Any = record.parts["body"]
    del body._modules["tree"]
    for part in (*record.parts, POOLER):
        model.__dict__.pop(part, None)
    del model.__dict__[UNFUSED]
    model._modules.clear()
    model._modules.update(record.parts)
    model.train(model.training)
    if record.output is not None and not tied and model.spec.tie_word_embeddings:
        model.spec = replace(model.spec, tie_word_embeddings=False)
        model.config.tie_word_embeddings = False
    changed(model)


def _kind(matrix: Any) -> type[nn.Linear]:
    kind: type[nn.Linear] = matrix.kind if type(matrix) is OutputMatrix else type(matrix)
    return kind


def _restored(old: Replaced, found: list[Any]) -> nn.Module:
    """The layer of the fused model: the one in the tree, or several of them joined."""
    if type(found[0]) in (LayerNorm, RMSNorm):
        for kind in old.module._parameters:
            old.module._parameters[kind] = found[0]._parameters.get(kind)
        return old.module
    if len(found) == 1:
        return found[0]  # type: ignore[no-any-return]
    for kind in ("weight", "bias"):
        pieces = [layer._parameters[kind] for layer in found]
        if pieces[0] is not None:
            joined = torch.cat([piece.detach() for piece in pieces])
            old.module._parameters[kind] = nn.Parameter(joined, any(p.requires_grad for p in pieces))
    return old.module
