"""What the tests of the native extension share: numbers, threads, other instruction sets, guarded memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import strategies
import torch
from hypothesis import settings
from torch import Tensor

from minilm.ops.backends import native


def require_extension() -> None:
    """Skip where the extension cannot be built; fail where it could be, and is not there."""
    if native.unavailable is None:
        return
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
    if os.environ.get("MINILM_BUILD_EXT") == "0" or not (compiler and headers):
        pytest.skip(native.unavailable)
    pytest.fail(f"this machine could build the extension, but {native.unavailable}")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for the same arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_threads(function: Callable[[], Tensor], counts: tuple[int, ...] = (1, 2, 3, 4)) -> list[Tensor]:
    """The results of `function` with so many threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


OTHER_ISAS = (
    [isa for isa in native.cpu_isas() if isa != native.cpu_isa()]
    if "MINILM_CPU_ISA" not in os.environ
    else []
)
"""Those that this process does not use; none in a process that was told which to use."""


def passes_with(isa: str, *files: str, chosen: str) -> None:
    """The tests `chosen` (pytest's -k) of `files` pass in a process that uses this instruction set."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**environment, "MINILM_CPU_ISA": isa},
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout.splitlines()[-1]


def examples(count: int) -> settings:
    """`count` examples in the usual profile; a quarter in a process that was told its instruction set."""
    return strategies.examples(count // 4 if "MINILM_CPU_ISA" in os.environ else count)


@contextmanager
def guarded(size: int) -> Iterator[Tensor]:
    """uint8 [size], ending where a page begins that may not be touched: reading on would end the process."""
    if sys.platform != "linux":
        pytest.skip("mprotect is called by its Linux constants")
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)

    def protect(flags: int) -> None:
        arguments = ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), flags
        assert libc.mprotect(*arguments) == 0, ctypes.get_errno()

    protect(0)
    try:
        yield torch.frombuffer(memory, dtype=torch.uint8, count=pages * mmap.PAGESIZE)[-size:]
    finally:
        protect(mmap.PROT_READ | mmap.PROT_WRITE)


def at_the_end(memory: Tensor, x: Tensor) -> Tensor:
    """A copy of x (contiguous) that ends where `memory`, uint8, ends."""
    place = memory[-x.nbytes :].view(x.dtype).view(x.shape)
    return place.copy_(x)
