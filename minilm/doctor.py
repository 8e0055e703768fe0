"""What this machine has, and which implementation of each op will run on it.

    report = examine(); report["torch"]["version"]; print(json.dumps(report))

No op is run: `minilm.ops.dispatch.decide` returns, for a typical call of each op, what the dispatch table
would choose and why. Without PyTorch, the other parts of the report still work.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import sys
from pathlib import Path
from typing import Any

from ._version import __version__
from .files import DEFAULT_DECODER, DEFAULT_ENCODER, HubError, resolve

PACKAGES: dict[str, str] = {
    "numpy": "",
    "safetensors": "",
    "tokenizers": "",
    "sentencepiece": "",
    "huggingface_hub": "",
    "gguf": "",
    "jinja2": "",
    "typer": "",
    "rich": "",
    "tqdm": "",
    "triton": "Triton kernels",
    "transformers": "comparison in the tests",
    "sentence-transformers": "comparison in the tests",
    "hypothesis": "the tests",
    "pytest": "the tests",
}
"""Distribution -> what it is used for, if minilm runs without it; "" for required ones."""

VARIABLES = (
    "MINILM_BACKEND",
    "MINILM_CPU_ISA",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
)

FEATURES = (
    *("sse2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("neon", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
"""The relevant instruction sets among those that Linux lists."""

ISAS: dict[str, tuple[str, ...]] = {
    "x86_64": ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"),
    "aarch64": ("generic", "neon_dotprod"),
}
"""Architecture -> the instruction sets that the CPU kernels of the extension are compiled for."""

EMULATED = ("aarch64",)
"""Architectures whose kernels the project tests only in an emulator."""


def examine() -> dict[str, Any]:
    """The whole report, in types that JSON supports. `problems`: what keeps minilm from working; `notes`:
    optional things that are missing."""
    report: dict[str, Any] = {
        "minilm": {"version": __version__, "folder": str(Path(__file__).parent)},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "system": {"platform": platform.platform(), "machine": platform.machine()},
        "cpu": _cpu(),
        "memory": memory(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": {name: {"version": _version(name), "for": use} for name, use in PACKAGES.items()},
        "models": {name: _model(name) for name in (DEFAULT_ENCODER, DEFAULT_DECODER)},
        "problems": [],
        "notes": [],
    }
    for name, package in report["packages"].items():
        if package["version"] is None and not package["for"]:
            report["problems"].append(f"{name} is not installed: pip install {name}")
    for model in report["models"].values():
        if model["reason"]:
            report["notes"].append(model["reason"])
    report.update(_torch_part(report))
    return report


def _torch_part(report: dict[str, Any]) -> dict[str, Any]:
    """The part of the report that needs PyTorch: GPUs, extension, ops."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it needs does not load
        report["problems"].append(f"PyTorch does not load: {' '.join(str(error).split())}")
        return {
            "torch": None,
            "gpus": [],
            "gpu_reason": "PyTorch does not load",
            "extension": None,
            "ops": [],
        }
    gpus, reason = _gpus(torch)
    extension, extension_problem = _extension()
    ops: list[dict[str, Any]] = []
    if extension_problem:
        report["problems"].append(extension_problem)
    else:
        if extension["reason"]:
            report["notes"].append(extension["reason"])
        if extension["not_run"]:
            sets = ", ".join(extension["not_run"])
            report["notes"].append(
                f"this processor cannot run the kernels for {sets}, so tests on this machine do not cover "
                "them"
            )
        if extension["built"] and platform.machine() in EMULATED:
            report["notes"].append("the native kernels for this architecture were tested in an emulator only")
        ops, op_problem = _ops(["cpu", *(["cuda"] if gpus else [])])
        if op_problem:
            report["problems"].append(op_problem)
    if reason:
        report["notes"].append(reason)
    return {
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "gpus": gpus,
        "gpu_reason": reason,
        "extension": extension,
        "ops": ops,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model(name: str) -> dict[str, str | None]:
    try:
        return {"path": str(resolve(name)), "reason": None}
    except HubError as error:
        return {"path": None, "reason": str(error)}


def _cpu() -> dict[str, Any]:
    """Name, cores and instruction sets (the latter only on Linux)."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass  # not Linux
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": name,
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in flags],
    }


def memory() -> dict[str, int | None]:
    """Bytes of memory, and the limit of a container (cgroup)."""
    found: dict[str, int | None] = {"total_bytes": None, "available_bytes": None, "limit_bytes": None}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in ("MemTotal", "MemAvailable"):
                found["total_bytes" if key == "MemTotal" else "available_bytes"] = (
                    int(value.split()[0]) * 1024
                )
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        found["limit_bytes"] = None if limit == "max" else int(limit)
    except OSError:
        pass  # not Linux, or no cgroup
    return found


def _gpus(torch: Any) -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that PyTorch finds, or why it finds none."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return [], "no GPU: this PyTorch is built for the CPU"
        return (
            [],
            f"no GPU: this PyTorch is built for CUDA {torch.version.cuda}, and finds no device or driver",
        )
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus, None


def _extension() -> tuple[dict[str, Any], str | None]:
    """The native extension, and an error if there is one (an impossible MINILM_CPU_ISA)."""
    try:
        from .ops.backends import native
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        return {"built": False, "reason": reason, "isa": None, "isas": [], "not_run": []}, reason
    return {
        "built": native.unavailable is None,
        "reason": native.unavailable,
        "isa": native.cpu_isa(),
        "isas": native.cpu_isas(),
        "not_run": _not_run(native.cpu_isas()),
    }, None


def _not_run(runnable: list[str]) -> list[str]:
    """The instruction sets that were compiled in and that this machine cannot run."""
    compiled = ISAS.get(platform.machine(), ()) if runnable else ()
    return [isa for isa in compiled if isa not in runnable]


def _ops(devices: list[str]) -> tuple[list[dict[str, Any]], str | None]:
    """For each device, dtype and op: the backend that will run, and why not the others."""
    from . import model  # noqa: F401 (its modules are the reference of whole ops)
    from .ops import BackendError, dispatch

    rows: list[dict[str, Any]] = []
    problem = None
    for device in devices:
        for dtype in _dtypes():
            for op in dispatch.ops():
                row: dict[str, Any] = {"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                try:
                    decision = dispatch.decide(op, typical_call(op, device, dtype))
                    row |= {"backend": decision.chosen.backend, "refused": decision.refused, "error": None}
                except BackendError as error:  # MINILM_BACKEND names one that cannot run it
                    row |= {"backend": None, "refused": {}, "error": str(error)}
                    problem = problem or str(error)
                rows.append(row)
    return rows, problem


def _dtypes() -> tuple[Any, ...]:
    import torch

    return torch.float32, torch.bfloat16


def typical_call(op: str, device: str, dtype: Any) -> Any:
    """The traits of a typical call of `op` in inference: 64 channels per head, 4 query heads per key/value
    head, no window.

    Raises ValueError for an op without an entry in this function.
    """
    from . import ops
    from .cache import KVCache

    page_size = inspect.signature(KVCache).parameters["page_size"].default
    kinds: dict[type, tuple[str, ...]] = {
        ops.NormTraits: ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"),
        ops.AttentionTraits: ("attention",),
        ops.PagedTraits: ("paged_attention", "append_kv", "rope_append"),
        ops.LinearTraits: ("linear",),
        ops.WholeTraits: ("blocks", "decode_step", "embed"),
        ops.PoolTraits: ("pool",),
        ops.PointwiseTraits: ("rope", "gated", "cross_entropy", "linear_cross_entropy"),
        ops.QuantizedTraits: ("quantized_linear",),
    }
    kind = next((kind for kind, names in kinds.items() if op in names), None)
    if kind is ops.NormTraits:
        return ops.NormTraits(device, dtype, 768, dtype, contiguous=True)
    if kind is ops.AttentionTraits:
        return ops.AttentionTraits(
            device, dtype, 64, 4, causal=True, window=False, dropout=False, lse=False, grad=False
        )
    if kind is ops.PagedTraits:
        return ops.PagedTraits(device, dtype, dtype, 64, 4, page_size, window=False, single_query=True)
    if kind is ops.PointwiseTraits:
        return ops.PointwiseTraits(device, dtype, "silu" if op == "gated" else None)
    if kind is ops.LinearTraits:
        return ops.LinearTraits(device, dtype, kept=True)
    if kind is ops.WholeTraits:
        return ops.WholeTraits(device, dtype)
    if kind is ops.PoolTraits:
        return ops.PoolTraits(device, dtype)
    if kind is ops.QuantizedTraits:
        return ops.QuantizedTraits(device, dtype, "q8_0", None, few_rows=True, grad=False)
    raise ValueError(f"minilm.doctor has no typical call of the op {op!r}")
