"""How equality is judged: errors are measured against float64, and allowed relative to what PyTorch itself
gets wrong.

A number alone (``atol=1e-5``) either hides an error or fails on another machine. So an implementation may be
at most twice as far from the float64 result as eager PyTorch is in the same dtype, plus a floor that the
test states. Whole float32 models may differ from transformers by 1e-4 at most, or, where float32 costs
transformers itself more, by that rule. NaN never passes, not even where NaN is expected.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

listeners: list[Callable[[str, float, float], object]] = []
"""Told of each judgement beside eager: dtype, error, eager's error (tools/kernel_table.py collects them)."""

LOGITS_ATOL = 1e-4
"""float32 logits of a whole model, against transformers: largest absolute difference."""


def max_error(actual: Tensor, expected: Tensor, what: str = "result") -> float:
    """Largest absolute difference, computed in float64; infinite where one is NaN or only one is infinite.

    Raises AssertionError when the shapes differ: broadcasting would compare a thing with a part of another.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, and expected is {list(expected.shape)}"
    )
    return float(_differences(actual, expected).max()) if actual.numel() else 0.0


def assert_close(
    actual: Tensor, expected: Tensor, *, atol: float = LOGITS_ATOL, what: str = "result"
) -> None:
    """|actual - expected| <= atol everywhere."""
    error = max_error(actual, expected, what)
    assert error <= atol, f"{what}: {_worst(actual, expected)}; the error {error:.3g} is above {atol:.3g}"


def assert_as_good_as_eager(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    floor: float | None = None,
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """err(actual) <= factor * err(eager) + floor, both errors against `exact` (float64).

    `eager` has the dtype of `actual`. `floor` in absolute terms; if not stated, one unit in the last place
    of the largest exact value, since eager may be exact by luck.
    """
    assert exact.dtype == torch.float64, f"{what}: the reference must be float64, and is {exact.dtype}"
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, and eager computes {eager.dtype}"
    error, eager_error = max_error(actual, exact, what), max_error(eager, exact, f"{what}, eager")
    assert math.isfinite(eager_error), f"{what}: eager itself is {_worst(eager, exact)}, which judges nothing"
    if floor is None:
        floor = torch.finfo(actual.dtype).eps * (float(exact.abs().max()) if exact.numel() else 0.0)
    for listener in listeners:
        listener(str(actual.dtype).removeprefix("torch."), error, eager_error)
    allowed = factor * eager_error + floor
    assert error <= allowed, (
        f"{what}: {_worst(actual, exact)}; the error {error:.3g} is above {factor:g} x {eager_error:.3g} "
        f"(eager {actual.dtype}) + {floor:.3g}"
    )


def assert_agree(
    actual: Tensor,
    expected: Tensor,
    model: nn.Module,
    again: Callable[[Any], Tensor],
    *,
    atol: float = LOGITS_ATOL,
    what: str = "result",
) -> None:
    """|actual - expected| <= atol, or |actual - exact| <= atol + twice what float32 costs `model`.

    `expected` is `again(model)`, which is asked for other versions of the model where the first fails: a
    norm of two channels that are nearly equal, say, makes any difference of two roundings, and on which
    processor that is seen depends on its matrix products.
    """
    if max_error(actual, expected, what) <= atol:
        return
    exact, cost = in_float64(model, again)
    error, allowed = max_error(actual, exact, what), atol + 2 * cost
    assert error <= allowed, (
        f"{what}: {_worst(actual, exact)}; the error {error:.3g} is above {atol:.3g} + 2 x {cost:.3g} "
        "(the model itself in float32)"
    )


@torch.no_grad()
def in_float64(model: nn.Module, again: Callable[[Any], Tensor]) -> tuple[Tensor, float]:
    """`again(model)` in float64, and how far float32 is from that: at the most of this model and of three
    whose weights are one rounding away, since one alone may be exact by luck."""
    exact, cost = again(copy.deepcopy(model).double()), 0.0
    for seed in range(4):
        single, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        for parameter in single.parameters():
            noise = torch.randint(-1, 2, parameter.shape, generator=generator) if seed else 0
            parameter.mul_(1 + noise * torch.finfo(torch.float32).eps)
        cost = max(cost, max_error(again(single), again(copy.deepcopy(single).double())))
    return exact, cost


def in_dtype_of(model: nn.Module, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same arguments for a version of the model: floating-point tensors in its dtype."""
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in call.items()}


def _differences(actual: Tensor, expected: Tensor) -> Tensor:
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    same_infinity = a.isinf() & (a == b)
    return (a - b).abs().masked_fill(same_infinity, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def _worst(actual: Tensor, expected: Tensor) -> str:
    flat = int(_differences(actual, expected).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape)]
    a, b = actual.flatten()[flat].item(), expected.flatten()[flat].item()
    return f"{a:.9g} at {place}, and expected is {b:.9g}"
