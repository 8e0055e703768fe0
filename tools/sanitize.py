"""Runs the native tests and the driver with AddressSanitizer and UndefinedBehaviorSanitizer, and the driver
with ThreadSanitizer.

    python tools/sanitize.py [arguments of pytest]

First it runs the driver of csrc/tests with one to four threads, with each sanitizer. ThreadSanitizer is only
used here, with the kernels and cpu/team.h, since PyTorch's thread pool does not support it. Then it runs
tests/ops/test_native*.py, and of tests/native test_steps.py and test_traits.py, on a package that is built
with the sanitizers into build/sanitize, separate from the installed one. Instruction sets are limited to
AVX2, since compiling attention's checks for AVX-512 takes many minutes, and the sources are the same. Any
finding of a sanitizer ends the run with an error.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_driver

ROOT = native_driver.ROOT
FOLDER = ROOT / "build" / "sanitize"
ISAS = ("generic", "avx2", "neon_dotprod")
FLAGS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # Python leaks by design
RACES = ["-O1", "-g", "-fsanitize=thread"]
OPTIONS |= {"TSAN_OPTIONS": "halt_on_error=1"}


def run_driver(compiler: str, flags: list[str], name: str) -> str:
    """Compile and run the driver; returns the best of its instruction sets."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    driver = native_driver.build(folder, compiler, platform.machine(), flags, ISAS)
    done = subprocess.run(
        [str(driver)], env=os.environ | OPTIONS, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    done.check_returncode()
    return done.stdout.splitlines()[-2].split(":")[0]


def build_package(compiler: str, isa: str) -> Path:
    """The package with a sanitized extension; returns the folder for PYTHONPATH."""
    flags = shlex.join(FLAGS)
    environment = {"CXX": compiler, "CXXFLAGS": flags, "LDFLAGS": flags}
    environment |= {"MINILM_BUILD_EXT": "1", "MINILM_BUILD_ISA": isa}
    library = FOLDER / "lib"
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build", "--build-lib", str(library)]
    command += ["--build-temp", str(FOLDER / "temp")]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    return library


def preloaded(compiler: str) -> dict[str, str]:
    """The environment variables with which an ordinary Python loads an extension with sanitizers."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the latter: asan looks for __cxa_throw when it starts
        command = [*shlex.split(compiler), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        libraries.append(str(Path(path).resolve(strict=True)))
    return {"LD_PRELOAD": " ".join(libraries), **OPTIONS}


def main() -> int:
    """The command."""
    compiler = os.environ.get("CXX", "g++")
    run_driver(compiler, RACES, "races")
    library = build_package(compiler, run_driver(compiler, FLAGS, "driver"))
    environment = os.environ | preloaded(compiler) | {"PYTHONPATH": str(library)}
    folder = ROOT / "tests"
    files = sorted((folder / "ops").glob("test_native*.py"))
    files += [folder / "native" / name for name in ("test_steps.py", "test_traits.py")]
    tests = [str(file) for file in files]
    # The driver covers the other instruction sets. Compilers must not run with the sanitizers, so tests
    # that start one are excluded.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not instruction_set and not driver and not compile", *tests, *sys.argv[1:]]
    origin = (
        "from minilm.ops.backends import native; print('testing', native._extension.__file__, flush=True)"
    )
    for arguments in ([sys.executable, "-c", origin], command):
        done = subprocess.run(arguments, cwd=ROOT / "tests", env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
