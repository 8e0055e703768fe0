"""One run: limits, then the levels that were asked for, then the limits once more, into one `Results`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from . import end_to_end, harness, layers, machine, models, ops, shapes
from .limits import CpuProbe, Limits, torch_threads
from .results import Results

LEVELS = ("op", "layer", "e2e", "sweep")


@dataclass
class Plan:
    """What a run is asked for."""

    levels: Sequence[str] = ("op", "layer", "e2e")
    models: Sequence[str] = tuple(shapes.HF_CONFIGS)
    only: str = ""
    """A regular expression: only workloads whose name it is found in."""
    peers: str = ""
    """A regular expression: only engines whose name it is found in (ours included)."""
    threads: Sequence[int] = field(default_factory=lambda: (usable_cores(),))
    device: str = "cpu"
    dtype: str = "float32"
    settings: harness.Settings = field(default_factory=harness.Settings.default)
    say: Callable[[str], None] = lambda text: None
    limit_rounds: int = 5
    cold: bool = True
    """Whether whole models are started cold as well."""

    def chosen(self, name: str) -> bool:
        """Is this workload asked for?"""
        return not self.only or re.search(self.only, name) is not None

    def wanted(self, name: str) -> bool:
        """Is this engine asked for?"""
        return not self.peers or re.search(self.peers, name) is not None


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(plan: Plan, on_cell: Callable[[Results], None] = lambda results: None) -> Results:
    """Measure. `on_cell` is called after each workload with what there is so far, so that a run that is cut
    off leaves its results."""
    settings = asdict(plan.settings) | {
        "levels": list(plan.levels),
        "models": list(plan.models),
        "only": plan.only,
        "peers": plan.peers,
        "threads": list(plan.threads),
        "tiny": machine.tiny(),
        "busy_share": machine.busy_share(),
        "load_at_start": list(os.getloadavg()),
    }
    results = Results(machine.describe(plan.device), settings)
    began = time.monotonic()
    plan.say("limits of the machine")
    probe = _probe(plan)
    results.limits.append(probe.limits)
    rounds = 2 if machine.tiny() else plan.limit_rounds
    for _ in range(rounds):
        probe.round()
    if plan.device == "cpu":
        results.settings["doubts"] = probe.doubts()
        for doubt in results.settings["doubts"]:
            plan.say(f"a limit is in doubt: {doubt}")
    for threads in plan.threads if plan.device == "cpu" else plan.threads[:1]:
        with torch_threads(threads):
            for level in plan.levels:
                for cell in _cells(level, plan, probe.limits, threads):
                    results.cells.append(cell)
                    on_cell(results)
                probe.round()  # between the levels too: machines drift
    for _ in range(rounds):
        probe.round()
    _limits_again(results, probe.limits)
    results.settings["seconds"] = round(time.monotonic() - began, 1)
    return results


def _probe(plan: Plan) -> Any:
    if plan.device == "cuda":
        from .cuda_timing import GpuProbe

        return GpuProbe(plan.dtype)
    return CpuProbe(plan.threads)


def _limits_again(results: Results, limits: Limits) -> None:
    """Hold every cell against the limits of the whole run, not of its beginning."""
    from .costs import Cost

    for cell in results.cells:
        if cell.get("floor_seconds") and "written" in cell:
            cost = Cost(cell["bytes"] - cell["written"], cell["written"], cell["operations"])
            threads = cell["threads"] if cell["device"] == "cpu" else None
            cell["floor_seconds"], cell["binding"] = limits.floor(cost, cell["arithmetic"], threads)


def _cells(level: str, plan: Plan, limits: Limits, threads: int) -> Any:
    if level == "op":
        yield from _op_cells(plan, limits, threads)
    elif level == "layer":
        timing = _timing(plan)
        for model in plan.models:
            plan.say(f"layer of {model}")
            dtype = getattr(torch, plan.dtype)
            options = (limits, plan.settings, threads, plan.device, dtype, plan.wanted, plan.chosen)
            yield from layers.run_model(model, *options, **timing)
    else:
        options = end_to_end.Options(plan.settings, threads, plan.device, plan.wanted, plan.chosen, plan.say)
        for model in plan.models:
            yield from _whole_model(level, model, limits, options, plan.cold)


def _timing(plan: Plan) -> dict[str, Any]:
    if plan.device != "cuda":
        return {}
    from .cuda_timing import block_of

    return {"block_of": block_of}


def _whole_model(level: str, model: str, limits: Limits, options: end_to_end.Options, cold: bool) -> Any:
    assets = models.assets(model)
    if level == "sweep":
        if model in shapes.ENCODERS:
            yield from end_to_end.run_model(
                model, end_to_end.sweep_workloads(model), limits, options, cold=False
            )
        return
    if model in shapes.ENCODERS:
        own = models.is_real(model) or machine.tiny()
        workloads = end_to_end.encoder_workloads(model, assets, with_corpus=own)
    else:
        workloads = end_to_end.decoder_workloads(model, assets)
    cold = cold and (models.is_real(model) or machine.tiny())
    yield from end_to_end.run_model(model, workloads, limits, options, cold=cold)


def _op_cells(plan: Plan, limits: Limits, threads: int) -> Any:
    dtype = getattr(torch, plan.dtype)
    timer = None
    if plan.device == "cuda":
        from .cuda_timing import time_on_gpu

        timer = partial(time_on_gpu, settings=plan.settings)
    for case in shapes.op_cases(plan.models, dtype.itemsize):
        if not plan.chosen(case.name):
            continue
        plan.say(case.name)
        cost, (precision, arithmetic) = case.call.cost, _numbers(case, plan)
        floor, binding = limits.floor(cost, arithmetic, threads if plan.device == "cpu" else None)
        load = machine.Load()
        found = ops.run_case(case, plan.device, dtype, plan.settings, plan.wanted, timer=timer)
        noted = load.stop()
        for cell in found:
            yield {
                "level": "op",
                "op": case.op,
                "model": case.model,
                "workload": case.name,
                "precision": precision,
                "dtype": plan.dtype,
                "arithmetic": arithmetic,
                "device": plan.device,
                "threads": threads,
                "unit": "",
                "units_per_call": 1,
                "bytes": cost.bytes,
                "written": cost.written,
                "operations": cost.operations,
                "floor_seconds": floor,
                "binding": binding,
                "load": noted,
                **cell,
            }


def _numbers(case: shapes.Case, plan: Plan) -> tuple[str, str]:
    """Precision of the weights, and the numbers whose peak is the limit: on a CPU quantised weights may be
    multiplied as the codes they are."""
    plain = "fp16" if getattr(torch, plan.dtype).itemsize == 2 else "fp32"
    if case.op != "quantized_linear":
        return plain, plan.dtype
    stored = "q4" if case.call.dims["format"].startswith("q4") else "int8"
    return stored, "int8" if plan.device == "cpu" else plan.dtype
