"""tools/compile_report.py: what it reads from the compiler's output, and what it objects to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tools" / "compile_report.py"
spec = util.spec_from_file_location("compile_report", FILE)
assert spec is not None
assert spec.loader is not None
report = util.module_from_spec(spec)
spec.loader.exec_module(report)

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_forward' for 'sm_80'
ptxas info    : Function properties for _forward
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 456 bytes cmem[0]
"""

PTX = """
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b32 { %r2, %r3 }, [ %rd2 + 0 ];
    ld.global.nc.b16 %rs1, [%rd3];
    cp.async.cg.shared.global [ %r486 + 0 ], [ %rd29 + 0 ], 0x10, %r103;
    cp.async.ca.shared.global [ %r486 + 0 ], [ %rd29 + 0 ], 0x4, %r103;
    ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r8];
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
    wgmma.fence.sync.aligned;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f2 };
"""


def test_what_ptxas_says() -> None:
    found = report.parse_ptxas(LOG.format(stack=8, stores=12, loads=16))
    assert found == {"registers": 40, "stack": 8, "spill_stores": 12, "spill_loads": 16}
    with pytest.raises(ValueError, match="said nothing about registers"):
        report.parse_ptxas("ptxas info : 0 bytes gmem")


def test_what_the_ptx_shows() -> None:
    found = report.parse_ptx(PTX)
    assert found["tensor"] == {"mma.sync": 1, "wgmma": 1}
    assert found["loads"] == {"2": 1, "4": 2, "8": 1, "16": 2}
    assert report.wide_share(found["loads"]) == 32 / 50
    assert report.wide_share(found["loads"], 8) == 40 / 50
    assert report.wide_share({}) == 1.0


@dataclass(frozen=True)
class Expected:
    """As in kernels/compile_cases.py, which imports the kernels."""

    tensor_cores: str = "full"
    width: int = 16
    spills: dict[str, str] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "kernel": "k", "case": "c", "function": "_f", "chip": "sm_90", "limit": 1000, "shared": 1000,
    "tensor_memory": 0, "registers": 255, "stack": 0, "spill_stores": 0, "spill_loads": 0,
    "tensor": {"wgmma": 4}, "loads": {"16": 4, "4": 8},
}  # fmt: skip
SPILLS = {"stack": 8, "spill_stores": 8, "spill_loads": 8}


def test_nothing_to_object_to() -> None:
    assert report.judge(GOOD, Expected(), None) == []
    assert report.judge(GOOD, Expected(), GOOD) == []
    no_products = GOOD | {"tensor": {}}
    assert report.judge(no_products, Expected(""), no_products) == []
    small = GOOD | {"tensor": {"mma.sync": 4}}
    assert report.judge(small, Expected("small"), small) == []
    assert report.judge(GOOD | {"loads": {"4": 1}}, Expected(width=0), None) == []
    assert report.judge(GOOD | SPILLS, Expected(spills={"sm_90": "why"}), GOOD | SPILLS) == []


@pytest.mark.parametrize(
    ("change", "expected", "before", "message"),
    [
        ({"error": "CompilationError: no"}, Expected(), None, "CompilationError: no"),
        ({"shared": 1001}, Expected(), None, "needs 1001 bytes of shared memory, and the chip has 1000"),
        ({"tensor_memory": 513}, Expected(), None, "needs 513 columns of tensor memory of 512"),
        (SPILLS, Expected(), None, "spills: 8 bytes of stack, 8 stored, 8 loaded"),
        (SPILLS, Expected(spills={"sm_80": "why"}), None, "spills: 8"),
        (SPILLS, Expected(spills={"sm_90": "why"}), {"stack": 1}, "spills 24 bytes, 1 in the last report"),
        ({"tensor": {}}, Expected(), None, "no tensor-core instruction, expected wgmma"),
        ({"tensor": {}}, Expected("small"), None, "no tensor-core instruction"),
        ({"tensor": {"mma.sync": 4}}, Expected(), None, "expected wgmma alone"),
        ({"tensor": {"mma.sync": 4, "wgmma": 2}}, Expected(), None, "expected wgmma alone"),
        ({"tensor": {"mma.sync": 4}}, Expected("small"), {}, "had wgmma in the last report, and has 4 x mma"),
        ({"loads": {"16": 1, "4": 8}}, Expected(), None, "33% of the bytes are loaded 16 at a time"),
        ({"loads": {"16": 3, "8": 4}}, Expected(), {"loads": {"16": 4}}, "60% .*, 100% in the last report"),
    ],
)
def test_what_is_objected_to(
    change: dict[str, Any], expected: Expected, before: dict[str, Any] | None, message: str
) -> None:
    (found,) = report.judge(GOOD | change, expected, None if before is None else GOOD | before)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


