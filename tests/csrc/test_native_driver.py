"""The CPU kernels for ARM, in an emulator: the driver of csrc/tests, which needs no torch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
neon_check = importlib.import_module("neon_check")


def test_every_kernel_for_arm() -> None:
    """Compiled for aarch64 and run under qemu, with and without the instructions for dot products."""
    reason = neon_check.missing()
    if reason is not None:
        pytest.skip(reason)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, TOOLS / "neon_check.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["generic", "neon_dotprod", "all are right"]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neon_check, "CXX", "no-such-compiler")
    assert neon_check.missing() == (
        "no-such-compiler is not installed (on Debian and Ubuntu: apt install g++-aarch64-linux-gnu)"
    )
