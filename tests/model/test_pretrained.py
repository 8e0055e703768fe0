"""Checkpoints as models see them: what minilm saves, transformers loads, and the other way round; fresh
heads; refusals."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from close import assert_close
from hypothesis import given
from pairs import arguments, class_of, fields, heads_of, pair, write
from safetensors.torch import load_file, save_file
from strategies import FAMILIES, Batch, Config, configs, examples, seeds, small
from torch import Tensor

import minilm
from minilm.families.family import Head

EVERY_HEAD = [(family, head) for family in FAMILIES for head in heads_of(family)]

BATCH = Batch(lengths=(7, 3, 1), left=False, extra=1, seed=5)


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_transformers_loads_what_minilm_saves(family: str, head: Head, tmp_path: Path) -> None:
    @examples(3)
    @given(configs(family), seeds())
    def check(config: Config, seed: int) -> None:
        with pair(config, head, seed) as p:
            p.model.save_pretrained(tmp_path)
            theirs, report = class_of(transformers, family, head).from_pretrained(
                tmp_path, output_loading_info=True
            )
        assert not any(report.values()), f"{config}: {report}"
        values = theirs.state_dict()
        for name, value in p.reference.state_dict().items():
            if name in (
                "cls.predictions.bias",
                "lm_head.bias",
            ):  # not used, unless it is decoder.bias as well
                continue
            assert torch.equal(values[name], value), name
        before, after = p.reference.config.to_dict(), theirs.config.to_dict()
        for key in before.keys() - {"architectures", "dtype", "_name_or_path"}:
            assert before[key] == after.get(key), f"{key} was {before[key]} and became {after.get(key)}"
        shutil.rmtree(tmp_path)

    check()


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_saving_again_gives_the_same_bytes(family: str, head: Head, tmp_path: Path) -> None:
    @examples(2)
    @given(configs(family), seeds())
    def check(config: Config, seed: int) -> None:
        with pair(config, head, seed) as p:
            p.model.save_pretrained(tmp_path / "a")
        type(p.model).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        files = sorted(f.name for f in (tmp_path / "a").iterdir())
        assert files == sorted(f.name for f in (tmp_path / "b").iterdir())
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
        shutil.rmtree(tmp_path)

    check()


def save(folder: Path, config: Config, head: Head, edit: Any = None) -> Any:
    """A checkpoint of transformers whose tensors `edit` has changed; returns the model that wrote it."""
    folder.mkdir(exist_ok=True)
    reference = write(config, head, folder, seed=3)
    if edit is not None:
        file = folder / "model.safetensors"
        tensors = edit({key: value.clone() for key, value in load_file(file).items()})
        save_file(tensors, file, metadata={"format": "pt"})
    return reference


def assert_equal_answers(model: Any, reference: Any, config: Config, head: Head) -> None:
    """The two models answer a batch alike."""
    call = arguments(config, BATCH)
    mask = BATCH.mask().bool()
    with torch.no_grad():
        ours, theirs = model(**call), reference(**call)
    for name in fields(head, theirs):
        a, b = ours[name], theirs[name]
        tokens = a.shape[:2] == mask.shape
        assert_close(a[mask] if tokens else a, b[mask] if tokens else b, what=name)


def renamed(old: str, new: str) -> Any:
    """Replace a part of every tensor's name."""
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def added(**more: Tensor) -> Any:
    """More tensors, `__` in place of dots."""
    return lambda tensors: {**tensors, **{key.replace("__", "."): value for key, value in more.items()}}


