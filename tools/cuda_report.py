"""``make cuda-report``: compiles every CUDA kernel for five chips, without a GPU: registers, spills.

    python tools/cuda_report.py     compile, check, write benchmarks/results/compile/cuda.md and cuda.json

The exit status is 1 if a kernel does not compile, spills, uses a stack, or needs more than a chip has.
Without nvcc nothing is compiled; a message says so, and the status is 0. The chips are those that setup.py
builds for (MINILM_CUDA_ARCHS chooses others).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compile"
MOST_REGISTERS = 255
"""Maximum registers of a thread, on all chips."""
REGISTERS = 65536
"""Of a block, and of a multiprocessor."""
MOST_STATIC = 48 * 1024
"""Bytes of shared memory that a block may declare, on every chip."""
SHARED = {"80": 164, "86": 100, "89": 100, "90a": 228, "90": 228, "100": 228, "120": 100}
"""KiB of shared memory of a multiprocessor (CUDA C++ programming guide); a block costs 1 more."""


class Kernel(NamedTuple):
    """The figures from ptxas for one kernel on one chip."""

    file: str
    kernel: str
    chip: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def setup_module() -> Any:
    """setup.py as a module, which defines how kernels are compiled."""
    spec = importlib.util.spec_from_file_location("minilm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(log: str, file: str, chip: str) -> list[Kernel]:
    """The kernels in the output of ``nvcc -Xptxas -v``."""
    found = []
    entries = re.split(r"Compiling entry function '(\w+)' for 'sm_\w+'", log)[1:]
    for name, text in zip(entries[::2], entries[1::2], strict=True):
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if frame is None or registers is None:
            raise ValueError(f"ptxas said nothing about the registers and spills of {name}: {text!r}")
        shared = re.search(r"(\d+) bytes smem", text)
        numbers = (int(registers[1]), int(shared[1]) if shared else 0, *map(int, frame.groups()))
        found.append(Kernel(file, name, chip, *numbers))
    return found


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names -> the names in the sources; unchanged if c++filt is missing."""
    names = list(names)
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    answer = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = {}
    for name, text in zip(names, answer.splitlines(), strict=True):
        text = re.sub(r"minilm::cuda::|\(anonymous namespace\)::|^void ", "", text)
        text = re.sub(r"\(Weights\)(\d)", lambda m: WEIGHTS[int(m[1])], text)
        plain[name] = text.rpartition("(")[0].replace("signed char", "int8") or text
    return plain


WEIGHTS = ("16 bits", "int8", "q8", "q4", "q4 with minimum")


def blocks(kernel: Kernel, threads: int) -> int:
    """Blocks that fit on a multiprocessor by registers (given out in 256 to a warp) and shared memory."""
    by_registers = REGISTERS // (-(-kernel.registers * 32 // 256) * 256 * (threads // 32))
    by_shared = SHARED.get(kernel.chip, 100) * 1024 // (kernel.shared + 1024)
    return min(by_registers, by_shared)


def judge(kernel: Kernel) -> list[str]:
    """Problems of a kernel."""
    wrong = []
    if kernel.spill_stores or kernel.spill_loads or kernel.stack:
        wrong.append(
            f"spills: {kernel.stack} bytes of stack, {kernel.spill_stores} stored, "
            f"{kernel.spill_loads} loaded"
        )
    if kernel.registers > MOST_REGISTERS:
        wrong.append(f"needs {kernel.registers} registers per thread, and there are {MOST_REGISTERS}")
    if kernel.shared > MOST_STATIC:
        wrong.append(f"needs {kernel.shared} bytes of shared memory, and a block may declare {MOST_STATIC}")
    return wrong


def compile_one(nvcc: str, file: Path, chip: str) -> list[Kernel]:
    """The kernels of one file on one chip. Raises CalledProcessError with the compiler's output."""
    options = [
        *setup_module().CUDA_FLAGS,
        f"-arch=sm_{chip}",
        "-cubin",
        "-Xptxas",
        "-v",
        f"-I{ROOT / 'csrc'}",
    ]
    command = [nvcc, *options, "-o", os.devnull, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse(done.stdout + done.stderr, file.name, chip)


def threads_of(file: Path) -> int:
    """Threads per block that the kernels of a file are compiled for."""
    names: dict[str, int] = {"kLinearWarps": 8, "kDecodeWarps": 4}
    for name, value in re.findall(r"constexpr int (\w+) = ([^;]+);", file.read_text()):
        if re.fullmatch(r"[\w\s*]+", value):
            product = 1
            for factor in value.split("*"):
                product *= int(factor) if factor.strip().isdigit() else names.get(factor.strip(), 1)
            names[name] = product
    return names.get("kThreads", 32 * names.get("kWarps", 1))


def table(kernels: list[Kernel], names: dict[str, str], folder: Path) -> str:
    """The report as Markdown: one row per kernel, one column per chip."""
    chips = list(dict.fromkeys(kernel.chip for kernel in kernels))
    head = ["kernel", *(f"sm_{chip}" for chip in chips)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * len(chips)]
    for file in dict.fromkeys(kernel.file for kernel in kernels):
        threads = threads_of(folder / file)
        of_file = [kernel for kernel in kernels if kernel.file == file]
        for name in sorted({kernel.kernel for kernel in of_file}, key=lambda name: names[name]):
            cells = []
            for chip in chips:
                k = next((k for k in of_file if k.kernel == name and k.chip == chip), None)
                cells.append(
                    "-"
                    if k is None
                    else f"{k.registers} · {k.shared} · {k.spill_stores} · {blocks(k, threads)}"
                )
            lines.append(f"| `{names[name]}` ({threads} threads) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(nvcc: str, folder: Path, chips: list[str], processes: int) -> list[Kernel]:
    """All kernels of the .cu files in `folder` on all chips."""
    jobs = [(file, chip) for file in sorted(folder.glob("*.cu")) for chip in chips]
    with ThreadPoolExecutor(processes) as pool:
        return [k for found in pool.map(lambda job: compile_one(nvcc, *job), jobs) for k in found]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "csrc" / "cuda", help="where the .cu files are")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    setup = setup_module()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        print("skipped: nvcc was not found")
        return 0
    try:
        kernels = report(nvcc, options.folder, setup.cuda_archs(), options.processes)
    except subprocess.CalledProcessError as error:
        print(f"{error.cmd[-1]} does not compile:\n{error.stderr.strip()[-3000:]}", file=sys.stderr)
        return 1
    names = readable(dict.fromkeys(kernel.kernel for kernel in kernels))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = next(iter(re.findall(r"release [^\n]*", version)), "unknown")
    text = (
        "# CUDA kernels, as compiled\n\n"
        f"By nvcc, {release}. No GPU was needed, and none of this is a measurement. Each cell: registers per "
        "thread · bytes of shared memory per block · bytes spilled · blocks that fit on a multiprocessor.\n\n"
        + table(kernels, names, options.folder)
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cuda.md").write_text(text)
    rows = [{**kernel._asdict(), "kernel": names[kernel.kernel]} for kernel in kernels]
    (options.output / "cuda.json").write_text(json.dumps({"nvcc": release, "kernels": rows}, indent=1) + "\n")
    wrong = [f"{names[k.kernel]} on sm_{k.chip}: {why}" for k in kernels for why in judge(k)]
    files = len({k.file for k in kernels})
    print(
        f"{len(kernels)} kernels of {files} files for {', '.join('sm_' + c for c in setup.cuda_archs())}: ",
        end="",
    )
    print(f"{len(wrong)} with problems" if wrong else "no spills, all fit")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