def test_a_report_is_read_back_and_shown(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Case:
        kernel: str = "k"
        name: str = "c"
        expected: Any = None

    spilling = GOOD | SPILLS | {"chip": "sm_80", "tensor": {}}
    expected = {"_f": replace(Expected(), spills={"sm_80": "it was late"})}
    report.write(tmp_path, [GOOD, spilling], [Case(expected=expected)], "Triton 0")
    assert report.read(tmp_path / "report.json") == {report.identity(r): r for r in (GOOD, spilling)}
    page = (tmp_path / "README.md").read_text()
    assert "| c | `_f` | 255 · 1.0 · 4 wgmma · 67% | 255 · 1.0 · 67% · **spills 16 B** |" in page
    assert "- k, c, `_f` on sm_80: it was late" in page


PLANTED = '''
import torch
import triton
import triton.language as tl
from minilm.kernels.compile_cases import Case, Expected

@triton.jit
def good(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at) * 2)

@triton.jit
def greedy(X, Y, N: tl.constexpr):
    """A row's sum is known when all of it is loaded: 512 numbers a lane, of 255 registers."""
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    tl.store(Y + i[:, None] * N + i[None, :], x / tl.sum(x, 1)[:, None])

@triton.jit
def bulky(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    total = tl.zeros([N, N], tl.float32)
    for k in range(64):
        x = tl.load(X + k * N * N + at)
        total = tl.dot(x, x, total)
    tl.store(Y + at, total)

def call(kernel, n, dtype=torch.float32, **options):
    x = torch.empty(64 * n * n, dtype=dtype)
    return lambda: kernel[(1,)](x, torch.empty(n * n), N=n, **options)

CASES = (
    Case("planted", "good", call(good, 2048, num_warps=4), {"good": Expected()}),
    Case("planted", "greedy", call(greedy, 128, num_warps=1), {"greedy": Expected(width=0)}),
    Case("planted", "bulky", call(bulky, 128, torch.float16, num_warps=8, num_stages=8),
         {"bulky": Expected("full")}),
)
'''


@pytest.mark.slow
def test_planted_kernels_that_spill_and_outgrow_their_chip_fail_it(tmp_path: Path) -> None:
    """The whole command, on kernels of which one is good, one spills, and one needs too much memory."""
    (tmp_path / "planted_cases.py").write_text(PLANTED)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "MINILM_COMPILE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(FILE), "--cases", "planted_cases", "--processes", "1"]
    command += ["--output", str(tmp_path / "out")]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], env=environment, capture_output=True, text=True)

    done = run()
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert not [line for line in lines if "planted, good" in line]
    assert [line for line in lines if "planted, greedy, greedy on sm_90: spills" in line]
    assert [line for line in lines if "bulky on sm_86: needs" in line and "101376" in line]
    assert not (tmp_path / "out").exists(), "a report with problems replaces the last one only if accepted"

    done = run("--accept")
    assert done.returncode == 1
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert {row["chip"] for row in rows} == set(report.FULL)
    bulky = {row["chip"]: row for row in rows if row["function"] == "bulky"}
    assert set(bulky["sm_90"]["tensor"]) == {"wgmma"}
    assert set(bulky["sm_80"]["tensor"]) == {"mma.sync"}
    assert set(bulky["sm_100"]["tensor"]) == {"tcgen05"}
