"""`index` and `search`: what they find is what the encoder says, and nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import Terminal, failure, records, run
from tiny_models import TEXTS, save_model

import minilm
from minilm.util import semantic_search

QUERIES = ["mary in paris", "the end"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = save_model(tmp_path_factory.mktemp("plain"), "bert", spread=0.2)
    folder = tmp_path_factory.mktemp("encoder")
    minilm.SentenceEncoder(plain, device="cpu").save_pretrained(folder)
    return folder


def best(encoder: Path, queries: list[str], texts: list[str], top_k: int) -> list[list[dict[str, Any]]]:
    model = minilm.SentenceEncoder(encoder, device="cpu")
    return semantic_search(model.encode(queries), model.encode(texts), top_k=top_k)


def test_lines_of_text(tmp_path: Path, encoder: Path) -> None:
    folder, file = tmp_path / "i", tmp_path / "corpus.txt"
    file.write_text("\n".join(TEXTS[:3]), encoding="utf-8")
    (made,) = records("index", folder, "--model", encoder, "--file", file)
    assert made == {"index": str(folder), "added": 3, "texts": 3, "model": str(encoder)}
    (more,) = records("index", folder, "--add", *TEXTS[3:])
    assert (more["added"], more["texts"]) == (2, 5)
    found = records("search", folder, *QUERIES, "--top-k", "2")
    expected = best(encoder, QUERIES, TEXTS, 2)
    assert [(f["query"], f["rank"]) for f in found] == [(q, rank) for q in QUERIES for rank in (1, 2)]
    for one, wanted in zip(found, [hit for hits in expected for hit in hits], strict=True):
        assert (one["id"], one["text"]) == (wanted["corpus_id"], TEXTS[wanted["corpus_id"]])
        assert one["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert len(records("search", folder, "tea")) == 5
    (again,) = records("index", folder, "--model", encoder, "--vectors", "int8", stdin="one\ntwo\n")
    assert again["texts"] == 2
    (vectors,) = folder.glob("vectors-*.npy")
    assert np.load(vectors).dtype == np.int8


def test_json_lines(tmp_path: Path, encoder: Path) -> None:
    folder = tmp_path / "i"
    rows = [{"id": n, "body": text, "tags": [n]} for n, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    run("index", folder, "--model", encoder, "--file", tmp_path / "rows.jsonl", "--field", "body")
    asked = "\n".join(json.dumps({"number": n, "q": query}) for n, query in enumerate(QUERIES))
    found = records("search", folder, "--field", "q", "--top-k", "1", stdin=asked)
    for n, (one, (wanted,)) in enumerate(zip(found, best(encoder, QUERIES, TEXTS, 1), strict=True)):
        assert (one["number"], one["text"]) == (n, TEXTS[wanted["corpus_id"]])
        assert one["metadata"] == {"id": wanted["corpus_id"], "tags": [wanted["corpus_id"]]}


def test_prompts(tmp_path: Path, encoder: Path) -> None:
    folder = tmp_path / "i"
    run("index", folder, "-m", encoder, "--prompt", "the ", "--query-prompt", "who: ", *TEXTS)
    (found,) = records("search", folder, "anna", "--top-k", "1")
    [[wanted]] = best(encoder, ["who: anna"], [f"the {text}" for text in TEXTS], 1)
    assert (found["id"], found["text"]) == (wanted["corpus_id"], TEXTS[wanted["corpus_id"]])
    assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)


def test_errors(tmp_path: Path, encoder: Path) -> None:
    folder = tmp_path / "i"
    run("index", folder, "--model", encoder, "one", "two")
    other = save_model(tmp_path / "other", "bert", seed=4)
    said = run("search", folder, "one", "--model", other, status=2).stderr.splitlines()
    assert [line.split(":")[0] for line in said] == ["warning", "error"], "one is that it has no modules.json"
    assert "other gives other vectors" in said[1]
    assert "no such folder" in failure("search", tmp_path / "none", "one")
    assert "no index.json, so it is not a search index" in failure("search", encoder, "one")
    assert "expected a search index or an empty folder" in failure("index", encoder, "-m", encoder, "one")
    assert "query 2 is empty" in failure("search", folder, "one", " ")
    assert "--vectors: those of the index" in failure("index", folder, "--add", "--vectors", "int8", "x")
    assert "dtype must be one of" in failure("index", folder, "-m", encoder, "--vectors", "int4", "x")
    assert "there is no text in" in failure("index", folder, "-m", encoder, stdin="")
    assert "no such file or folder" in failure("index", folder, "-m", tmp_path / "none", "one")
    assert "no such folder" in failure("index", tmp_path / "none", "--add", "one")
    result = run("search", folder, "one", "--top-k", "9")
    assert result.stderr == "warning: --top-k 9: the index has 2 texts\n"
    assert len(result.stdout.splitlines()) == 2
    minilm.SearchIndex.build(minilm.SentenceEncoder(encoder), [], tmp_path / "empty")
    assert "the index is empty" in failure("search", tmp_path / "empty", "one")


@pytest.mark.slow
def test_tables(tmp_path: Path, encoder: Path) -> None:
    terminal = Terminal("index", tmp_path / "i", "--model", encoder, *TEXTS)
    assert terminal.finish() == 0
    assert "5 texts added, 5 in all, by" in " ".join(terminal.shown.split())
    terminal = Terminal("search", tmp_path / "i", *QUERIES)
    assert terminal.finish() == 0
    assert all(query in terminal.shown for query in QUERIES)
    assert "{" not in terminal.shown
