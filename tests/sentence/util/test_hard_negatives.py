"""Hard negatives compared with the rule in the docstring and with sentence-transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_model
from tiny_sentence import build

from minilm import CrossEncoder, SentenceEncoder
from minilm.differences import said
from minilm.sentence.util import dot_score, mine_hard_negatives, pairwise_dot_score


class Model:
    """Texts "a12" to vectors of small whole numbers, so that scores are exact and often equal."""

    def __init__(self, seed: int) -> None:
        self.vectors = np.random.default_rng(seed).integers(-2, 3, (60, 3)).astype(np.float32)
        self.asked: list[tuple[str, int, dict[str, Any]]] = []

    def encode_query(self, texts: list[str], batch_size: int, **options: Any) -> Any:
        self.asked.append(("query", batch_size, options))
        return torch.from_numpy(self.vectors[[int(text[1:]) for text in texts]])

    def encode_document(self, texts: list[str], batch_size: int, **options: Any) -> Any:
        self.asked.append(("document", batch_size, options))
        return torch.from_numpy(self.vectors[[30 + int(text[1:]) for text in texts]])

    def similarity(self, a: Any, b: Any) -> Any:
        return dot_score(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        return pairwise_dot_score(a, b)

    def score(self, query: str, document: str) -> float:
        return float(self.vectors[int(query[1:])] @ self.vectors[30 + int(document[1:])])


class Cross:
    """Scores that have nothing to do with the model's."""

    def predict(self, pairs: list[tuple[str, str]], batch_size: int, convert_to_tensor: bool) -> Any:
        return torch.tensor([self.score(*pair) for pair in pairs])

    def score(self, query: str, document: str) -> float:
        return float((int(query[1:]) * 5 + int(document[1:]) * 7) % 11 - 4)


def by_hand(
    rows: list[dict[str, str]], corpus: list[str], model: Any, cross: Any, most: int, **how: Any
) -> list[tuple[str, list[tuple[str, float]], list[tuple[str, float]]]]:
    """(anchor, positives with scores, negatives with scores), by the docstring."""
    texts = list(dict.fromkeys([*corpus, *(row["b"] for row in rows)]))
    found = []
    for query in dict.fromkeys(row["a"] for row in rows):
        positives = list(dict.fromkeys(row["b"] for row in rows if row["a"] == query))
        score = (cross or model).score
        near = sorted(texts, key=lambda text: (-model.score(query, text), texts.index(text)))
        near = near[: how["range_max"] + most]
        near = [text for text in near if how["include_positives"] or text not in positives]
        worst = min(score(query, text) for text in positives)
        limits = {
            "max_score": lambda s, x: s <= x,
            "min_score": lambda s, x: s >= x,
            "absolute_margin": lambda s, x, worst=worst: s + x <= worst,
            "relative_margin": lambda s, x, worst=worst: s <= worst - abs(worst) * x,
        }
        for name, fits in limits.items():
            if how[name] is not None:
                near = [text for text in near if fits(score(query, text), how[name])]
        near.sort(key=lambda text: -score(query, text))
        near = near[how["range_min"] : how["range_max"]]
        found.append((query, [(t, score(query, t)) for t in positives], [(t, score(query, t)) for t in near]))
    return found


def table(found: Any, output_format: str, count: int, scores: bool) -> list[dict[str, Any]]:
    """The rows that they make."""
    rows: list[dict[str, Any]] = []
    for query, positives, near in found:
        chosen = near[:count]
        texts, values = [t for t, _ in chosen], [s for _, s in chosen]
        if output_format == "labeled-pair":
            for label, pairs in ((1, positives), (0, chosen)):
                rows += [
                    {"a": query, "b": t, **({"score": s} if scores else {"label": label})} for t, s in pairs
                ]
            continue
        for text, score in positives:
            row = {"a": query, "b": text}
            if output_format == "triplet":
                for other, less in chosen:
                    rows.append({**row, "negative": other, **({"scores": [score, less]} if scores else {})})
            elif output_format == "n-tuple" and len(chosen) == count:
                named = {f"negative_{i}": t for i, t in enumerate(texts, start=1)}
                rows.append({**row, **named, **({"scores": [score, *values]} if scores else {})})
            elif output_format == "labeled-list" and chosen:
                labels = {"scores": [score, *values]} if scores else {"labels": [1] + [0] * len(chosen)}
                rows.append({"a": query, "b": [text, *texts], **labels})
    return rows


