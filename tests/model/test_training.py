"""Training: gradients are transformers', an AdamW loop follows theirs, and dropout is where theirs is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_agree, assert_close, in_dtype_of
from hypothesis import given
from pairs import Pair, arguments, class_of, heads_of, pair, pooled_where_they_look, their_arguments
from safetensors.torch import save_file
from strategies import DECODERS, FAMILIES, Batch, Config, cases, examples, seeds, small
from torch import Tensor

import minilm
from minilm.families.family import Head

EVERY_HEAD = [(family, head) for family in FAMILIES for head in heads_of(family) if head != "base"]
NO_DROPOUT = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "xlm-roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "camembert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "mpnet": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "electra": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    "distilbert": ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"),
    "deberta-v2": (
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"),
    ),
    "nomic_bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "modernbert": ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
    "llama": ("attention_dropout", "classifier_dropout"),
    "mistral": ("attention_dropout", "classifier_dropout"),
    "qwen2": ("attention_dropout", "classifier_dropout"),
    "qwen3": ("attention_dropout", "classifier_dropout"),
    "phi3": ("attention_dropout", "resid_pdrop", "classifier_dropout"),
    "smollm3": ("attention_dropout", "classifier_dropout"),
    "olmo2": ("attention_dropout",),
    "gpt_neox": ("attention_dropout", "hidden_dropout", "classifier_dropout"),
    "phi": ("attention_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout"),
    "gemma": ("attention_dropout", "classifier_dropout"),
    "gemma2": ("attention_dropout", "classifier_dropout"),
    "gemma3_text": ("attention_dropout",),
}
"""The dropout probabilities of each family."""


def targets(head: Head, config: Config, batch: Batch) -> dict[str, Tensor]:
    """Labels for any head; none at padding."""
    rows = len(batch.lengths)
    if head == "question-answering":
        return {"start_positions": torch.zeros(rows).long(), "end_positions": torch.tensor(batch.lengths) - 1}
    if head in ("sequence-classification", "next-sentence"):
        return {"labels": torch.arange(rows) % 2}
    family = config["model_type"]
    two = head == "token-classification" or (head == "pre-training" and family == "electra")
    classes = 2 if two else config["vocab_size"]
    tokens = {"labels": batch.lay_out(batch.integers(0, classes, 9), -100)}
    pairs = {"bert": "next_sentence_label", "albert": "sentence_order_label"}
    return {**tokens, pairs[family]: torch.arange(rows) % 2} if head == "pre-training" and not two else tokens


def as_ours(p: Pair, values: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Tensors under transformers' names, as parameters of minilm: loaded as if they were a checkpoint."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(p.model.config.to_dict()))
    return dict(class_of(minilm, p.config["model_type"], p.head).from_pretrained(folder).named_parameters())


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_gradients_are_transformers(family: str, head: Head) -> None:
    """Of the loss, for every parameter; the padding token, in the middle of a text, is not trained as an
    input."""

    @examples(5)
    @given(cases(family, even=head == "question-answering"), seeds())
    def check(case: tuple[Config, Batch], seed: int) -> None:
        config, batch = case
        if head == "causal-lm":
            batch = replace(batch, lengths=tuple(max(n, 2) for n in batch.lengths), extra=0)
        batch = pooled_where_they_look(config, head, replace(batch, left=False, embedded=False))
        labels = targets(head, config, batch)
        with pair(config, head, seed) as p:
            theirs = their_arguments(config, batch)
            ours = arguments(config, batch)
            if seed % 2 == 0:  # a text that holds the padding id
                padding = config.get("pad_token_id", 0) or 0
                for call in (ours, theirs):
                    call["input_ids"] = call["input_ids"].clone()
                    call["input_ids"][0, 0] = padding
            try:
                compare(p, ours, theirs, labels)
            except AssertionError:
                # A drawn model of two channels may turn float32's rounding into any difference: if that is
                # all, there is none in float64.
                p.model.double().zero_grad()
                p.reference.double().zero_grad()
                compare(p, ours, theirs, labels)

    def compare(p: Any, ours: dict[str, Any], theirs: dict[str, Any], labels: dict[str, Any]) -> None:
        loss = p.model(**ours, **labels).loss
        expected = p.reference(**theirs, **labels).loss
        assert_close(loss, expected, atol=2e-5, what="loss")
        loss.backward()
        expected.backward()
        gradients = {
            name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in p.reference.named_parameters(remove_duplicate=False)
        }
        expected_gradients = as_ours(p, gradients, p.folder / "gradients")
        for name, parameter in p.model.named_parameters():
            value = expected_gradients[name].detach()
            gradient = torch.zeros_like(value) if parameter.grad is None else parameter.grad.to(value.dtype)
            assert_close(gradient, value, atol=1e-5 * max(1.0, float(value.abs().max())), what=name)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_vectors_is_transformers(family: str) -> None:
    @examples(5)
    @given(cases(family), seeds())
    def check(case: tuple[Config, Batch], seed: int) -> None:
        config, batch = case
        batch = replace(batch, left=False, embedded=True, extra=0)
        labels = {"labels": batch.lay_out(batch.integers(0, 2, 9), -100)}
        head: Head = "token-classification"
        if head not in heads_of(family):
            head = "causal-lm"
        with pair(config, head, seed) as p:

            def gradient(model: Any, call: dict[str, Any]) -> Tensor:
                vectors = in_dtype_of(model, {"inputs_embeds": batch.vectors(p.model.spec.table_size)})
                vectors["inputs_embeds"].requires_grad_()
                with torch.enable_grad():
                    model(**{**call, **vectors}, **labels).loss.backward()
                found = vectors["inputs_embeds"].grad
                assert found is not None
                return found

            def again(model: Any) -> Tensor:
                return gradient(model, their_arguments(config, batch))

            expected = again(p.reference)
            atol = 1e-5 * max(1.0, float(expected.abs().max()))
            assert_agree(gradient(p.model, arguments(config, batch)), expected, p.reference, again, atol=atol)

    check()


def without_dropout(family: str) -> Config:
    """The small configuration, all probabilities zero."""
    return small(family, **dict.fromkeys(NO_DROPOUT[family], 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_adamw_follows_transformers(family: str, head: Head) -> None:
    """Twenty steps in training mode: each loss as theirs, and the last one lower than the first."""
    config = without_dropout(family)
    batch = Batch(
        lengths=(6, 6, 6) if head == "question-answering" else (6, 4, 5), left=False, extra=0, seed=2
    )
    labels = targets(head, config, batch)
    with pair(config, head, seed=4) as p:
        losses: dict[str, list[float]] = {}
        for name, model, call in (
            ("ours", p.model, arguments(config, batch)),
            ("theirs", p.reference, their_arguments(config, batch)),
        ):
            model.train()
            optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
            losses[name] = []
            for _ in range(20):
                optimiser.zero_grad()
                loss = model(**call, **labels).loss
                loss.backward()
                optimiser.step()
                losses[name].append(float(loss.detach()))
    assert_close(torch.tensor(losses["ours"]), torch.tensor(losses["theirs"]), atol=1e-3, what="losses")
    assert losses["ours"][-1] < 0.9 * losses["ours"][0], losses["ours"]


def varies(model: Any, ids: Tensor) -> bool:
    """Whether two calls differ."""
    with torch.no_grad():
        return not torch.equal(*(model(ids, return_dict=False)[0] for _ in range(2)))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [*EVERY_HEAD, *((family, "base") for family in FAMILIES)])
def test_dropout_is_where_theirs_is(family: str, head: Head) -> None:
    """Each probability alone: what it makes random in training, and nothing in evaluation."""
    ids = torch.randint(1, 41, (2, 9), generator=torch.Generator().manual_seed(0))
    quiet = without_dropout(family)
    with pair(quiet, head) as p:
        assert not varies(p.model.train(), ids)
        expected = p.model.eval()(ids, return_dict=False)[0]
    for option in NO_DROPOUT[family]:
        with pair({**quiet, option: 0.5}, head) as p:
            assert varies(p.model.train(), ids) == varies(p.reference.train(), ids), option
            assert torch.equal(p.model.eval()(ids, return_dict=False)[0], expected), option


@pytest.mark.parametrize("family", FAMILIES)
def test_default_dropout_is_theirs(family: str) -> None:
    """With nothing said of it, too."""
    ids = torch.randint(1, 41, (2, 9), generator=torch.Generator().manual_seed(0))
    for head in heads_of(family):
        with pair(small(family), head) as p:
            assert varies(p.model.train(), ids) == varies(p.reference.train(), ids), head
            assert not varies(p.model.eval(), ids), head


def test_dropout_keeps_the_mean() -> None:
    """What survives is scaled up: over many draws, the mean of a linear model stays as it is without."""
    config = small("distilbert", n_layers=0, dropout=0.5)
    with pair(config, "token-classification") as p, torch.no_grad():
        ids = torch.tensor([[4, 9]]).expand(4000, 2)
        expected = p.model(ids[:1]).logits[0]
        found = p.model.train()(ids).logits
        assert_close(found.mean(0), expected, atol=6 * float(found.std(0).max()) / 4000**0.5)
        assert float(found.std(0).max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_scratch(family: str) -> None:
    """`from_config` gives a model in training mode that learns."""
    torch.manual_seed(0)
    head: Head = "causal-lm" if family in DECODERS else "masked-lm"
    cls = {"causal-lm": minilm.AutoModelForCausalLM, "masked-lm": minilm.AutoModelForMaskedLM}[head]
    model = cls.from_config(minilm.PretrainedConfig.from_dict(without_dropout(family)))
    assert model.training
    ids = torch.randint(1, 41, (4, 8))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert abs(losses[0] - torch.tensor(41.0).log()) < 0.3, (
        "fresh weights are small, so that the first guess is even"
    )
    assert losses[-1] < losses[0] / 2


def test_frozen_body_gets_no_gradient() -> None:
    """The usual way to train a head alone."""
    with pair(small("bert"), "sequence-classification") as p:
        for parameter in p.model.bert.parameters():
            parameter.requires_grad = False
        before = {name: value.clone() for name, value in p.model.named_parameters()}
        optimiser = torch.optim.AdamW([q for q in p.model.parameters() if q.requires_grad], lr=1e-2)
        p.model(torch.tensor([[5, 6]]), labels=torch.tensor([1])).loss.backward()
        optimiser.step()
    for name, value in p.model.named_parameters():
        assert torch.equal(value, before[name]) != name.startswith("head."), name


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    """Mixed precision, as in most training loops: float32 parameters and gradients, the loss near that of
    float32."""
    head: Head = "causal-lm" if family in DECODERS else "masked-lm"
    with pair(without_dropout(family), head) as p:
        ids = torch.randint(1, 41, (3, 8), generator=torch.Generator().manual_seed(0))
        expected = p.reference(ids, labels=ids).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = p.model.train()(ids, labels=ids).loss
            theirs = p.reference.train()(ids, labels=ids).loss
        assert loss.dtype == torch.float32
        error, allowed = abs(float(loss - expected)), 2 * abs(float(theirs - expected)) + 0.02
        assert error <= allowed, f"error {error}, and transformers' {allowed}"
        loss.backward()
        for name, parameter in p.model.named_parameters():
            assert parameter.grad is None or parameter.grad.dtype == torch.float32, name
        assert p.model.body.embeddings.tokens.weight.grad.isfinite().all()


def test_gradients_add_up() -> None:
    """Two backward passes are the sum of both, as gradient accumulation expects."""
    with pair(small("gpt2"), "causal-lm") as p:
        a, b = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[8, 9, 10, 11]])
        gradients = []
        for steps in ((a,), (b,), (a, b)):
            p.model.zero_grad()
            for ids in steps:
                p.model(ids, labels=ids).loss.backward()
            gradients.append(p.model.body.layers[0].mlp.up.weight.grad.clone())
        assert_close(gradients[2], gradients[0] + gradients[1], atol=1e-6)
