"""Builds `minilm._C` from csrc/, and installs the folders kernels/ and benchmarks/ as `minilm.kernels` and
`minilm.benchmarks`. See pyproject.toml too.

The extension is built on PyTorch's stable ABI and Python's limited API: one binary serves PyTorch 2.10 and
every later one, and CPython 3.10 and every later one. It needs the headers and libraries of PyTorch, Python's
headers, and a C++17 compiler that knows GNU vector extensions (g++, clang++); nothing of
torch.utils.cpp_extension, and no GPU.

PyTorch is looked for in this process's environment and then, since pip builds in an environment of its own
that hides it, in the one that pip will install into. It is not a build requirement of the package: pip would
fetch it anew, with all of CUDA, to compile a few files.

Environment
    MINILM_BUILD_EXT=auto   (default) build the extension where all of that is found, otherwise install the
                            package without it and say in one line what was missing. A compile error is an
                            error.
    MINILM_BUILD_EXT=1      build it; whatever is missing is an error too.
    MINILM_BUILD_EXT=0      leave it out.
    MINILM_BUILD_ISA=avx2,..  compile the CPU kernels for these instruction sets only, of those below;
                            "native": for the best that this machine has, and the one that every machine has.
    MAX_JOBS                so many compilers at once, by default one for each core that may be used.
    CXX, CXXFLAGS, LDFLAGS  as usual.

Objects are kept in build/objects/, and used again until a source, a header, a flag or the compiler changes.
`python setup.py build_kernels` compiles those that need no PyTorch, which may meanwhile be on its way.

The CUDA kernels of csrc/cuda/ become a library of their own beside it, minilm._C_cuda, which is loaded
when a CUDA tensor first asks for one of its ops.

    MINILM_BUILD_CUDA=auto  (default) build it where the extension is built, nvcc is found (CUDA_HOME, PATH)
                            and PyTorch is a CUDA build: others could never load it.
    MINILM_BUILD_CUDA=1     build it with any PyTorch (its CPU build has the headers too), to see that it
                            compiles; what is missing is an error.
    MINILM_BUILD_CUDA=0     leave it out.
    MINILM_CUDA_ARCHS       the chips, by default "80;86;89;90a;100".
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")  # relative to this file, where every build front end runs it
OLDEST_TORCH = (2, 10)
OLDEST_PYTHON = (3, 10)

# Every source in csrc/cpu/ but dispatch.cpp is compiled once per instruction set, into a namespace of its
# name.
GENERIC: dict[str, list[str]] = {"generic": []}  # the architecture's base line: SSE2, NEON
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
X86: dict[str, list[str]] = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
ARM: dict[str, list[str]] = {"neon_dotprod": ["-march=armv8.2-a+dotprod"]}


NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
}
"""What /proc/cpuinfo says of a processor that has it, and all before it."""


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """The instruction sets to compile for on such a machine (`platform.machine()`), and their flags."""
    more = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
    return GENERIC | more.get(machine.lower(), {})


def native_sets(sets: dict[str, list[str]]) -> dict[str, list[str]]:
    """The plain one of these, and the best that this machine runs; all, where it does not say what it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return sets
    flags = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set[str]())
    best = "generic"
    for isa in (isa for isa in sets if isa not in GENERIC):
        if isa not in NEEDS:
            return sets
        if not NEEDS[isa] <= flags:
            break
        best = isa
    return {isa: sets[isa] for isa in dict.fromkeys(("generic", best))}


INSTRUCTION_SETS = instruction_sets(platform.machine())
if os.environ.get("MINILM_BUILD_ISA") == "native":
    INSTRUCTION_SETS = native_sets(INSTRUCTION_SETS)
elif "MINILM_BUILD_ISA" in os.environ:
    INSTRUCTION_SETS = {isa: INSTRUCTION_SETS[isa] for isa in os.environ["MINILM_BUILD_ISA"].split(",")}

COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMPILE_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))  # last, so that they prevail
# A multiply-add may round once; nothing else is relaxed: results do not depend on how a loop was vectorised.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

CUDA_ARCHS = "80;86;89;90a;100"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]

PROBE = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
folder = spec and spec.submodule_search_locations
print(json.dumps(folder and {"folder": folder[0], "version": importlib.metadata.version("torch")}))
"""


def find_torch() -> tuple[Path, str] | None:
    """Folder and version of the PyTorch here, or where pip will install; it is not imported."""
    for flags in ([], ["-I"]):  # -I: without the PYTHONPATH by which pip puts its build environment first
        answer = subprocess.run([sys.executable, *flags, "-c", PROBE], capture_output=True, text=True)
        found = json.loads(answer.stdout) if answer.returncode == 0 else None
        if found:
            return Path(found["folder"]), found["version"]
    return None


def find_compiler() -> str | None:
    """The C++ compiler that setuptools will call, or None. A stale name in Python's settings is replaced."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(shlex.split(configured)[0]):
        return configured
    if "CXX" not in os.environ:
        for name in ("g++", "clang++", "c++"):
            if shutil.which(name):
                os.environ["CXX"] = name
                return name
    return None


