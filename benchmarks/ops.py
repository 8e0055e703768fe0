"""The op level: each op of `minilm.ops` in each implementation that supports it, compared with the peers, at
shapes of real models.

minilm's implementations are called through the public function under ``with backend(name)``, as models do:
checks and dispatch are part of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilm import ops
from minilm.ops import dispatch, reference
from minilm.ops.quantized import FORMATS, GROUP, dequantise, quantise

from . import check, harness, machine
from .peers import OpPeer, Skipped, op_peers
from .shapes import Case

Args = tuple[Any, ...]


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Callable[[torch.Generator], Args]:
    """A function that returns one random set of the op's tensor arguments: normal data, random weights and
    biases, true lengths, pages in random order."""
    dims, op = case.call.dims, case.op

    def normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype).to(device)

    def norms(g: torch.Generator) -> Args:
        T, C = dims["T"], dims["C"]
        data = [normal(g, T, C) for _ in range(1 + op.startswith("add_"))]
        weight = (normal(g, C, std=0.1) + 1,)
        return (*data, *weight, *((normal(g, C),) if "layer" in op else ()))

    def heads(g: torch.Generator, tokens: int, count: int) -> Tensor:
        return normal(g, tokens, count, dims["D"])

    def attention(g: torch.Generator) -> Args:
        total = sum(dims["lengths"])
        ends = _ends(dims["lengths"]).to(device)
        return (heads(g, total, dims["H"]), heads(g, total, dims["Hkv"]), heads(g, total, dims["Hkv"]), ends)

    def pages(g: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        shape = (count, 32, dims["Hkv"], dims["D"])
        return normal(g, *shape), normal(g, *shape)

    def paged(g: torch.Generator) -> Args:
        lengths, contexts = dims["lengths"], dims["contexts"]
        width = -(-max(contexts) // 32)
        order = torch.randperm(width * len(contexts), generator=g).int().view(len(contexts), width)
        k, v = pages(g, order.numel())
        context = torch.tensor(contexts, dtype=torch.int32, device=device)
        return (heads(g, sum(lengths), dims["H"]), k, v, order.to(device), _ends(lengths).to(device), context)

    def angles(g: torch.Generator, tokens: int) -> tuple[Tensor, Tensor]:
        turn = torch.rand(tokens, dims["D"] // 2, generator=g) * 6.28
        return turn.cos().to(device), turn.sin().to(device)

    def places(g: torch.Generator, tokens: int) -> Args:
        k, v = pages(g, -(-tokens // 32) + 1)
        return (k, v, torch.randperm(len(k) * 32, generator=g)[:tokens].to(device))

    def rope(g: torch.Generator) -> Args:
        tokens = dims["T"]
        qk = (heads(g, tokens, dims["H"]), heads(g, tokens, dims["Hkv"]))
        if op == "rope":
            return (*qk, *angles(g, tokens))
        return (*qk, heads(g, tokens, dims["Hkv"]), *angles(g, tokens), *places(g, tokens))

    def append(g: torch.Generator) -> Args:
        tokens = dims["T"]
        return (heads(g, tokens, dims["Hkv"]), heads(g, tokens, dims["Hkv"]), *places(g, tokens))

    def linear(g: torch.Generator) -> Args:
        rows, inner, outer = dims["T"], dims["I"], dims["O"]
        bias = normal(g, outer) if dims["bias"] else None
        return (normal(g, rows, inner), normal(g, outer, inner, std=inner**-0.5), bias)

    def quantized(g: torch.Generator) -> Args:
        x, weight, bias = linear(g)
        return (x, quantise(weight, dims["format"]), bias)

    def gated(g: torch.Generator) -> Args:
        return (normal(g, dims["T"], 2 * dims["F"]),)

    def loss(g: torch.Generator) -> Args:
        labels = torch.randint(0, dims["V"], (dims["T"],), generator=g).to(device)
        if op == "linear_cross_entropy":
            inner = dims["C"]
            return (normal(g, dims["T"], inner), normal(g, dims["V"], inner, std=3 * inner**-0.5), labels)
        return (normal(g, dims["T"], dims["V"], std=3.0), labels)

    makers = {
        "attention": attention,
        "paged_attention": paged,
        "rope": rope,
        "rope_append": rope,
        "append_kv": append,
        "linear": linear,
        "quantized_linear": quantized,
        "gated": gated,
        "cross_entropy": loss,
        "linear_cross_entropy": loss,
    }
    return makers.get(op, norms)


def our_call(case: Case) -> Callable[[Args], Any]:
    """The public function of `minilm.ops` on one input set."""
    dims, spec, op = case.call.dims, case.spec, case.op
    run = getattr(ops, op)
    if op.endswith("norm"):
        return lambda v: run(*v, spec.norm_eps)
    if op == "attention":
        longest, scale = max(dims["lengths"]), spec.scale(0)
        options = {"scale": scale, "causal": dims["causal"], "window": dims["window"]}
        return lambda v: run(*v[:3], v[3], v[3], longest, longest, **options)
    if op == "paged_attention":
        new, most = max(dims["lengths"]), max(dims["contexts"])
        return lambda v: run(*v, new, most, scale=spec.scale(0), window=dims["window"])
    if op in ("linear", "quantized_linear"):
        activation = spec.activation if dims["act"] else None
        return lambda v: run(*v, activation)
    if op == "gated":
        return lambda v: run(*v, spec.activation)
    if op == "linear_cross_entropy" and dims["backward"]:
        return partial(trained, run)
    return lambda v: run(*v)


def trained(call: Callable[..., Any], values: Args) -> tuple[Tensor, ...]:
    """Outputs of ``call(*values)``, and the gradients of all floating-point arguments for the outputs
    themselves as upstream."""
    with torch.enable_grad():
        leaves = tuple(
            v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for v in values
        )
        outputs = check.tensors(call(*leaves))
        wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
        found = torch.autograd.grad(outputs, wanted, [o.detach() for o in outputs])
    return (*(o.detach() for o in outputs), *found)


def reference_call(case: Case, function: Callable[..., Any] | None = None) -> Callable[[Args], Any]:
    """The specification itself (or `function`, which has its signature) on one input set, on any dtype."""
    dims, spec, op = case.call.dims, case.spec, case.op
    run = function or getattr(reference, op)
    if op.endswith("norm"):
        return lambda v: run(*v, spec.norm_eps)
    if op == "attention":
        longest = max(dims["lengths"])
        rest = (longest, longest, spec.scale(0), dims["causal"], dims["window"], 0.0)
        return lambda v: run(*v[:3], v[3], v[3], *rest)[0]
    if op == "paged_attention":
        rest = (max(dims["lengths"]), max(dims["contexts"]), spec.scale(0), dims["window"])
        return lambda v: run(*v, *rest)
    if op in ("linear", "quantized_linear"):
        return lambda v: run(*v, spec.activation if dims["act"] else None)
    if op == "gated":
        return lambda v: run(*v, spec.activation)
    if op == "cross_entropy":
        return lambda v: run(*v, -100)
    if op == "linear_cross_entropy":
        if dims["backward"]:
            return partial(trained, lambda *v: run(*v, -100))
        return lambda v: run(*v, -100)
    return lambda v: run(*v)


def with_written(case: Case, call: Callable[[Args], Any]) -> Callable[[Args], Any]:
    """For ops that write into the cache, the pages are checked too."""
    if case.op == "append_kv":
        return lambda v: (call(v), v[2], v[3])
    if case.op == "rope_append":
        return lambda v: (call(v), v[5], v[6])
    return call


def our_peers(case: Case, device: str, dtype: torch.dtype) -> list[OpPeer | Skipped]:
    """minilm's implementations of the op, as peers named after their backend."""
    found: list[OpPeer | Skipped] = []
    probe = as_kept(case, make_inputs(case, dtype, device)(torch.Generator().manual_seed(0)))
    call = our_call(case)
    for backend in dispatch.BACKENDS:
        implementation = dispatch.implementations(case.op).get(backend)
        name = f"minilm {backend}"
        if implementation is None:
            continue
        if backend == "triton" and device == "cpu" and not machine.tiny():
            found.append(Skipped(name, "on a CPU, Triton only runs in an interpreter"))
            continue
        try:
            with ops.backend(backend), torch.no_grad():
                call(probe)
        except ops.BackendError as error:
            found.append(Skipped(name, str(error).split(f"{backend}: ")[-1]))
            continue
        rounds = backend == "native" and case.op == "quantized_linear"
        prepare = partial(packed, case) if backend == "native" else partial(as_kept, case)
        found.append(OpPeer(name, call, prepare, context=partial(ops.backend, backend), rounds=rounds))
    return found


