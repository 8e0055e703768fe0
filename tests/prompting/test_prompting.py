"""Prompting methods compared with transformers' models, which are run one text at a time by the formula of
each method."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import TEXTS, save_decoder, save_model

from minilm import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoTokenizer,
)
from minilm.prompting import (
    ClozeClassifier,
    FewShotTemplate,
    LabelScorer,
    PromptedEntities,
    Template,
    next_sentence_scores,
    pseudo_log_likelihoods,
    pseudo_perplexity,
)
from minilm.prompting.templates import shortened

ITEMS = ["john lives in paris", "anna", "the river of the green land", "Éric, who is old?"]
WORDS = {"good": ["tea", "house"], "bad": "unland", "none": "in paris"}
"""One token, several, several words: what a label may be."""


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder, request.param, "ForMaskedLM", positions=64)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), "llama", positions=96)


@cache
def theirs(folder: Path, head: str) -> tuple[Any, Any]:
    cls = getattr(transformers, head)
    return cls.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def logs_at(folder: Path, ids: list[int], places: list[int]) -> torch.Tensor:
    """log P [places, V] of transformers' model, with these tokens masked."""
    model, tokenizer = theirs(folder, "AutoModelForMaskedLM")
    masked = [tokenizer.mask_token_id if i in places else token for i, token in enumerate(ids)]
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([masked])).logits[0]
    return logits.double().log_softmax(-1)[places]


def cloze_by_hand(folder: Path, before: str, after: str) -> list[float]:
    """log of the mean over a label's words of exp(mean of its tokens' log P)."""
    _, tokenizer = theirs(folder, "AutoModelForMaskedLM")
    frame = len(tokenizer("")["input_ids"]) // 2
    found = []
    for said in WORDS.values():
        words = []
        for word in [said] if isinstance(said, str) else said:
            ids = tokenizer(before + word + after)["input_ids"]
            left = len(tokenizer(before.rstrip())["input_ids"]) - frame
            right = len(tokenizer(after)["input_ids"]) - frame
            places = list(range(left, len(ids) - right))
            logs = logs_at(folder, ids, places)
            words.append(math.exp(sum(logs[n, ids[p]].item() for n, p in enumerate(places)) / len(places)))
        found.append(math.log(sum(words) / len(words)))
    return found


def test_cloze(masked: Path) -> None:
    ours = ClozeClassifier(masked, "{text}! it was {mask}.", WORDS, batch_size=3)
    expected = torch.tensor([cloze_by_hand(masked, f"{item}! it was ", ".") for item in ITEMS])
    torch.testing.assert_close(ours.scores(ITEMS), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.probabilities(ITEMS), expected.softmax(-1).float(), rtol=1e-3, atol=1e-5)
    assert ours.predict(ITEMS) == [list(WORDS)[i] for i in expected.argmax(-1).tolist()]
    assert (expected.std(0) > 0.05).all(), "the texts make a difference"
    assert ours.scores([]).shape == (0, 3)


def test_cloze_with_the_mask_first_and_fields(masked: Path) -> None:
    ours = ClozeClassifier(masked, "{mask} {{of}} {city}, {river}", WORDS)
    expected = cloze_by_hand(masked, "", " {of} paris, green")
    found = ours.scores([{"river": "green", "city": "paris", "more": "no field"}])
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-4, atol=1e-4)


def test_calibration(masked: Path) -> None:
    template = "{text}! it was {mask}."
    nothing = np.array([cloze_by_hand(masked, f"{text}! it was ", ".") for text in ("N/A", "", "...")])
    items = np.array([cloze_by_hand(masked, f"{item}! it was ", ".") for item in ITEMS])
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (items, nothing))
    expected = p / q.mean(0)
    expected /= expected.sum(-1, keepdims=True)
    found = ClozeClassifier(masked, template, WORDS, calibrate=True).probabilities(ITEMS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-5)
    assert not np.allclose(expected, p, atol=1e-2)


