"""The programs in examples/ run, with small random models and (slow tests) with the pretrained ones, and are
listed in its README."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_decoders
from tiny_models import save_model

FOLDER = Path(__file__).parent.parent / "examples"
PROGRAMS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
LIST = (FOLDER / "README.md").read_text(encoding="utf-8")
MOST_LINES = 50

SHOWN: dict[str, tuple[str, ...]] = {
    "attention_map": (
        r"Layer 2, head 1: .*\n\n  \[CLS\] \|██ ",
        r"(\n *\S+ \|[ ░▒▓█]{30}\| +\d+ % \S+){15}\n$",
    ),
    "batch_generation": (
        r"^The sea is .+\n(The .+\n){7}\none by one +\d+ tokens/s\n",
        r"together +\d+ tokens/s; \d of 8 texts are the same",
    ),
    "classify_by_prompt": (
        r"^zero-shot\n +8\d% positive  I laughed .*\n +3\d% positive  Two hours",
        r"\nfour examples\n +[89]\d% positive  I laughed .*\n +[23]\d% positive  Two hours",
    ),
    "chat_stream": (
        r"^Why is the sky blue\? .*\nThe sky .+\n\n",
        r"41 tokens read in .* then \d+ written, \d+",
    ),
    "cluster_sentences": (
        r"around: My delivery is a week late\.\n(    .*\n)*    Where is my order\?\n",
        r"In no group: Do you have an office in Lisbon\?\n$",
    ),
    "constrained_answers": (
        *(r"yes or no\.  ->  (yes|no)\n", r"  ->  (tea|stones|chairs)\n", r"  ->  (positive|negative)\n"),
        r"1\. Apples\n2\. [^\n]*   \(ended by '\\n'\)",
    ),
    "finetune_with_trainer": (
        r"lightning tonight\.  ->  weather \(0\.\d\d\)\n",
        r"The team scored twice\.  ->  sports \(0\.\d\d\)\n",
    ),
    "quantize_and_compare": (
        *(r"\nfloat32 +90\.9 +1\.00000 ", r"\nint8 +\d\d\.\d +0\.99\d+ ", r"\nq8_0 +\d\d\.\d +0\.99\d+ "),
        *(r"\nq4_1 +\d\d\.\d +0\.9\d+ ", r"\nq4_0 +\d\d\.\d +0\.9\d+ "),
    ),
    "rag_langchain": (
        r"found: +'The museum is open .* closed on Mondays\.'\n",
        r"answered: .*closed on Mondays",
    ),
    "rag_llama_index": (
        r"found \(0\.\d+\): Breakfast is served in the dining car",
        r"\nanswered: .*dining car",
    ),
    "semantic_search": (
        r"Do I need a graphics card\?\n\(\d+ paragraphs of README\.md\)\n",
        r"\n\n0\.\d+  .*GPU",
    ),
    "train_classifier": (
        r"step  29  loss 0\.0",
        r"praise +an excellent walk\n.*complaint +the service .*\n.*praise +we .*\n.*complaint +never again",
    ),
    "retrieve_then_answer": (
        r"^How many people live on Tarnholm\?\n +0\.\d\d  .*312",
        r"\nWhat is the capital of Peru\?\n +0\.\d\d  \(not in the documents\)\n",
        r"\nwith passages: 1[2-5] of 15 answers are right\nwithout: [0-3] of 15 answers are right\n",
        r"\nnot in the documents: [45] of 5 recognised\n$",
    ),
    "customer_service": (
        r"^> Somebody stole my bike!\nTell the police .*\[0\.\d\d, threshold 0\.3\d\]\n",
        r"\n> Do you have a job for me\?\n\(a colleague will answer you\)  ",
        r"\n26 other questions: right answer 1[5-7], .* in vain [1-4], wrong answer [3-6]\n$",
    ),
    "news_alarm": (
        r"^day 1 +█+ +33% bad\n(day [2-5] .* bad\n){4}day 6 .* bad  ALARM, mostly \w+\nday 7 .* ALARM",
        r"\nday 8 .* bad\nsentiment: (29|3[0-2]) of 36 are right\ntopic: 3[2-4] of 36 are right\n$",
    ),
    "recommend_books": (
        r"^Dracula\n    because you like Carmilla \(0\.\d\d\)\n",
        r"\n1[4-6] of 18 hidden books are among the first five; by chance 2\.6\n$",
    ),
    "what_ran": (
        r"auto +\d+ texts/s, at most \d\.\de-0[5-9] from",
        r"reference +\d+ texts/s, at most 0\.0e\+00 from",
        r"For one text, with reasons:\n(.*\n)*pool: ",
    ),
}
"""What the real models must make of them."""
NEEDS = {
    "rag_langchain": "langchain_core",
    "rag_llama_index": "llama_index",
    "finetune_with_trainer": "accelerate",
}
SMALL = [name for name in PROGRAMS if name not in NEEDS]
OPTIONS: dict[str, list[str]] = {
    "train_classifier": ["MODEL", "--steps", "2"],
    "chat_stream": ["a question", "--model", "MODEL", "--max-tokens", "5"],
    "batch_generation": ["MODEL", "--max-tokens", "4"],
    "attention_map": ["The old man", "--model", "MODEL", "--layer", "1", "--head", "0"],
    "semantic_search": [str(FOLDER / "README.md"), "a question", "--model", "MODEL"],
    "cluster_sentences": ["--model", "MODEL", "--threshold", "0.9"],
    "what_ran": ["MODEL"],
    "retrieve_then_answer": ["DECODER", "--encoder", "ENCODER"],
    "customer_service": ["--model", "MODEL", "a question"],
    "news_alarm": ["--model", "MODEL"],
    "recommend_books": ["--model", "MODEL", "--likes", "Emma"],
    "quantize_and_compare": ["MODEL"],
    "constrained_answers": ["MODEL"],
    "classify_by_prompt": ["MODEL"],
}
DECODERS = ("chat_stream", "batch_generation", "constrained_answers", "classify_by_prompt")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    encoder = tmp_path_factory.mktemp("examples") / "encoder"
    save_model(encoder, "bert", positions=200, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    return {"encoder": str(encoder), "decoder": str(tiny_decoders.decoder("llama").folder)}


@pytest.mark.filterwarnings("ignore:.* texts have more than:UserWarning")
@pytest.mark.parametrize("name", SMALL)
def test_they_run(
    name: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small random model, as an argument names it."""
    model = models["decoder" if name in DECODERS else "encoder"]
    named = {"MODEL": model, "DECODER": models["decoder"], "ENCODER": models["encoder"]}
    arguments = [named.get(value, value) for value in OPTIONS[name]]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(PROGRAMS[name]), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_they_show_what_they_say(name: str, tmp_path: Path) -> None:
    """With the real models, each alone as a person runs it."""
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    finished = subprocess.run(
        [sys.executable, str(PROGRAMS[name])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    for pattern in SHOWN[name]:
        assert re.search(pattern, finished.stdout), f"{pattern}\n{finished.stdout}"
    assert not list(tmp_path.iterdir()), "it leaves files behind"


@pytest.mark.slow
def test_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    command = [sys.executable, str(PROGRAMS["attention_map"]), "A text.", "--picture", str(picture)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_list_is_complete() -> None:
    rows = dict(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (.*) \|$", LIST, re.M))
    assert set(rows) == set(PROGRAMS) == set(SHOWN)
    assert len(rows) >= 10
    for name, path in PROGRAMS.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        says = " ".join(text.split("\n\n")[0].split()).split(" Takes ")[0]
        assert rows[name] == says, name
        assert re.search(r"\bTakes \d+ seconds\.", text), name


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_are_short(name: str) -> None:
    assert 15 <= len(PROGRAMS[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_data_is_whole() -> None:
    """Small, as JSON lines, each file named in the README; what refers to another file finds it there."""
    rows = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((FOLDER / "data").iterdir())
    }
    assert set(re.findall(r"`(\w+\.jsonl)`", LIST)) == set(rows)
    assert all(5 < len(found) < 100 for found in rows.values())
    for found in rows.values():
        assert len({tuple(row) for row in found}) == 1, "the same fields"
        assert len({json.dumps(row) for row in found}) == len(found), "nothing twice"
    known = {entry["id"] for entry in rows["faq.jsonl"]}
    asked = {question["id"] for question in rows["faq_questions.jsonl"]}
    assert asked == {*known, None}
    titles = [book["title"] for book in rows["books.jsonl"]]
    assert all(title in titles for reader in rows["readers.jsonl"] for title in reader["likes"])
    for question in rows["island_questions.jsonl"]:
        assert (question["passage"] is None) == (not question["answers"])
        if question["answers"]:
            assert question["answers"][0] in rows["island.jsonl"][question["passage"]]["text"]
