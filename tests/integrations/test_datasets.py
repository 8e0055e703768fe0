"""`datasets`, transformers' collators, and the inputs of its pipelines, with minilm's tokenizers, pipelines
and models in the Trainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from same import assert_same
from tiny_models import TEXTS, save_decoder, save_model
from torch.utils.data import DataLoader
from transformers.data import data_collator as collators
from transformers.pipelines.pt_utils import KeyDataset, KeyPairDataset

import minilm

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LABELS = [0, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, with its tokenizer."""
    home = tmp_path_factory.mktemp("models")
    save_model(home / "bert", "bert", "ForSequenceClassification", positions=64)
    save_model(home / "roberta", "roberta", "ForMaskedLM", positions=128)
    save_decoder(home / "gpt2", "gpt2", positions=128)
    return {family: home / family for family in ("bert", "roberta", "gpt2")}


def rows() -> Any:
    return datasets.Dataset.from_dict({"text": TEXTS, "other": TEXTS[::-1], "label": LABELS})


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("processes", [None, 2])
def test_map_and_formats(family: str, processes: int | None, folders: dict[str, Path]) -> None:
    found = []
    for library in (minilm, transformers):
        tokenizer = library.AutoTokenizer.from_pretrained(folders[family])

        def encode(batch: dict[str, Any], tokenizer: Any = tokenizer) -> Any:
            return tokenizer(
                batch["text"], batch["other"], truncation=True, max_length=20, padding="max_length"
            )

        whole = rows().map(encode, batched=True, batch_size=2, remove_columns=["text"], num_proc=processes)
        one = rows().map(lambda row, encode=encode: encode(row))
        assert one["input_ids"][:] == whole["input_ids"][:]
        whole.set_format("torch", columns=["input_ids", "attention_mask", "label"])
        batches = list(DataLoader(whole, batch_size=3))
        assert [batch["input_ids"].shape for batch in batches] == [(3, 20), (2, 20)]
        columns = {key: whole[:][key].tolist() for key in ("input_ids", "attention_mask", "label")}
        found.append((whole.column_names, columns))
    assert found[0] == found[1]


def test_a_tokenizer_is_an_argument_of_map(folders: dict[str, Path]) -> None:
    """Without a function around it; and its fingerprint is the same after it was used, so that what was
    mapped is found again."""
    from datasets.fingerprint import Hasher

    tokenizer = minilm.AutoTokenizer.from_pretrained(folders["bert"])
    before = Hasher.hash(tokenizer)
    mapped = rows().map(tokenizer, input_columns="text", batched=True)
    assert mapped["input_ids"][:] == tokenizer(TEXTS)["input_ids"]
    assert Hasher.hash(tokenizer) == before
    assert Hasher.hash(minilm.AutoTokenizer.from_pretrained(folders["roberta"])) != before


COLLATORS: dict[str, Callable[[Any], Any]] = {
    "padding": lambda t: collators.DataCollatorWithPadding(t),
    "multiple": lambda t: collators.DataCollatorWithPadding(t, pad_to_multiple_of=8, return_tensors="np"),
    "masked": lambda t: collators.DataCollatorForLanguageModeling(t, mlm_probability=0.4),
    "masked, seed": lambda t: collators.DataCollatorForLanguageModeling(t, mlm_probability=0.4, seed=5),
    "masked, arrays": lambda t: collators.DataCollatorForLanguageModeling(t, return_tensors="np"),
    "words": lambda t: collators.DataCollatorForLanguageModeling(t, whole_word_mask=True),
    "permuted": lambda t: collators.DataCollatorForPermutationLanguageModeling(t),
    "causal": lambda t: collators.DataCollatorForLanguageModeling(t, mlm=False),
    "tokens": lambda t: collators.DataCollatorForTokenClassification(t),
    "sequences": lambda t: collators.DataCollatorForSeq2Seq(t, padding=True),
    "choices": lambda t: collators.DataCollatorForMultipleChoice(t),
    "flat": lambda t: collators.DataCollatorWithFlattening(),
}


