"""``minilm bench --explain MODEL``: the time of a forward pass, op by op.

Each call of an op is recorded where its implementation is chosen: the bytes and operations from its shapes
(`costs`), the implementation that ran and why the others did not, and the time. Recording costs some
microseconds per call, so the whole pass is also timed without it; the time outside the ops is shown as a
separate line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm import ops
from minilm.ops import dispatch

from . import costs, machine, report, shapes
from .costs import Cost
from .limits import CpuProbe, Limits
from .stats import summary


def cost_of_call(op: str, args: tuple[Any, ...]) -> tuple[Cost, str]:
    """Bytes and operations of a call of an implementation of `op`, and its shape as text."""
    x = args[0]
    size = x.element_size()
    channels, rows = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if op in ("layer_norm", "add_layer_norm"):
        weight, bias = args[-3], args[-2]
        cost = costs.FORMULAS[op](rows, channels, size, weight.element_size(), bias is not None)
        return cost, f"{rows} x {channels}"
    if op in ("rms_norm", "add_rms_norm"):
        return costs.FORMULAS[op](rows, channels, size, args[-2].element_size()), f"{rows} x {channels}"
    if op == "attention":
        q, k, _, cu_q, cu_k = args[:5]
        causal, window = args[8], args[9]
        lengths, contexts = cu_q.diff().tolist(), cu_k.diff().tolist()
        cost = costs.attention(lengths, q.shape[1], k.shape[1], q.shape[2], causal, window, contexts, size)
        return (
            cost,
            f"{len(lengths)} sequences, {q.shape[0]} tokens, {q.shape[1]}/{k.shape[1]} heads of {q.shape[2]}",
        )
    if op == "paged_attention":
        q, k, _, _, cu_q, context = args[:6]
        lengths, contexts = cu_q.diff().tolist(), context.tolist()
        heads = (q.shape[1], k.shape[2], q.shape[2])
        cost = costs.paged_attention(lengths, contexts, *heads, k.shape[1], args[9], size, k.element_size())
        return (
            cost,
            f"{len(lengths)} sequences on {sum(contexts)} keys, {heads[0]}/{heads[1]} heads of {heads[2]}",
        )
    if op in ("rope", "rope_append"):
        q, k = args[:2]
        dims = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], size)
        cost = costs.rope(*dims) if op == "rope" else costs.rope_append(*dims, args[5].element_size())
        return cost, f"{q.shape[0]} tokens, {q.shape[1]}/{k.shape[1]} heads of {q.shape[2]}"
    if op == "append_kv":
        cost = costs.append_kv(x.shape[0], x.shape[1], x.shape[2], size, args[2].element_size())
        return cost, f"{x.shape[0]} tokens, {x.shape[1]} heads of {x.shape[2]}"
    if op == "linear":
        weight, bias, activation = args[1:4]
        outer, inner = weight.shape
        stored = weight.nbytes / (outer * inner)
        cost = costs.linear(rows, inner, outer, size, stored, bias is not None, activation is not None)
        return cost, f"{rows} x {inner} -> {outer}" + (f", {activation}" if activation else "")
    if op == "quantized_linear":
        weight, bias, activation = args[1:4]
        dims = (rows, weight.columns, weight.rows, weight.format, size)
        shape = f"{rows} x {weight.columns} -> {weight.rows}, {weight.format}"
        cost = costs.quantized_linear(*dims, bias is not None, activation is not None)
        return cost, shape + (f", {activation}" if activation else "")
    if op == "linear_cross_entropy":
        return costs.linear_cross_entropy(rows, channels, len(args[1]), size), f"{rows} x {channels}"
    if op == "gated":
        return costs.gated(rows, channels // 2, size), f"{rows} x 2 x {channels // 2}"
    if op == "cross_entropy":
        return costs.cross_entropy(rows, channels, size), f"{rows} x {channels}"
    return Cost(), str([list(a.shape) for a in args if isinstance(a, Tensor)])


@dataclass
class Step:
    """One kind of call: op, shape, implementation; `calls` of them in one pass."""

    op: str
    shape: str
    backend: str
    why_not: dict[str, str]
    cost: Cost
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    """Seconds of all calls of one pass together, one entry per pass."""


class Watch:
    """Records the ops of the passes that run inside `watching`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: dict[tuple[str, str, str], Step] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """One pass. Replaces `dispatch.select`, which ops call, and nothing else."""
        genuine = dispatch.select
        spent: dict[tuple[str, str, str], list[float]] = {}

        def select(op: str, traits: Any) -> Callable[..., Any]:
            call = genuine(op, traits)
            if isinstance(traits, ops.WholeTraits):  # record the ops inside it instead
                return call

            def watched(*args: Any, **options: Any) -> Any:
                self._wait()
                begin = time.perf_counter()
                result = call(*args, **options)
                self._wait()
                seconds = time.perf_counter() - begin
                cost, shape = cost_of_call(op, args)
                backend, why_not = self._decision(op, traits)
                key = (op, shape, backend)
                self.steps.setdefault(key, Step(op, shape, backend, why_not, cost))
                spent.setdefault(key, []).append(seconds)
                return result

            return watched

        setattr(dispatch, "select", select)  # noqa: B010 (a module attribute, on purpose)
        try:
            yield
        finally:
            setattr(dispatch, "select", genuine)  # noqa: B010
        for key, values in spent.items():
            self.steps[key].calls = len(values)
            self.steps[key].seconds.append(sum(values))

    def time(self, run: Callable[[], Any]) -> float:
        """Seconds of a pass without recording."""
        begin = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _decision(op: str, traits: Any) -> tuple[str, dict[str, str]]:
        for decision in reversed(dispatch.explain().decisions):
            if decision.op == op and decision.traits == traits:
                return decision.chosen.backend, decision.refused
        return "?", {}