def test_a_long_text_is_cut_and_the_template_is_not(masked: Path) -> None:
    ours = ClozeClassifier(masked, "{text} it was {mask}.", WORDS)
    with pytest.warns(UserWarning, match="1 of 2 texts were cut: a prompt has 64 tokens"):
        found = ours.scores(["tea", "the green river " * 60])
    _, tokenizer = theirs(masked, "AutoModelForMaskedLM")
    whole = tokenizer("the green river " * 60 + " it was in paris.", verbose=False)["input_ids"]
    end = tokenizer(" it was in paris.")["input_ids"][1:]  # of the template, without the first special token
    ids = [*whole[: 64 - len(end)], *end]
    word = len(tokenizer(" in paris")["input_ids"]) - 2
    places = list(range(64 - 2 - word, 64 - 2))
    logs = logs_at(masked, ids, places)
    expected = sum(logs[n, ids[place]].item() for n, place in enumerate(places)) / word
    assert found[1, 2].item() == pytest.approx(expected, rel=1e-4)


def test_templates_and_words_that_are_none(masked: Path) -> None:
    with pytest.raises(ValueError, match=r"must have \{mask\} at the answer, .* has none"):
        ClozeClassifier(masked, "{text}", WORDS)
    with pytest.raises(ValueError, match=r"must have one \{mask\}, .* has 2"):
        Template("{mask} {mask}")
    with pytest.raises(ValueError, match="a field of a template must be a name in braces"):
        Template("{text.__class__} {mask}")
    with pytest.raises(ValueError, match="cannot be read"):
        Template("{text")
    with pytest.raises(ValueError, match="words must have two or more labels"):
        ClozeClassifier(masked, "{text} {mask}", {"one": "tea"})
    with pytest.raises(ValueError, match="the label 'a' needs a word"):
        ClozeClassifier(masked, "{text} {mask}", {"a": [], "b": "tea"})
    ours = ClozeClassifier(masked, "{a} {b} {mask}", WORDS)
    with pytest.raises(ValueError, match="the fields a, b: give a dict with a text for each"):
        ours.scores(["text"])
    with pytest.raises(ValueError, match=r"needs a text for \{b\}, and the item has only a"):
        ours.scores([{"a": "x"}])
    with pytest.raises(TypeError, match="expected several items"):
        ours.scores("text")
    with pytest.raises(TypeError, match="an item must be a text or"):
        ours.scores([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        ClozeClassifier(ours.model, "{text} {mask}", WORDS)


def test_a_word_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    ours = ClozeClassifier(
        save_model(tmp_path, "bert", "ForMaskedLM"), "{text} {mask}", {"a": "tea", "b": "☃"}
    )
    with pytest.raises(ValueError, match="the vocabulary does not have the word '☃'"):
        ours.scores(["x"])


def test_shortened() -> None:
    def spans(text: str) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(len(text))]

    assert shortened({"a": "abc", "b": "defghi"}, 2, spans) == {"a": "abc", "b": "defg"}
    with pytest.raises(ValueError, match="6 tokens too many, and no field is long enough to be cut"):
        shortened({"a": "abc", "b": "defghi"}, 6, spans)


def labels_by_hand(folder: Path, prompt: str, labels: list[str], special: bool = True) -> list[list[float]]:
    """log P of each token of each label behind the prompt, one sequence at a time."""
    model, tokenizer = theirs(folder, "AutoModelForCausalLM")
    start = len(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    found = []
    for label in labels:
        ids = tokenizer(prompt + label, add_special_tokens=special)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append([logs[i - 1, ids[i]].item() for i in range(start, len(ids))])
    return found


LABELS = {"tea": " tea", "city": " the old city", "x": " x"}


@pytest.mark.parametrize("length", ["mean", "sum"])
def test_labels(causal: Path, length: Any) -> None:
    texts = {"tea": "tea", "city": " the old city", "x": "x"}
    ours = LabelScorer(causal, "Q: {text}\nA:", texts, length=length, batch_size=2)
    logs = [labels_by_hand(causal, f"Q: {item}\nA:", list(LABELS.values())) for item in ITEMS]
    assert {len(tokens) for item in logs for tokens in item} > {1}
    divided = [[sum(t) / (len(t) if length == "mean" else 1) for t in item] for item in logs]
    torch.testing.assert_close(ours.scores(ITEMS), torch.tensor(divided), rtol=1e-4, atol=1e-4)
    expected = torch.tensor(divided).argmax(-1).tolist()
    assert ours.predict(iter(ITEMS)) == [list(LABELS)[i] for i in expected]


def test_labels_do_not_depend_on_how_many_prompts_are_copied(
    causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = LabelScorer(causal, "{text}:", LABELS)
    together = ours.scores(TEXTS[:2] + ITEMS)
    monkeypatch.setattr("minilm.prompting.labels._COPIED", 10)
    monkeypatch.setattr("minilm.prompting.labels._ROWS", 2)
    torch.testing.assert_close(ours.scores(TEXTS[:2] + ITEMS), together, rtol=1e-4, atol=1e-5)


def test_labels_in_a_chat(causal: Path) -> None:
    ours = LabelScorer(causal, "{text}?", ["tea", "the old city"], chat=True, length="sum")
    assert ours.prompt("anna") == "<|user|>anna?<|assistant|>"
    logs = labels_by_hand(causal, ours.prompt("anna"), ["tea", "the old city"], special=False)
    torch.testing.assert_close(ours.scores(["anna"]), torch.tensor([[sum(t) for t in logs]]))


def test_label_errors(causal: Path) -> None:
    for labels in ["ab", ["a"], ["a", "a"], {"a": "x", "b": "x"}, ["a", ""]]:
        with pytest.raises(ValueError, match="labels must be"):
            LabelScorer(causal, "{text}", labels)
    with pytest.raises(ValueError, match=r"must not have \{mask\}"):
        LabelScorer(causal, "{text} {mask}", ["a", "b"])
    with pytest.raises(ValueError, match="has no token: the model needs one"):
        LabelScorer(causal, "{text}", ["a", "b"]).scores([""])
    with pytest.raises(ValueError, match='length must be "mean" or "sum"'):
        LabelScorer(causal, "{text}", ["a", "b"], length="max")  # type: ignore[arg-type]
    ours = LabelScorer(causal, "{text} is:", ["a", "b"])
    with pytest.warns(UserWarning, match="1 of 1 texts were cut: a prompt has 96 tokens"):
        assert torch.isfinite(ours.scores(["tea " * 200])).all()


class Letters:
    """An encoder: how often a text has each letter."""

    def encode(self, texts: list[str], **_: Any) -> torch.Tensor:
        counts = torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts]).float()
        return counts / counts.norm(dim=1, keepdim=True)


EXAMPLES: list[Any] = [("aab", " 1"), ("xyz", " 2"), ("abb", " 3"), ("xxz", " 4")]


def test_few_shot_prompts(causal: Path) -> None:
    plain = FewShotTemplate("<{text}>:", EXAMPLES, k=2, instruction="Do.", separator="|")
    assert plain.render("q") == "Do.|<aab>: 1|<xyz>: 2|<q>:"
    near = FewShotTemplate("<{text}>:", EXAMPLES, k=3, encoder=Letters(), separator="|")  # type: ignore[arg-type]
    cosines = Letters().encode(["<xxy>:"]) @ Letters().encode([f"<{item}>:" for item, _ in EXAMPLES]).T
    order = torch.sort(cosines[0], descending=True, stable=True).indices.tolist()
    assert near.nearest("<xxy>:") == order[:3][::-1]
    assert near.with_fewer().nearest("<xxy>:") == order[:2][::-1]
    assert near.k == 3
    with pytest.raises(ValueError, match="k must be from 0 to the number of examples, 4, and is 5"):
        FewShotTemplate("{text}", EXAMPLES, k=5)

    labels = LabelScorer(causal, plain, [" 1", " 2"], length="sum")
    logs = labels_by_hand(causal, "Do.|<aab>: 1|<xyz>: 2|<q>:", [" 1", " 2"])
    torch.testing.assert_close(labels.scores(["q"]), torch.tensor([[sum(t) for t in logs]]))


def test_a_few_shot_prompt_that_is_too_long_loses_examples_first(causal: Path) -> None:
    long = [("the green river " * 5, " 1"), ("tea", " 2"), ("house " * 40, " 3")]
    template = FewShotTemplate("{text}:", long, k=3)
    labels = LabelScorer(causal, template, [" 1", " 2"], length="sum")
    logs = labels_by_hand(causal, f"{long[0][0]}: 1\n\ntea: 2\n\nq:", [" 1", " 2"])
    torch.testing.assert_close(labels.scores(["q"]), torch.tensor([[sum(t) for t in logs]]))


def test_pseudo_perplexity(masked: Path) -> None:
    _, tokenizer = theirs(masked, "AutoModelForMaskedLM")
    expected = []
    for text in ITEMS:
        ids = tokenizer(text)["input_ids"]
        inner = range(1, len(ids) - 1)
        expected.append([logs_at(masked, ids, [i])[0, ids[i]].item() for i in inner])
    found = pseudo_log_likelihoods(masked, ITEMS, batch_size=3)
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, their in zip(found, expected, strict=True):
        assert ours == pytest.approx(their, rel=1e-4, abs=1e-4)
    flat = [log for row in expected for log in row]
    assert pseudo_perplexity(masked, ITEMS) == pytest.approx(math.exp(-sum(flat) / len(flat)), rel=1e-4)
    with pytest.raises(ValueError, match="needs at least one token"):
        pseudo_perplexity(masked, [""])
    with pytest.raises(ValueError, match="tokens, and the model reads 64"):
        pseudo_perplexity(masked, ["the river " * 60])


def test_next_sentence(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert", "ForNextSentencePrediction")
    model, tokenizer = theirs(folder, "BertForNextSentencePrediction")
    pairs = [("john lives in paris", "who is john?"), ("anna", "the river"), ("a", "b")]
    expected = []
    for first, second in pairs:
        with torch.no_grad():
            logits = model(**tokenizer(first, second, return_tensors="pt")).logits
        expected.append(logits.double().softmax(-1)[0, 0].item())
    ours = AutoModelForNextSentencePrediction.from_pretrained(folder)
    found = next_sentence_scores(ours, AutoTokenizer.from_pretrained(folder), pairs, batch_size=2)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert next_sentence_scores(ours, AutoTokenizer.from_pretrained(folder), []).shape == (0,)


class Spans:
    """A classifier that knows what some spans are."""

    def __init__(self, known: dict[str, tuple[str, float]]) -> None:
        self.labels, self.known, self.asked = ["none", "person", "place"], known, list[str]()

    def probabilities(self, items: list[Any]) -> torch.Tensor:
        rows = []
        for item in items:
            self.asked.append(item["span"])
            label, score = self.known.get(item["span"], ("none", 0.9))
            rest = (1 - score) / 2
            rows.append([score if name == label else rest for name in self.labels])
        return torch.tensor(rows)


def test_entities() -> None:
    text = "Mary Smith lives in New York, near York."
    spans = Spans({"Mary": ("person", 0.6), "Mary Smith": ("person", 0.8), "New York": ("place", 0.7),
                   "York": ("place", 0.65), "Smith lives": ("place", 0.7)})  # fmt: skip
    found = PromptedEntities(spans, max_words=2)(text)
    assert [(e["entity_group"], e["word"], e["start"], e["end"]) for e in found] == [
        ("person", "Mary Smith", 0, 10),
        ("place", "New York", 20, 28),
        ("place", "York", 35, 39),
    ]
    assert found[0]["score"] == pytest.approx(0.8)
    assert "York near" not in spans.asked
    assert "York, near" not in spans.asked
    assert PromptedEntities(spans)("...") == []
    with pytest.raises(ValueError, match="none= must be the label"):
        PromptedEntities(spans, none="other")


def test_loaded_models_are_taken(masked: Path, causal: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(masked)
    tokenizer = AutoTokenizer.from_pretrained(masked)
    ours = ClozeClassifier(model, "{text} {mask}", {"a": "tea", "b": "house"}, tokenizer=tokenizer)
    assert ours.scores(["x"]).shape == (1, 2)
    decoder, words = AutoModelForCausalLM.from_pretrained(causal), AutoTokenizer.from_pretrained(causal)
    assert LabelScorer(decoder, "{text}", ["a", "b"], tokenizer=words).scores(["x"]).shape == (1, 2)


def test_a_label_without_tokens(tmp_path: Path) -> None:
    """Of a tokenizer that drops a character, such as a control character."""
    folder = save_decoder(tmp_path, "llama")
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["normalizer"] = {"type": "Replace", "pattern": {"String": " ~"}, "content": ""}
    file.write_text(json.dumps(stored), encoding="utf-8")
    scorer = LabelScorer(folder, "{text}", ["tea", "~"])
    with pytest.raises(ValueError, match="the label '~' has no token after the prompt 'the green'"):
        scorer.predict(["the green"])
