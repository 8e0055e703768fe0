"""Output on a terminal of 60 columns: no line is longer, no name is cut, paragraphs are wrapped evenly."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_runs import run
from tiny_models import save_model

from minilm.benchmarks import peers, report
from minilm.benchmarks.results import Results
from minilm.cli.app import app
from minilm.cli.options import paragraphs
from minilm.conversion import summarise

GROUP: Any = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
WIDTHS = (60, 80, 120)


def shown(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str | Path) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    lines: list[str] = [line.rstrip() for line in run(*arguments).stdout.splitlines()]
    for line in lines:
        assert len(line) <= width, line
        assert "…" not in line, line
    return lines


def ragged(lines: list[str], width: int) -> list[str]:
    """Lines that end although the first word of the next would have fitted."""
    found = []
    for line, following in pairwise(lines):
        word = following.split(" ")[0] if following.strip() else ""
        if line.strip() and word and len(line) + 1 + len(word) <= width:
            found.append(line)
    return found


def prose(lines: list[str]) -> list[str]:
    """The help's paragraphs, without margins: from the usage to the first box."""
    start = next(at for at, line in enumerate(lines) if "Usage:" in line)
    end = next(at for at, line in enumerate(lines) if line.startswith(("╭", "Arguments:", "Options:")))
    return [line.strip() for line in lines[start + 1 : end]]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_is_not_ragged(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, width, name, "--help")
    assert ragged(prose(lines), width - 2) == []
    command = GROUP.commands[name]
    words = " ".join(" ".join(prose(lines)).split())
    for paragraph in command.help.split("\n\n"):
        assert " ".join(paragraph.split()) in words
    text = "\n".join(lines)
    for parameter in command.params:
        for option in parameter.opts:
            assert re.search(
                rf"(?<![\w-]){re.escape(option)}(?![\w-])", text
            ) or parameter.param_type_name == ("argument"), option
    assert not re.search(r"<(bool|str|int|float|path|Path)\b", text)  # types of Python are no help


def test_a_ragged_paragraph_is_seen() -> None:
    assert ragged(["a line that ends", "early and goes on"], 40) == ["a line that ends"]
    assert ragged(["a line that is full", "and goes on"], 20) == []
    assert ragged(["the last of one", "", "the first of another"], 60) == []
    assert paragraphs("One\n    sentence.\n\n    And\n    more.") == "One sentence.\n\nAnd more."


@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_of_commands_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(shown(monkeypatch, width))
    assert all(re.search(rf"│ {name} ", text) for name in COMMANDS)


@pytest.mark.parametrize("options", [(), ("--weights",)])
def test_inspect_keeps_names_whole(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, "roberta", "ForMaskedLM")
    lines = shown(monkeypatch, 60, "inspect", folder, *options)
    words = {word for line in lines for word in line.split()}
    summary = summarise(folder)
    for parameter in summary.parameters:
        assert re.sub(r"(?<=\.)\d+(?=\.)", "{i}", parameter.name) in words
    sources = {re.sub(r"(?<=\.)\d+(?=\.)", "{i}", entry.source) for entry in summary.weights if entry.source}
    assert (sources <= words) == bool(options)
    at = lines.index("body.layers.{i}.attention.qkv.weight")
    assert lines[at + 1] == "  [72, 24] x 2, 3.46 k, " + lines[at + 1].split(", ", 3)[3]


def test_doctor_keeps_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm import doctor

    lines = shown(monkeypatch, 60, "doctor")
    here = doctor.examine()
    for name in (*here["packages"], *(row["op"] for row in here["ops"])):
        assert any(line == name or line.startswith(f"{name} ") for line in lines), name


def test_the_list_of_engines_keeps_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 60, "bench", "--list")
    table = [re.split(r" {2,}", line) for line in lines]
    rows = {row[0]: row for row in table if len(row) == 4}
    reasons = " ".join(lines[len(peers.ENGINES) + 2 :])
    for name in peers.ENGINES:
        assert rows[name][3] in ("yes", "no")
        told = re.search(rf"(no|,) {re.escape(name)}[,:]", reasons) is not None
        assert (rows[name][3] == "no") == told, name


def test_tables_of_the_bench_keep_names_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    machine = {
        "cpu": "A",
        "usable_cores": 2,
        "native_isa": "avx2",
        "native_unavailable": None,
        "versions": {},
    }
    machine |= {"features": [], "architecture": "x86_64", "commit": "abc"}
    shared = {
        "level": "end to end",
        "model": "M",
        "workload": "M 1 x 16",
        "dtype": "float32",
        "device": "cpu",
    }
    shared |= {"threads": 2, "unit": "s", "units_per_call": 1, "precision": "fp32"}
    peer = "transformers compiled"
    cells = [
        {**shared, "peer": "minilm", "ours": True, "status": "ok", "samples": [1.0, 1.0, 1.0]},
        {**shared, "peer": peer, "ours": False, "status": "ok", "samples": [0.2, 0.25, 0.5]},
        {**shared, "peer": "absent one", "ours": False, "status": "skipped", "reason": "is not installed"},
        {**shared, "peer": "absent two", "ours": False, "status": "skipped", "reason": "is not installed"},
    ]
    settings = {"left_out": ["gated [1 x 2] M", "gated [1 x 4] M", "M: minilm", "M: cold starts"]}
    cells[0]["load"] = {"others_share": 0.376, "steal_share": 0.0}
    report.print_tables(Results(machine, settings, [], cells), Console(width=60))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) <= 60 for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "transformers compiled 250 ms 4.00x slower (2.50 to 4.55)" in text
    assert "absent one, absent two: skipped: is not installed" in text
    assert "Left out for lack of time: 2 shapes of ops (gated); M: minilm, cold starts." in text
    assert "Other programs used 38% of the processors during the measurements" in text
