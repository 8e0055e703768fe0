"""transformers.pipeline with models of minilm and tokenizers of either library, compared with transformers'
models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import TEXTS, save_decoder, save_model

import minilm

TASKS = {
    "feature-extraction": ("AutoModel", "Model"),
    "fill-mask": ("AutoModelForMaskedLM", "ForMaskedLM"),
    "text-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "zero-shot-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "token-classification": ("AutoModelForTokenClassification", "ForTokenClassification"),
}
LABELS = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
LABELS["label2id"] = {label: number for number, label in LABELS["id2label"].items()}


def same(found: Any, expected: Any) -> None:
    """Equal, numbers nearly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, float | np.floating):
        assert found == pytest.approx(expected, abs=2e-4, rel=1e-3)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    else:
        assert found == expected


def pipes(task: str, name: str, folder: Path) -> Iterator[Any]:
    """transformers' pipeline of a model: theirs, then ours with either tokenizer."""
    for library, words in ((transformers, transformers), (minilm, transformers), (minilm, minilm)):
        model = getattr(library, name).from_pretrained(folder)
        tokenizer = words.AutoTokenizer.from_pretrained(folder)
        yield transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_encoders(task: str, tmp_path: Path) -> None:
    name, head = TASKS[task]
    folder = save_model(tmp_path, "bert", head, **(LABELS if "Class" in head else {}))
    texts, options = TEXTS, {}
    if task == "fill-mask":
        texts, options = ["the [MASK] of paris", "a [MASK] and [MASK] ."], {"top_k": 3}
    elif task == "zero-shot-classification":
        texts, options = TEXTS[:2], {"candidate_labels": ["tea", "river", "city"]}
    elif task == "text-classification":
        options = {"top_k": None}
    expected, *found = pipes(task, name, folder)
    first = expected(texts[0], **options)
    many = expected(list(texts), batch_size=1, **options)
    for pipe in found:
        same(pipe(texts[0], **options), first)
        same(pipe(list(texts), batch_size=1, **options), many)
        assert type(pipe.model).__name__ in repr(pipe)
    if task == "text-classification":
        same(found[1](list(texts), batch_size=3, **options), many)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_text_generation(family: str, tmp_path: Path) -> None:
    folder = save_decoder(tmp_path, family)
    chat = [{"role": "user", "content": "Where does Anna live?"}]
    expected, *found = pipes("text-generation", "AutoModelForCausalLM", folder)
    for text, options in (
        ("John Smith", {"max_new_tokens": 5}),
        (["John Smith", "anna"], {"max_new_tokens": 4, "return_full_text": False}),
        (chat, {"max_new_tokens": 4}),
    ):
        first = expected(text, do_sample=False, **options)
        for pipe in found:
            same(pipe(text, do_sample=False, **options), first)


@pytest.mark.filterwarnings("ignore")
def test_defaults_of_text_generation(tmp_path: Path) -> None:
    """What neither the call nor the model says is the pipeline's: tokens that are drawn, more than 20."""
    folder = save_decoder(tmp_path, "llama", do_sample=True, top_k=7, eos_token_id=None)
    expected, *found = pipes("text-generation", "AutoModelForCausalLM", folder)
    for pipe in found:
        for option in ("max_new_tokens", "do_sample", "temperature", "top_k"):
            assert getattr(pipe.generation_config, option) == getattr(expected.generation_config, option)
        assert pipe.model.generation_config.temperature is None
    torch.manual_seed(3)
    first = expected("John", max_new_tokens=9)
    torch.manual_seed(3)
    assert found[1]("John", max_new_tokens=9) == first


@pytest.mark.filterwarnings("ignore")
def test_text_generation_by_a_model_made_of_a_configuration(tmp_path: Path) -> None:
    """It was never saved, and its options of generation are those of its configuration."""
    folder = save_decoder(tmp_path, "gpt2")
    tokenizer = minilm.AutoTokenizer.from_pretrained(folder)
    model = minilm.AutoModelForCausalLM.from_config(minilm.AutoConfig.from_pretrained(folder)).eval()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = pipe("John Smith", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = model.generate(**tokenizer("John Smith", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert found == tokenizer.decode(ids[0], skip_special_tokens=True)