CASES = [
    (family, name)
    for family in ("bert", "roberta", "gpt2")
    for name in COLLATORS
    if family != "gpt2" or not name.startswith(("masked", "words", "permuted"))  # it has no mask token
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_collators(family: str, name: str, folders: dict[str, Path]) -> None:
    """The same batches, and the same draws after the same seeds."""
    batches = []
    for library in (minilm, transformers):
        tokenizer = library.AutoTokenizer.from_pretrained(folders[family])
        texts = [tokenizer(text, return_special_tokens_mask=name == "masked") for text in TEXTS]
        items = [dict(text) for text in texts]
        if name == "words":
            whole = tokenizer(TEXTS, padding=True, return_offsets_mapping=True)
            items = [{key: whole[key][row] for key in whole} for row in range(len(TEXTS))]
        elif name in ("tokens", "sequences", "flat"):
            items = [{**item, "labels": list(range(len(item["input_ids"])))} for item in items]
        elif name == "choices":
            items = [{**tokenizer([text, "a"], ["the", "tea"]), "labels": 1} for text in TEXTS]
        elif name == "padding":
            items = [{**item, "label": label} for item, label in zip(items, LABELS, strict=True)]
        elif name == "permuted":
            items = [
                {"input_ids": [*item["input_ids"], 5][: len(item["input_ids"]) // 2 * 2]} for item in items
            ]
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        batch = COLLATORS[name](tokenizer)(items)
        batches.append({key: np.asarray(value).tolist() for key, value in batch.items()})
    assert batches[0] == batches[1]


@pytest.mark.parametrize("own", [False, True], ids=["theirs", "ours"])
def test_training_on_a_mapped_data_set(own: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """The program of every tutorial, and a pipeline of what it has saved."""
    from minilm.integrations.trainer import trainer_class

    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    tokenizer = minilm.AutoTokenizer.from_pretrained(folders["bert"])
    data = rows().map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)
    model = minilm.AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=2)
    trainer = (trainer_class() if own else transformers.Trainer)(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    before = trainer.predict(data).predictions.argmax(-1)
    classify = minilm.pipeline("text-classification", model=str(tmp_path / "checkpoint-3"))
    assert [result["label"] for result in classify(TEXTS)] == [f"LABEL_{number}" for number in before]


def feeds(counted: list[str]) -> dict[str, Any]:
    """What pipelines are fed with beside lists; `counted` gets each text that is drawn of the generator."""

    def draw() -> Iterator[str]:
        for text in TEXTS:
            counted.append(text)
            yield text

    return {
        "column": rows()["text"],
        "arrays": rows().with_format("numpy")["text"],
        "KeyDataset": KeyDataset(rows(), "text"),
        "generator": draw(),
        "stream": (row["text"] for row in rows().to_iterable_dataset()),
        "rows": rows().select_columns(["text"]),
    }


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pipelines_stream(size: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An iterator for what is no list: in order, in batches of batch_size, no further than asked."""
    pipe = minilm.pipeline("text-classification", model=str(folders["bert"]))
    expected = pipe(TEXTS)
    batches: list[int] = []
    run = pipe.model.body.forward
    monkeypatch.setattr(pipe.model.body, "forward", lambda b: batches.append(b.packed.batch) or run(b))
    for name in feeds([]):
        counted: list[str] = []
        batches.clear()
        results = pipe(feeds(counted)[name], batch_size=size)
        assert isinstance(results, Iterator), name
        first = next(results)
        if name == "generator":
            assert len(counted) <= size + 1
        assert_same([first, *results], expected, 1e-4)
        assert batches == [min(size, len(TEXTS) - start) for start in range(0, len(TEXTS), size)], name


def test_pairs_of_columns(folders: dict[str, Path]) -> None:
    theirs = transformers.pipeline("text-classification", model=str(folders["bert"]), device="cpu")
    ours = minilm.pipeline("text-classification", model=str(folders["bert"]))
    data = datasets.Dataset.from_dict({"one": ["anna", "the old man"], "two": ["London", "red tea"]})
    pairs = KeyPairDataset(data, "one", "two")
    assert_same(list(ours(pairs, batch_size=2)), list(theirs(pairs, batch_size=1)), 1e-4)
    named = [{"text": row["one"], "text_pair": row["two"]} for row in data]
    assert_same(list(ours(pairs)), ours(named), 1e-4)


@pytest.mark.parametrize(
    "task", ["feature-extraction", "token-classification", "fill-mask", "text-generation"]
)
def test_columns_for_other_tasks(task: str, folders: dict[str, Path], tmp_path: Path) -> None:
    heads = {"feature-extraction": "Model", "token-classification": "ForTokenClassification"}
    texts, options = ["anna lives", "the green house"], {}
    if task == "text-generation":
        folder, options = folders["gpt2"], {"max_new_tokens": 3, "do_sample": False}
    elif task == "fill-mask":
        folder, texts = folders["roberta"], ["the <mask> of", "<mask> tea"]
    else:
        folder = save_model(tmp_path, "bert", heads[task])
    column = KeyDataset(datasets.Dataset.from_dict({"text": texts}), "text")
    theirs = transformers.pipeline(task, model=str(folder), device="cpu")(column, batch_size=1, **options)
    ours = minilm.pipeline(task, model=str(folder))(column, batch_size=2, **options)
    assert_same(list(ours), list(theirs), 1e-3)
