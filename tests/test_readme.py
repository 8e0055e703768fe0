"""What the README says is so: its programs run, its commands parse, its files exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from house import ORDER

from minilm.cli.app import app
from minilm.families import families

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^    (minilm .*?)(?:  +#.*)?$", README, re.M)
HEADS: dict[str, str] = {
    "masked-lm": "masked LM",
    "next-sentence": "next sentence",
    "pre-training": "pre-training",
    "sequence-classification": "sequence",
    "token-classification": "token classification",
    "question-answering": "question answering",
    "causal-lm": "causal LM",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_programs_run(program: str, tmp_path: Path) -> None:
    """Each alone, in a process that has none of the libraries whose names it uses."""
    names = ("transformers", "sentence_transformers", "vllm")
    block = f"import sys\nfor name in {names}: sys.modules[name] = None\n"
    finished = subprocess.run(
        [sys.executable, "-c", block + program], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr


def test_there_are_programs_and_commands() -> None:
    assert len(PROGRAMS) >= 5
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_parse(line: str) -> None:
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line)
    group.commands[name].make_context(name, arguments)


def test_every_command_is_shown_or_named() -> None:
    group: Any = typer.main.get_command(app)
    section = README.split("## The command line")[1].split("## ")[0]
    for name in group.commands:
        assert re.search(rf"\b{name}\b", section), name


def test_the_table_of_families_is_complete() -> None:
    rows = dict(re.findall(r"^\| (`[a-z0-9_`, -]+`) \| (.*) \|$", README, re.M))
    said = {name: heads for names, heads in rows.items() for name in re.findall(r"`([^` ]+)`", names)}
    assert set(said) == {family.model_type for family in families()}
    for family in families():
        missing = [head for head in family.heads if HEADS[head] not in said[family.model_type]]
        surplus = [head for head, words in HEADS.items() if words in said[family.model_type]]
        assert not missing
        assert set(surplus) == set(family.heads)


SECTION = README.split("## The code, in reading order")[1].split("\n## ")[0]
MAP = dict(re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", SECTION, re.M))


def first_sentence(path: Path) -> str:
    """Of the docstring of a file, or of a folder's `__init__`."""
    file = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()) + " ")[0]


@pytest.mark.parametrize("place", [place for place in MAP if place.startswith(("minilm/", "kernels/"))])
def test_the_map_says_what_the_folders_say(place: str) -> None:
    assert MAP[place] == first_sentence(ROOT / place)


def test_the_map_is_complete_and_in_order() -> None:
    """Every folder and file at the top of minilm/, in the order in which they stand on each other."""
    shown = [place.removeprefix("minilm/").rstrip("/").removesuffix(".py") for place in MAP]
    top = [place for place in shown if "/" not in place and (ROOT / "minilm" / place).exists()]
    top += [place for place in shown if (ROOT / "minilm" / f"{place}.py").exists()]
    inside = (ROOT / "minilm").iterdir()
    there = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(top) == there - {"__init__", "__main__", "_version"}
    places = [ORDER.index(place.split("/")[0]) for place in shown if place.split("/")[0] in ORDER]
    assert places == sorted(places)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"`((?:minilm|tests|kernels|csrc|tools)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name


def test_it_is_short() -> None:
    """Without the measured tables."""
    text = re.sub(r"## How fast\n.*?(?=\n## )", "", README, flags=re.S)
    assert len(text.splitlines()) <= 210


RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"


def test_the_figures_are_those_that_were_measured() -> None:
    """The table, the page of results and the run that they are of."""
    from minilm.benchmarks import markdown

    found = markdown.newest(RESULTS)
    assert found is not None
    name, results = found
    section = README.split("## How fast")[1].split("\n## ")[0]
    assert results.machine["cpu"] in section
    assert markdown.overview(results) in f"{section}\n"
    assert section.count("\n|---") == 1, "one table; the rest is on the page of results"
    pictures = sorted(file.stem for file in (RESULTS / "pictures").glob("*.png"))
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == markdown.page(results, name, pictures)
