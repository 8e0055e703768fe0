"""The limits of the machine, measured in the same run as the results that are compared with them.

On a CPU: read and copy bandwidth and the peaks of fp32 multiply-adds and of 8-bit dot products, for each
number of threads, by the plain loops of limits.cpp, which the system's C++ compiler builds for this very
processor (kept in a cache folder under a hash of source, compiler and processor). Without a compiler, NumPy
and PyTorch are used instead, and the result says so. In addition, the fastest matrix product of PyTorch's
library: a limit that is reached in practice.

Two checks run each time (`CpuProbe.doubts`), and disagreements are recorded. The clock frequency is measured
by a chain of dependent additions, one per cycle; peak / (clock x threads) must then be near the processor's
operations per cycle. The bandwidths are compared with those of NumPy's loops."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from . import machine
from .costs import Cost
from .stats import summary

SOURCE = Path(__file__).with_name("limits.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"]


def cache_folder() -> Path:
    """The folder for compiled loops and converted models between runs (MINILM_BENCH_CACHE)."""
    chosen = os.environ.get("MINILM_BENCH_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "minilm-bench"
    folder = base.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiled_loops() -> tuple[ctypes.CDLL | None, str]:
    """The loops of limits.cpp, or None and the reason why they are missing."""
    compiler = next(
        (c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None
    )
    if compiler is None:
        return None, "no C++ compiler was found"
    tag = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256(
        (SOURCE.read_text() + tag + machine.cpu_name() + " ".join(FLAGS)).encode()
    ).hexdigest()
    target = cache_folder() / f"limits-{key[:16]}.so"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.so")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, f"{compiler} failed on {SOURCE.name}: {done.stderr.strip()[:300]}"
        made.replace(target)
    library = ctypes.CDLL(str(target))
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, arguments in {
        "fill": [pointer, number, threads],
        "read_all": [pointer, number, threads],
        "copy_all": [pointer, pointer, number, threads],
        "fma_all": [number, threads],
        "int8_all": [number, threads],
        "clock_chain": [number],
    }.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None if name == "fill" else ctypes.c_double
    library.int8_name.restype = ctypes.c_char_p
    return library, f"{Path(compiler).name} -O3 -march=native"


@dataclass
class Limit:
    """One limit: each repetition in its unit per second (bytes or operations)."""

    repeats: list[float] = field(default_factory=list)
    how: str = ""

    @property
    def value(self) -> float:
        """The median, like the medians that are compared with it."""
        return summary(self.repeats).median if self.repeats else 0.0


@dataclass
class Limits:
    """The limits of one device by name: "read", "copy", "fma", "int8", "gemm float32", ..., with "@2" for two
    threads."""

    device: str
    how: str
    table: dict[str, Limit] = field(default_factory=dict)

    def add(self, name: str, threads: int | None, value: float, how: str = "") -> None:
        """Add one repetition."""
        limit = self.table.setdefault(name if threads is None else f"{name}@{threads}", Limit(how=how))
        limit.repeats.append(value)

    def get(self, name: str, threads: int | None = None) -> float:
        """The limit with that many threads (or the nearest measured number), 0.0 if there is none."""
        exact = self.table.get(name if threads is None else f"{name}@{threads}")
        if exact is None and threads is not None:
            measured = sorted(int(k.split("@")[1]) for k in self.table if k.startswith(f"{name}@"))
            near = [m for m in measured if m <= threads] or measured
            exact = self.table.get(f"{name}@{near[-1]}") if near else self.table.get(name)
        return exact.value if exact is not None else 0.0

    def bandwidth(self, cost: Cost, threads: int | None) -> tuple[float, str]:
        """The bandwidth for a mix of reading and writing; pure reading has a separate limit."""
        name = "read" if cost.written < 0.1 * cost.bytes else "copy"
        return self.get(name, threads), f"{name} bandwidth"

    def peak(self, dtype: str, threads: int | None) -> tuple[float, str]:
        """Operations a second for `dtype`: the loop's peak, or what the library's matrix product reached,
        whichever is higher."""
        names = {"float32": ("fma", "gemm float32"), "int8": ("int8",), "q4": ("int8",)}
        found = [(self.get(n, threads), n) for n in names.get(dtype, (f"gemm {dtype}", "fma"))]
        return max(found, default=(0.0, "none"))

    def floor(self, cost: Cost, dtype: str, threads: int | None) -> tuple[float, str]:
        """The minimum time for `cost` in seconds, and the name of the binding limit."""
        bandwidth, memory = self.bandwidth(cost, threads)
        peak, arithmetic = self.peak(dtype, threads)
        times = []
        if bandwidth:
            times.append((cost.bytes / bandwidth, memory))
        if peak:
            times.append((cost.operations / peak, arithmetic))
        return max(times, default=(0.0, "not measured"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with all repetitions."""
        table = {
            name: {"median": limit.value, "repeats": limit.repeats, "how": limit.how}
            for name, limit in self.table.items()
        }
        return {"device": self.device, "how": self.how, "table": table}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Limits:
        """The inverse of `to_dict`."""
        table = {name: Limit(list(v["repeats"]), v.get("how", "")) for name, v in data["table"].items()}
        return cls(data["device"], data["how"], table)