HALVES = st.none() | st.sampled_from([-3.0, -0.5, 0.0, 0.5, 2.0, 5.0])


@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 11)), min_size=1, max_size=14),
    corpus=st.lists(st.integers(0, 25), max_size=12),
    range_min=st.integers(0, 3),
    beyond=st.none() | st.integers(0, 9),
    count=st.integers(1, 4),
    limits=st.tuples(HALVES, HALVES, HALVES, st.none() | st.sampled_from([0.0, 0.25, 0.5])),
    rescored=st.booleans(),
    positives=st.booleans(),
    output_format=st.sampled_from(["triplet", "n-tuple", "labeled-pair", "labeled-list"]),
    scores=st.booleans(),
    batch=st.integers(1, 6),
    seed=st.integers(0, 9),
)
@pytest.mark.filterwarnings("ignore:cross_encoder is not used:UserWarning")
@pytest.mark.filterwarnings("ignore:include_positives gives a ranking:UserWarning")
def test_negatives_are_those_of_the_rule(
    pairs: list[tuple[int, int]],
    corpus: list[int],
    range_min: int,
    beyond: int | None,
    count: int,
    limits: tuple[float | None, ...],
    rescored: bool,
    positives: bool,
    output_format: Any,
    scores: bool,
    batch: int,
    seed: int,
) -> None:
    rows = [{"a": f"q{query}", "b": f"d{document}"} for query, document in pairs]
    more = [f"d{document}" for document in corpus]
    named: dict[str, Any] = dict(
        zip(("max_score", "min_score", "absolute_margin", "relative_margin"), limits, strict=True)
    )
    model: Any = Model(seed)
    any_limit = any(limit is not None for limit in limits)
    cross: Any = Cross() if rescored else None
    found = mine_hard_negatives(
        rows,
        model,
        corpus=more,
        cross_encoder=cross,
        range_min=range_min,
        range_max=None if beyond is None else range_min + count + beyond,
        num_negatives=count,
        include_positives=positives,
        output_format=output_format,
        output_scores=scores,
        faiss_batch_size=batch,
        verbose=False,
        **named,
    )
    most = max(sum(row["a"] == query for row in rows) for query in {row["a"] for row in rows})
    if beyond is None:
        wide = any(limits[i] is not None for i in (0, 2, 3)) or (rescored and limits[1] is not None)
        beyond = count * 10 + most - count if wide else most
    expected = by_hand(
        rows,
        more,
        model,
        cross if any_limit else None,
        most,
        range_min=range_min,
        range_max=range_min + count + beyond,
        include_positives=positives,
        **named,
    )
    assert found == table(expected, "n-tuple" if positives else output_format, count, scores)


ROWS = [{"a": f"q{i % 4}", "b": f"d{i}"} for i in range(9)]


def test_random_negatives_are_drawn_from_the_range() -> None:
    model: Any = Model(1)
    options: dict[str, Any] = {"range_min": 1, "range_max": 6, "num_negatives": 2, "verbose": False}
    options |= {"sampling_strategy": "random", "output_format": "n-tuple"}
    fixed: Any = dict.fromkeys(("max_score", "min_score", "absolute_margin", "relative_margin"))
    expected = by_hand(ROWS, [], model, None, 3, range_min=1, range_max=6, include_positives=False, **fixed)
    allowed = {query: [text for text, _ in near] for query, _, near in expected}
    drawn: dict[str, set[str]] = {}
    for seed in range(30):
        random.seed(seed)
        rows = mine_hard_negatives(ROWS, model, **options)
        random.seed(seed)
        again = mine_hard_negatives(ROWS, model, **options)
        assert rows == again
        for row in rows:
            two = [row["negative_1"], row["negative_2"]]
            assert len(set(two)) == 2
            assert sorted(two, key=allowed[row["a"]].index) == two
            drawn.setdefault(row["a"], set()).update(two)
    assert {query: set(texts) for query, texts in allowed.items()} == drawn


