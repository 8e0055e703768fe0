"""`classify --labels`: each method gives what its class in minilm.prompting gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Terminal, failure, records, run
from tiny_models import TEXTS, save_decoder, save_model

import minilm
from minilm.prompting import ClozeClassifier, EmbeddingClassifier, FewShotTemplate, LabelScorer

LABELS = {"person": "mary", "place": "paris", "tea": "tea"}
ASKED = "person=mary, place = paris,tea"
EXAMPLES = [("anna", "person"), ("the green tea", "tea"), ("berlin, city", "place"), ("who", "person")]
ITEMS = [TEXTS[0], TEXTS[1], TEXTS[4]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    plain = save_model(root / "plain", "bert", spread=0.2)
    minilm.SentenceEncoder(plain, device="cpu").save_pretrained(root / "embed")
    nli = {"contradiction": 0, "neutral": 1, "entailment": 2}
    names = {"label2id": nli, "id2label": {number: name for name, number in nli.items()}}
    return {
        "embed": root / "embed",
        "cloze": save_model(root / "cloze", "bert", "ForMaskedLM"),
        "score": save_decoder(root / "score", "llama"),
        "nli": save_model(root / "nli", "bert", "ForSequenceClassification", **names),
    }


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": text, "label": label}) for text, label in EXAMPLES]
    (tmp_path / "examples.jsonl").write_text("\n".join(rows))
    return tmp_path / "examples.jsonl"


def same(found: list[dict[str, Any]], classifier: Any) -> None:
    """The best label of each item, and all of them in order."""
    for record, item, row in zip(found, ITEMS, classifier.probabilities(ITEMS).tolist(), strict=True):
        order = sorted(range(3), key=lambda i: -row[i])
        assert record["text"] == item
        assert [one["label"] for one in record["labels"]] == [list(LABELS)[i] for i in order]
        assert [one["score"] for one in record["labels"]] == pytest.approx([row[i] for i in order], abs=1e-5)
        assert (record["label"], record["score"]) == tuple(record["labels"][0].values())


@pytest.mark.parametrize("calibrate", [False, True])
def test_methods(calibrate: bool, models: dict[str, Path]) -> None:
    common = ("classify", "--labels", ASKED, "--top-k", "9", *(("--calibrate",) if calibrate else ()))
    same(
        records(*common, "--model", models["embed"], *ITEMS),
        EmbeddingClassifier(models["embed"], LABELS, calibrate=calibrate),
    )
    same(
        records(*common, "--model", models["cloze"], "--method", "cloze", *ITEMS),
        ClozeClassifier(models["cloze"], "{text} This is {mask}.", LABELS, calibrate=calibrate),
    )
    same(
        records(*common, "--model", models["score"], "--method", "score", *ITEMS),
        LabelScorer(models["score"], "{text}\nCategory:", LABELS, calibrate=calibrate),
    )


def test_nli(models: dict[str, Path]) -> None:
    ask = ("classify", "--labels", ASKED, "--method", "nli", "--model", models["nli"])
    found = records(*ask, "--template", "it is {}.", *ITEMS)
    pipe = minilm.pipeline("zero-shot-classification", model=models["nli"], device="cpu")
    names = {text: label for label, text in LABELS.items()}
    for record, expected in zip(
        found, pipe(ITEMS, list(names), hypothesis_template="it is {}."), strict=True
    ):
        assert record["label"] == names[expected["labels"][0]]
        assert record["score"] == pytest.approx(expected["scores"][0], abs=1e-5)
        assert set(record) == {"text", "label", "score"}


def test_examples_and_templates(models: dict[str, Path], examples: Path, tmp_path: Path) -> None:
    common = ("classify", "--examples", examples, "--top-k", "3")
    found = records(*common, "--model", models["embed"], "--template", "a {}", "--labels", ASKED, *ITEMS)
    same(found, EmbeddingClassifier(models["embed"], LABELS, hypothesis="a {}", examples=EXAMPLES))
    template = FewShotTemplate("{text} ->", [(t, f" {LABELS[label]}") for t, label in EXAMPLES])
    score = ("--model", models["score"], "--method", "score", "--template", "{text} ->")
    same(records(*common, *score, "--labels", ASKED, *ITEMS), LabelScorer(models["score"], template, LABELS))
    table = tmp_path / "examples.tsv"
    table.write_text("".join(f"{text}\t{label}\n" for text, label in EXAMPLES))
    (one,) = records("classify", "--examples", table, "--model", models["embed"], "--top-k", "3", "anna")
    assert {answer["label"] for answer in one["labels"]} == set(LABELS), "the labels of the examples"


def test_json_lines_keep_their_fields(models: dict[str, Path]) -> None:
    lines = "\n".join(json.dumps({"id": n, "body": text}) for n, text in enumerate(ITEMS))
    found = records("classify", "--labels", ASKED, "-m", models["embed"], "--field", "body", stdin=lines)
    assert [(record["id"], record["body"]) for record in found] == list(enumerate(ITEMS))


def test_errors(models: dict[str, Path], examples: Path, tmp_path: Path) -> None:
    def said(*arguments: str | Path) -> str:
        return failure("classify", "-m", models["embed"], "a text", *arguments)

    assert "--method, --calibrate needs --labels or --examples" in said("--method", "embed", "--calibrate")
    assert "--method must be one of embed, score, cloze, nli" in said("--labels", "a,b", "--method", "x")
    assert "has an empty label" in said("--labels", "a,,b")
    assert "has an empty label" in said("--labels", "a,b=")
    assert "--labels has 'a' twice" in said("--labels", "a,b,a")
    assert "two labels have the text 'x'" in said("--labels", "a=x,b=x")
    assert "two or more labels, and there are 1" in said("--labels", "a")
    assert "--pair has no effect with --labels" in said("--labels", "a,b", "--pair", "x")
    assert "--untrained has no effect with --labels" in said("--labels", "a,b", "--untrained")
    assert "has the label 'person'" in said("--labels", "a,b", "--examples", examples)
    assert "--examples: only for the methods embed and score" in said(
        "--examples", examples, "--method", "cloze"
    )
    assert "--calibrate: not for the method nli" in said("--labels", "a,b", "--method", "nli", "--calibrate")
    assert "hypothesis must have one {}" in said("--labels", "a,b", "--template", "about")
    assert "a template must have {mask}" in failure(
        "classify", "--labels", "mary,tea", "--method", "cloze", "-m", models["cloze"], "--template", "x", "a"
    )
    assert "the vocabulary does not have the word" in failure(
        "classify", "--labels", "mary,😀", "--method", "cloze", "-m", models["cloze"], "a"
    )
    for method, kind in (("cloze", "a masked language model"), ("nli", "a model trained on NLI")):
        assert f"--method {method} needs {kind}" in failure(
            "classify", "--labels", "a,b", "--method", method, "x"
        )
    assert "no masked-lm head" in said("--labels", "a,b", "--method", "cloze")
    for name, content, words in (
        ("e.txt", "a\tb", "expected a name that ends in .jsonl or .tsv"),
        ("e.tsv", "a\tb\tc", "line 1 must be a text, a tab and a label"),
        ("e.tsv", "a\tb\n\tc", "line 2 must be a text, a tab and a label"),
        ("e.tsv", "", "there is no example in"),
        ("e.jsonl", '{"text": "a"}', "example 1 has no text in the field 'label'"),
        ("e.jsonl", '{"label": "a"}', "line 1 has no text in the field 'text'"),
    ):
        (tmp_path / name).write_text(content)
        assert words in said("--examples", tmp_path / name)
    assert "No such file" in said("--examples", tmp_path / "none.tsv")


def test_tables(models: dict[str, Path]) -> None:
    terminal = Terminal("classify", "-m", models["embed"], "--labels", ASKED, *ITEMS)
    assert terminal.finish() == 0
    assert "score" in terminal.shown
    assert any(label in terminal.shown for label in LABELS)
    assert "{" not in terminal.shown


@pytest.mark.slow
def test_with_the_real_models() -> None:
    texts = ["The striker scored twice.", "Parliament passed the budget.", "Rain is expected in the north."]
    for method in ((), ("--method", "score", "--calibrate")):
        found = records("classify", "--labels", "sport,politics,weather", *method, *texts)
        assert [record["label"] for record in found] == ["sport", "politics", "weather"]
    assert run("classify", "--labels", "sport,politics", texts[0]).stderr == ""
