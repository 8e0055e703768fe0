"""The `native` backend: ops of the compiled extension minilm._C (csrc/), with their derivatives and fake
implementations (which compute only output shapes, for torch.compile).

The extension is optional: without it, or with a PyTorch older than its stable ABI, this module still imports,
and `unavailable` holds the reason. The environment variable
``MINILM_CPU_ISA=generic|avx2|avx512|avx512_vnni|avx512_bf16`` (on ARM ``generic|neon_dotprod``) selects the
instruction set of the CPU kernels; by default it is the best available. One that this machine cannot run is
an error at import.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import native_attention, packed

OLDEST_TORCH = (2, 10)
NORM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and the reason. An unsupported MINILM_CPU_ISA raises RuntimeError."""
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        return None, f"the extension minilm._C needs PyTorch 2.10 or later, and this is {torch.__version__}"
    try:
        return importlib.import_module("minilm._C"), None
    except ModuleNotFoundError as error:
        if error.name != "minilm._C":
            raise
        return None, "the extension minilm._C is not built (setup.py says what it needs)"
    except ImportError as error:  # a binary of another platform, a symbol that this PyTorch lacks
        return None, f"the extension minilm._C does not load: {error}"


_extension, unavailable = _load()


def cpu_limit(root: Path = Path("/")) -> int | None:
    """Number of CPUs that this process may use at a time, rounded up: the least of its affinity and the CPU
    quotas of its control group (cgroup v2 cpu.max or v1 cpu.cfs_quota_us) and its parents; None: unknown."""
    limits: list[float] = []
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    for folder, new in _control_groups(root):
        limits += _quota(folder, new)
    return max(1, math.ceil(min(limits))) if limits else None


def _control_groups(root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's control groups for CPU time, and whether they are cgroup v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        new = number == "0" and not controllers
        if not new and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup"
        top = top if new else top / controllers if (top / controllers).is_dir() else top / "cpu"
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place != top and top not in place.parents:
                break
            yield place, new


def _quota(folder: Path, new: bool) -> list[float]:
    try:
        if new:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):  # "max", or there is no such file
        return []


def limit_threads(limit: int | None) -> None:
    """Limit the threads of a native forward pass. They synchronise often, so more threads than CPUs would
    spin while others cannot run. A thread count set by `torch.set_num_threads` or OMP_NUM_THREADS takes
    precedence. Importing calls this with `cpu_limit`; None removes the limit."""
    if _extension is not None:
        chosen = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
        _extension.limit_threads(torch.get_num_threads(), 0 if limit is None or chosen else limit)


def team_threads() -> int:
    """Number of threads that a native forward pass uses now."""
    threads = torch.get_num_threads()
    return threads if _extension is None else int(_extension.team_threads(threads))


def cpu_isa() -> str | None:
    """The instruction set of the CPU kernels in use ("generic", "avx2", ...); None without the extension."""
    return _extension.cpu_isa() if _extension is not None else None


def cpu_isas() -> list[str]:
    """The instruction sets that this machine can run, the best last; empty without the extension."""
    return list(_extension.cpu_isas()) if _extension is not None else []


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (*x.shape[:-1], 1)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *_statistics(x))


def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), x.new_empty(x.shape), *_statistics(x))


def _norm_gradients(
    ctx: Any, grad_y: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the normalised tensor, weight and bias, computed in the statistics' dtype."""
    total, weight, mean, rstd = ctx.saved_tensors
    if grad_y is None:
        return None, None, None
    wide = mean.dtype
    bias = weight.to(wide)  # placeholder for the bias, of which only shape and dtype matter
    gradients = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide), total.to(wide), total.shape[-1:], mean, rstd, weight.to(wide), bias, needs
    )
    grad, grad_weight, grad_bias = gradients
    return (
        grad.to(total.dtype) if needs[0] else None,
        grad_weight.to(weight.dtype) if needs[1] else None,
        grad_bias.to(weight.dtype) if needs[2] else None,
    )


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight = inputs[:2]
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (*_norm_gradients(ctx, grad_y, (needs_x, needs_weight, needs_bias)), None)