@dataclass
class Waterfall:
    """The result for one situation: the steps, the time of the whole pass without recording, the time as
    models run it if that differs (all blocks in one call), and the limits."""

    title: str
    steps: list[Step]
    whole: list[float]
    fused: list[float]
    limits: Limits
    threads: int
    dtype: str

    def floor(self, step: Step) -> tuple[float, str]:
        """The minimum time for all calls of a step by the limits."""
        threads = self.threads if self.limits.device == "cpu" else None
        seconds, name = self.limits.floor(step.cost, self.dtype, threads)
        return seconds * step.calls, name


def passes(name: str) -> tuple[Any, list[tuple[str, Callable[[], Any]]]]:
    """(model, [(situation, a function that runs one pass)]) for a model's name, folder or GGUF file."""
    from minilm import AutoModel, AutoModelForCausalLM
    from minilm.families import family_of
    from minilm.model.auto import AutoConfig

    from . import models

    path: Any = models.assets(name).folder if name in shapes.HF_CONFIGS else Path(name)
    path = path if Path(path).exists() else name
    config = AutoConfig.from_pretrained(path)
    causal = family_of(config.model_type).config(config).causal
    model: Any = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(path, dtype=torch.float32)
    spec = model.spec
    small = machine.tiny()
    generator = torch.Generator().manual_seed(0)

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(5, spec.vocab_size, (batch, length), generator=generator)

    if not causal:
        sizes = [(1, 16), (3, 8)] if small else [(1, 16), (1, min(512, spec.max_positions)), (32, 128)]
        return model, [(f"{b} x {n} tokens", partial(model, input_ids=ids(b, n))) for b, n in sizes]
    long = 24 if small else 512
    prompt = ids(1, long)

    def step(context: int) -> Callable[[], Any]:
        cache = model.new_cache(1)
        model(input_ids=ids(1, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids(1, 1)

        def run() -> Any:
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache.crop(context)
            return out

        return run

    found: list[tuple[str, Callable[[], Any]]] = [
        (f"prefill of {long} tokens", lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))
    ]
    with torch.no_grad():
        found += [(f"one step after {n} tokens", step(n)) for n in ((8, 24) if small else (32, 1000))]
    return model, found


def measure(name: str, threads: int, device: str = "cpu", repeats: int = 0) -> list[Waterfall]:
    """Record all situations of a model."""
    repeats = repeats or (2 if machine.tiny() else 9)
    torch.set_num_threads(threads)
    if device == "cuda":
        from .cuda_timing import GpuProbe

        probe: Any = GpuProbe("float32")
    else:
        probe = CpuProbe([threads])
    for _ in range(3):
        probe.round()
    found = []
    with torch.no_grad():
        model, situations = passes(name)
        model.to(device)
        for title, run in situations:
            watch = Watch(device)
            whole: list[float] = []
            fused: list[float] = []
            run()
            for _ in range(repeats):  # in turn: recorded, op by op, as models run
                with dispatch.backend(blocks="reference", embed="reference"):
                    with watch.watching():
                        run()
                    whole.append(watch.time(run))
                fused.append(watch.time(run))
            if dispatch.explain().backends("blocks") == {"reference"}:
                fused = []
            steps = list(watch.steps.values())
            found.append(Waterfall(f"{name}, {title}", steps, whole, fused, probe.limits, threads, "float32"))
    return found


def show(name: str, threads: int, device: str, console: Any) -> None:
    """Print the tables."""
    from rich.text import Text

    for waterfall in measure(name, threads, device):
        console.print(_table(waterfall, console.width))
        reasons = {
            f"{step.op} ran on {step.backend}; not {other}: {reason}"
            for step in waterfall.steps
            for other, reason in step.why_not.items()
        }
        for reason in sorted(reasons):
            console.print(Text(f"  {reason}", style="dim"))


def _table(waterfall: Waterfall, width: int) -> Any:
    """All columns if the terminal has 130 or more; else the name with shape and backend below it, and the
    times."""
    from rich.table import Table
    from rich.text import Text

    whole = summary(waterfall.whole)
    limits, threads = waterfall.limits, waterfall.threads
    read, (peak, unit) = limits.get("read", threads), limits.peak(waterfall.dtype, threads)
    spread = f"[{report.seconds(whole.p20)} - {report.seconds(whole.p80)}]"
    title = (
        f"{waterfall.title}: {report.seconds(whole.median)} {spread}"
        f" · limits read {read / 1e9:.3g} GB/s, {unit} {peak / 1e9:.4g} Gop/s, {threads} threads"
    )
    if waterfall.fused:
        alone = summary(waterfall.fused)
        title += f" · with all blocks in one native call, as models run: {report.seconds(alone.median)}"
    headings = (
        "op",
        "shape",
        "ran on",
        "calls",
        "MB",
        "Mop",
        "time",
        "of the pass",
        "limit allows",
        "of limit",
    )
    rows: list[tuple[str, ...]] = []
    seen = 0.0
    for step in sorted(waterfall.steps, key=lambda s: -summary(s.seconds).median):
        spent = summary(step.seconds).median
        allowed, bound = waterfall.floor(step)
        seen += spent
        rows.append((
            *(step.op, step.shape, step.backend, str(step.calls)),
            *(f"{step.cost.bytes * step.calls / 1e6:.2f}", f"{step.cost.operations * step.calls / 1e6:.1f}"),
            *(report.seconds(spent), f"{spent / whole.median:.0%}"),
            *(report.seconds(allowed), f"{allowed / spent:.0%}", bound),
        ))  # fmt: skip
    rest = whole.median - seen
    words = "outside the ops: embeddings, Python, management of the cache"
    shown = report.seconds(rest) if rest > 0 else "not measurable: less than the cost of recording"
    rows.append(("rest", words, "", "", "", "", shown, f"{max(rest, 0) / whole.median:.0%}", "", "", ""))
    narrow = width < report.WIDE
    kept = (0, 6, 7, 9) if narrow else range(11)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for at in kept:
        left = at in (0, 1, 2, 10)
        heading = (*headings, "bound by")[at]
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=not left and not narrow, overflow="fold"
        )
    for row in rows:
        values = list(row)
        if narrow:  # shape and backend are below the name
            values[0] = "\n  ".join(filter(None, (row[0], row[1], row[2] and f"{row[2]}, {row[3]} calls")))
        table.add_row(*(Text(values[at]) for at in kept))
    return table