def test_the_models_are_asked_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Model(2)
    mine_hard_negatives(
        ROWS,
        model,
        num_negatives=9,
        max_score=1.0,
        query_prompt="q: ",
        corpus_prompt_name="passage",
        batch_size=5,
    )
    by_kind = {kind: (size, options) for kind, size, options in model.asked}
    common = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": True}
    assert by_kind["query"] == (5, {**common, "prompt": "q: ", "prompt_name": None})
    assert by_kind["document"] == (5, {**common, "prompt": None, "prompt_name": "passage"})
    shown = capsys.readouterr().out
    assert "range_max is 93" in shown
    assert "9 positives: mean" in shown
    assert "candidates were removed by max_score=1.0" in shown
    assert "4 of 4 anchors have fewer than 9 negatives" in shown


def test_what_changes_nothing_is_said() -> None:
    model, cross = Model(3), Cross()
    expected = mine_hard_negatives(ROWS, model, verbose=False)  # type: ignore[arg-type]
    for options, message in (
        ({"cross_encoder": cross}, "cross_encoder is not used: it only scores for max_score"),
        ({"use_faiss": True}, "have no effect: the search is exact and runs in this process"),
        ({"use_multi_process": ["cpu"]}, "have no effect: the search is exact and runs in this process"),
    ):
        with pytest.warns(UserWarning, match=message):
            found = mine_hard_negatives(ROWS, model, verbose=False, **options)  # type: ignore[arg-type]
        assert found == expected
    with pytest.warns(UserWarning, match="whose format is n-tuple, not labeled-list"):
        mine_hard_negatives(ROWS, model, include_positives=True, output_format="labeled-list", verbose=False)  # type: ignore[arg-type]


def test_columns_are_chosen() -> None:
    model: Any = Model(4)
    swapped = [{"b": row["b"], "n": 1, "a": row["a"]} for row in ROWS]
    expected = mine_hard_negatives(ROWS, model, verbose=False)
    assert mine_hard_negatives(swapped, model, "a", "b", verbose=False) == expected
    # sentence-transformers would compare the second column with itself.
    other = [{"b": row["b"], "a": row["a"]} for row in ROWS]
    assert mine_hard_negatives(other, model, "a", verbose=False) == expected
    assert mine_hard_negatives(ROWS, model, positive_column_name="b", verbose=False) == expected


def test_older_names() -> None:
    model: Any = Model(5)
    said.clear()
    with pytest.warns(FutureWarning, match="margin is now called absolute_margin"):
        found = mine_hard_negatives(
            ROWS, model, margin=1.0, as_triplets=False, num_negatives=1, verbose=False
        )
    expected = mine_hard_negatives(
        ROWS, model, absolute_margin=1.0, output_format="n-tuple", num_negatives=1, verbose=False
    )
    assert found == expected


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "the dataset is empty"),
        ({"train": ROWS}, {}, "expected a datasets.Dataset or a list of dicts, got dict"),
        ("text", {}, "expected a datasets.Dataset or a list of dicts, got str"),
        ([("a", "b")], {}, r"expected a list of dicts, and one of them is \('a', 'b'\)"),
        ([{"a": "q1"}], {}, "anchor and positive must be two columns; the dataset has a"),
        (ROWS, {"anchor_column_name": "query"}, "the dataset has no column 'query'; it has a, b"),
        (ROWS, {"anchor_column_name": "a", "positive_column_name": "a"}, "must be two columns"),
        ([*ROWS, {"a": "q1", "b": None}], {}, "row 9: 'b' must be a text, and is None"),
        ([*ROWS, {"a": "q1"}], {}, "row 9: 'b' must be a text, and is None"),
        (ROWS, {"corpus": "text"}, "corpus must be a list of texts, and is a single text"),
        (ROWS, {"corpus": ["text", 3]}, "corpus must be a list of texts, and number 1 is 3"),
        (ROWS, {"num_negatives": 0}, "num_negatives must be a positive integer, and is 0"),
        (ROWS, {"range_min": -1}, "range_min must be a whole number of at least 0, and is -1"),
        (
            ROWS,
            {"range_min": 5, "range_max": 7},
            "do not fit between range_min=5 and range_max=7",
        ),
        (
            ROWS,
            {"output_format": "pairs"},
            "output_format must be one of triplet, .*, and is 'pairs'",
        ),
        (ROWS, {"sampling_strategy": "best"}, "sampling_strategy must be top or random, and is 'best'"),
        (ROWS, {"max_score": "1"}, "max_score must be a number, and is '1'"),
        (ROWS, {"relative_margin": float("nan")}, "relative_margin must be a number, and is nan"),
        (
            ROWS,
            {"cache_folder": "here"},
            "cache_folder is not supported, since minilm does not store embeddings in files",
        ),
        (ROWS, {"top_k": 3}, "mine_hard_negatives has no argument top_k"),
        ([{"a": "q1", "negative": "d1"}], {}, "the dataset has a column 'negative', which a new column"),
    ],
)
def test_refuses(dataset: Any, options: dict[str, Any], message: str) -> None:
    model: Any = Model(6)
    with pytest.raises((ValueError, TypeError), match=message):
        mine_hard_negatives(dataset, model, verbose=False, **options)
    assert not model.asked  # nothing was encoded


