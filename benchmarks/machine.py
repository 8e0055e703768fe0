"""Describes the machine and the programs of a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "openvino-genai",
    "ctranslate2",
    "llama-cpp-python",
    "liger-kernel",
    "flash-attn",
)


def tiny() -> bool:
    """Whether MINILM_BENCH_TINY requests toy sizes, which only test that everything runs."""
    return os.environ.get("MINILM_BENCH_TINY", "") not in ("", "0")


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's name from the operating system."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def last_cache_bytes() -> int:
    """Size of the largest data cache of the first core; 32 MiB if unknown."""
    sizes = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        text = _read(str(folder / "size")).strip()
        found = re.fullmatch(r"(\d+)([KMG]?)", text)
        if found and _read(str(folder / "type")).strip() != "Instruction":
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=32 << 20)


def clocks_mhz() -> list[float]:
    """The clock of each core in MHz from the kernel; empty if unknown."""
    return [float(v) for v in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)]


def _jiffies() -> dict[str, int]:
    fields = _read("/proc/stat").split("\n", 1)[0].split()[1:]
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    return dict(zip(names, map(int, fields), strict=False))


def _tree() -> dict[int, float]:
    """Process id -> seconds of processor time, of this process and its descendants, including ended ones."""
    times = os.times()
    found = {os.getpid(): times.user + times.system + times.children_user + times.children_system}
    parents: dict[int, tuple[int, float]] = {}
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _read(str(folder / "stat")).rpartition(")")[2].split()
        if len(fields) > 14:
            parents[int(folder.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / tick)
    grew = True
    while grew:
        below = {pid: spent for pid, (above, spent) in parents.items() if above in found and pid not in found}
        found |= below
        grew = bool(below)
    return found


class Load:
    """How busy the machine was between construction and `stop`: load average, clocks, the share of processor
    time that the host gave to others (steal), and the share used by other programs."""

    def __init__(self) -> None:
        self._before, self._own = _jiffies(), sum(_tree().values())

    def stop(self) -> dict[str, Any]:
        """The figures to record with a measurement."""
        after, own = _jiffies(), sum(_tree().values()) - self._own
        spent = {k: after.get(k, 0) - v for k, v in self._before.items()}
        whole = sum(spent.values()) or 1
        used = (whole - spent.get("idle", 0) - spent.get("iowait", 0) - spent.get("steal", 0)) / whole
        tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        return {
            "load_1min": round(os.getloadavg()[0], 2),
            "steal_share": round(spent.get("steal", 0) / whole, 4),
            "idle_share": round(spent.get("idle", 0) / whole, 4),
            "others_share": round(max(0.0, used - own * tick / whole), 3) if spent else None,
            "clocks_mhz": [round(c) for c in clocks_mhz()],
        }


def busy_share(seconds: float = 0.5) -> float:
    """Share of all processors' time that is used while this process sleeps, 0..1: shows whether the machine
    is idle."""
    load = Load()
    time.sleep(seconds)
    return round(1.0 - float(load.stop()["idle_share"]), 3)


def git(*arguments: str) -> str:
    """The output of git in the working tree of this package; "" if there is none."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def describe(device: str = "cpu") -> dict[str, Any]:
    """Machine, system, versions and commit, ready for JSON."""
    import torch

    from minilm.ops.backends import native

    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    known = (
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_int8",
        "asimddp",
    )
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [f for f in known if flags and f in flags.group(1).split()],
        "last_cache_bytes": last_cache_bytes(),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "virtual": "hypervisor" in (flags.group(1).split() if flags else []),
        "native_isa": native.cpu_isa(),
        "native_unavailable": native.unavailable,
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "commit": git("rev-parse", "--short=12", "HEAD") or None,
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return result


def short_name(machine: dict[str, Any]) -> str:
    """A folder name for this machine's results: "amd-epyc-2-cores"."""
    name = machine.get("gpu", {}).get("name") or f"{machine['cpu']} {machine['usable_cores']} cores"
    name = re.sub(r"\(.*?\)|processor|cpu|@.*$", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
