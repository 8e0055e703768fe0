"""docs/prompting.md names what there is: its classes, its commands, and the papers of the files."""

from __future__ import annotations

import ast
import json
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


@pytest.mark.slow
def test_the_figures_of_the_page() -> None:
    """Those of the sentence encoder, and of the language model without examples. Other processors may round
    one or two sentences to the other side."""
    lines = (ROOT / "examples" / "data" / "news.jsonl").read_text(encoding="utf-8").splitlines()
    news = [json.loads(line) for line in lines]
    test = [row for row in news if row["day"] > 2]
    shown = [(row["text"], row["sentiment"]) for row in news if row["day"] <= 2]
    topics, moods = ["sport", "politics", "business", "weather"], ["positive", "negative"]
    described = {"positive": "good news", "negative": "bad news"}
    scorer = prompting.LabelScorer("SmolLM2-135M-Instruct", "News: {text}\nSentiment:", moods)
    encoder = minilm.SentenceEncoder("all-MiniLM-L6-v2")
    for classifier, field, told in (
        (prompting.EmbeddingClassifier(encoder, topics, hypothesis="This is about {}."), "topic", 33),
        (prompting.EmbeddingClassifier(encoder, described), "sentiment", 24),
        (prompting.EmbeddingClassifier(encoder, described, examples=shown), "sentiment", 30),
        (scorer, "sentiment", 34),
    ):
        found = classifier.predict([row["text"] for row in test])
        right = sum(label == row[field] for label, row in zip(found, test, strict=True))
        assert abs(right - told) <= 2, (field, right, told)
        assert f"{told} {field}s" in " ".join(PAGE.split()) or f"and {told} with the 12 examples" in PAGE
    assert len(test) == 36
    assert len(shown) == 12
