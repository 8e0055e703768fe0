"""The commands of encoders with a head: each gives what the pipeline gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import Terminal, failure, records, run
from tiny_models import TEXTS, save_model

import minilm

LABELS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}
CLOZE = ["john lives in [MASK].", "the [MASK] old [MASK] of the river", "[MASK]"]
COMMANDS = {
    "fill-mask": "ForMaskedLM",
    "classify": "ForSequenceClassification",
    "ner": "ForTokenClassification",
}
COMMANDS["qa"] = "ForQuestionAnswering"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for each command."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_model(
            root / name, "bert", head, spread=0.2, **(LABELS if name in ("ner", "classify") else {})
        )
        for name, head in COMMANDS.items()
    }


def test_fill_mask(models: dict[str, Path]) -> None:
    found = records("fill-mask", "--model", models["fill-mask"], "--top-k", "3", *CLOZE)
    pipe = minilm.pipeline("fill-mask", model=models["fill-mask"], device="cpu")
    assert [record["text"] for record in found] == CLOZE
    assert [len(record["masks"]) for record in found] == [1, 2, 1]
    for record, text in zip(found, CLOZE, strict=True):
        expected = pipe(text, top_k=3)
        masks = expected if isinstance(expected[0], list) else [expected]
        assert record["masks"] == [[pytest.approx(guess, abs=1e-5) for guess in mask] for mask in masks]
    (one,) = records("fill-mask", "--model", models["fill-mask"], "--top-k", "3", stdin=CLOZE[1])
    assert one["masks"] == [[pytest.approx(guess, abs=1e-5) for guess in mask] for mask in found[1]["masks"]]
    assert "[MASK]" in failure("fill-mask", "--model", models["fill-mask"], "no mask here")


def test_classify(models: dict[str, Path]) -> None:
    pipe = minilm.pipeline("text-classification", model=models["classify"], device="cpu")
    found = records("classify", "--model", models["classify"], *TEXTS)
    for record, expected in zip(found, pipe(TEXTS), strict=True):
        assert (record["label"], record["score"]) == (
            expected["label"],
            pytest.approx(expected["score"], abs=1e-5),
        )
        assert set(record) == {"text", "label", "score"}
    (ranked,) = records("classify", "--model", models["classify"], "--top-k", "2", TEXTS[0])
    assert ranked["labels"] == [pytest.approx(answer, abs=1e-5) for answer in pipe(TEXTS[0], top_k=2)]
    assert ranked["label"] == ranked["labels"][0]["label"]
    (paired,) = records("classify", "--model", models["classify"], "--pair", "anna", TEXTS[0])
    expected = pipe({"text": TEXTS[0], "text_pair": "anna"})
    assert (paired["pair"], paired["score"]) == ("anna", pytest.approx(expected["score"], abs=1e-5))
    assert paired["score"] != pytest.approx(found[0]["score"])


@pytest.mark.parametrize("aggregation", ["none", "simple", "max"])
def test_ner(models: dict[str, Path], aggregation: str) -> None:
    pipe = minilm.pipeline("ner", model=models["ner"], device="cpu", aggregation_strategy=aggregation)
    found = records("ner", "--model", models["ner"], "--aggregation", aggregation, *TEXTS)
    expected = pipe(TEXTS)
    assert any(expected)
    for record, entities in zip(found, expected, strict=True):
        assert record["entities"] == [
            pytest.approx(json.loads(json.dumps(e, default=float)), abs=1e-5) for e in entities
        ]
        for entity in record["entities"] if aggregation != "none" else ():
            start, end = entity["start"], entity["end"]
            assert 0 <= start < end <= len(record["text"])
    assert "--aggregation must be one of" in failure(
        "ner", "--model", models["ner"], "--aggregation", "sum", "x"
    )


def test_qa(tmp_path: Path, models: dict[str, Path]) -> None:
    pipe = minilm.pipeline("question-answering", model=models["qa"], device="cpu")
    question, context = "where does anna live", "mary works in london; anna lives in berlin. " * 12
    (found,) = records("qa", "--model", models["qa"], question, context)
    expected = pipe(question=question, context=context)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    assert context[found["start"] : found["end"]] == found["answer"]
    file = tmp_path / "context.txt"
    file.write_text("mary works in london;\nanna lives in berlin.\n")
    (whole,) = records("qa", "--model", models["qa"], question, "--file", file)
    assert whole["answer"] in file.read_text()
    several = "\n".join(json.dumps({"id": i, "context": text}) for i, text in enumerate(TEXTS[:2]))
    (tmp_path / "contexts.jsonl").write_text(several)
    both = records("qa", "--model", models["qa"], question, "--file", tmp_path / "contexts.jsonl")
    assert [record["id"] for record in both] == [0, 1]
    best = records("qa", "--model", models["qa"], question, context, "--top-k", "3")
    assert [record["answer"] for record in best] == [
        answer["answer"] for answer in pipe(question=question, context=context, top_k=3)
    ]


@pytest.mark.parametrize(
    ("command", "text"), [("fill-mask", "a [MASK]"), ("classify", "a"), ("ner", "a"), ("qa", "a")]
)
def test_a_head_that_is_missing(command: str, text: str, models: dict[str, Path]) -> None:
    """A program that reads the results would not see that they are random, so they are not given unasked."""
    other = models["classify" if command == "fill-mask" else "fill-mask"]
    arguments = (command, "--model", other, text, *(["some context"] if command == "qa" else []))
    message = failure(*arguments)
    assert "would be random" in message
    assert "--untrained" in message
    result = run(*arguments, "--untrained")
    assert json.loads(result.stdout)
    assert "the answers are random" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_decoder_has_no_such_head() -> None:
    assert "llama models have no masked-lm head" in failure("fill-mask", "-m", "SmolLM2-135M-Instruct", "a")


@pytest.mark.parametrize(
    ("command", "arguments", "shown"),
    [
        ("fill-mask", ["john lives in [MASK]."], "token"),
        ("classify", [TEXTS[0]], "label"),
        ("ner", [TEXTS[0]], "entity"),
        ("qa", ["who", TEXTS[0]], "answer"),
    ],
)
def test_tables(command: str, arguments: list[str], shown: str, models: dict[str, Path]) -> None:
    terminal = Terminal(command, "--model", models[command], *arguments)
    assert terminal.finish() == 0
    assert shown in terminal.shown
    assert "score" in terminal.shown
    assert "{" not in terminal.shown
