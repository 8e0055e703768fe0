"""The compile report of the CUDA kernels: what it reads, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    {stack} bytes stack frame, {stores} bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, {shared} bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_80'
ptxas info    : Function properties for _Z6secondv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 352 bytes cmem[0]
"""
SPILLS = """
__global__ void __launch_bounds__(1024) spills(float* x) {
  float kept[200];
  for (int i = 0; i < 200; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  for (int round = 0; round < 5; ++round) {
    __syncthreads();
    for (int i = 0; i < 200; ++i) kept[i] = kept[i] * kept[(i * 7 + 3) % 200] + x[i];
  }
  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = kept[i];
}
"""


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_says_is_read(tool: ModuleType) -> None:
    first, second = tool.parse(LOG.format(stack=64, stores=8, shared=33044), "a.cu", "80")
    assert first == ("a.cu", "_Z5firstPf", "80", 40, 33044, 64, 8, 12)
    assert second == ("a.cu", "_Z6secondv", "80", 255, 0, 0, 0, 0)
    assert tool.judge(second) == []
    assert tool.judge(first) == ["spills: 64 bytes of stack, 8 stored, 12 loaded"]
    too_much = second._replace(shared=49153, registers=256)
    assert [why.split(",")[0] for why in tool.judge(too_much)] == [
        "needs 256 registers per thread",
        "needs 49153 bytes of shared memory",
    ]
    with pytest.raises(ValueError, match="said nothing"):
        tool.parse("Compiling entry function '_Z5firstPf' for 'sm_80'\n", "a.cu", "80")


def test_blocks_of_a_multiprocessor(tool: ModuleType) -> None:
    kernel = tool.Kernel("a.cu", "k", "90a", 128, 37184, 0, 0, 0)
    assert tool.blocks(kernel, 256) == 2  # 65,536 registers for 2 x 256 x 128
    assert tool.blocks(kernel._replace(registers=40), 256) == 6  # 228 KiB for 6 x 37.3 KiB
    assert tool.blocks(kernel._replace(registers=40, chip="86"), 256) == 2


def test_threads_are_read_from_the_sources(tool: ModuleType) -> None:
    folder = ROOT / "csrc" / "cuda"
    expected = {
        "linear.cu": 256,
        "decode_attention.cu": 128,
        "decode_attention_mma.cu": 128,
        "decode_combine.cu": 128,
    }
    expected |= {"rope_append.cu": 256, "sample.cu": 512, "pack.cu": 256}
    assert {name: tool.threads_of(folder / name) for name in expected} == expected


def test_without_nvcc_nothing_is_compiled(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tool.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "skipped: nvcc was not found\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found, so nothing can be compiled")
def test_a_spill_and_an_error_are_found(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("MINILM_CUDA_ARCHS", "80")
    (tmp_path / "spills.cu").write_text(SPILLS)
    command = ["--folder", str(tmp_path), "--output", str(tmp_path / "out")]
    assert tool.main(command) == 1
    assert "spills(float*) on sm_80: spills: " in capsys.readouterr().out.replace(
        "spills on", "spills(float*) on"
    )
    (kernel,) = json.loads((tmp_path / "out" / "cuda.json").read_text())["kernels"]
    assert kernel["spill_stores"] > 0
    (tmp_path / "spills.cu").write_text("this is not CUDA\n")
    assert tool.main(command) == 1
    assert "spills.cu does not compile" in capsys.readouterr().err
