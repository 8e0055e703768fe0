"""Counts the instructions of the CPU kernels at fixed sizes, and compares them with the committed figures.

    python tools/instruction_counts.py            compare; exit status 1 if a kernel needs more than allowed
    python tools/instruction_counts.py --update   write new figures, after an intended change

Times on shared machines are not stable, but instruction counts are: they reveal a kernel that is no longer
vectorised, or has an additional pass. The kernels of csrc/cpu/ are compiled as setup.py compiles them, linked
to instruction_counts.cpp without torch, and run under ``valgrind --tool=callgrind`` for the instruction sets
that valgrind knows. The figures hold for one compiler; with another major version nothing is compared, and a
message says so."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "instruction_counts.json"
TOLERANCE = 0.03
"""Allowed increase over the committed figure, for another libc or linker. Decreases are reported too."""
UNKNOWN_TO_VALGRIND = ("avx512", "avx512_vnni", "avx512_bf16")


class CannotCount(RuntimeError):
    """Raised if something is missing on this machine; the message says what."""


def setup_module() -> Any:
    """setup.py as a module, for the compiler's flags."""
    spec = importlib.util.spec_from_file_location("minilm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> tuple[str, str]:
    """The compiler and its "name major architecture". Raises CannotCount."""
    name = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    if not name:
        raise CannotCount("no C++ compiler was found")
    answer = subprocess.run([name, "-dumpversion"], capture_output=True, text=True, check=True).stdout
    kind = "clang" if "clang" in name else "gcc"
    return name, f"{kind} {answer.strip().split('.')[0]} {platform.machine()}"


def build(folder: Path) -> tuple[Path, list[str]]:
    """Compile and link the driver; returns it and the instruction sets in it."""
    setup = setup_module()
    name, _ = compiler()
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    kernels = [file for file in sources if file.name != "dispatch.cpp"]
    isas = [isa for isa in setup.INSTRUCTION_SETS if isa not in UNKNOWN_TO_VALGRIND]
    objects = []
    include = f"-I{ROOT / 'csrc'}"
    for isa in isas:
        for file in kernels:
            made = folder / f"{file.stem}-{isa}.o"
            flags = [*setup.COMPILE_FLAGS, *setup.KERNEL_FLAGS, *setup.INSTRUCTION_SETS[isa]]
            _run([name, *flags, f"-DMINILM_ISA={isa}", include, "-c", str(file), "-o", str(made)])
            objects.append(str(made))
    program = folder / "instruction_counts"
    have = [f"-DMINILM_HAS_{isa.upper()}=1" for isa in isas]
    driver = [str(ROOT / "csrc" / "cpu" / "dispatch.cpp"), str(Path(__file__).with_suffix(".cpp"))]
    _run([name, *setup.COMPILE_FLAGS, *have, include, *driver, *objects, "-o", str(program)])
    return program, isas


def _run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise CannotCount(f"{' '.join(command[:2])} ... failed: {done.stderr.strip()[-600:]}")
    return done.stdout


def count() -> dict[str, dict[str, int]]:
    """{instruction set: {case: instructions}}. Raises CannotCount."""
    if shutil.which("valgrind") is None:
        raise CannotCount("valgrind is not installed (on Debian and Ubuntu: apt install valgrind)")
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, isas = build(folder)
        for isa in isas:
            out = folder / isa
            valgrind = ["valgrind", "--tool=callgrind", "--toggle-collect=measured", "--dump-after=measured"]
            command = [*valgrind, f"--callgrind-out-file={out}", str(program), isa]
            lines = _run(command, env={**os.environ, "LD_BIND_NOW": "1"}).splitlines()
            names = [line.split("\t")[1] for line in lines]
            found[isa] = {case: _total(Path(f"{out}.{i + 1}")) for i, case in enumerate(names)}
    return found


def _total(file: Path) -> int:
    match = re.search(r"^(?:totals|summary): (\d+)", file.read_text(), re.MULTILINE)
    if match is None or int(match[1]) == 0:
        raise CannotCount(f"callgrind left no count in {file.name}")
    return int(match[1])


def compare(
    found: dict[str, dict[str, int]], figures: dict[str, Any], name: str
) -> tuple[list[str], list[str]]:
    """(kernels that need more than allowed, other remarks), compared with the figures for compiler `name`."""
    known = figures.get(name)
    if known is None:
        return [], [f"no figures for {name}, only for {', '.join(figures) or 'none'}: nothing to compare"]
    worse, remarks = [], []
    for isa, counts in found.items():
        for case, value in counts.items():
            before = known.get(isa, {}).get(case)
            if before is None:
                remarks.append(f"new: {case}, {isa}: {value:,} instructions (--update writes the figure)")
            elif value > before * (1 + TOLERANCE):
                worse.append(
                    f"{case}, {isa}: {value:,} instructions, {value / before - 1:+.1%} of {before:,}"
                )
            elif value < before * (1 - TOLERANCE):
                remarks.append(
                    f"less: {case}, {isa}: {value:,} instructions, {value / before - 1:+.1%} of {before:,}"
                )
    for isa, counts in known.items():
        gone = sorted(set(counts) - set(found.get(isa, {})))
        remarks += [f"gone: {case}, {isa}" for case in gone]
    return worse, remarks


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write new figures")
    options = parser.parse_args()
    try:
        found, (_, name) = count(), compiler()
    except CannotCount as error:
        print(f"cannot count: {error}", file=sys.stderr)
        return 2
    for isa, counts in found.items():
        for case, value in counts.items():
            rows, channels = map(int, re.findall(r"\d+", case)[-2:])
            print(f"{isa:8} {case:36} {value:>10,} instructions, {value / rows / channels:6.2f} per element")
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    if options.update:
        figures[name] = found
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"written: {FIGURES.relative_to(ROOT)}, for {name}")
        return 0
    worse, remarks = compare(found, figures, name)
    for line in (*remarks, *worse):
        print(line)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
