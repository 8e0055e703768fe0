"""The work of `minilm tune`: candidates for the heuristics' block sizes, checked and then timed.

An op is called once at a shape of a model, forward and, if models train with it, backward, and the calls that
its launchers make to the heuristics are recorded. For each new call, the op runs with one candidate
(`minilm.kernels.candidates`) after the other: the result is checked against float64 by the rule of `check`,
then timed. The best few are timed again in turn with the heuristic's choice, and one that is faster by more
than the noise becomes an entry of the table (`minilm.kernels.tuned`)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilm import ops

from . import check, harness, machine
from .hollow import hollow
from .ops import Args, cache_bytes, make_inputs, our_call, reference_call, trained, with_written
from .shapes import Case, op_cases

TRAINED = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "attention", "gated", "cross_entropy")
"""Ops whose backward is timed too."""
FINALISTS = 3
FASTER = 0.97
"""An entry takes at most this fraction of the heuristic's time; a smaller gain is noise."""

Timer = Callable[[Callable[[Args], Any], Sequence[Args]], float]
"""A function that times a call on inputs in turn, in seconds per call."""


@dataclass(frozen=True)
class Problem:
    """One op at one shape, forward or with its backward."""

    case: Case
    backward: bool

    @property
    def name(self) -> str:
        return self.case.name + (" forward and backward" if self.backward else "")

    def ours(self, values: Args) -> Any:
        """The Triton implementation on one input set."""
        with ops.backend("triton"):
            return _with_gradients(our_call(self.case), values, self.backward)

    def reference(self, values: Args) -> Any:
        """The specification on one input set, in any dtype."""
        return _with_gradients(reference_call(self.case), values, self.backward)


def _with_gradients(call: Callable[[Args], Any], values: Args, backward: bool) -> Any:
    return trained(lambda *v: call(v), values) if backward else call(values)


def problems(models: Sequence[str], dtype: torch.dtype) -> Iterator[Problem]:
    """Every op that Triton implements, at the shapes of `models`."""
    for case in op_cases(models, dtype.itemsize):
        if "triton" in ops.dispatch.implementations(case.op):
            yield Problem(case, backward=False)
            if case.op in TRAINED:
                yield Problem(case, backward=True)


def questions(problem: Problem, dtype: torch.dtype, device: str, kernels: Sequence[str]) -> list[Any]:
    """The calls to the heuristics named in `kernels` while the op runs, each once (`tuned.Asked`)."""
    from minilm.kernels import tuned

    values = make_inputs(problem.case, dtype, device)(torch.Generator().manual_seed(0))
    with tuned.observed() as asked, torch.no_grad():
        problem.ours(values)
    return list({(a.kernel, a.shape): a for a in asked if a.kernel in kernels}.values())


def gpu_timer(call: Callable[[Args], Any], inputs: Sequence[Args]) -> float:
    """The device's time of a call by CUDA graphs, the median of seven."""
    from .cuda_timing import device_block

    block, _ = device_block(call, inputs)
    calls = max(1, min(1000, round(5e-3 / max(block(1), 1e-7))))
    return statistics.median(block(calls) / calls for _ in range(7))


