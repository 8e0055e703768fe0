"""One run: the limits, the requested levels, and the limits again, in one `Results`."""

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
from .course import Course, Step
from .limits import CpuProbe, Limits, torch_threads
from .report import BUSY
from .results import Results

LEVELS = ("op", "layer", "e2e", "sweep")


@dataclass
class Plan:
    """The options of a run."""

    levels: Sequence[str] = ("op", "layer", "e2e")
    models: Sequence[str] = tuple(shapes.HF_CONFIGS)
    only: str = ""
    """A regular expression: only workloads whose name matches."""
    peers: str = ""
    """A regular expression: only engines whose name matches (also minilm's)."""
    threads: Sequence[int] = field(default_factory=lambda: (usable_cores(),))
    device: str = "cpu"
    dtype: str = "float32"
    settings: harness.Settings = field(default_factory=harness.Settings.default)
    say: Callable[[str], None] = lambda text: None
    limit_rounds: int = 5
    cold: bool = True
    """Whether cold starts of whole models are measured too."""
    course: Course = field(default_factory=Course)
    """Progress and time limit of the run."""

    def chosen(self, name: str) -> bool:
        """Whether this workload is requested."""
        return not self.only or re.search(self.only, name) is not None

    def wanted(self, name: str) -> bool:
        """Whether this engine is requested."""
        return not self.peers or re.search(self.peers, name) is not None


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(plan: Plan, on_cell: Callable[[Results], None] = lambda results: None) -> Results:
    """Measure. `on_cell` is called after each workload with the results so far, so that an interrupted run
    leaves them."""
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
    course, rounds = plan.course, 2 if machine.tiny() else plan.limit_rounds
    began = time.monotonic()
    threads = list(plan.threads if plan.device == "cpu" else plan.threads[:1])
    course.plan(_steps(plan, rounds, threads))
    if settings["busy_share"] > BUSY:
        plan.say(
            f"other programs use {settings['busy_share']:.0%} of the processors: speeds will be too low, "
            "and spread"
        )
    course.begin("limits", FIRST, rounds * ROUND_SECONDS, needed=True)
    probe = _probe(plan)
    results.limits.append(probe.limits)
    for _ in range(rounds):
        began_round = time.monotonic()
        probe.round()
        if course.limited and course.remaining() < 0.9 * course.limit:  # a slow machine: one round is enough
            break
    round_seconds = time.monotonic() - began_round
    if plan.device == "cpu":
        results.settings["doubts"] = probe.doubts()
        for doubt in results.settings["doubts"]:
            plan.say(f"a limit is doubtful: {doubt}")
    course.end()
    last = max(1, min(rounds, int(0.05 * course.limit / round_seconds))) if course.limited else rounds
    course.reserve = last * round_seconds
    levels = list(plan.levels)
    if course.limited:  # end to end first: it takes longest and matters most
        levels.sort(key=lambda level: -LEVEL_WEIGHTS[level])
    weights = [LEVEL_WEIGHTS[level] for level in levels] * len(threads)
    for count in threads:
        with torch_threads(count):
            for level in levels:
                end = course.within(weights[0] / sum(weights))
                weights.pop(0)
                for cell in _cells(level, plan, probe.limits, count, end):
                    results.cells.append(cell)
                    on_cell(results)
                if not course.limited:
                    probe.round()  # also between the levels, since machines' speeds drift
    course.begin("limits", LAST, last * ROUND_SECONDS, needed=True)
    for _ in range(last):
        probe.round()
    course.end()
    _limits_again(results, probe.limits)
    results.settings["seconds"] = round(time.monotonic() - began, 1)
    results.settings["left_out"] = course.left_out
    return results


FIRST, LAST = "limits of the machine", "limits of the machine, again"
ROUND_SECONDS = FILES_SECONDS = 2.0
LEVEL_WEIGHTS = {"op": 1.0, "layer": 0.6, "e2e": 2.4, "sweep": 1.0}
"""How limited time is divided among the levels."""


def _steps(plan: Plan, rounds: int, threads: Sequence[int]) -> list[Step]:
    """Announce the steps of the run."""
    found = [Step("limits", name, rounds * ROUND_SECONDS) for name in (FIRST, LAST)]
    for count in threads:
        for level in plan.levels:
            if level == "op":
                found += [Step("op", case.name, _op_guess(case, plan)) for case in _op_cases(plan)]
            elif level == "layer":
                found += [
                    Step("layer", f"layer of {m}", _layer_guess(m, plan))
                    for m in plan.models
                    if _layers(m, plan)
                ]
            else:
                options = _options(plan, count)
                for model in plan.models:
                    named = _workloads(level, model, None)
                    if named:
                        found.append(Step("files", f"{model}: preparing its files", FILES_SECONDS))
                        found += end_to_end.steps(model, named, options, cold=_cold(level, model, plan))
    return found


def _op_cases(plan: Plan) -> list[shapes.Case]:
    """The requested cases; if the time is limited, first one of each op, small ones first."""
    dtype = getattr(torch, plan.dtype)
    cases = [case for case in shapes.op_cases(plan.models, dtype.itemsize) if plan.chosen(case.name)]
    if not plan.course.limited:
        return cases
    cases.sort(key=lambda case: _op_guess(case, plan))
    met: dict[str, int] = {}
    ranks = []
    for case in cases:
        met[case.op] = met.get(case.op, 0) + 1
        ranks.append(met[case.op])
    return [
        case for _, _, case in sorted(zip(ranks, range(len(cases)), cases, strict=True), key=lambda x: x[:2])
    ]


