"""Compiles the driver of csrc/tests with the CPU kernels, without torch, for any machine and any flags."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def setup_module() -> Any:
    """setup.py as a module, for the compiler's flags."""
    spec = importlib.util.spec_from_file_location("minilm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(
    folder: Path, compiler: str, machine: str, flags: list[str], only: tuple[str, ...] | None = None
) -> Path:
    """The driver with the instruction sets of `machine` (a name as in platform.machine()), in `folder`.

    `flags` come after those of setup.py; `only` names instruction sets, otherwise all are taken. Raises
    RuntimeError with the compiler's message.
    """
    setup = setup_module()
    isas: dict[str, list[str]] = setup.instruction_sets(machine)
    isas = {isa: isa_flags for isa, isa_flags in isas.items() if only is None or isa in only}
    common = [*shlex.split(compiler), *setup.COMPILE_FLAGS, f"-I{ROOT / 'csrc'}", "-pthread"]
    commands, objects = [], []
    for isa, isa_flags in isas.items():
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.name == "dispatch.cpp":
                continue
            objects.append(str(folder / f"{source.stem}-{isa}.o"))
            kernel = [*setup.KERNEL_FLAGS, *isa_flags, *flags, f"-DMINILM_ISA={isa}"]
            commands.append([*common, *kernel, "-c", str(source), "-o", objects[-1]])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    have = [f"-DMINILM_HAS_{isa.upper()}=1" for isa in isas]
    checks = map(str, sorted((ROOT / "csrc" / "tests").glob("*.cpp")))
    sources = [str(ROOT / "csrc" / "cpu" / "dispatch.cpp"), *checks]
    driver = folder / "driver"
    _run([*common, *flags, *have, *sources, *objects, "-o", str(driver)])
    return driver


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr.strip()[-3000:]}")