def as_kept(case: Case, values: Args) -> Args:
    """The weight of a linear layer as a parameter, as in a model."""
    if case.op != "linear":
        return values
    return (values[0], nn.Parameter(values[1], requires_grad=False), *values[2:])


def packed(case: Case, values: Args) -> Args:
    """`as_kept`, after the first call, which packs the weight."""
    values = as_kept(case, values)
    if case.op in ("linear", "quantized_linear"):
        with ops.backend("native"), torch.no_grad():
            our_call(case)(values)
    return values


def truths(case: Case, draws: Sequence[Args]) -> list[check.Truth]:
    """The results of the specification for each random input."""
    exact = with_written(case, reference_call(case))
    return check.truths(exact, exact, draws)


def judge(peer: OpPeer, case: Case, against: Sequence[check.Truth]) -> check.Verdict:
    """Whether the peer is correct at this shape."""

    def call(values: Args) -> Any:
        with peer.context():
            return with_written(case, lambda v: peer.result(peer.call(peer.prepare(v))))(values)

    return check.judge_rounded(call, against, rounding) if peer.rounds else check.judge(call, against)


STEEPEST = 1.13
"""The largest derivative of all activation functions: that of gelu."""


def rounding(values: Args) -> Tensor:
    """Standard deviation [T, O] of each output of a quantised layer when x is rounded to 8 bits: in groups of
    32 if the weight is in groups, else in rows.

    The rounding error of an element is uniform between -1/2 and 1/2 of the step (largest / 127), so its
    deviation is step / sqrt(12). Squares add up in the product: sum over groups of step^2 / 12 sum of w^2."""
    x, weight, _ = values
    size = GROUP if FORMATS[weight.format].grouped else weight.columns
    step = x.view(len(x), -1, size).abs().amax(2) / 127  # [T, G]
    values = dequantise(weight, torch.float64)
    squares = values.view(weight.rows, -1, size).square().sum(2)  # [O, G]
    deviation: Tensor = STEEPEST * (step.square() / 12 @ squares.T).sqrt()
    return deviation


