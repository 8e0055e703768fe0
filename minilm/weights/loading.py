"""Loading and saving weights: maps names in a checkpoint to the model's names, and back.

A checkpoint is a set of named tensors, with names from another program:
`bert.encoder.layer.3.attention.self.query.weight`. minilm's models have other names, and partly other shapes:
query, key and value are one matrix. The family's rules define the mapping as data (minilm/weights/rules.py
has the kinds of rules, minilm/families/ the rules themselves). Loading has three steps.

1. *Normalise names.* A BERT with a head names its body `bert.…`, the bare model does not. If any key starts
   with a prefix of the family, then keys with the prefix belong to the base model and lose it, and the others
   belong to heads. The LayerNorm names of 2018, gamma and beta, become weight and bias.

2. *Plan* (minilm/weights/plan.py), from names, shapes and dtypes only. Every key must match exactly one rule,
   every parameter must be filled exactly once, every shape must agree. What happens to mismatches depends on
   the part of the model:

   - In the body no tensor may be missing, surplus or of another shape. Otherwise the configuration or the
     family is not that of the checkpoint, and the model would give wrong results.
   - A head that the checkpoint lacks is initialised, with a warning; one that the model lacks is skipped, and
     listed in the report.

   All problems are found before any data is copied, and one error lists several.

3. *Execute the plan*, one parameter at a time: allocate memory in the final dtype on the final device, and
   copy each source to its part of it. The model gets its parameters when all are complete; if anything fails
   before, it is unchanged.

Saving is step 2 backwards. The same function maps parts of a parameter to tensors of the checkpoint in both
directions, so loaded weights are saved byte for byte.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files import (
    INDEX,
    SINGLE,
    Checkpoint,
    FileError,
    SafetensorsCheckpoint,
    TensorInfo,
    WeightError,
    open_checkpoint,
    saving,
)
from ..ops.quantized import QuantizedWeight
from .plan import Fill, Shape, fused_sizes, plan_load, unique_parameters, views
from .quantized import read_quantised, target_format
from .rules import Rule, affine, copy, fuse, ignore, tied, transpose

__all__ = [
    "Checkpoint",
    "LoadReport",
    "MapEntry",
    "Rule",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "WeightError",
    "affine",
    "copy",
    "fuse",
    "ignore",
    "load_weights",
    "open_checkpoint",
    "save_weights",
    "tied",
    "transpose",
    "weight_map",
]

log = logging.getLogger(__name__)

_LARGE = 1_000_000_000  # loading at least this many bytes shows a progress bar
_SHARD = "model-" + 5 * "[0-9]" + "-of-" + 5 * "[0-9]" + ".safetensors"  # as a pattern of names
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class LoadReport:
    """The result of loading; `str()` gives a readable report.

    loaded: number of tensors of the checkpoint that were read
    initialised: parameters of a head that the checkpoint lacks (names in the model)
    skipped: names in the checkpoint that were not read -> reason
    mismatched: parameters of a head initialised because the shape differs -> (found, expected)
    nan: names in the checkpoint whose tensors have NaN or infinite values, in the dtype of the model
    quantised: matrices that were loaded quantised (names in the model) -> format
    floating: matrices that should have been quantised, but could not be -> reason
    requantised: matrices in another format than their parts in the file -> reason
    """

    loaded: int = 0
    initialised: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    nan: list[str] = field(default_factory=list)
    quantised: dict[str, str] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)
    requantised: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensor{'s' * (self.loaded != 1)} loaded"]
        lines += [f"  initialised, as the checkpoint has none: {name}" for name in self.initialised]
        for name, (found, expected) in self.mismatched.items():
            lines.append(f"  initialised, as the checkpoint has {list(found)} for {list(expected)}: {name}")
        lines += [f"  skipped: {name} ({reason})" for name, reason in self.skipped.items()]
        for format, count in Counter(self.quantised.values()).items():
            lines.append(f"  {count} matri{'ces' if count > 1 else 'x'} in {format}")
        lines += [f"  not quantised: {name} ({reason})" for name, reason in self.floating.items()]
        for name, reason in self.requantised.items():
            lines.append(f"  requantised to {self.quantised[name]}: {name} ({reason})")
        lines += [f"  NaN or infinite values: {name}" for name in self.nan]
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    prefixes: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    init: Callable[[str, Tensor], None],
    ignore_mismatched_sizes: bool = False,
    progress: bool | None = None,
    formats: Mapping[str, str] | None = None,
    install: Callable[[nn.Module, str, QuantizedWeight], None] | None = None,
) -> LoadReport:
    """Load `checkpoint` into `model`, which may be on the meta device.

    Every parameter is replaced by one of `dtype` on `device`; shared parameters stay shared. `init(name,
    tensor)` initialises head parameters that the checkpoint does not have. Only a few megabytes of memory are
    used beyond the weights. `progress`: show a progress bar; None: on a terminal for more than 1 GB.
    Parameters in `formats` become quantised matrices of that format (see minilm/weights/quantized.py), and
    `install(model, name, matrix)` puts each into the model.

    Raises WeightError, and leaves the model unchanged, if the checkpoint does not fit or cannot be read.
    Warns of NaN and infinite values, and logs a warning that names the initialised head parameters.
    """
    parameters, names = unique_parameters(model)
    plan = plan_load(model, checkpoint, rules, prefixes, ignore_mismatched_sizes=ignore_mismatched_sizes)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise WeightError(f"{checkpoint.path}: no weights are stored for the buffer {name} of the model")
    report = LoadReport(initialised=plan.initialised, skipped=plan.skipped, mismatched=plan.mismatched)
    filled: dict[str, Tensor] = {}
    matrices: dict[str, QuantizedWeight] = {}
    total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
    with torch.no_grad(), _progress_bar(total, progress) as advance:
        for fill in plan.fills:
            shape = tuple(parameters[fill.target].shape)
            report.loaded += len(fill.sources)
            format = _format(fill, checkpoint, shape, (formats or {}).get(fill.target), report)
            if format is not None:
                matrix, infinite = read_quantised(fill, checkpoint, shape, format, device)
                matrices[fill.target] = matrix
                report.nan += infinite
                advance(math.prod(shape) * dtype.itemsize)
                continue
            out = torch.empty(shape, dtype=dtype, device=device)
            for key, part in zip(fill.sources, fill.views(out), strict=True):
                checkpoint.read_into(key, part)
                if not _finite(part):
                    report.nan.append(key)
            filled[fill.target] = out
            advance(out.nbytes)
        for name in (*plan.initialised, *plan.mismatched):
            filled[name] = torch.empty(parameters[name].shape, dtype=dtype, device=device)
            init(name, filled[name])
    checkpoint.close()
    _assign(model, {name: filled[first] for name, first in names.items() if first in filled})
    for name, matrix in matrices.items():
        assert install is not None
        install(model, name, matrix)
    if report.nan:
        tensors = ", ".join(report.nan[:5]) + (", ..." if len(report.nan) > 5 else "")
        warnings.warn(f"{checkpoint.path}: NaN or infinite values, as {dtype}, in {tensors}", stacklevel=2)
    for name, reason in (*report.floating.items(), *report.requantised.items()):
        kind = report.quantised.get(name)
        log.warning(
            "%s: %s is %s: %s", checkpoint.path, name, f"in {kind}" if kind else "not quantised", reason
        )
    if fresh := [*report.initialised, *report.mismatched]:
        lacking = ", ".join(_stored_name(rules, name) for name in fresh)
        of_shape = " of this shape" if report.mismatched else ""
        log.warning(
            "%s has no %s%s: these weights are random, train them before use",
            checkpoint.path,
            lacking,
            of_shape,
        )
    return report


def _stored_name(rules: Sequence[Rule], name: str) -> str:
    """The name of a parameter in a checkpoint."""
    found = (match[0][0] for rule in rules if (match := rule.match_target(name)))
    return next(found, name)


def _format(
    fill: Fill, checkpoint: Checkpoint, shape: Shape, wanted: str | None, report: LoadReport
) -> str | None:
    """The format for the parameter of `fill`, None if it stays floating point; added to the report."""
    if wanted is None:
        return None
    format, remark = target_format(fill, checkpoint, shape, wanted)
    if format is None:
        if remark:
            report.floating[fill.target] = remark
        return None
    report.quantised[fill.target] = format
    if remark:
        report.requantised[fill.target] = remark
    return format


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the parameters of `model`; names with the same tensor get the same parameter."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, leaf)
        new = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=old.requires_grad))
        setattr(module, leaf, new)


def _finite(part: Tensor) -> bool:
    """Whether all values are finite, by the minimum and maximum of the tensor, which needs no memory."""
    if part.numel() == 0:
        return True
    low, high = torch.aminmax(part if part.is_contiguous() else part.t())
    return bool(torch.isfinite(low) & torch.isfinite(high))


@contextmanager
def _progress_bar(total: int, wanted: bool | None) -> Iterator[Callable[[int], object]]:
    if wanted is False or (wanted is None and total < _LARGE):
        yield lambda count: None
        return
    from tqdm import tqdm

    # disable=None: silent unless standard error is a terminal
    disable = False if wanted else None
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=disable) as bar:
        yield bar.update


class MapEntry(NamedTuple):
    """One entry of `weight_map`: the tensor `source` becomes `target` by `transform`."""

    source: str
    target: str
    transform: str
    shape: Shape
    dtype: str


def weight_map(
    model: nn.Module, checkpoint: Checkpoint, rules: Sequence[Rule], prefixes: Sequence[str]
) -> list[MapEntry]:
    """What `load_weights` would do with every tensor, in the order of the checkpoint, then the parameters
    that it would initialise (with source ""). A skipped tensor has no target, and the reason as its
    transform."""
    parameters, _ = unique_parameters(model)
    plan = plan_load(model, checkpoint, rules, prefixes, ignore_mismatched_sizes=True)
    entries = []
    goal: dict[str, tuple[str, str]] = {key: ("", f"skipped: {why}") for key, why in plan.skipped.items()}
    for fill in plan.fills:
        kind = "copy" if fill.rule.transform == "tied" else fill.rule.transform
        for number, key in enumerate(fill.sources, start=1):
            goal[key] = (fill.target, f"fuse {number}/{len(fill.sources)}" if kind == "fuse" else kind)
    for key, info in checkpoint.tensors.items():
        entries.append(MapEntry(key, *goal[key], info.shape, info.stored))
    for name in (*plan.initialised, *plan.mismatched):
        entries.append(MapEntry("", name, "initialised", tuple(parameters[name].shape), ""))
    return entries


def save_weights(
    model: nn.Module,
    folder: str | Path,
    rules: Sequence[Rule],
    prefix: str,
    *,
    max_shard_size: int | str = "5GB",
    matrices: Mapping[str, QuantizedWeight] | None = None,
) -> list[Path]:
    """Write the weights of `model` to `folder` under the names of its family; returns the files.

    Writes `model.safetensors`, or, above `max_shard_size` (bytes, or "500MB", "2GiB"), shards with an index,
    like transformers. Names of the base model get `prefix`. The same weights always give the same bytes. The
    files replace those of an earlier save together (`minilm.files.saving`). `matrices`: the quantised
    matrices, by the names of the parameters that they replace; see minilm/files/quantized.py for their
    storage.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    shards = _shards(stored_tensors(model, rules, prefix, matrices or {}), _bytes(max_shard_size))
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    try:
        with saving(folder, replaces=(SINGLE, INDEX, _SHARD)) as new:
            for file, shard in zip(files, shards, strict=True):
                # One shard at a time: writing copies a transposed matrix, or one on a device.
                tensors = {key: tensor.detach().contiguous() for key, tensor in shard.items()}
                save_file(tensors, new / file, metadata={"format": "pt"})
            if len(shards) > 1:
                (new / INDEX).write_text(_index(files, shards), encoding="utf-8")
                files = [*files, INDEX]
    except (OSError, FileError, SafetensorError) as error:
        raise WeightError(f"{folder}: the weights cannot be written: {error}") from error
    return [folder / file for file in files]