def extension() -> tuple[Extension | None, str]:
    """The extension, or None and the reason why it cannot be built here."""
    if sys.platform == "win32":
        return None, "Windows is not supported"
    torch = find_torch()
    if torch is None:
        return None, "PyTorch was not found (install it first: pip install torch)"
    folder, version = torch
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        return None, f"PyTorch {version} is too old (expected 2.10 or later)"
    if find_compiler() is None:
        return None, "no C++ compiler was found (install g++, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return None, "Python's headers were not found (on Debian and Ubuntu: apt install python3-dev)"
    return (
        Extension(
            "minilm._C",
            sources=sorted(
                str(file)
                for file in [*CSRC.glob("*.cpp"), CSRC / "cpu" / "dispatch.cpp"]
                if file.name != "bindings_cuda.cpp"
            ),
            depends=sorted(map(str, CSRC.rglob("*.[ch]*"))),
            include_dirs=[str(CSRC)],
            library_dirs=[str(folder / "lib")],
            libraries=["torch_cpu"],  # loaded by `import torch`, which comes first, so no rpath is needed
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)),
                ("Py_LIMITED_API", "0x{:02x}{:02x}0000".format(*OLDEST_PYTHON)),
            ],
            # -isystem: no warnings from there
            extra_compile_args=[*COMPILE_FLAGS, "-isystem", str(folder / "include")],
            py_limited_api=True,
            language="c++",
        ),
        "",
    )


