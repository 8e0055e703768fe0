"""Builds the CUDA kernels for the host, with a plain C++ compiler, and loads them as the ops of
``torch.ops.minilm_emulated``.

csrc/cuda/emulation.h runs the threads of a block as coroutines. The build is kept under build/ and made again
when a source has changed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "minilm_emulated"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def build() -> Path:
    """The shared library; skips the test where there is no compiler."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    csrc = ROOT / "csrc"
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    sources = [*kernels, csrc / "bindings_cuda.cpp", ROOT / "tests" / "cuda_driver.cpp"]
    digest = hashlib.sha256(f"{compiler} {FLAGS} {torch.__version__}".encode())
    for file in (*sources, *sorted((csrc / "cuda").glob("*.h"))):
        digest.update(file.read_bytes())
    made = ROOT / "build" / "cuda_emulation" / digest.hexdigest()[:16] / "libminilm_emulated.so"
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:

        def compiled(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            options = ["-DMINILM_CUDA_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}"]
            options += ["-isystem", str(torch_folder / "include")]
            _run(
                [
                    compiler,
                    *FLAGS,
                    *options,
                    "-Wno-unknown-pragmas",
                    "-x",
                    "c++",
                    "-c",
                    str(source),
                    "-o",
                    target,
                ]
            )
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, sources))
        library = f"{folder}/{made.name}"
        _run([compiler, "-shared", *objects, "-o", library, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"])
        os.replace(library, made)  # other workers may build the same
    return made


@cache
def driver() -> ctypes.CDLL:
    """The library, loaded: its ops are registered, and the functions of cuda_driver.cpp can be called."""
    from minilm.ops.backends import cuda

    file = str(build())
    torch.ops.load_library(file)
    cuda.register_fakes(LIBRARY)
    library = ctypes.CDLL(file)
    for name in ("words", "scales", "place", "scale_place"):
        getattr(library, name).restype = ctypes.c_longlong
    library.bits_of.restype = ctypes.c_ulonglong
    return library
