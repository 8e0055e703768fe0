"""``make compile-report``: compiles every Triton kernel in use for four chips, without a GPU, and checks the
machine code.

    python tools/compile_report.py            compile, check, write benchmarks/results/compile/
    python tools/compile_report.py --accept   write the report even if something became worse

The cases are those of kernels/compile_cases.py. For each compiled kernel, the report lists registers, shared
memory, spills to local memory (from ptxas), tensor-core instructions and the widths of loads from global
memory (from the PTX). The exit status is 1 if a kernel

    does not compile, or needs more shared or tensor memory than its chip has;
    spills without a reason stated in its case, or more than a quarter beyond the last report;
    lacks the tensor-core instructions that its case expects, or uses smaller ones beside them;
    loads less than half of its bytes as many at a time as its case expects (16, mostly);
    has lost tensor-core instructions, or a tenth of its wide loads, since the last report.

Counts are of instructions in the code, not of their executions. Results for unchanged sources are read from a
cache outside the repository ($MINILM_COMPILE_CACHE).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compile"
FULL = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}
"""The largest tensor-core instruction of each chip."""
TENSOR_MEMORY = 512
"""Columns of tensor memory that a multiprocessor of sm_100 has."""

Row = dict[str, Any]


def parse_ptxas(log: str) -> Row:
    """Registers, stack and spills in bytes, from what `ptxas -v` says; several functions are added up."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise ValueError(f"ptxas said nothing about registers and spills: {log!r}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*spills, strict=True))
    return {
        "registers": max(map(int, registers)),
        "stack": stack,
        "spill_stores": stores,
        "spill_loads": loads,
    }


def parse_ptx(ptx: str) -> Row:
    """Tensor-core instructions by kind, and loads from global memory by their width in bytes."""
    kinds = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma\b"}
    tensor = {kind: count for kind, at in kinds.items() if (count := len(re.findall(at, ptx)))}
    loads: Counter[int] = Counter()
    for vector, bits in re.findall(
        r"\bld\.global(?:\.[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx
    ):
        loads[int(vector or 1) * int(bits) // 8] += 1
    for width in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], *\[[^\]]*\], *(\w+)", ptx):
        loads[int(width, 0)] += 1
    loads[16] += len(re.findall(r"\bcp\.async\.bulk\.tensor[^;]*global", ptx))
    return {"tensor": tensor, "loads": {str(width): n for width, n in sorted(loads.items()) if n}}


def wide_share(loads: Mapping[str, int], width: int = 16) -> float:
    """The share of loaded bytes that come `width` or more at a time; 1 if nothing is loaded."""
    size = {int(at): int(at) * n for at, n in loads.items()}
    return sum(n for at, n in size.items() if at >= width) / sum(size.values()) if size else 1.0


