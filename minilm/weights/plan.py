"""The plan for loading: what to do with every tensor, decided from names, shapes and dtypes only.

Read minilm/weights/loading.py first; it gives the overview.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files import Checkpoint, WeightError
from .rules import Rule

Shape = tuple[int, ...]
UNFUSED = "_unfused"
"""Key in the `__dict__` of a model that is unfused (`minilm.weights.unfused`)."""
POOLER = "_pooler"
"""Key for the pooler of such a model, if the module with that name is only its layer (ALBERT)."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_AGAIN = "ignore_mismatched_sizes=True"
_SHOWN = 4  # maximum number of problems in one error message


@dataclass(frozen=True)
class Fill:
    """One parameter of the model, and the tensors of the checkpoint that it is loaded from."""

    target: str
    sources: tuple[str, ...]  # full names in the checkpoint
    rule: Rule
    sizes: tuple[int, ...]  # rows of each source if several are fused, else ()
    codes: bool = False  # quantised matrices, which are stored as [out, in] in every family

    def views(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The parts of `parameter` for the sources, as views in the sources' shapes; write to them to
        load."""
        if self.codes and self.rule.transform == "transpose":
            return (parameter,)
        return views(self.rule, self.sizes, parameter)


@dataclass
class Plan:
    """The complete, checked plan; the last three fields are those of `LoadReport`."""

    fills: list[Fill] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


class _Name(NamedTuple):
    short: str  # as used in the rules
    inside: bool | None  # part of the base model? None: no key has a prefix, so it is unknown


def normalise(keys: Sequence[str], prefixes: Sequence[str]) -> tuple[str, dict[str, _Name]]:
    """The prefix of keys of a checkpoint ("" if none), and every key as used in the rules."""
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in keys)), "")
    names = {}
    for key in keys:
        inside = key.startswith(prefix) if prefix else None
        short = key[len(prefix) :] if inside else key
        short = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", short))
        names[key] = _Name(short, inside)
    return prefix, names


def unique_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The parameters of `model`, each once; and for every name (a shared parameter has several) its key in
    the first dict."""
    parameters: dict[str, nn.Parameter] = {}
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
        parameters.setdefault(names[name], parameter)
    return parameters, names


def fused_sizes(rule: Rule, model: nn.Module, name: str, rows: int) -> tuple[int, ...]:
    """Number of rows, of the `rows` of parameter `name`, of each source of a `fuse`; () for other rules."""
    if rule.transform != "fuse":
        return ()
    count = len(rule.sources)
    if rule.sizes:
        sizes = tuple(model.fused_sizes()[rule.sizes])  # type: ignore[operator]
    else:
        sizes = (rows // count,) * count
    if len(sizes) != count or sum(sizes) != rows:
        raise ValueError(f"the {rows} rows of {name} cannot be split into {sizes} for {list(rule.sources)}")
    return sizes


def views(rule: Rule, sizes: tuple[int, ...], parameter: Tensor) -> tuple[Tensor, ...]:
    """The parts of `parameter` for the sources of `rule`, as views in the sources' shapes. Loading writes to
    them and saving reads them, so the two cannot disagree."""
    if rule.transform == "fuse":
        return tuple(torch.split(parameter, list(sizes)))
    return (parameter.t(),) if rule.transform == "transpose" else (parameter,)


def plan_load(
    model: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    prefixes: Sequence[str],
    *,
    ignore_mismatched_sizes: bool = False,
) -> Plan:
    """Decide what to do with every tensor of `checkpoint` and every parameter of `model`; reads no data.

    Raises WeightError if they do not fit, which names file, key, and what was expected and found.
    """
    return _Planner(model, checkpoint, rules, prefixes, ignore_mismatched_sizes).run()


class _Planner:
    """Works in two passes: every key claims a parameter or is skipped, then every parameter's claims are
    checked."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        rules: Sequence[Rule],
        prefixes: Sequence[str],
        ignore_mismatched_sizes: bool,
    ) -> None:
        self.model, self.checkpoint, self.rules = model, checkpoint, rules
        self.ignore_mismatched_sizes = ignore_mismatched_sizes
        self.parameters, self.canonical = unique_parameters(model)
        self.prefix, self.names = normalise(list(checkpoint.tensors), prefixes)
        self.claims: dict[str, dict[Rule, dict[str, str]]] = {}  # parameter -> rule -> short name -> key
        self.plan = Plan()
        self.problems: list[str] = []

    def run(self) -> Plan:
        path = self.checkpoint.path
        for key in self.names:
            self._claim(key)
        if not self.claims:
            some = ", ".join([*list(self.names)[:3], "..."]) if self.names else "it is empty"
            raise WeightError(f"{path}: no tensor in it belongs to a model of this family ({some})")
        for target, parameter in self.parameters.items():
            self._fill(target, parameter, self.claims.get(target, {}))
        if self.problems:
            rest = len(self.problems) - _SHOWN
            more = f"; and {rest} more problem{'s' * (rest > 1)}" if rest > 0 else ""
            raise WeightError(f"{path}: {'; '.join(self.problems[:_SHOWN])}{more}")
        order = {key: position for position, key in enumerate(self.checkpoint.tensors)}
        self.plan.fills.sort(key=lambda fill: order[fill.sources[0]])
        return self.plan

    def _claim(self, key: str) -> None:
        """Find the one rule that matches `key`, and the parameter, or the reason to skip it."""
        name = self.names[key]
        hits = [
            (rule, target)
            for rule in self.rules
            if (rule.transform == "ignore" or name.inside in (None, rule.in_base))
            and (target := rule.match_key(name.short)) is not None
        ]
        if len(hits) != 1:
            self._unmatched(key, [rule for rule, _ in hits])
            return
        rule, target = hits[0]
        if rule.transform == "ignore" or (rule.transform == "tied" and target not in self.parameters):
            self.plan.skipped[key] = rule.reason
        elif target in self.parameters:
            claimed = self.claims.setdefault(target, {}).setdefault(rule, {})
            if name.short in claimed:
                self.problems.append(f"{key} and {claimed[name.short]} are two names of one tensor")
            claimed[name.short] = key
        elif target in self.canonical:
            self.plan.skipped[key] = f"shared with {self.canonical[target]}"
        elif target.startswith("body."):
            absent = f"the model with this configuration has no {self._absent(target)}"
            self.problems.append(f"surplus tensor {self._located(key)}: {absent}")
        else:
            self.plan.skipped[key] = f"the model has no {self._absent(target)}"

    def _unmatched(self, key: str, hits: list[Rule]) -> None:
        if hits:
            self.problems.append(f"{key} matches more than one rule: {' and '.join(map(str, hits))}")
        elif self.names[key].inside is False:
            self.plan.skipped[key] = f"not under {self.prefix!r}: of another model's head"
        else:
            self.problems.append(f"surplus tensor {self._located(key)}, which matches no rule of the family")

    def _fill(self, target: str, parameter: Tensor, claims: dict[Rule, dict[str, str]]) -> None:
        """Turn the claims on a parameter into a `Fill`, or record what is wrong with them."""
        if len(claims) > 1:
            keys = " and ".join(key for claimed in claims.values() for key in claimed.values())
            self.problems.append(f"{target} would be filled more than once, by {keys}")
            return
        in_body = target.startswith("body.")
        if not claims and not in_body:
            self.plan.initialised.append(target)
            return
        rule = next((r for r in (claims or self.rules) if r.match_target(target)), None)
        if rule is None:
            self.problems.append(f"no rule has a source for {target}")
            return
        claimed = claims.get(rule, {})
        sources = self._sources(rule, target, claimed)
        sizes = fused_sizes(rule, self.model, target, parameter.shape[0])
        parts = views(rule, sizes, parameter)
        prefix = self.prefix if rule.in_base else ""
        missing = [
            f"missing tensor {prefix}{short} of shape {list(part.shape)} for {target}"
            for short, part in zip(sources, parts, strict=True)
            if short not in claimed
        ]
        if missing:
            self.problems += missing
            return
        found = tuple(claimed[short] for short in sources)
        codes = any(self.checkpoint.tensors[key].format for key in found)
        fill = Fill(target, found, rule, sizes, codes)
        for key in claimed.values():
            if key not in fill.sources:
                self.plan.skipped[key] = f"the same tensor as {fill.sources[0]}"
        if self._fits(fill, fill.views(parameter), in_body):
            self.plan.fills.append(fill)

    @staticmethod
    def _sources(rule: Rule, target: str, claimed: dict[str, str]) -> tuple[str, ...]:
        """The names to read `target` from: the rule's own, or the first of `also` that exists."""
        sources, also = rule.match_target(target) or ((), ())
        present = [name for name in (*sources, *also) if name in claimed]
        return (present[0],) if also and present else sources

    def _fits(self, fill: Fill, parts: Sequence[Tensor], in_body: bool) -> bool:
        for key, part in zip(fill.sources, parts, strict=True):
            info, expected = self.checkpoint.tensors[key], tuple(part.shape)
            if info.dtype not in _FLOATS:
                self.problems.append(f"{self._located(key)} is stored as {info.stored}, expected floats")
                return False
            if info.shape == expected:
                continue
            what = f"{self._located(key)} has shape {list(info.shape)}, expected {list(expected)}"
            if in_body:
                self.problems.append(f"{what} for {fill.target}")
            elif self.ignore_mismatched_sizes:
                self.plan.mismatched[fill.target] = (info.shape, expected)
                reason = f"its shape is {list(info.shape)}, the model needs {list(expected)}"
                self.plan.skipped.update(dict.fromkeys(fill.sources, reason))
            else:
                self.problems.append(f"{what} for {fill.target}, which {_AGAIN} would initialise anew")
            return False
        return True

    def _located(self, key: str) -> str:
        """`key`, with its file unless the message already names it."""
        file = self.checkpoint.tensors[key].file
        return key if file == self.checkpoint.path else f"{key} in {file.name}"

    def _absent(self, target: str) -> str:
        """The outermost part of `target` that the model lacks: `pooler` for `pooler.dense.weight`."""
        parts = target.split(".")
        for end in range(1, len(parts)):
            part = ".".join(parts[:end])
            if not any(name.startswith(part + ".") for name in self.canonical):
                return part
        return target
