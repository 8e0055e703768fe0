"""docs/prompting.md names what there is: its classes, its commands, and the papers of the files."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import minilm
from minilm import prompting
from minilm.cli.app import app
from minilm.cli.labels import METHODS

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "prompting.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (minilm .*(?:\n    (?!minilm).+)*)", PAGE, re.M)
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_all_names_are_there() -> None:
    for name in prompting.__all__:
        if name != "Template":
            assert f"`{name}" in PAGE, name
    for name in METHODS:
        assert f"`--method {name}`" in PAGE
    for program in PROGRAMS:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name in prompting.__all__ for alias in node.names)


def test_the_papers_of_the_files_are_named() -> None:
    cited = set()
    for file in (ROOT / "minilm" / "prompting").glob("*.py"):
        cited |= set(re.findall(r"arXiv:\d{4}\.\d{5}", file.read_text(encoding="utf-8")))
    assert len(cited) > 6
    assert cited <= set(re.findall(r"arXiv:\d{4}\.\d{5}", PAGE))


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_parse(line: str) -> None:
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(re.sub(r"\n    ", "\n", line))
    group.commands[name].make_context(name, arguments)


def test_there_are_enough_of_them() -> None:
    assert len(COMMANDS) == 5
    assert len(PROGRAMS) == 3
    assert minilm.prompting is prompting


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS[:2], ids=["embed", "score"])
def test_the_programs_say_what_the_page_says(program: str) -> None:
    *lines, last = program.strip().splitlines()
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    call, _, said = last.partition("  # ")
    assert eval(call, scope) == ast.literal_eval(said)