@dataclass
class Tuner:
    """Measures; `say` is called with each line of progress."""

    dtype: torch.dtype
    device: str
    timer: Timer = gpu_timer
    most: int = 24
    """Candidates per call of a heuristic."""
    say: Callable[[str], None] = print

    def answer(self, problem: Problem, asked: Any) -> dict[str, Any] | None:
        """The entry for one call of a heuristic, or None if no correct candidate is faster than its
        choice."""
        from minilm.kernels.candidates import candidates

        blocks = candidates(asked.kernel, asked.sizes, asked.answer, asked.device)[: self.most]
        make = make_inputs(problem.case, self.dtype, self.device)
        draws = [make(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        exact = with_written(problem.case, problem.reference)
        truths = check.truths(exact, exact, draws)
        inputs = harness.rotated(make, seed=3, cache=cache_bytes(self.device))
        times: dict[Any, float] = {}
        for block in blocks:
            refusal = self._wrong(problem, asked.kernel, block, truths)
            if refusal is None:
                times[block] = self._time(problem, asked.kernel, block, inputs)
            elif block == asked.answer:
                self.say(f"    the heuristic's {_fields(block)} {refusal}: nothing to compare with")
                return None
        own = asked.answer
        best = sorted(times, key=times.__getitem__)[:FINALISTS]
        rounds: dict[Any, list[float]] = {block: [times[block]] for block in {own, *best}}
        for _ in range(2):
            for block, taken in rounds.items():
                taken.append(self._time(problem, asked.kernel, block, inputs))
        final = {block: statistics.median(taken) for block, taken in rounds.items()}
        winner = min(final, key=final.__getitem__)
        self.say(
            f"    {len(times)} of {len(blocks)} candidates right; heuristic {_fields(own)} "
            f"{final[own] * 1e6:.1f} us, best {_fields(winner)} {final[winner] * 1e6:.1f} us"
        )
        if final[winner] > FASTER * final[own]:
            return None
        return {
            "device": asked.device.name,
            "capability": list(asked.device.capability),
            "kernel": asked.kernel,
            "shape": dict(asked.shape),
            "block": winner._asdict(),
            "seconds": final[winner],
            "heuristic": own._asdict(),
            "heuristic_seconds": final[own],
            "problem": problem.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "triton": machine.version_of("triton"),
            "date": time.strftime("%Y-%m-%d"),
        }

    def _forced(self, kernel: str, block: Any) -> AbstractContextManager[None]:
        from minilm.kernels import tuned

        return tuned.forced(kernel, block._asdict())

    def _wrong(self, problem: Problem, kernel: str, block: Any, truths: Sequence[check.Truth]) -> str | None:
        """Why a candidate is excluded: its result is wrong, or it does not run."""
        try:
            with self._forced(kernel, block):
                verdict = check.judge(with_written(problem.case, problem.ours), truths)
        except Exception as error:  # too large for the chip, or does not compile
            return f"does not run ({type(error).__name__})"
        return None if verdict.ok else f"is wrong ({verdict.detail})"

    def _time(self, problem: Problem, kernel: str, block: Any, inputs: Sequence[Args]) -> float:
        with self._forced(kernel, block), torch.no_grad():
            return self.timer(problem.ours, inputs)


def tune(
    models: Sequence[str], kernels: Sequence[str], tuner: Tuner, keep: Callable[[dict[str, Any]], None],
    seconds: float = float("inf"),
) -> int:  # fmt: skip
    """Tune each call of a heuristic once; `keep` is called with each entry. Returns the number of calls;
    stops after `seconds`."""
    end, seen = time.monotonic() + seconds, set()
    for problem in problems(models, tuner.dtype):
        try:
            found = questions(problem, tuner.dtype, tuner.device, kernels)
        except ops.BackendError as error:
            tuner.say(f"{problem.name}: {error}")
            continue
        for asked in found:
            key = asked.kernel, asked.shape
            if key in seen:
                continue
            if time.monotonic() > end:
                tuner.say(f"stopped after {seconds:.0f} s")
                return len(seen)
            seen.add(key)
            tuner.say(f"{asked.kernel} {_named(asked.sizes)}  ({problem.name})")
            entry = tuner.answer(problem, asked)
            if entry is not None:
                keep(entry)
    return len(seen)


def asks(case: Case) -> bool:
    """Whether a launcher calls a heuristic: a plain matrix product uses the library."""
    return case.op != "linear" or bool(case.call.dims["act"])


def listing(
    models: Sequence[str],
    kernels: Sequence[str],
    dtype: torch.dtype,
    device: Any,
    see: Callable[[str], None] = lambda name: None,
) -> Iterator[Any]:
    """The calls of heuristics that `tune` would measure on `device` (a `minilm.kernels.devices.Device`),
    which may be absent. The launchers are called on the CPU with tensors without values, and their launches
    are recorded and discarded. `see` is called with each problem."""
    from minilm.kernels.compile_cases import recording

    seen: set[Any] = set()
    for problem in problems(models, dtype):
        if not asks(problem.case):
            continue
        see(problem.name)
        with recording(device), hollow():
            asked = questions(problem, dtype, "cpu", kernels)
        for question in asked:
            key = question.kernel, question.shape
            if key not in seen:
                seen.add(key)
                yield question


def add_entry(path: Path, entry: dict[str, Any]) -> None:
    """Write an entry into the table `path`, replacing one for the same device, kernel and shape."""
    from minilm.kernels import tuned

    def key(e: dict[str, Any]) -> tuple[Any, ...]:
        return e["device"], e["kernel"], e["shape"]

    entries = tuned.read_entries(path) if path.is_file() else []
    entries = [e for e in entries if key(e) != key(entry)] + [entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    body = ",\n".join("  " + json.dumps(e) for e in entries)
    new.write_text(f'{{\n "version": {tuned.VERSION},\n "entries": [\n{body}\n ]\n}}\n', encoding="utf-8")
    new.replace(path)
    tuned.reload()


def _fields(block: Any) -> str:
    return " x ".join(map(str, block))


def _named(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())
