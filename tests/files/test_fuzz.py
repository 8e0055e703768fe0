"""tools/fuzz.py: a case is made from its number alone, and what goes wrong in a child is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"


@pytest.mark.slow
def test_a_short_campaign_and_one_case_again(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "--keep", str(tmp_path), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--cases", "90", "--seed", "11")
    assert done.returncode == 0, done.stdout
    assert "90 cases" in done.stdout
    assert "10 gguf" in done.stdout
    one, other = run("--repeat", "gguf:11:3"), run("--repeat", "gguf:11:3")
    assert one.stdout == other.stdout
    assert "model.gguf" in one.stdout