def find_nvcc() -> str | None:
    """CUDA's compiler, of CUDA_HOME if that is set, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def cuda_archs() -> list[str]:
    """The chips to compile for: "80", "90a", ..."""
    return [arch for arch in os.environ.get("MINILM_CUDA_ARCHS", CUDA_ARCHS).split(";") if arch]


def cuda_extension(wanted: str) -> tuple[Extension | None, str]:
    """The CUDA library, or None and the reason why it is not built here; `wanted` is MINILM_BUILD_CUDA."""
    if find_nvcc() is None:
        return None, "nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)"
    torch = find_torch()
    if torch is None:
        return None, "PyTorch was not found"
    folder, version = torch
    of_cuda = any((folder / "lib").glob("libtorch_cuda.*"))
    if wanted == "auto" and not of_cuda:
        return None, f"PyTorch {version} is no CUDA build"
    if not all(re.fullmatch(r"\d+[af]?", arch) for arch in cuda_archs()) or not cuda_archs():
        raise SystemExit(
            f"MINILM_CUDA_ARCHS={os.environ['MINILM_CUDA_ARCHS']}: expected such as {CUDA_ARCHS}"
        )
    return (
        Extension(
            "minilm._C_cuda",
            sources=["csrc/bindings_cuda.cpp", *sorted(map(str, (CSRC / "cuda").glob("*.cu")))],
            depends=sorted(map(str, CSRC.rglob("*.[ch]*"))),
            include_dirs=[str(CSRC)],
            library_dirs=[str(folder / "lib")],
            libraries=["torch_cpu", *(["torch_cuda"] if of_cuda else [])],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)),
                ("USE_CUDA", "1"),
            ],
            extra_compile_args=[*COMPILE_FLAGS, "-isystem", str(folder / "include")],
            py_limited_api=True,  # it needs nothing of Python: the name says that it suits every version
            language="c++",
        ),
        "",
    )


class Job(NamedTuple):
    """One source to compile."""

    source: str
    macros: list[tuple[str, str]]
    include_dirs: list[str]
    flags: list[str]


def kernel_jobs() -> list[Job]:
    """The sources in csrc/cpu/, once per instruction set."""
    sources = sorted(str(file) for file in (CSRC / "cpu").glob("*.cpp") if file.name != "dispatch.cpp")
    return [
        Job(source, [("MINILM_ISA", name)], [str(CSRC)], [*COMPILE_FLAGS, *KERNEL_FLAGS, *flags])
        for name, flags in INSTRUCTION_SETS.items()
        for source in sources
    ]


def cores() -> int:
    """How many compilers run at once."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BuildExtension(build_ext):  # type: ignore[misc]
    """Compiles the sources in csrc/cpu/ once per instruction set and links the objects with the rest; the
    CUDA library is compiled and linked by nvcc, but for its bindings."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "minilm._C_cuda":
            self.build_cuda(ext)
            return
        have = [(f"MINILM_HAS_{name.upper()}", "1") for name in INSTRUCTION_SETS]
        jobs = [
            Job(
                source,
                ext.define_macros + have * ("dispatch" in source),
                ext.include_dirs,
                ext.extra_compile_args,
            )
            for source in ext.sources
        ]
        linked = copy.copy(ext)
        linked.sources, linked.extra_objects = [], [*ext.extra_objects, *self.compile(kernel_jobs() + jobs)]
        super().build_extension(linked)

    def compile(self, jobs: list[Job]) -> list[str]:
        """Compile what has changed, `cores()` at once; returns all objects. After an error no compiler is
        started any more."""
        compiler = self.compiler
        version = subprocess.run([*compiler.compiler_cxx, "--version"], capture_output=True).stdout
        newest = max(file.stat().st_mtime for file in CSRC.rglob("*.h"))
        begun = time.time()

        def one(job: Job) -> str:
            made_by = repr(
                (job, compiler.include_dirs, compiler.compiler_so, compiler.compiler_so_cxx, version)
            )
            folder = Path("build", "objects", hashlib.sha256(made_by.encode()).hexdigest()[:16])
            source, kept = Path(job.source), folder / Path(job.source).with_suffix(".o").name
            changed = max(newest, source.stat().st_mtime)
            if self.force or not kept.is_file() or kept.stat().st_mtime <= changed:
                # Elsewhere at first: what an interrupted compiler leaves is not taken for an object.
                elsewhere = folder / str(os.getpid())
                (made,) = compiler.compile(
                    [job.source], str(elsewhere), job.macros, job.include_dirs, extra_postargs=job.flags
                )
                os.utime(made, (begun, begun))  # a source that was saved in the meantime is newer
                os.replace(made, kept)
                shutil.rmtree(elsewhere)
            return str(kept)

        with ThreadPoolExecutor(cores()) as pool:
            return list(pool.map(one, jobs))

    def build_cuda(self, ext: Extension) -> None:
        """One binary for every chip in `cuda_archs`, with PTX for the chips to come."""
        bindings, *kernels = ext.sources
        nvcc, archs = find_nvcc(), cuda_archs()
        plain = [arch for arch in archs if arch.isdigit()]
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        code += [f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}"] if plain else []
        objects = self.compiler.compile(
            [bindings],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
        )
        for kernel in kernels:
            made = Path(self.build_temp, kernel).with_suffix(".cuda.o")
            made.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, *CUDA_FLAGS, *code, f"-I{CSRC}", "-c", kernel, "-o", str(made)])
            objects.append(str(made))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{folder}" for folder in ext.library_dirs] + [f"-l{name}" for name in ext.libraries]
        self.spawn([nvcc, "-shared", *objects, *libraries, "-o", str(target)])


class BuildKernels(BuildExtension):
    """The objects that need no PyTorch, for a later build_ext; nothing where that would build nothing."""

    description = "compile the CPU kernels only"

    def run(self) -> None:
        if os.environ.get("MINILM_BUILD_EXT") == "0" or sys.platform == "win32" or find_compiler() is None:
            return
        self.extensions = [Extension("minilm._C", [])]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        self.compile(kernel_jobs())


def configuration() -> dict[str, Any]:
    """What setup() is told about the extension, as MINILM_BUILD_EXT asks."""
    wanted = os.environ.get("MINILM_BUILD_EXT", "auto").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"MINILM_BUILD_EXT={wanted}: expected auto, 0 or 1")
    ext, reason = (None, "MINILM_BUILD_EXT=0") if wanted == "0" else extension()
    if ext is None:
        if wanted == "1":
            raise SystemExit(f"minilm: MINILM_BUILD_EXT=1, but minilm._C cannot be built: {reason}")
        print(
            f"minilm: installing without the native extension minilm._C: {reason}. To get it, mend that and "
            "install again with MINILM_BUILD_EXT=1 and pip's --force-reinstall --no-deps",
            file=sys.stderr,
        )
        return {}
    return {
        "ext_modules": [ext, *cuda_configuration()],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}},
    }


def cuda_configuration() -> list[Extension]:
    """The CUDA library, as MINILM_BUILD_CUDA asks."""
    wanted = os.environ.get("MINILM_BUILD_CUDA", "auto").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"MINILM_BUILD_CUDA={wanted}: expected auto, 0 or 1")
    ext, reason = (None, "") if wanted == "0" else cuda_extension(wanted)
    if ext is None and wanted == "1":
        raise SystemExit(f"minilm: MINILM_BUILD_CUDA=1, but minilm._C_cuda cannot be built: {reason}")
    return [] if ext is None else [ext]


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["minilm", "minilm.*"]),
            "minilm.kernels",
            *(f"minilm.kernels.{name}" for name in find_packages("kernels")),
            "minilm.benchmarks",
            "minilm.benchmarks.peers",
        ],
        package_dir={"minilm.kernels": "kernels", "minilm.benchmarks": "benchmarks"},
        include_package_data=False,  # what a wheel has besides modules is said here, and not by MANIFEST.in
        package_data={
            "minilm": ["py.typed"],
            "minilm.kernels": ["*.json"],
            "minilm.benchmarks": ["*.cpp", "*.css"],
        },
        **({"cmdclass": {"build_kernels": BuildKernels}} if "build_kernels" in sys.argv else configuration()),
    )
