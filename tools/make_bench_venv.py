"""Creates the bench's environment on top of another: make_bench_venv.py BASE FOLDER CONSTRAINTS.

FOLDER sees the packages of BASE, but not the other way round. Each package of CONSTRAINTS is installed
separately: one without a build for this platform is reported and does not affect the others. llama-cpp-python
is compiled for this processor."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def main(base: Path, folder: Path, constraints: Path) -> None:
    """Create the environment, or update it."""
    subprocess.check_call([sys.executable, str(Path(__file__).with_name("make_venv.py")), str(folder)])
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(base.resolve())}))
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder.resolve())}))
    link = f"import site; site.addsitedir({str(packages)!r})\n"
    (inside / "_base_environment.pth").write_text(link)
    (inside / "_minilm_base.pth").unlink(missing_ok=True)
    python = str(folder / "bin" / "python")
    wanted = [
        line.strip() for line in constraints.read_text().splitlines() if line.strip() and line[0] != "#"
    ]
    failed = []
    environment = {**os.environ, "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON")}
    for requirement in wanted:
        command = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            str(constraints),
        ]
        if subprocess.call([*command, requirement], env=environment):
            failed.append(requirement)
    for requirement in failed:
        print(f"no build for this platform: {requirement}; the bench will say that it was skipped")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
