"""Runs the numerical tests as on other processors: test_isa.py [arguments of pytest]

PyTorch, its matrix products (MKL, oneDNN), NumPy's (OpenBLAS, in Triton's interpreter) and minilm's kernels
each choose code for the processor, and sum in different orders on different ones. Here they are set to the
instruction sets of older processors, since a test must pass on all of them. Fewer random examples than usual
are used (HYPOTHESIS_PROFILE=ci: the usual number).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROCESSORS: dict[str, dict[str, str]] = {
    "of 2008, SSE4": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OPENBLAS_CORETYPE": "Nehalem",
        "MINILM_CPU_ISA": "generic",
    },
    "of 2013, AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "MINILM_CPU_ISA": "avx2",
    },
}

FILES = (
    "attention_maps", "attention_scores", "blocks", "cache", "cross_encoder", "embed", "engine",
    "generate", "golden", "heads", "linear_cross_entropy", "llm", "models", "native*", "ops", "pool",
    "properties", "quantized*", "sentence", "steps", "training", "traits",
    "triton_*",
)  # fmt: skip


def main() -> int:
    """The command; the exit status is that of the first run that fails."""
    from minilm.ops.backends import native

    files = sorted({str(file) for name in FILES for file in (ROOT / "tests").rglob(f"test_{name}.py")})
    command = [sys.executable, "-m", "pytest", "--quiet", "--numprocesses", "auto", "--dist", "worksteal"]
    for name, variables in PROCESSORS.items():
        if native.unavailable is None and variables["MINILM_CPU_ISA"] not in native.cpu_isas():
            print(f"left out, since this machine does not support it: a processor {name}")
            continue
        print(f"as on a processor {name}: {' '.join(f'{k}={v}' for k, v in variables.items())}", flush=True)
        environment = {"HYPOTHESIS_PROFILE": "few"} | os.environ | variables
        done = subprocess.run(
            [*command, "-m", "not slow", *files, *sys.argv[1:]], cwd=ROOT, env=environment, check=False
        )
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