def old_norm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LayerNorm.gamma and .beta, as the checkpoints of 2018 have them."""

    def old(key: str) -> str:
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    return {old(key): value for key, value in tensors.items()}


STORED_OTHERWISE = {
    "bert: gamma and beta": ("bert", "masked-lm", old_norm_names),
    "bert: position_ids": ("bert", "masked-lm", added(bert__embeddings__position_ids=torch.arange(33)[None])),
    "bert: one bias, the old name": (
        "bert",
        "masked-lm",
        lambda t: {k: v for k, v in t.items() if k != "cls.predictions.decoder.bias"},
    ),
    "bert: matrix that repeats the table": (
        "bert",
        "masked-lm",
        lambda t: {
            **t,
            "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone(),
        },
    ),
    "roberta: position_ids": (
        "roberta",
        "token-classification",
        added(roberta__embeddings__position_ids=torch.arange(33)[None]),
    ),
    "distilbert: head of another task": (
        "distilbert",
        "question-answering",
        added(vocab_projector__bias=torch.zeros(41), classifier__weight=torch.zeros(2, 12)),
    ),
    "gpt2: no prefix": ("gpt2", "causal-lm", renamed("transformer.", "")),
    "gpt2: the causal mask": (
        "gpt2",
        "causal-lm",
        added(
            transformer__h__0__attn__bias=torch.ones(1, 1, 30, 30),
            transformer__h__0__attn__masked_bias=torch.tensor(-1e4),
        ),
    ),
    "gpt2: no prefix, the causal mask": (
        "gpt2",
        "base",
        added(
            h__1__attn__bias=torch.ones(1, 1, 30, 30, dtype=torch.uint8),
            h__1__attn__masked_bias=torch.tensor(-1e4),
        ),
    ),
    "gpt2: matrix that repeats the table": (
        "gpt2",
        "causal-lm",
        lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()},
    ),
    "llama: inv_freq": (
        "llama",
        "causal-lm",
        added(
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2),
            model__rotary_emb__inv_freq=torch.ones(2),
        ),
    ),
    "qwen2: no prefix": ("qwen2", "base", None),
    "llama: in shards": ("llama", "causal-lm", "shards"),
    "bert: in shards": ("bert", "pre-training", "shards"),
}


@pytest.mark.parametrize("name", STORED_OTHERWISE)
def test_checkpoints_as_they_are_around(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    family, head, edit = STORED_OTHERWISE[name]
    config = small(family)
    if edit == "shards":
        reference = save(tmp_path, config, head)
        reference.save_pretrained(tmp_path, max_shard_size="2KB")
        (tmp_path / "model.safetensors").unlink()
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    else:
        reference = save(tmp_path, config, head, edit)
    model = class_of(minilm, family, head).from_pretrained(tmp_path)
    assert not model.load_report.initialised
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]
    assert_equal_answers(model, reference, config, head)


@pytest.mark.parametrize(
    ("family", "head", "key"),
    [
        ("gpt2", "causal-lm", "lm_head.weight"),
        ("qwen3", "causal-lm", "lm_head.weight"),
        ("bert", "masked-lm", "cls.predictions.decoder.weight"),
        ("distilbert", "masked-lm", "vocab_projector.weight"),
    ],
)
def test_configuration_that_ties_what_is_stored_apart(
    family: str, head: Head, key: str, tmp_path: Path
) -> None:
    config = small(family, tie_word_embeddings=True)
    save(tmp_path, config, head, lambda tensors: {**tensors, key: torch.randn(41, 12)})
    reference = class_of(transformers, family, head).from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = class_of(minilm, family, head).from_pretrained(tmp_path)
    assert_equal_answers(model, reference, config, head)
    model.save_pretrained(tmp_path / "again")
    again = class_of(minilm, family, head).from_pretrained(tmp_path / "again")
    assert_equal_answers(again, reference, config, head)


@pytest.mark.parametrize("family", [f for f in FAMILIES if (f, "token-classification") in EVERY_HEAD])
def test_fresh_head_is_announced(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small(family)
    reference = save(tmp_path, config, "base")
    labels = {0: "calm", 1: "glad", 2: "sad"}
    with caplog.at_level(logging.WARNING):
        model = minilm.AutoModelForTokenClassification.from_pretrained(
            tmp_path, num_labels=3, id2label=labels, label2id={v: k for k, v in labels.items()}
        )
    assert re.search(
        r"has no .*(classifier|score)\.weight.*: these weights are random, train them before use", caplog.text
    )
    assert str(tmp_path) in caplog.text
    inner = ["head.dense.weight", "head.norm.weight"] if family == "modernbert" else []
    assert sorted(model.load_report.initialised) == [*inner, "head.out.bias", "head.out.weight"]
    assert model.config.num_labels == 3
    assert model.config.id2label == labels
    with torch.no_grad():
        assert model(**arguments(config, BATCH)).logits.shape == (3, 8, 3)
        body = model(**arguments(config, BATCH), output_hidden_states=True).hidden_states[-1]
        theirs = reference(**arguments(config, BATCH)).last_hidden_state
    mask = BATCH.mask().bool()
    assert_close(body[mask], theirs[mask], what="body under a fresh head")


def test_body_is_never_initialised(tmp_path: Path) -> None:
    save(
        tmp_path,
        small("bert"),
        "masked-lm",
        lambda t: {k: v for k, v in t.items() if "layer.1.output" not in k},
    )
    with pytest.raises(minilm.WeightError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        minilm.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_body_of_another_depth(tmp_path: Path) -> None:
    save(tmp_path, small("llama"), "causal-lm")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(minilm.WeightError, match=r"surplus tensor model\.layers\.1\."):
        minilm.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_head_of_another_size(tmp_path: Path) -> None:
    with pair(small("bert"), "sequence-classification", num_labels=5) as p:
        with pytest.raises(minilm.WeightError, match="ignore_mismatched_sizes") as error:
            minilm.AutoModelForSequenceClassification.from_pretrained(p.folder, num_labels=2)
        assert "[5, 12]" in str(error.value)
        assert "[2, 12]" in str(error.value)
        model = minilm.AutoModelForSequenceClassification.from_pretrained(
            p.folder, num_labels=2, ignore_mismatched_sizes=True
        )
        assert sorted(model.load_report.mismatched) == ["head.out.bias", "head.out.weight"]
        assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2)


def test_head_that_is_not_used_is_skipped_with_a_reason(tmp_path: Path) -> None:
    reference = save(tmp_path, small("bert"), "pre-training")
    model = minilm.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    skipped = model.load_report.skipped
    assert {key.split(".")[0] for key in skipped} == {"cls", "bert"}
    assert all(reason for reason in skipped.values())
    assert model(torch.tensor([[3, 4]])).get("pooler_output") is None
    pooled = minilm.AutoModel.from_pretrained(tmp_path)
    assert_equal_answers(pooled, reference.bert, small("bert"), "base")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("asked", [None, "auto", torch.float32, "bfloat16", torch.float64])
def test_dtype_is_transformers(stored: torch.dtype, said: bool, asked: Any, tmp_path: Path) -> None:
    reference = save(tmp_path, small("llama"), "causal-lm")
    reference.to(stored).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if not said:
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    options = {} if asked is None else {"dtype": asked}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    ours = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype}
    assert ours.dtype == theirs.dtype
    assert str(ours.config.dtype) == str(theirs.config.dtype).removeprefix("torch.")


def test_config_may_be_given(tmp_path: Path) -> None:
    save(tmp_path, small("gpt2"), "causal-lm")
    config = minilm.AutoConfig.from_pretrained(tmp_path, scale_attn_weights=False)
    changed = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    plain = minilm.AutoModelForCausalLM.from_pretrained(tmp_path)
    overridden = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, scale_attn_weights=False)
    ids = torch.tensor([[4, 8, 15, 16, 23]])
    with torch.no_grad():
        assert torch.equal(changed(ids).logits, overridden(ids).logits)
        assert not torch.allclose(changed(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    "option", ["num_label", "load_in_8bit", "quantization_config", "output_loading_info", "state_dict"]
)
def test_option_that_nothing_knows(option: str, tmp_path: Path) -> None:
    save(tmp_path, small("gpt2"), "causal-lm")
    with pytest.raises(TypeError, match=option):
        minilm.AutoModelForCausalLM.from_pretrained(tmp_path, **{option: True})


def test_head_that_a_family_does_not_have(tmp_path: Path) -> None:
    save(tmp_path, small("llama"), "causal-lm")
    with pytest.raises(ValueError, match="masked-lm"):
        minilm.AutoModelForMaskedLM.from_pretrained(tmp_path)
