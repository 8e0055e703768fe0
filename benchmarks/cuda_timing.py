"""Times and limits on a GPU.

Two times are measured for each call. *Launch-inclusive*: wall-clock time of calls as a program makes them,
with Python, dispatch and launches, up to the synchronisation after the last call. *Device*: the calls are
captured in a CUDA graph over inputs of more than twice the L2 cache, and events around replays of the graph
give the device's time. Calls that cannot be captured are timed by events around plain calls, and the result
says so. Compiling and tuning happen in the warm-up, on a separate stream, as capturing requires. Clocks are
recorded, never set."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import harness, machine
from .limits import Limits
from .peers import OpPeer

GRAPH_CALLS = 64
"""Maximum number of calls in one graph."""


class GpuSamples(harness.Samples):
    """Launch-inclusive seconds, and in `extra` those of the device."""

    extra: dict[str, Any]


def block_of(
    call: Callable[[Any], Any],
    inputs: Sequence[Any],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> harness.Block:
    """The launch-inclusive block: wall-clock time of n calls and the synchronisation after them."""
    plain = harness.block_of(call, inputs, context)

    def block(calls: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        plain(calls)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    return block


def device_block(
    call: Callable[[Any], Any],
    inputs: Sequence[Any],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[harness.Block, str]:
    """The device's time, and how it was measured ("graph", or "events: why there is no graph")."""
    sets = list(inputs[:GRAPH_CALLS])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), context(), torch.no_grad():
        for values in [*sets[:2], *sets[:1]]:
            call(values)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with context(), torch.no_grad(), torch.cuda.graph(graph):
            for values in sets:
                call(values)
    except RuntimeError as error:  # an op that waits for the device cannot be captured
        torch.cuda.synchronize()
        return _event_block(call, inputs, context), f"events: {str(error).splitlines()[0][:120]}"
    graph.replay()
    torch.cuda.synchronize()

    def block(calls: int) -> float:
        replays = max(1, round(calls / len(sets)))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (replays * len(sets)) * calls

    return block, "graph"


def _event_block(
    call: Callable[[Any], Any], inputs: Sequence[Any], context: Callable[[], AbstractContextManager[Any]]
) -> harness.Block:
    plain = harness.block_of(call, inputs, context)

    def block(calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        plain(calls)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return block


def time_on_gpu(
    peers: dict[str, OpPeer], inputs: Sequence[Any], settings: harness.Settings
) -> dict[str, harness.Samples]:
    """Time all peers in turn, with both times of each in the same rounds."""
    blocks: dict[str, harness.Block] = {}
    how: dict[str, str] = {}
    for name, peer in peers.items():
        sets = [peer.prepare(values) for values in inputs]
        blocks[f"launch {name}"] = block_of(peer.call, sets, peer.context)
        blocks[f"device {name}"], how[name] = device_block(peer.call, sets, peer.context)
    taken = harness.measure(blocks, settings)
    result: dict[str, harness.Samples] = {}
    for name in peers:
        launch, device = taken[f"launch {name}"], taken[f"device {name}"]
        samples = GpuSamples(device.seconds, device.calls)
        samples.extra = {"launch_samples": launch.seconds, "timed_by": how[name], "gpu_clocks": clocks()}
        result[name] = samples
    return result


def clocks() -> dict[str, str]:
    """SM and memory clock, power and temperature now, as nvidia-smi reads them; empty where it is missing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    values = [v.strip() for v in answer.stdout.strip().split(",")]
    return dict(zip(fields.split(","), values, strict=False)) if answer.returncode == 0 else {}


class GpuProbe:
    """A GPU's limits: read and copy bandwidth on far more than the L2 cache, and the matrix product of each
    dtype on normal random data."""

    def __init__(self, dtype: str) -> None:
        small = machine.tiny()
        self.limits = Limits("cuda", "PyTorch: Tensor.copy_, torch.sum, torch.mm; CUDA events")
        count = (8 << 20) if small else (1 << 30) // 4
        self.x = torch.randn(count, device="cuda")
        self.y = torch.empty_like(self.x)
        self.n = 512 if small else 8192
        self.dtypes = [torch.float32, torch.float16, torch.bfloat16]

    def round(self) -> Limits:
        """One repeat of every limit; returns all so far."""
        add = self.limits.add
        add("copy", None, 2 * self.x.nbytes / _device_seconds(lambda: self.y.copy_(self.x)), "Tensor.copy_")
        add("read", None, self.x.nbytes / _device_seconds(lambda: self.x.sum()), "torch.sum")
        for dtype in self.dtypes:
            a = torch.randn(self.n, self.n, device="cuda").to(dtype)
            b = torch.randn(self.n, self.n, device="cuda").to(dtype)
            seconds = _device_seconds(lambda a=a, b=b: torch.mm(a, b))
            name = str(dtype).removeprefix("torch.")
            add(f"gemm {name}", None, 2 * self.n**3 / seconds, f"torch.mm, {self.n} x {self.n} x {self.n}")
            if dtype == torch.float32:  # what the CPU's loop of multiply-adds stands for
                add("fma", None, 2 * self.n**3 / seconds, "as gemm float32")
        return self.limits


def _device_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats
