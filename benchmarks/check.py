"""Checks of results, made before anything is timed.

Results are compared with the specification in float64 on the same values: err(implementation) <= 2 x
err(eager PyTorch in the same dtype) + a floor of 8 units in the last place of the largest value. NaN and
infinity never pass. Two random inputs are used, so that a result left in memory from the first does not pass
as that of the second.

Engines that run whole models have different dtypes. They are compared with the float32 model: embeddings by
the cosine, decoders by the first tokens of greedy decoding (`cosines`, `equal_tokens`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minilm.ops.quantized import QuantizedWeight

FACTOR = 2.0
ULPS = 8.0
DEVIATIONS = 8.0
"""Allowed error of an output, in standard deviations of the error from rounding activations to 8 bits.
Rounding errors are uniform between -1/2 and 1/2 of a step and independent, so the probability of more than k
deviations is below 2 exp(-k^2 / 2): at 8, 5e-7 for all of 25 million outputs together."""
SPREAD = 1.25
"""Allowed root mean square error of all outputs, in the same standard deviations. `DEVIATIONS` catches few,
large errors; this bound catches errors everywhere, such as those of one bit less."""

LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.99, "int8": 0.95, "q4": 0.9}
"""Minimum cosine between an embedding and the float32 one; an engine below it is reported as wrong."""
LEAST_TOKENS = {"fp32": 16, "fp16": 12, "bf16": 8, "int8": 8, "q4": 4}
"""Number of first greedy tokens that must equal those in float32 (after a prompt with an obvious
continuation, see `end_to_end.check_prompt`)."""


@dataclass(frozen=True)
class Verdict:
    """The result of a check: errors as the largest difference over the largest value."""

    ok: bool
    error: float
    allowed: float
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in a result, in order."""
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, (tuple, list)):
        return [t for v in values for t in tensors(v)]
    return []


def error(result: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest |result - truth| over largest |truth|, the worst of all outputs; infinity for NaN or another
    shape."""
    if len(result) != len(truth):
        return float("inf")
    worst = 0.0
    for a, b in zip(result, truth, strict=True):
        if a.shape != b.shape or not bool(a.isfinite().all()):
            return float("inf")
        if b.numel():
            scale = float(b.abs().max()) or 1.0
            worst = max(worst, float((a.detach().double().cpu() - b.double().cpu()).abs().max()) / scale)
    return worst


def to_float64(values: Any) -> Any:
    """The same arguments with every floating-point tensor in float64 on the CPU (integers and quantised
    weights unchanged: their values are exact in float64)."""
    if isinstance(values, Tensor):
        moved = values.detach().cpu()
        return moved.double() if values.is_floating_point() else moved
    if isinstance(values, QuantizedWeight):
        return QuantizedWeight(values.format, **{name: p.cpu() for name, p in values.planes.items()})
    if isinstance(values, (tuple, list)):
        return type(values)(to_float64(v) for v in values)
    return values


def clone(values: Any) -> Any:
    """Independent tensors, for ops that write into their arguments."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, QuantizedWeight):
        return QuantizedWeight(values.format, **{name: p.clone() for name, p in values.planes.items()})
    return type(values)(clone(v) for v in values) if isinstance(values, (tuple, list)) else values


@dataclass(frozen=True)
class Truth:
    """One random input, its result in float64, and the error of eager PyTorch."""

    values: Any
    exact: list[Tensor]
    baseline: float


def truths(eager: Callable[[Any], Any], truth: Callable[[Any], Any], draws: Sequence[Any]) -> list[Truth]:
    """The references for each of `draws`; `eager` is plain PyTorch, `truth` the specification (called with
    float64 arguments)."""
    found = []
    with torch.no_grad():
        for values in draws:
            exact = tensors(truth(to_float64(clone(values))))
            found.append(Truth(values, exact, error(tensors(eager(clone(values))), exact)))
    return found


def compare(
    call: Callable[[Any], Any], eager: Callable[[Any], Any], truth: Callable[[Any], Any], draws: Sequence[Any]
) -> Verdict:
    """Judge `call` on each of `draws` (see `truths`)."""
    return judge(call, truths(eager, truth, draws))


def judge(call: Callable[[Any], Any], against: Sequence[Truth]) -> Verdict:
    """Whether `call` is correct for each input."""
    worst, allowed = 0.0, 0.0
    with torch.no_grad():
        for draw in against:
            result = tensors(call(clone(draw.values)))
            eps = max((torch.finfo(t.dtype).eps for t in result), default=0.0)
            limit, found = FACTOR * draw.baseline + ULPS * eps, error(result, draw.exact)
            if found - limit >= worst - allowed or not worst:
                worst, allowed = found, limit
            if not found <= limit:
                break
    ok = worst <= allowed
    detail = "" if ok else f"error {worst:.2e} of the largest value, allowed {allowed:.2e}"
    return Verdict(ok, worst, allowed, detail)


def judge_rounded(
    call: Callable[[Any], Any], against: Sequence[Truth], deviation: Callable[[Any], Tensor]
) -> Verdict:
    """Whether `call`, which rounds its activations to 8 bits, is correct.

    `deviation` gives, from the float64 arguments, the standard deviation of each output that this rounding
    causes. An output may differ by `DEVIATIONS` of them, all outputs in the root mean square by `SPREAD` of
    them, in addition to what `judge` allows."""
    worst, typical, ok = 0.0, 0.0, True
    with torch.no_grad():
        for draw in against:
            result, (exact,) = tensors(call(clone(draw.values))), draw.exact
            if error(result, draw.exact) == float("inf"):
                return Verdict(False, float("inf"), DEVIATIONS, f"NaN, or not {list(exact.shape)}")
            usual = (FACTOR * draw.baseline + ULPS * torch.finfo(result[0].dtype).eps) * exact.abs().max()
            expected = deviation(to_float64(draw.values))
            beyond = ((result[0].double().cpu() - exact).abs() - usual).clamp(min=0)
            worst = max(worst, float((beyond / expected).nan_to_num(0.0).max()))
            typical = max(typical, float(beyond.square().mean().sqrt() / expected.square().mean().sqrt()))
            ok = ok and worst <= DEVIATIONS and typical <= SPREAD
    words = (
        f"off by {typical:.2f} of what activations in 8 bits explain, at the worst by {worst:.1f}; "
        f"allowed {SPREAD:g} and {DEVIATIONS:g}"
    )
    return Verdict(ok, worst, DEVIATIONS, words)


def cosines(found: Tensor, truth: Tensor, precision: str) -> Verdict:
    """Embeddings [B, C] against the float32 ones, row by row."""
    least = LEAST_COSINE[precision]
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return Verdict(
            False, 2.0, 1 - least, f"shape {list(found.shape)} or NaN, expected {list(truth.shape)}"
        )
    worst = float(torch.cosine_similarity(found.double(), truth.double(), dim=1).min())
    return Verdict(worst >= least, 1 - worst, 1 - least, f"worst cosine {worst:.5f}, minimum {least}")


def equal_tokens(found: Sequence[int], truth: Sequence[int], precision: str) -> Verdict:
    """The number of first greedy tokens that are equal."""
    same = next((i for i, (a, b) in enumerate(zip(found, truth, strict=False)) if a != b), None)
    same = min(len(found), len(truth)) if same is None else same
    least = min(LEAST_TOKENS[precision], len(truth))
    detail = f"first {same} of {len(truth)} greedy tokens equal, minimum {least}"
    return Verdict(same >= least, float(len(truth) - same), float(len(truth) - least), detail)
