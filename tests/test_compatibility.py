"""docs/compatibility.md agrees with the code."""

from __future__ import annotations

from pathlib import Path

from minilm.substitutes import CLASSES, OPTIONS

ROOT = Path(__file__).parent.parent
WORKS, NOT = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split("## Not supported")


def test_what_works_names_a_test_that_exists() -> None:
    rows = [line for line in WORKS.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for row in rows:
        named = row.rstrip(" |").rpartition("| ")[2].strip("`")
        assert (ROOT / named).is_file(), row


def test_what_does_not_is_what_the_errors_say() -> None:
    names = {**CLASSES, **{f"from_pretrained({option}=)": way for option, way in OPTIONS.items()}}
    for name, way in names.items():
        assert f"| `{name}` | {way} |" in NOT
