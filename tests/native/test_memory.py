"""Memory of a process that waits: code that its start touched is unmapped, and comes back when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest
from native_runs import require_extension

PROGRAM = """
import torch
from minilm.ops.backends import packed

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

def results():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    return torch.linalg.inv(x) @ torch.fft.fft(x).real, str(x.sum()), sorted(["b", "a"])

before, told = resident(), results()
packed.trim(code=True)
after, again = resident(), results()
assert torch.equal(told[0], again[0]) and told[1:] == again[1:]
packed.trim(code=True)
try:
    torch.ones(2) @ torch.ones(3)
except RuntimeError as error:  # unwinding reads tables of the linker
    print(before - after, "size" in str(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages of a Linux process")
def test_code_is_unmapped_and_comes_back() -> None:
    require_extension()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages, unwound = done.stdout.split()
    assert int(pages) > 2000, "torch alone has more code than that"
    assert unwound == "True"
