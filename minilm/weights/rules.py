"""The rules that map weight names, as listed in the files of minilm/families/.

A rule defines which tensors of a checkpoint one parameter of the model comes from. There are six kinds:

    copy("embeddings.LayerNorm.weight", "body.embeddings.norm.weight")      the same tensor under another name
    affine("encoder.layer.{i}.output.dense", "body.layers.{i}.mlp.down")    two copies: .weight and .bias
    transpose("h.{i}.mlp.c_fc.weight", "body.layers.{i}.mlp.up.weight")     stored [in, out] (GPT-2's Conv1D)
    fuse(["...q_proj.weight", "...k_proj.weight", "...v_proj.weight"],      rows of several tensors, one below
         "body.layers.{i}.attention.qkv.weight", sizes="qkv")                the other
    tied("lm_head.weight", "head.out.weight", "tied to the embeddings")     read only when the model owns it
    ignore("embeddings.position_ids", "a buffer: 0, 1, 2, ...")             in the file, and not needed

A pattern matches a whole name, never a part of it. `{i}` stands for a decimal layer number, the same on both
sides, and `*` in `ignore` for anything. Nothing else is special, so a rule works in both directions: forwards
it gives the target of a key (load), backwards the keys of a target (save).

A name is written without the family's prefix (`bert.`, `model.`). The target decides whether the name has the
prefix: everything belongs to the family's base model except `head.…`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Transform = Literal["copy", "transpose", "fuse", "tied", "ignore"]

_NUMBER = r"(?P<i>0|[1-9][0-9]*)"  # ASCII, no leading zeros, so that it is written back unchanged


@dataclass(frozen=True)
class Rule:
    """One weight rule of a family; create it with the six functions below.

    `sources` are the names in the checkpoint (several only for `fuse`), `also` other names under which the
    same tensor may be stored, `target` is the parameter of the model ("" for `ignore`), `sizes` the key in
    `model.fused_sizes()` for the rows of each source ("": equal parts), `reason` the text in the report if a
    key is skipped, `write_also` whether saving writes the names of `also` too, `older` whether the names are
    those of older files, which are read and never written.
    """

    transform: Transform
    sources: tuple[str, ...]
    target: str = ""
    also: tuple[str, ...] = ()
    sizes: str = ""
    reason: str = ""
    write_also: bool = False
    older: bool = False

    def __post_init__(self) -> None:
        names = (*self.sources, *self.also, *([self.target] if self.target else []))
        for name in names:
            if name.count("{i}") > 1 or re.search(r"[{}]", name.replace("{i}", "")):
                raise ValueError(f"bad pattern {name!r}: only one {{i}} and no other braces are allowed")
            if self.transform != "ignore" and "{i}" in name and "{i}" not in self.target:
                raise ValueError(f"pattern {name!r} has a layer number that its target {self.target!r} lacks")
            if self.transform != "ignore" and "{i}" in self.target and "{i}" not in name:
                raise ValueError(f"target {self.target!r} has a layer number that pattern {name!r} lacks")
        if len(set(names)) != len(names) and self.transform != "copy":
            raise ValueError(f"a name is given twice: {names}")

    @property
    def in_base(self) -> bool:
        """Whether the name has the family's prefix if the checkpoint has one."""
        return not self.target.startswith("head.")

    @cached_property
    def _keys(self) -> tuple[re.Pattern[str], ...]:
        wildcard = self.transform == "ignore"
        return tuple(_compile(name, wildcard=wildcard) for name in (*self.sources, *self.also))

    @cached_property
    def _target(self) -> re.Pattern[str]:
        return _compile(self.target, wildcard=False)

    def match_key(self, key: str) -> str | None:
        """The target of the checkpoint name `key` (without prefix); None if the rule does not match it."""
        for pattern in self._keys:
            if found := pattern.fullmatch(key):
                return self.target.replace("{i}", found.groupdict().get("i", ""))
        return None

    def match_target(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The `sources` and `also` of the model's parameter `name`; None if the rule does not match it."""
        found = self._target.fullmatch(name) if self.target else None
        if found is None:
            return None
        number = found.groupdict().get("i", "")
        sources = tuple(source.replace("{i}", number) for source in self.sources)
        return sources, tuple(other.replace("{i}", number) for other in self.also)


def _compile(name: str, *, wildcard: bool) -> re.Pattern[str]:
    text = re.escape(name).replace(re.escape("{i}"), _NUMBER)
    return re.compile(text.replace(re.escape("*"), ".*") if wildcard else text, re.DOTALL)


def copy(source: str, target: str, *, also: Sequence[str] = (), write_also: bool = False) -> Rule:
    """The same tensor under another name. The first existing of `source` and `also` is read; the others are
    skipped as duplicates. Saving writes `source`; with `write_also` all of them."""
    return Rule("copy", (source,), target, also=tuple(also), write_also=write_also)


def affine(source: str, target: str) -> tuple[Rule, Rule]:
    """The weight and the bias of a linear layer or a norm: two copies, `.weight` and `.bias`."""
    return copy(f"{source}.weight", f"{target}.weight"), copy(f"{source}.bias", f"{target}.bias")


def older(rule: Rule) -> Rule:
    """A rule of older files, beside the one by which its target is saved."""
    return replace(rule, older=True)


def transpose(source: str, target: str) -> Rule:
    """A matrix that the checkpoint stores transposed, [in, out]."""
    return Rule("transpose", (source,), target)


def fuse(sources: Sequence[str], target: str, *, sizes: str = "") -> Rule:
    """Several tensors concatenated along dimension 0, in this order. `model.fused_sizes()[sizes]` has the
    number of rows of each, "qkv" -> (H*D, Hkv*D, Hkv*D); without `sizes` all have the same number."""
    return Rule("fuse", tuple(sources), target, sizes=sizes)


def tied(source: str, target: str, reason: str, *, also: Sequence[str] = ()) -> Rule:
    """A tensor that is tied in some models: `copy` if the model has `target`, else skipped."""
    return Rule("tied", (source,), target, also=tuple(also), reason=reason)


def ignore(pattern: str, reason: str) -> Rule:
    """A tensor that a checkpoint may have and no model needs; `*` in `pattern` stands for anything."""
    return Rule("ignore", (pattern,), reason=reason)