def _add_layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight = inputs[2]
    _, total, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_layer_norm_backward(
    ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    grad, grad_weight, grad_bias = _norm_gradients(
        ctx, grad_y, (needs_x or needs_residual, needs_weight, needs_bias)
    )
    if grad_sum is not None and (needs_x or needs_residual):
        grad = grad_sum if grad is None else grad + grad_sum
    return grad if needs_x else None, grad if needs_residual else None, grad_weight, grad_bias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See `minilm.ops.layer_norm`."""
    y: Tensor = torch.ops.minilm.layer_norm.default(x, weight, bias, eps)[0]
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `minilm.ops.add_layer_norm`. Mixed dtypes are promoted, as in ``x + residual``."""
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    y, total, _, _ = torch.ops.minilm.add_layer_norm.default(x, residual, weight, bias, eps)
    return y, total


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _rms_gradients(
    total: Tensor, weight: Tensor, eps: float, grad_y: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the normalised tensor and of weight, in float32 (float64), by differentiable formulas."""
    if grad_y is None:
        return None, None
    wide = torch.float64 if total.dtype == torch.float64 else torch.float32
    x, upstream = total.to(wide), grad_y.to(wide)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * rstd
    grad = grad_weight = None
    if needs[0]:
        of_unit = upstream * weight.to(wide)
        grad = (rstd * (of_unit - unit * (of_unit * unit).mean(-1, keepdim=True))).to(total.dtype)
    if needs[1]:
        grad_weight = (upstream * unit).flatten(0, -2).sum(0).to(weight.dtype)
    return grad, grad_weight


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    return (*_rms_gradients(x, weight, ctx.eps, grad_y, (needs_x, needs_weight)), None)


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, ctx.eps = inputs[2:]
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(
    ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
    needs_sum = needs_x or needs_residual
    grad, grad_weight = _rms_gradients(total, weight, ctx.eps, grad_y, (needs_sum, needs_weight))
    if grad_sum is not None and needs_sum:
        grad = grad_sum if grad is None else grad + grad_sum
    return grad if needs_x else None, grad if needs_residual else None, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `minilm.ops.rms_norm`."""
    y: Tensor = torch.ops.minilm.rms_norm.default(x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `minilm.ops.add_rms_norm`. Mixed dtypes are promoted, as in ``x + residual``."""
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    y, total = torch.ops.minilm.add_rms_norm.default(x, residual, weight, eps)
    return y, total


def supports_norm(traits: Any) -> str | None:
    """None, or why the extension's norms cannot run this call (`minilm.ops.NormTraits`)."""
    if traits.device != "cpu":
        return f"the extension has no kernel for {traits.device}"
    if traits.dtype not in NORM_DTYPES:
        return f"the extension has no kernel for {traits.dtype}"
    wide = traits.dtype in (torch.bfloat16, torch.float16) and traits.parameter_dtype == torch.float32
    if traits.parameter_dtype != traits.dtype and not wide:
        return f"the extension has no kernel for {traits.dtype} with parameters in {traits.parameter_dtype}"
    if traits.channels == 0:
        return "the extension needs at least one channel"
    return None


def pool(x: Tensor, cu_seqlens: Tensor, unit: bool) -> Tensor:
    """See `minilm.ops.pool`."""
    y: Tensor = torch.ops.minilm.pool.default(x.float().contiguous(), cu_seqlens, unit)
    return y.to(x.dtype)


def supports_pool(traits: Any) -> str | None:
    """None, or why the extension cannot run this call (`minilm.ops.PoolTraits`)."""
    if traits.device != "cpu":
        return f"the extension has no kernel for {traits.device}"
    if traits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the extension has no kernel for {traits.dtype}"
    if traits.grad:
        return "the extension's pooling has no derivative"
    return None


def register_all() -> None:
    """Add the extension's ops to the dispatch table, or record why it is unavailable."""
    if unavailable is not None:
        dispatch.register_unavailable("native", unavailable)
        return
    for op, call, supports in (
        ("layer_norm", layer_norm, supports_norm),
        ("add_layer_norm", add_layer_norm, supports_norm),
        ("rms_norm", rms_norm, supports_norm),
        ("add_rms_norm", add_rms_norm, supports_norm),
        ("rope", native_attention.rope, native_attention.supports_rope),
        ("append_kv", native_attention.append_kv, native_attention.supports_paged),
        ("rope_append", native_attention.rope_append, native_attention.supports_paged),
        ("attention", native_attention.attention, native_attention.supports_attention),
        ("paged_attention", native_attention.paged_attention, native_attention.supports_paged),
        ("pool", pool, supports_pool),
        ("linear", packed.linear, packed.supports_linear),
        ("quantized_linear", packed.quantized_linear, packed.supports_quantized_linear),
    ):
        dispatch.register(dispatch.Implementation(op, "native", call, supports))


def _register_with_torch() -> None:
    for name, fake, backward, setup in (
        ("minilm::layer_norm", _layer_norm_fake, _layer_norm_backward, _layer_norm_setup),
        ("minilm::add_layer_norm", _add_layer_norm_fake, _add_layer_norm_backward, _add_layer_norm_setup),
        ("minilm::rms_norm", _rms_norm_fake, _rms_norm_backward, _rms_norm_setup),
        ("minilm::add_rms_norm", _add_rms_norm_fake, _add_rms_norm_backward, _add_rms_norm_setup),
    ):
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, backward, setup_context=setup)
    native_attention.register_fakes()
    packed.register_fakes()


if _extension is not None:
    _register_with_torch()
    limit_threads(cpu_limit())