@pytest.mark.slow
def test_negatives_are_those_of_sentence_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On datasets.Dataset, with random models of both libraries; `random` is drawn alike."""
    datasets = pytest.importorskip("datasets")
    import sentence_transformers
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.util import mine_hard_negatives as reference

    rng = np.random.default_rng(0)
    words = ["anna", "drinks", "tea", "in", "the", "old", "city", "of", "berlin", "and", "john", "lives"]
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 9))) for _ in range(60)]
    theirs = build(tmp_path, lambda: Pooling(32, "mean"))
    ours = SentenceEncoder(tmp_path / "model", device="cpu")
    save_model(tmp_path / "cross", "bert", "ForSequenceClassification", positions=80, num_labels=1)
    crosses = [
        kind(str(tmp_path / "cross"), device="cpu")
        for kind in (CrossEncoder, sentence_transformers.CrossEncoder)
    ]
    data = datasets.Dataset.from_dict(
        {
            "id": list(range(30)),
            "question": [texts[i % 20] for i in range(30)],
            "answer": [texts[20 + i] for i in range(30)],
        }
    )
    with_limits = {"relative_margin": 0.01, "max_score": 0.9999, "min_score": -0.5}
    for options in (
        {},
        {"corpus": texts, "range_min": 2, "range_max": 12, "num_negatives": 4},
        {"sampling_strategy": "random", "range_max": 15},
        {"absolute_margin": 0.001, "output_format": "n-tuple", "output_scores": True},
        {**with_limits, "output_format": "labeled-list"},
        {**with_limits, "output_format": "labeled-pair", "output_scores": True, "query_prompt": "who "},
        {"include_positives": True, "output_format": "n-tuple", "output_scores": True, "num_negatives": 10},
        {"cross": True, "absolute_margin": 0.0, "output_scores": True},
        {
            "cross": True,
            "relative_margin": 0.02,
            "sampling_strategy": "random",
            "output_format": "labeled-list",
        },
    ):
        options = {"anchor_column_name": "question", "positive_column_name": "answer", **options}
        cross = crosses if options.pop("cross", False) else [None, None]
        random.seed(7)
        expected = reference(data, theirs, cross_encoder=cross[1], **options)
        random.seed(7)
        found = mine_hard_negatives(data, ours, cross_encoder=cross[0], **options)
        assert type(found) is datasets.Dataset
        assert found.column_names == expected.column_names
        assert len(found) == len(expected) > 0
        for name in found.column_names:
            if name.startswith("score"):
                assert np.allclose(flat(found[name]), flat(expected[name]), atol=1e-5)
            else:
                assert list(found[name]) == list(expected[name])


def flat(column: Any) -> list[float]:
    return [value for row in column for value in (row if isinstance(row, list) else [row])]