class CpuProbe:
    """Measures a CPU's limits, one round at a time, so that rounds can run before, between and after the
    levels."""

    def __init__(self, threads: Sequence[int]) -> None:
        small = machine.tiny()
        self.threads = sorted(set(threads) | {1})
        self.loops, reason = compiled_loops()
        self.count = (4 << 20 if small else max(256 << 20, 4 * machine.last_cache_bytes())) // 4
        self.seconds = 0.005 if small else 0.1
        self.gemm = 128 if small else 2048
        how = f"loops of limits.cpp, {reason}" if self.loops else f"NumPy and PyTorch, because {reason}"
        self.limits = Limits("cpu", how)
        self.x = torch.empty(self.count)
        self.y = torch.empty(self.count)
        self._rounds: dict[tuple[str, int], int] = {}
        if self.loops is None:
            self.x.normal_()
            self.y.normal_()

    def round(self) -> Limits:
        """One repeat of every limit; returns all so far."""
        for threads in self.threads:
            if self.loops is not None:
                self._compiled(self.loops, threads)
            else:
                self._standing_in(threads)
            self._matrix_products(threads)
        return self.limits

    def doubts(self) -> list[str]:
        """Disagreements between the limits so far and independent loops, one sentence each; none in toy
        sizes, or if the loops of limits.cpp were not used. Takes about a second."""
        if self.loops is None or machine.tiny():
            return []
        x, y = self.x.numpy(), self.y.numpy()
        others: dict[str, float] = {}
        for _ in range(3):
            for name, moved, run in (
                ("read", x.nbytes, x.max),
                ("copy", 2 * x.nbytes, lambda: numpy.copyto(y, x)),
            ):
                others[name] = max(others.get(name, 0.0), moved / _seconds(run))
        return contradictions(self.limits, others, self.loops.float_lanes())

    def _compiled(self, loops: ctypes.CDLL, threads: int) -> None:
        x, y, n = self.x.data_ptr(), self.y.data_ptr(), self.count
        loops.fill(x, n, threads)
        loops.fill(y, n, threads)
        used = n // threads * threads * 4
        self.limits.add("read", threads, used / loops.read_all(x, n, threads))
        self.limits.add("copy", threads, 2 * used / loops.copy_all(x, y, n, threads))
        lanes = loops.float_lanes()
        self._paced("fma", threads, loops.fma_all, loops.fma_operations(), f"{lanes} lanes")
        if loops.int8_operations():
            self._paced("int8", threads, loops.int8_all, loops.int8_operations(), loops.int8_name().decode())
        if threads == 1:
            rounds = 20_000 if machine.tiny() else 2_000_000
            self.limits.add("clock", 1, 64 * rounds / loops.clock_chain(rounds), "dependent additions")

    def _paced(self, name: str, threads: int, run: Callable[..., float], operations: int, how: str) -> None:
        rounds = self._rounds.get((name, threads))
        if rounds is None:
            rounds = 10_000
            while (seconds := run(rounds, threads)) < self.seconds:
                rounds = int(rounds * max(2.0, 1.1 * self.seconds / max(seconds, 1e-6)))
            self._rounds[name, threads] = rounds
        self.limits.add(name, threads, operations * rounds * threads / run(rounds, threads), how)

    def _standing_in(self, threads: int) -> None:
        with torch_threads(threads):
            self.limits.add("read", threads, self.x.nbytes / _seconds(self.x.sum), "torch.sum")
            copied = _seconds(lambda: self.y.copy_(self.x))
            self.limits.add("copy", threads, 2 * self.x.nbytes / copied, "Tensor.copy_")

    def _matrix_products(self, threads: int) -> None:
        n = self.gemm
        with torch_threads(threads):
            for dtype in (torch.float32, torch.bfloat16):
                a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
                name = str(dtype).removeprefix("torch.")
                if f"gemm {name}@{threads}" not in self.limits.table:
                    torch.mm(a, b)  # the first product plans, allocates and wakes the threads
                seconds = _seconds(lambda a=a, b=b: torch.mm(a, b))
                self.limits.add(f"gemm {name}", threads, 2 * n**3 / seconds, f"torch.mm, {n} x {n} x {n}")


def contradictions(limits: Limits, others: dict[str, float], lanes: int) -> list[str]:
    """Check the best limits for one thread against `others` (bytes per second by "read" and "copy") and a
    processor with vectors of `lanes` floats. The ranges are wide, since other programs may run: they reveal a
    loop that was optimised away, a wrong unit, or an unused vector width."""
    best = {name: max(limit.repeats) for name, limit in limits.table.items() if limit.repeats}
    clock, found = best.get("clock@1", 0.0), []
    measured = [
        (f"{name} bandwidth / that of NumPy", best[f"{name}@1"] / v, 0.5, 3.0) for name, v in others.items()
    ]
    if clock:
        a_clock = best["fma@1"] / clock  # one or two multiply-adds of that width
        measured += [("the clock in GHz", clock / 1e9, 1.0, 7.0)]
        measured += [(f"operations a clock / {2 * lanes}", a_clock / (2 * lanes), 0.5, 2.6)]
    for what, value, low, high in measured:
        if not low < value < high:
            found.append(f"{what} is {value:.2f}, and should be between {low:g} and {high:g}")
    return found


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class torch_threads:
    """``with torch_threads(2):`` PyTorch works with two threads inside the block."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