def stored_tensors(
    model: nn.Module, rules: Sequence[Rule], prefix: str, matrices: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """The parameters of `model` as tensors of a checkpoint: views under the family's names."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Tensor | QuantizedWeight] = {**unique_parameters(model)[0], **matrices}
    for name, parameter in parameters.items():
        if (parameter if isinstance(parameter, Tensor) else parameter.codes).is_meta:
            raise WeightError(f"{name} cannot be saved: it is on the meta device, which holds no values")
        saved = (rule for rule in rules if not rule.older)
        inverse = [(rule, match) for rule in saved if (match := rule.match_target(name))]
        if len(inverse) != 1:
            many = "more than one rule gives" if inverse else "no rule gives"
            raise WeightError(f"{name} cannot be saved: {many} its name in a checkpoint")
        rule, (sources, also) = inverse[0]
        parts = _parts(rule, fused_sizes(rule, model, name, parameter.shape[0]), parameter)
        if rule.write_also:  # a safetensors file cannot express that two names share data
            sources, parts = (*sources, *also), (*parts, *(_cloned(parts[0]) for _ in also))
        for source, part in zip(sources, parts, strict=True):
            key = prefix + source if rule.in_base else source
            for plane, tensor in part.items():
                if key + plane in tensors:
                    raise WeightError(
                        f"{name} cannot be saved: {key + plane} is already the name of another tensor"
                    )
                tensors[key + plane] = tensor
    return tensors


def _parts(
    rule: Rule, sizes: tuple[int, ...], parameter: Tensor | QuantizedWeight
) -> tuple[dict[str, Tensor], ...]:
    """The stored tensors of each source of a parameter: suffix of the name -> tensor."""
    if isinstance(parameter, Tensor):
        return tuple({"": view} for view in views(rule, sizes, parameter))
    parts = parameter.split(sizes or parameter.shape[:1])
    return tuple({f".{plane}": tensor for plane, tensor in part.planes.items()} for part in parts)


def _cloned(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {plane: tensor.clone() for plane, tensor in part.items()}


def _shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Split the tensors, in order, into shards of at most `limit` bytes; a larger tensor is its own shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


def _index(files: Sequence[str], shards: Sequence[dict[str, Tensor]]) -> str:
    everything = [tensor for shard in shards for tensor in shard.values()]
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in everything),
        "total_size": sum(tensor.nbytes for tensor in everything),
    }
    places = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def _bytes(size: int | str) -> int:
    """5_000_000_000 for "5GB", 2**30 for "1GiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    count = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if count < 1:
        raise ValueError(f"max_shard_size: expected a number of bytes or a size such as '5GB', got {size!r}")
    return count
