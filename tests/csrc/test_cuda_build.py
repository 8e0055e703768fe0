"""What setup.py decides about the CUDA library. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("MINILM_BUILD_EXT", "MINILM_BUILD_CUDA", "MINILM_CUDA_ARCHS", "CUDA_HOME", "CXX")


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in the folder where it is run."""
    monkeypatch.chdir(ROOT)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a PyTorch without CUDA, beside an nvcc."""
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(setup_py, "find_torch", lambda: (tmp_path, "2.13.0+cpu"))
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: "/cuda/bin/nvcc")
    return tmp_path


def test_where_nvcc_is_looked_for(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("on_path", "home/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"))
    assert setup_py.find_nvcc() == str(tmp_path / "on_path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup_py.find_nvcc() is None


def test_it_is_built_where_it_can_be_loaded(
    setup_py: ModuleType, torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup_py.cuda_configuration() == []
    assert setup_py.cuda_extension("auto") == (None, "PyTorch 2.13.0+cpu is no CUDA build")
    monkeypatch.setenv("MINILM_BUILD_CUDA", "1")
    (ext,) = setup_py.cuda_configuration()
    assert ext.libraries == ["torch_cpu"]
    monkeypatch.setenv("MINILM_BUILD_CUDA", "auto")
    (torch / "lib" / "libtorch_cuda.so").touch()
    (ext,) = setup_py.cuda_configuration()
    assert ext.name == "minilm._C_cuda"
    assert ext.libraries == ["torch_cpu", "torch_cuda"]
    kernels = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert set(ext.sources) == {"csrc/bindings_cuda.cpp", *kernels}
    monkeypatch.setenv("MINILM_BUILD_CUDA", "0")
    assert setup_py.cuda_configuration() == []


def test_what_is_missing_is_an_error_where_it_was_asked_for(
    setup_py: ModuleType, torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    assert setup_py.cuda_configuration() == []
    monkeypatch.setenv("MINILM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="cannot be built: nvcc was not found"):
        setup_py.cuda_configuration()
    monkeypatch.setenv("MINILM_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="MINILM_BUILD_CUDA=yes: expected auto, 0 or 1"):
        setup_py.cuda_configuration()


@pytest.mark.parametrize("archs", ["", "sm_80", "80,90", "80;-x"])
def test_the_chips_are_checked(
    archs: str, setup_py: ModuleType, torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILM_BUILD_CUDA", "1")
    monkeypatch.setenv("MINILM_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match="expected such as 80;86;89;90a;100"):
        setup_py.cuda_configuration()


def test_the_other_extension_has_no_part_of_it(
    setup_py: ModuleType, torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "find_compiler", lambda: "g++")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(torch))
    (torch / "Python.h").touch()
    ext, reason = setup_py.extension()
    assert reason == "", sys.version
    assert not [name for name in ext.sources if "cuda" in name]