def compile_one(launch: Any, capability: int) -> Row:
    """The figures of one launch on one chip, or {"error": why it does not compile}."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    function = getattr(importlib.import_module(launch.module), launch.function)
    source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    log = io.StringIO()
    try:
        with redirect_stdout(log):
            kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # any error is reported
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    found = {"shared": kernel.metadata.shared, "tensor_memory": tensor_memory}
    return parse_ptxas(log.getvalue()) | found | parse_ptx(kernel.asm["ptx"])


def cache_key(launch: Any, chip: str) -> str:
    """A hash of everything that the figures depend on: sources, arguments, compiler, and this file."""
    import triton

    function = getattr(importlib.import_module(launch.module), launch.function)
    parts = (function.cache_key, launch, chip, triton.__version__, Path(__file__).read_bytes())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def measure(jobs: Mapping[str, tuple[Any, str]], cache: Path, processes: int) -> dict[str, Row]:
    """The measurements by cache key, from the cache or by compiling in `processes` processes."""
    found: dict[str, Row] = {}
    for key in jobs:
        if (cache / f"{key}.json").is_file():
            found[key] = json.loads((cache / f"{key}.json").read_text())
    todo = {key: job for key, job in jobs.items() if key not in found}
    if not todo:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        made = {
            key: pool.submit(compile_one, launch, int(chip.removeprefix("sm_")))
            for key, (launch, chip) in todo.items()
        }
        for key, future in made.items():
            found[key] = future.result()
            new = cache / f"{key}.{os.getpid()}"
            new.write_text(json.dumps(found[key]))
            new.replace(cache / f"{key}.json")
    return found


def report(cases: Sequence[Any], chips: Iterable[str], cache: Path, processes: int) -> list[Row]:
    """One row for each case, jit function and chip."""
    from minilm.kernels.compile_cases import launches
    from minilm.kernels.devices import CHIPS

    rows: list[Row] = []
    jobs: dict[str, tuple[Any, str]] = {}
    for case in cases:
        for chip in chips:
            distinct = {repr(launch): launch for launch in launches(case, chip)}
            times: Counter[str] = Counter()
            for launch in distinct.values():
                times[launch.function] += 1
                number = f" ({times[launch.function]})" if times[launch.function] > 1 else ""
                key = cache_key(launch, chip)
                jobs[key] = launch, chip
                rows.append(
                    {
                        "kernel": case.kernel,
                        "case": case.name,
                        "function": launch.function + number,
                        "chip": chip,
                        "constants": _constants(launch),
                        "num_warps": launch.num_warps,
                        "num_stages": launch.num_stages,
                        "limit": CHIPS[chip].shared_memory,
                        "key": key,
                    }
                )
    found = measure(jobs, cache, processes)
    for row in rows:
        row.update(found[row.pop("key")])
    return rows


def _constants(launch: Any) -> dict[str, Any]:
    names = list(launch.signature)
    return {
        names[path[0]]: value
        for path, value in launch.constants.items()
        if isinstance(value, (bool, int, float, str)) and launch.signature[names[path[0]]] == "constexpr"
    }


def identity(row: Row) -> tuple[str, ...]:
    """The key by which a row is found in the last report."""
    return row["kernel"], row["case"], row["function"], row["chip"]


def judge(row: Row, expected: Any, before: Row | None) -> list[str]:
    """Problems of a row, compared with its case and with the same row of the last report."""
    if "error" in row:
        return [row["error"]]
    wrong = []
    if row["shared"] > row["limit"]:
        wrong.append(f"needs {row['shared']} bytes of shared memory, and the chip has {row['limit']}")
    if row["tensor_memory"] > TENSOR_MEMORY:
        wrong.append(f"needs {row['tensor_memory']} columns of tensor memory of {TENSOR_MEMORY}")
    spilled = row["stack"] + row["spill_stores"] + row["spill_loads"]
    if spilled and row["chip"] not in expected.spills:
        stored, loaded = row["spill_stores"], row["spill_loads"]
        wrong.append(f"spills: {row['stack']} bytes of stack, {stored} stored, {loaded} loaded")
    full = FULL[row["chip"]]
    if expected.tensor_cores and not row["tensor"]:
        wrong.append(f"no tensor-core instruction, expected {full}")
    elif expected.tensor_cores == "full" and set(row["tensor"]) != {full}:
        wrong.append(f"tensor-core instructions {_counts(row['tensor'])}, expected {full} alone")
    share = wide_share(row["loads"], expected.width)
    loads = f"of the bytes are loaded {expected.width} at a time ({_counts(row['loads'])})"
    if share < 0.5:
        wrong.append(f"{share:.0%} {loads}, expected half")
    if before is None or "error" in before:
        return wrong
    last = before["stack"] + before["spill_stores"] + before["spill_loads"]
    if spilled > 1.25 * last and row["chip"] in expected.spills:
        wrong.append(f"spills {spilled} bytes, {last} in the last report")
    if full in before["tensor"] and full not in row["tensor"]:
        wrong.append(f"had {full} in the last report, and has {_counts(row['tensor'])}")
    if share < (past := wide_share(before["loads"], expected.width)) - 0.1:
        wrong.append(f"{share:.0%} {loads}, {past:.0%} in the last report")
    return wrong


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {kind}" for kind, n in counts.items()) or "none"


def markdown(rows: Sequence[Row], cases: Sequence[Any], versions: str) -> str:
    """The table as Markdown: one row per kernel, one column per chip."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    lines = [
        "# Triton kernels, compiled",
        "",
        f"Made by `make compile-report` with {versions}. Every kernel at the configurations in use, compiled "
        "for each chip without a GPU; nothing here has been run. A cell is registers per thread · KB of "
        "shared memory · tensor-core instructions in the code · share of the bytes that are loaded 16 at "
        "a time; tiles and warps are the heuristics' choice for the chip.",
        "",
        "Shared memory that a program may use: 163 KB on sm_80, 99 KB on sm_86, 227 KB on sm_90 and sm_100.",
    ]
    by_case: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["kernel"], row["case"], row["function"]), {})[row["chip"]] = row
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        lines += ["", f"## kernels/{kernel}.py", "", "| case | function | " + " | ".join(chips) + " |"]
        lines.append("|---" * (2 + len(chips)) + "|")
        for (of, case, function), cells in by_case.items():
            if of == kernel:
                body = " | ".join(_cell(cells[chip]) if chip in cells else "" for chip in chips)
                lines.append(f"| {case} | `{function}` | {body} |")
    reasons = [
        f"- {case.kernel}, {case.name}, `{function}` on {chip}: {reason}"
        for case in cases
        for function, expected in case.expected.items()
        for chip, reason in expected.spills.items()
    ]
    lines += ["", "## Spills", "", *(reasons or ["None."])]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if "error" in row:
        return "does not compile"
    parts = [str(row["registers"]), f"{row['shared'] / 1024:.1f}"]
    parts += [f"{n} {kind}" for kind, n in row["tensor"].items()]
    parts.append(f"{wide_share(row['loads']):.0%}" if row["loads"] else "-")
    if spilled := row["spill_stores"] + row["spill_loads"]:
        parts.append(f"**spills {spilled} B**")
    return " · ".join(parts)


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """The rows of a report, if there is one."""
    if not path.is_file():
        return {}
    return {identity(row): row for row in json.loads(path.read_text())["rows"]}


