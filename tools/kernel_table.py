"""``make kernel-table``: the tests of each Triton kernel, as benchmarks/results/kernels.md.

Runs the kernels' tests in Triton's interpreter, in this process, and records for each kernel its test files,
the number of passed tests and of hypothesis examples, and the largest error against float64 next to that of
eager PyTorch on the same data (from `tests/close.py`). The exit status is 1 if a test failed, or a kernel is
missing in the table.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "kernels.md"
TESTS: dict[str, tuple[str, ...]] = {
    "norm": ("test_triton_norm.py",),
    "attention": ("test_triton_attention.py", "test_attention_scores.py"),
    "attention_backward": ("test_triton_attention.py",),
    "attention_shared": ("test_triton_attention.py", "test_triton_attention_short.py"),
    "attention_short": ("test_triton_attention_short.py",),
    "decode": ("test_triton_decode.py",),
    "rope": ("test_triton_rope.py",),
    "activation": ("test_triton_activation.py",),
    "cross_entropy": ("test_triton_cross_entropy.py",),
    "linear_cross_entropy": ("test_triton_cross_entropy.py",),
    "quantized_matmul": ("test_triton_quantized.py",),
}
"""The test files of each file in kernels/ that has kernels."""
DTYPES = ("float32", "float16", "bfloat16")


class Recorder:
    """A plugin of pytest: counts by test file."""

    def __init__(self) -> None:
        self.file = ""
        self.passed: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.examples: Counter[str] = Counter()
        self.errors: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        """(file, dtype): the largest error, ours and eager's."""
        self._counted: set[int] = set()

    def judged(self, dtype: str, error: float, eager: float) -> None:
        """Called by `close.assert_as_good_as_eager`."""
        ours, theirs = self.errors[self.file, dtype]
        self.errors[self.file, dtype] = max(ours, error), max(theirs, eager)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Count the calls of what hypothesis calls with each example."""
        import close

        close.listeners.append(self.judged)
        for item in items:
            handle = getattr(getattr(item, "obj", None), "hypothesis", None)
            if handle is not None and id(handle) not in self._counted:
                self._counted.add(id(handle))
                handle.inner_test = self._counting(handle.inner_test, item.path.name)

    def _counting(self, test: Callable[..., Any], file: str) -> Callable[..., Any]:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.examples[file] += 1
            return test(*args, **kwargs)

        return counted

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.file = Path(nodeid.split("::")[0]).name

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self.skipped[self.file] += 1
        elif report.when == "call" and report.passed:
            self.passed[self.file] += 1


def kernel_files() -> set[str]:
    """Names of the files in kernels/ that define kernels or ops of them."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")}
    own = re.compile(r"^@(triton\.jit|.*_op\(\"minilm_triton::)", re.MULTILINE)
    return {name for name, text in texts.items() if own.search(text)}


def table(recorder: Recorder, versions: str) -> str:
    """The page."""
    lines = [
        "# Triton kernels, tested",
        "",
        f"Made by `make kernel-table` with {versions}, on a CPU in Triton's interpreter: no GPU has run "
        "these kernels. Counts are of whole test files, which kernels may share. Errors are the largest "
        "absolute difference to float64 that the tests judged, ours / eager PyTorch's in the same dtype on "
        "the same data; a single result may err twice as much as eager's, plus a floor that its test states.",
        "",
        "| kernel | tests in | passed | examples drawn | " + " | ".join(DTYPES) + " |",
        "|---" * (4 + len(DTYPES)) + "|",
    ]
    for kernel, files in TESTS.items():
        cells = []
        for dtype in DTYPES:
            found = [recorder.errors[f, dtype] for f in files if (f, dtype) in recorder.errors]
            pairs = max((a for a, _ in found), default=0.0), max((b for _, b in found), default=0.0)
            cells.append(f"{pairs[0]:.1e} / {pairs[1]:.1e}" if found else "-")
        names = ", ".join(f"`{name}`" for name in files)
        passed, drawn = (sum(c[f] for f in files) for c in (recorder.passed, recorder.examples))
        lines.append(f"| `kernels/{kernel}.py` | {names} | {passed} | {drawn} | {' | '.join(cells)} |")
    skipped = sum(recorder.skipped.values())
    lines += ["", f"{skipped} tests need a GPU and were skipped." if skipped else "No test was skipped."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; arguments go to pytest."""
    if missing := kernel_files() ^ set(TESTS):
        print(f"kernels/ and the table of tools/kernel_table.py differ by: {', '.join(sorted(missing))}")
        return 1
    os.environ["TRITON_INTERPRET"] = "1"
    recorder = Recorder()
    names = dict.fromkeys(name for names in TESTS.values() for name in names)
    files = [str(file) for name in names for file in (ROOT / "tests").rglob(name)]
    extra = sys.argv[1:] if arguments is None else arguments
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, *extra], [recorder])
    if status != 0:
        return 1
    import torch
    import triton

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(table(recorder, f"PyTorch {torch.__version__} and Triton {triton.__version__}"))
    print(f"written to {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
