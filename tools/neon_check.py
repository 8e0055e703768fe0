"""Checks the CPU kernels for ARM on other machines: compiles them and the driver of csrc/tests for aarch64,
and runs the driver in an emulator.

    python tools/neon_check.py

Needs Debian's g++-aarch64-linux-gnu and qemu-user, or the commands in MINILM_NEON_CXX and MINILM_NEON_RUN.
The exit status is that of the driver, 1 if a result is wrong; 2 if something is missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_driver

CXX = os.environ.get("MINILM_NEON_CXX", "aarch64-linux-gnu-g++")
EMULATOR = os.environ.get("MINILM_NEON_RUN", "qemu-aarch64 -cpu max")


def missing() -> str | None:
    """What this machine lacks, or None."""
    for command, package in ((CXX, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(shlex.split(command)[0]) is None:
            return f"{shlex.split(command)[0]} is not installed (on Debian and Ubuntu: apt install {package})"
    return None


def main() -> int:
    """The command."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    reason = missing()
    if reason is not None:
        print(f"cannot check: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        # -static: the emulator needs no libraries of the other machine.
        driver = native_driver.build(Path(folder), CXX, "aarch64", ["-O2", "-static"])
        return subprocess.run([*shlex.split(EMULATOR), str(driver)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