def run_case(
    case: Case,
    device: str,
    dtype: torch.dtype,
    settings: harness.Settings,
    wanted: Callable[[str], bool] = lambda name: True,
    extra: Sequence[OpPeer] = (),
    timer: Callable[..., dict[str, harness.Samples]] | None = None,
) -> list[dict[str, Any]]:
    """Check, then time, all implementations and peers of one case; one cell each, also for skipped and wrong
    ones."""
    torch.compiler.reset()  # graphs of earlier shapes are no longer needed
    every = [*our_peers(case, device, dtype), *op_peers(case, device, dtype), *extra]
    every = [peer for peer in every if wanted(peer.name)]
    make = make_inputs(case, dtype, device)
    against = truths(case, [make(torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    cells: dict[str, dict[str, Any]] = {}
    right: dict[str, OpPeer] = {}
    for peer in every:
        cell: dict[str, Any] = {"peer": peer.name, "ours": peer.name.startswith("minilm")}
        cells[peer.name] = cell
        if isinstance(peer, Skipped):
            cell |= {"status": "skipped", "reason": peer.reason}
            continue
        try:
            verdict = judge(peer, case, against)
        except Exception as error:  # an error of a peer is a result too, and is shown
            cell |= {
                "status": "failed",
                "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            }
            continue
        cell |= {"status": "ok" if verdict.ok else "wrong", "reason": verdict.detail or None}
        cell["check"] = verdict.to_dict()
        if verdict.ok:
            right[peer.name] = peer
    del against
    if right:
        inputs = harness.rotated(make, seed=3, cache=cache_bytes(device))
        run = timer or partial(time_on_cpu, settings=settings)
        for name, samples in run(right, inputs).items():
            cells[name] |= {"samples": samples.seconds, "calls": samples.calls}
            cells[name] |= getattr(samples, "extra", {})
    return list(cells.values())


def cache_bytes(device: str) -> int | None:
    """The cache that rotation must exceed: the GPU's L2, or None for the CPU's last-level cache."""
    if device != "cuda":
        return None
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20)


def time_on_cpu(
    peers: dict[str, OpPeer], inputs: Sequence[Args], settings: harness.Settings
) -> dict[str, harness.Samples]:
    """All peers in turn on the same rotating inputs, each in its own layout."""
    blocks = {
        name: harness.block_of(peer.call, [peer.prepare(values) for values in inputs], peer.context)
        for name, peer in peers.items()
    }
    return harness.measure(blocks, settings)
