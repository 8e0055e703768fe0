"""``make gpu-check``: all checks that need a GPU, in one command of less than ten minutes.

It needs only the working tree, PyTorch, Triton and transformers; nothing is downloaded or installed. The
package is laid out with links in a temporary folder, in which the extension is built. Each step has a time
limit, and is reported as passed, failed, or not run, with the reason:

    extension   compiled from csrc/
    tests       those marked gpu
    sanitizer   the tests marked gpu whose name holds "small", under compute-sanitizer
    tuning      `minilm tune` on MiniLM's shapes; what it finds serves the steps that follow
    ops         the op level in 16 bits
    models      layers and whole models with the peers that are on the machine

The output is one folder ($OUT, or ./gpu-check-out) with few files: report.json, results of the bench,
pictures. Without a GPU, MINILM_BENCH_TINY=1 runs the same steps on the CPU in toy sizes with Triton's
interpreter, which tests only the command itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 570.0
"""Seconds for all steps."""


@dataclass
class Step:
    """The result of a step. `status`: passed, failed, skipped, out of time."""

    name: str
    status: str
    seconds: float
    detail: str


def lay_out(folder: Path) -> Path:
    """A folder to put on PYTHONPATH: minilm/ with kernels and benchmarks inside, all links into the working
    tree."""
    package = folder / "minilm"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "minilm").iterdir():
        if entry.name != "__pycache__" and not entry.name.startswith("_C."):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (package / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


class Check:
    """Runs the steps one after the other within the budget."""

    def __init__(self, out: Path) -> None:
        import torch

        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.site = lay_out(out.parent / f".{out.name}-site")
        self.gpu = torch.cuda.is_available()
        self.tiny = os.environ.get("MINILM_BENCH_TINY", "") not in ("", "0")
        self.end = time.monotonic() + BUDGET
        self.steps: list[Step] = []
        self.env = {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "200",
        }
        self.env.setdefault("MINILM_BENCH_CACHE", str(self.site / "cache"))
        if not self.gpu:
            self.env["TRITON_INTERPRET"] = "1"

    def run(
        self, name: str, command: list[str], limit: float, *, nothing: dict[int, str] | None = None
    ) -> None:
        """Run one command as a step. `nothing`: exit statuses that mean there was nothing to do -> the
        reason."""
        left = self.end - time.monotonic()
        if left < 10:
            self.steps.append(Step(name, "out of time", 0.0, "the time was used up before this step"))
            return
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command,
                env=self.env,
                cwd=self.site,
                timeout=min(limit, left),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            raw = error.stdout or b""
            text, code = raw if isinstance(raw, str) else raw.decode(errors="replace"), None
        print(text[-4000:], flush=True)
        tail = "\n".join(text.strip().splitlines()[-12:])
        if code is None:
            status = "out of time"
        elif nothing and code in nothing:
            status, tail = "skipped", nothing[code]
        else:
            status = "passed" if code == 0 else "failed"
        self.steps.append(Step(name, status, round(time.monotonic() - begin, 1), tail))

    def skip(self, name: str, reason: str) -> None:
        """A step that cannot run here."""
        self.steps.append(Step(name, "skipped", 0.0, reason))

    def all(self) -> int:
        """Every step; returns the exit status."""
        python = sys.executable
        self._extension(python)
        pytest = [
            python,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
        ]
        pytest += ["-p", "no:cacheprovider", *self._tests()]
        none = {5: "no test is marked gpu"}
        self.run("tests", [*pytest, "-m", "gpu"], 240, nothing=none)
        sanitizer = shutil.which("compute-sanitizer")
        if not self.gpu:
            self.skip("sanitizer", "there is no CUDA device")
        elif sanitizer is None:
            self.skip("sanitizer", "compute-sanitizer is not on this machine")
        else:
            few = [*pytest, "-m", "gpu", "-k", "small"]
            self.run("sanitizer", [sanitizer, "--error-exitcode", "9", *few], 90, nothing=none)
        self._tuning(python)
        self._benches(python)
        return self._report()

    def _tests(self) -> list[str]:
        """All tests; if hypothesis is not installed, the files about a GPU that do not need it."""
        if importlib.util.find_spec("hypothesis") is not None:
            return [str(ROOT / "tests")]
        files = sorted((ROOT / "tests").rglob("test_*gpu*.py"))
        return ["--noconftest", *(str(file) for file in files if "hypothesis" not in file.read_text())]

    def _extension(self, python: str) -> None:
        """Build the extension; minilm works without it, so a failure is reported and the other steps go
        on."""
        build = self.site / "build"
        command = [
            python,
            str(ROOT / "setup.py"),
            "-q",
            "build_ext",
            "--build-lib",
            str(build),
            "--build-temp",
        ]
        before, self.site = self.site, ROOT  # setup.py names its files relative to itself
        self.run("extension", [*command, str(build / "temp")], 240)
        self.site = before
        for made in build.glob("minilm/_C*"):
            shutil.copy(made, self.site / "minilm" / made.name)

    def _tuning(self, python: str) -> None:
        """Tune the kernels that matter most to MiniLM; without a GPU, in toy sizes, only list the
        candidates."""
        tune = [python, "-m", "minilm", "tune", "--model", "MiniLM-L6", "--dtype", "float16"]
        if self.gpu:
            table = str(self.out / "tuned.json")
            self.run("tuning", [*tune, "--most", "10", "--seconds", "80", "--output", table], 120)
            self.env["MINILM_TUNED"] = table
        elif self.tiny:
            self.run("tuning", [*tune, "--dry-run", "--most", "3"], 120)
        else:
            self.skip("tuning", "there is no CUDA device")

    def _benches(self, python: str) -> None:
        device = "cuda" if self.gpu else "cpu"
        if not self.gpu and not self.tiny:
            self.skip("ops", "there is no CUDA device (MINILM_BENCH_TINY=1 tests the command on the CPU)")
            self.skip("models", "there is no CUDA device")
            return
        script = str(Path(__file__).with_name("gpu_run.py"))
        few = (
            ["MiniLM-L6", "SmolLM2-135M"]
            if self.tiny
            else ["MiniLM-L6", "BERT-base", "SmolLM2-135M", "Llama-1B"]
        )
        jobs = (("ops", "op", few, 150.0), ("models", "layer,e2e", few[:3], 240.0))
        for name, levels, models, limit in jobs:
            target = str(self.out / f"{name}.json")
            self.run(
                name, [python, script, device, levels, ",".join(models), target, str(limit * 0.8)], limit
            )

    def _report(self) -> int:
        import torch

        try:
            import triton

            version = triton.__version__
        except ImportError:
            version = None
        device = torch.cuda.get_device_name(0) if self.gpu else None
        data = {
            "gpu": device,
            "torch": torch.__version__,
            "triton": version,
            "tiny": self.tiny,
            "steps": [asdict(step) for step in self.steps],
        }
        (self.out / "report.json").write_text(json.dumps(data, indent=1) + "\n")
        print(f"\ngpu-check on {device or 'no GPU'}, torch {torch.__version__}, triton {version}")
        for step in self.steps:
            reason = (
                f": {step.detail.splitlines()[-1][:150]}" if step.detail and step.status != "passed" else ""
            )
            print(f"  {step.name:10} {step.status:11} {step.seconds:6.1f} s{reason}")
        files = sorted(str(p.relative_to(self.out)) for p in self.out.rglob("*") if p.is_file())
        print(f"  in {self.out}: {', '.join(files)}")
        shutil.rmtree(self.site, ignore_errors=True)
        needed = {"tests", "ops", "models"}
        bad = [s for s in self.steps if s.status in ("failed", "out of time") and s.name in needed]
        return 1 if bad else 0


def main() -> int:
    """The command."""
    out = Path(os.environ.get("OUT") or "gpu-check-out").resolve()
    return Check(out).all()


if __name__ == "__main__":
    sys.exit(main())