def _op_guess(case: shapes.Case, plan: Plan) -> float:
    """Estimated seconds of the check in float64, the inputs, and the rounds."""
    cost = case.call.cost
    return 0.5 + cost.operations / 2e9 + plan.settings.budget_seconds


def _layers(model: str, plan: Plan) -> list[shapes.Regime]:
    found = (r for r in shapes.regimes(model) if not r.decoding)
    return [r for r in found if plan.chosen(f"layer of {model} {r.name}")]


def _layer_guess(model: str, plan: Plan) -> float:
    tokens = sum(regime.tokens for regime in _layers(model, plan))
    heavy = 0.0 if machine.tiny() else shapes.spec(model).hidden_size ** 2 * 12 * 2 * tokens / 3e9
    return 6.0 + heavy + len(_layers(model, plan)) * (plan.settings.budget_seconds + 1)


def _probe(plan: Plan) -> Any:
    if plan.device == "cuda":
        from .cuda_timing import GpuProbe

        return GpuProbe(plan.dtype)
    return CpuProbe(plan.threads)


def _limits_again(results: Results, limits: Limits) -> None:
    """Compare all cells with the limits of the whole run, not those of its beginning."""
    from .costs import Cost

    for cell in results.cells:
        if cell.get("floor_seconds") and "written" in cell:
            cost = Cost(cell["bytes"] - cell["written"], cell["written"], cell["operations"])
            threads = cell["threads"] if cell["device"] == "cpu" else None
            cell["floor_seconds"], cell["binding"] = limits.floor(cost, cell["arithmetic"], threads)


def _cells(level: str, plan: Plan, limits: Limits, threads: int, end: float) -> Any:
    course = plan.course
    if level == "op":
        yield from _op_cells(plan, limits, threads)
    elif level == "layer":
        timing = _timing(plan)
        for model in plan.models:
            if not _layers(model, plan) or not course.begin(
                "layer", f"layer of {model}", _layer_guess(model, plan)
            ):
                continue
            dtype = getattr(torch, plan.dtype)
            options = (limits, plan.settings, threads, plan.device, dtype, plan.wanted, plan.chosen)
            yield from layers.run_model(model, *options, **timing)
            course.end()
    else:
        for at, model in enumerate(plan.models):
            course.within(min(1.0, 1.5 / (len(plan.models) - at)), end)  # the first level needs enough time
            yield from _whole_model(level, model, limits, _options(plan, threads), plan)


def _options(plan: Plan, threads: int) -> end_to_end.Options:
    chosen = (plan.settings, threads, plan.device, plan.wanted, plan.chosen, plan.say)
    return end_to_end.Options(*chosen, course=plan.course)


def _timing(plan: Plan) -> dict[str, Any]:
    if plan.device != "cuda":
        return {}
    from .cuda_timing import block_of

    return {"block_of": block_of}


def _whole_model(level: str, model: str, limits: Limits, options: end_to_end.Options, plan: Plan) -> Any:
    if not _workloads(level, model, None):
        return
    files = f"{model}: preparing its files"
    if not plan.course.begin("files", files, FILES_SECONDS, told=f"{model}: everything"):
        plan.course.drop_all(f"{model}: ")
        return
    workloads = _workloads(level, model, models.assets(model))
    plan.course.end()
    if workloads:
        cold = _cold(level, model, plan)
        yield from end_to_end.run_model(model, workloads, limits, options, cold=cold)


def _workloads(level: str, model: str, assets: Any) -> list[end_to_end.Workload]:
    """The workloads of a model; without `assets`, only with the right names and sizes, for announcing
    them."""
    if level == "sweep":
        return end_to_end.sweep_workloads(model) if model in shapes.ENCODERS else []
    if model in shapes.ENCODERS:
        own = models.is_real(model) or machine.tiny()
        return end_to_end.encoder_workloads(model, assets, with_corpus=own)
    return end_to_end.decoder_workloads(model, assets)


def _cold(level: str, model: str, plan: Plan) -> bool:
    return level == "e2e" and plan.cold and (models.is_real(model) or machine.tiny())


def _op_cells(plan: Plan, limits: Limits, threads: int) -> Any:
    dtype = getattr(torch, plan.dtype)
    timer = None
    if plan.device == "cuda":
        from .cuda_timing import time_on_gpu

        timer = partial(time_on_gpu, settings=plan.settings)
    for case in _op_cases(plan):
        if not plan.chosen(case.name) or not plan.course.begin("op", case.name, _op_guess(case, plan)):
            continue
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
        plan.course.end()


def _numbers(case: shapes.Case, plan: Plan) -> tuple[str, str]:
    """Precision of the weights, and the dtype whose peak is the limit: on a CPU, quantised weights may be
    multiplied as integers."""
    plain = "fp16" if getattr(torch, plan.dtype).itemsize == 2 else "fp32"
    if case.op != "quantized_linear":
        return plain, plan.dtype
    stored = "q4" if case.call.dims["format"].startswith("q4") else "int8"
    return stored, "int8" if plan.device == "cpu" else plan.dtype
