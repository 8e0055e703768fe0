"""Counts the lines to read: the files of the Transformer in reading order, and those of the Triton kernels.

    python tools/reading.py

The Transformer: the configuration, the ops with their formulas and the dispatch table (without
`ops/backends/`), the model, and the contract of a family, with BERT and Llama as examples. The exit status is
1 if a part is longer than its limit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRANSFORMER = (
    "minilm/config.py",
    "minilm/ops/*.py",
    "minilm/model/*.py",
    "minilm/families/__init__.py",
    "minilm/families/family.py",
    "minilm/families/table.py",
    "minilm/families/bert.py",
    "minilm/families/llama.py",
    "minilm/families/positions.py",
)
KERNELS = ("kernels/*.py",)
MOST = {"the Transformer": (TRANSFORMER, 5000), "the Triton kernels": (KERNELS, 4000)}
"""Part -> its files, and the maximum number of lines."""


def lines_of(patterns: Iterable[str]) -> dict[str, int]:
    """The lines of each file, by its path."""
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    return {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in files
    }


def main() -> int:
    """The command."""
    too_long = False
    for what, (patterns, most) in MOST.items():
        lines = lines_of(patterns)
        for file, count in lines.items():
            print(f"{count:6}  {file}")
        total = sum(lines.values())
        too_long |= total > most
        print(f"{total:6}  {what}, of at most {most}\n")
    return int(too_long)


if __name__ == "__main__":
    sys.exit(main())
