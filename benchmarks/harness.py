"""How times are measured.

Engines run in turn, A B C A B C ..., each with a block of calls long enough to be timed, so that a slowdown
of the machine affects all of them. The order is rotated by one in each round. Inputs are random data that
rotate over more than twice the size of the last-level cache, so that they are not found in the cache.
Compilation, tuning and warm-up happen before. The garbage collector is off during timing.

A *block* is a function that makes n calls and returns the seconds they took: in this process (`block_of`),
in another (`workers`), or on a GPU (`cuda_timing`)."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import machine

Block = Callable[[int], float]

FEWEST = 3
"""Minimum number of rounds, also for the longest workload: fewer do not show the spread."""
PATIENCE = 4
"""Multiple of the budget after which the minimum of rounds is enough."""


@dataclass(frozen=True)
class Settings:
    """Durations and counts. A round gives one repetition of each engine."""

    rounds: int = 15
    block_seconds: float = 0.02
    """A block makes as many calls as it takes to last this long."""
    budget_seconds: float = 20.0
    """For all engines of one workload together. At least `least_rounds` are made (see PATIENCE)."""
    least_rounds: int = 5
    warmup_seconds: float = 0.1

    @classmethod
    def default(cls) -> Settings:
        """The usual settings, or those of MINILM_BENCH_TINY."""
        return cls(3, 0.0005, 1.0, 3, 0.0) if machine.tiny() else cls()


@dataclass
class Samples:
    """Seconds per call, one value per round; `calls` were timed as one block."""

    seconds: list[float]
    calls: int


def nbytes(values: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        return values.nbytes
    if isinstance(values, dict):
        return sum(map(nbytes, values.values()))
    if isinstance(values, (tuple, list)):
        return sum(map(nbytes, values))
    return 0


def copies_needed(one: int, cache: int | None = None, most: int = 512) -> int:
    """How many input sets of `one` bytes make up more than twice the last cache (at most `most`)."""
    cache = machine.last_cache_bytes() if cache is None else cache
    if machine.tiny():
        return 2
    return max(1, min(most, math.floor(2 * cache / max(one, 1)) + 1))


def rotated(make: Callable[[torch.Generator], Any], seed: int = 0, cache: int | None = None) -> list[Any]:
    """Independent random input sets, as many as rotation needs; `make` returns one."""
    generator = torch.Generator().manual_seed(seed)
    first = make(generator)
    return [first, *(make(generator) for _ in range(copies_needed(nbytes(first), cache) - 1))]


def block_of(
    call: Callable[[Any], Any],
    inputs: Sequence[Any],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    clock: Callable[[], float] = time.perf_counter,
) -> Block:
    """A block that calls `call` on one input set after the other, inside `context` (entered outside the
    timing)."""
    at = 0

    def block(calls: int) -> float:
        nonlocal at
        sets = [inputs[(at + i) % len(inputs)] for i in range(calls)]
        at = (at + calls) % len(inputs)
        with context(), torch.no_grad():
            begin = clock()
            for values in sets:
                call(values)
            return clock() - begin

    return block


def measure(
    blocks: Mapping[str, Block],
    settings: Settings,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Run all blocks in turn and return their samples. `between` is called with the name before each turn."""
    calls: dict[str, int] = {}
    for name, block in blocks.items():
        between(name)
        calls[name] = _calls_for(block, settings, clock)
    samples = {name: Samples([], calls[name]) for name in blocks}
    names = list(blocks)
    began = clock()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(settings.rounds):
            spent = clock() - began
            enough = settings.least_rounds if spent < PATIENCE * settings.budget_seconds else FEWEST
            if done >= enough and spent > settings.budget_seconds:
                break
            first = done % max(len(names), 1)
            for name in [*names[first:], *names[:first]]:
                between(name)
                samples[name].seconds.append(blocks[name](calls[name]) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def _calls_for(block: Block, settings: Settings, clock: Callable[[], float]) -> int:
    """Warm up, and find the number of calls in a block of the wanted duration."""
    began, calls = clock(), 1
    seconds = block(1)  # one-time work happens here
    if seconds < settings.budget_seconds / 20:
        seconds = block(1)
    while seconds < settings.block_seconds:
        calls = min(
            calls * 10, max(calls + 1, math.ceil(1.1 * calls * settings.block_seconds / max(seconds, 1e-9)))
        )
        seconds = block(calls)
    while clock() - began < settings.warmup_seconds:
        block(calls)
    return calls


def time_calls(
    calls: Mapping[str, Callable[[Any], Any]],
    inputs: Mapping[str, Sequence[Any]],
    settings: Settings | None = None,
) -> dict[str, Samples]:
    """Compare plain functions, each on its own rotated inputs."""
    blocks = {name: block_of(call, inputs[name]) for name, call in calls.items()}
    return measure(blocks, settings or Settings.default())


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
