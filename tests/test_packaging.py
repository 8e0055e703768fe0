"""What is built from the repository: wheels with and without the extension, sdist; what setup.py decides."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest

from minilm._version import __version__

ROOT = Path(__file__).resolve().parent.parent
COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    dropped = ("MINILM_BUILD_EXT", "MINILM_CPU_ISA", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files that git tracks, and of no other: what a fresh clone has."""
    listed = run("git", "ls-files", "-z", cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git repository, so there is no list of the files that belong to it")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def build_wheel(source: Path, **environment: str) -> Path:
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", source.parent / "dist", source),
        cwd=source.parent,
        **environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source.parent / "dist").glob("*.whl")
    return wheel


def metadata(wheel: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        message = Parser().parsestr(archive.read(f"minilm-{__version__}.dist-info/METADATA").decode())
    return {key: message.get_all(key, []) for key in set(message.keys())}


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler on this machine")
def test_wheel_with_the_extension(source: Path) -> None:
    wheel = build_wheel(source, MINILM_BUILD_EXT="1", MINILM_BUILD_ISA="generic")  # one of them builds fast
    assert re.fullmatch(rf"minilm-{re.escape(__version__)}-cp310-abi3-\w+\.whl", wheel.name)

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"minilm-{__version__}.dist-info/entry_points.txt").decode()
    packages = {"minilm": "minilm", "kernels": "minilm/kernels", "benchmarks": "minilm/benchmarks"}
    for folder, package in packages.items():
        expected = {
            f"{package}/{file.relative_to(source / folder)}" for file in (source / folder).rglob("*.py")
        }
        assert expected <= names
    data = {"py.typed", "kernels/tuned.json", "benchmarks/limits.cpp", "benchmarks/page.css"}
    assert {"minilm/_C.abi3.so", *(f"minilm/{name}" for name in data)} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"minilm", f"minilm-{__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".h", ".pyc")) or "csrc" in name]
    assert "minilm = minilm.cli:main" in entry_points

    target = source.parent / "installed"
    done = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            target,
            wheel,
        ),
        cwd=source.parent,
    )
    assert done.returncode == 0, done.stderr
    code = (
        "import minilm, minilm.kernels, torch\n"
        "from minilm import ops\n"
        "y = ops.layer_norm(torch.arange(6.0).view(2, 3), torch.ones(3), None, 1e-5)\n"
        "print(minilm.__file__, minilm.kernels.__file__, sep='\\n')\n"
        "print(ops.backends.native._extension.__file__)\n"
        "print(minilm.__version__, ops.explain().backends('layer_norm'), round(y[0, 0].item(), 3))\n"
    )
    done = run(sys.executable, "-c", code, cwd=source.parent, PYTHONPATH=str(target))
    *files, last = done.stdout.splitlines() or [done.stderr]
    assert last == f"{__version__} {{'native'}} -1.225", done.stderr
    assert [Path(file).relative_to(target).as_posix() for file in files] == [
        "minilm/__init__.py",
        "minilm/kernels/__init__.py",
        "minilm/_C.abi3.so",
    ]
    check_stable_abi(target / "minilm" / "_C.abi3.so")


def check_stable_abi(library: Path) -> None:
    """It calls torch through its C interface only, and brings no thread pool of its own."""
    symbols = run("nm", "--dynamic", "--undefined-only", library, cwd=library.parent)
    assert symbols.returncode == 0, symbols.stderr
    assert "torch_parallel_for" in symbols.stdout
    assert not re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w*|\b(?:GOMP|omp)_\w*", symbols.stdout)


def test_wheel_without_the_extension(source: Path) -> None:
    wheel = build_wheel(source, MINILM_BUILD_EXT="0")
    assert wheel.name == f"minilm-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert "minilm/kernels/__init__.py" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]

    facts = metadata(wheel)
    assert facts["Version"] == [__version__]
    assert facts["License-Expression"] == ["Apache-2.0"]
    pinned = {
        re.split("[=;]", line)[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    required = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in facts["Requires-Dist"]}
    assert required - pinned == set(), "not in constraints.txt"


def test_sdist_holds_what_a_wheel_is_built_from(source: Path) -> None:
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    (source / "dist").mkdir()
    done = run(sys.executable, "-c", code, cwd=source, MINILM_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    with tarfile.open(source / "dist" / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "benchmarks", "minilm", "tests"):
        files = {
            file.relative_to(source).as_posix() for file in (source / folder).rglob("*.*") if file.is_file()
        }
        assert {file for file in files if ".egg-info" not in file} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "constraints.txt"} <= names


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler on this machine")
def test_a_compile_error_is_an_error(source: Path) -> None:
    (source / "csrc" / "cpu" / "attention.cpp").write_text("this is not C++\n")
    done = run(sys.executable, "setup.py", "build_ext", cwd=source)
    assert done.returncode != 0
    assert "attention.cpp" in done.stdout + done.stderr


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in the folder where it is run."""
    monkeypatch.chdir(ROOT)
    for name in ("MINILM_BUILD_EXT", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_torch(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "find_torch", lambda: None)
    return "PyTorch was not found"


def with_an_old_torch(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "find_torch", lambda: (Path("/nowhere"), "2.9.1+cpu"))
    return "PyTorch 2.9.1+cpu is too old (expected 2.10 or later)"


def without_a_compiler(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATH", "")
    return "no C++ compiler was found"


def without_headers(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    return "Python's headers were not found"


@pytest.mark.parametrize("lacking", [without_torch, with_an_old_torch, without_a_compiler, without_headers])
def test_what_is_missing_is_said(
    lacking: object, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(lacking)
    reason = lacking(setup_py, monkeypatch)
    assert setup_py.configuration() == {}
    line = capsys.readouterr().err
    assert line.startswith(f"minilm: installing without the native extension minilm._C: {reason}")
    assert line.count("\n") == 1
    monkeypatch.setenv("MINILM_BUILD_EXT", "1")
    with pytest.raises(SystemExit, match=f"cannot be built: {re.escape(reason)}"):
        setup_py.configuration()


def test_the_choice_is_checked(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILM_BUILD_EXT", "yes")
    with pytest.raises(SystemExit, match="MINILM_BUILD_EXT=yes: expected auto, 0 or 1"):
        setup_py.configuration()


def test_torch_is_found_from_an_isolated_build(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip runs setup.py with a PYTHONPATH whose sitecustomize hides the environment's packages."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run(sys.executable, "-c", "import torch", cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode != 0
    folder, version = setup_py.find_torch()
    import torch

    assert folder == Path(torch.__file__).parent
    assert version == torch.__version__


def test_the_folder_kernels_is_installed_as_minilm_kernels_only(tmp_path: Path) -> None:
    done = run(sys.executable, "-c", "import minilm.kernels as k; print(k.__name__)", cwd=tmp_path)
    assert done.stdout.strip() == "minilm.kernels", done.stderr
    assert run(sys.executable, "-c", "import kernels", cwd=tmp_path).returncode != 0


def test_transformers_does_not_take_the_folder_for_the_package_it_looks_for() -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
