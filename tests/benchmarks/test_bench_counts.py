"""Instruction counts of the CPU kernels compared with the committed figures; a slower kernel is detected."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "instruction_counts", ROOT / "tools" / "instruction_counts.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kernels_need_no_more_instructions_than_committed(tool: ModuleType) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed (apt install valgrind)")
    name = tool.compiler()[1]
    figures = json.loads(tool.FIGURES.read_text())
    if name not in figures:
        pytest.skip(f"no figures for {name}, only for {', '.join(figures)}")
    worse, remarks = tool.compare(tool.count(), figures, name)
    assert not worse, "\n".join(worse)
    assert not [r for r in remarks if r.startswith(("new", "gone"))], (
        "run tools/instruction_counts.py --update"
    )


def test_a_kernel_that_grew_is_caught(tool: ModuleType) -> None:
    figures = {"gcc 12 x86_64": {"avx2": {"norm 2 x 3": 1000, "gone 2 x 3": 5}}}
    found = {"avx2": {"norm 2 x 3": 1031, "new 2 x 3": 7}}
    worse, remarks = tool.compare(found, figures, "gcc 12 x86_64")
    assert worse == ["norm 2 x 3, avx2: 1,031 instructions, +3.1% of 1,000"]
    assert [r.split(":")[0] for r in remarks] == ["new", "gone"]
    assert tool.compare({"avx2": {"norm 2 x 3": 1029}}, figures, "gcc 12 x86_64")[0] == []
    assert "nothing to compare" in tool.compare(found, figures, "clang 19 x86_64")[1][0]


@pytest.mark.slow
def test_a_planted_slow_kernel_is_caught(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernel with every row done twice: the counts see it, on any machine and under any load."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed (apt install valgrind)")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    source = tmp_path / "csrc" / "cpu" / "layer_norm.cpp"
    text = source.read_text()
    loop = re.search(r"for \(std::int64_t row = begin; row < end; \+\+row\) \{", text)
    assert loop is not None, "the kernel's loop over rows was rewritten: plant the fault anew"
    twice = "for (std::int64_t again = begin; again < 2 * end - begin; ++again) {\n"
    twice += "    const std::int64_t row = begin + (again - begin) / 2;"
    source.write_text(text[: loop.start()] + twice + text[loop.end() :])
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    setup = tool.setup_module()
    monkeypatch.setattr(setup, "INSTRUCTION_SETS", {"generic": []})
    monkeypatch.setattr(tool, "setup_module", lambda: setup)
    name = tool.compiler()[1]
    figures = json.loads(tool.FIGURES.read_text())
    if name not in figures:
        pytest.skip(f"no figures for {name}")
    worse, _ = tool.compare(tool.count(), figures, name)
    assert len(worse) == sum("layer_norm" in figure for figure in figures[name]["generic"])