def write(folder: Path, rows: Sequence[Row], cases: Sequence[Any], versions: str) -> None:
    """Write report.json, with one row per line, and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    (folder / "report.json").write_text(
        f'{{\n "versions": {json.dumps(versions)},\n "rows": [\n{body}\n ]\n}}\n'
    )
    (folder / "README.md").write_text(markdown(rows, cases, versions))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="minilm.kernels.compile_cases", help="a module with CASES")
    parser.add_argument("--only", default="", help="regular expression on 'kernel, case'; writes nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--accept", action="store_true", help="write the report even if there are problems")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["MINILM_TUNED"] = ""  # ignore the user's table of measured block sizes
    try:
        import triton
    except ImportError:
        print("compile-report: Triton is not installed, so nothing can be compiled", file=sys.stderr)
        return 2

    begin = time.monotonic()
    cache = os.environ.get("MINILM_COMPILE_CACHE") or Path.home() / ".cache" / "minilm" / "compile-report"
    cases = [
        case
        for case in importlib.import_module(options.cases).CASES
        if re.search(options.only, f"{case.kernel}, {case.name}")
    ]
    rows = report(cases, FULL, Path(cache), options.processes)
    last = read(options.output / "report.json")
    expected = {(case.kernel, case.name, name): e for case in cases for name, e in case.expected.items()}
    bad = 0
    for row in rows:
        function = row["function"].split()[0]
        for problem in judge(row, expected[row["kernel"], row["case"], function], last.get(identity(row))):
            bad += 1
            print(f"{row['kernel']}, {row['case']}, {row['function']} on {row['chip']}: {problem}")
    print(f"{len(rows)} kernels compiled in {time.monotonic() - begin:.0f} s, {bad} problems")
    if not options.only and (options.accept or not bad):
        write(options.output, rows, cases, f"Triton {triton.__version__}")
        print(f"written to {options.output}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
