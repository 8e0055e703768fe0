"""Heads and their losses against transformers, and what is minilm's own: padding never counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from close import assert_agree, assert_as_good_as_eager, assert_close, in_dtype_of
from hypothesis import given
from hypothesis import strategies as st
from pairs import arguments, class_of, fields, heads_of, pair, their_arguments
from strategies import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    WITHOUT_TABLE,
    Batch,
    Config,
    batches,
    cases,
    configs,
    examples,
    is_dynamic,
    seeds,
    small,
)
from torch import Tensor

from minilm.families.family import Head
from minilm.model.outputs import ModelOutput

TOKEN_HEADS = [
    (family, head)
    for family in FAMILIES
    for head in heads_of(family)
    if head in ("masked-lm", "token-classification", "causal-lm")
]
LOSS = 2e-5
"""Largest difference of two losses, relative to those above 1 (a squared difference of outputs can be
large)."""

ANSWERING = [family for family in FAMILIES if "question-answering" in heads_of(family)]


def assert_loss(actual: Tensor, expected: Tensor, *, what: str) -> None:
    """Two losses are the same."""
    assert_close(actual, expected, atol=LOSS * max(1.0, abs(float(expected))), what=what)


def assert_same_loss(actual: Tensor, reference: Any, run: Callable[[Any], Any]) -> None:
    """The loss of a drawn model is that of `run(reference)`, as far as float32 can tell."""
    expected = run(reference).loss
    atol = LOSS * max(1.0, abs(float(expected)))
    assert_agree(actual, expected, reference, lambda model: run(model).loss, atol=atol, what="loss")


def rows_alone(batch: Batch) -> list[tuple[slice, int]]:
    """For each row, its columns in the batch and its number."""
    starts = [batch.columns - n if batch.left else 0 for n in batch.lengths]
    return [
        (slice(start, start + n), row)
        for row, (start, n) in enumerate(zip(starts, batch.lengths, strict=True))
    ]


def draw_labels(batch: Batch, classes: int, what: int = 7) -> tuple[Tensor, Tensor]:
    """Labels of tokens, some of them ignored: with arbitrary ones at padding, and with -100 there."""
    labels = batch.integers(0, classes, what).masked_fill(batch.integers(0, 4, what + 1) == 0, -100)
    labels[0, 0] = 0  # one label at least counts; causal models look from the second on
    labels[:, 1:2] = classes - 1
    laid_out = batch.lay_out(labels, -100)
    noise = torch.randint(classes, laid_out.shape, generator=torch.Generator().manual_seed(batch.seed))
    return torch.where(batch.mask().bool(), laid_out, noise), laid_out


@pytest.mark.parametrize(("family", "head"), TOKEN_HEADS)
def test_loss_of_tokens_is_transformers(family: str, head: Head) -> None:
    @examples(8)
    @given(cases(family), seeds(), st.integers(1, 5))
    def check(case: tuple[Config, Batch], seed: int, num_labels: int) -> None:
        config, batch = case
        if head == "causal-lm":  # whoever has one token has no next one
            batch = replace(batch, lengths=tuple(max(n, 2) for n in batch.lengths), extra=0)
        # transformers asks the padding before a row for its first token, if it is on the left
        their_batch = replace(batch, left=False)
        classes = num_labels if head == "token-classification" else config["vocab_size"]
        ours, _ = draw_labels(batch, classes)
        _, theirs = draw_labels(their_batch, classes)
        with pair(config, head, seed, num_labels=num_labels) as p, torch.no_grad():
            call = their_arguments(config, their_batch)
            loss = p.model(**arguments(config, batch), labels=ours).loss
            assert loss.shape == ()
            assert_same_loss(loss, p.reference, lambda m: m(**in_dtype_of(m, call), labels=theirs))

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_sequences_is_transformers(family: str) -> None:
    @examples(16)
    @given(
        cases(family),
        seeds(),
        st.integers(1, 4),
        st.sampled_from(["one", "several", "number"]),
        st.booleans(),
    )
    def check(case: tuple[Config, Batch], seed: int, num_labels: int, kind: str, said: bool) -> None:
        config, batch = case
        batch = replace(batch, left=batch.embedded and family in DECODERS)
        generator = torch.Generator().manual_seed(seed)
        rows = len(batch.lengths)
        said = said or family == "deberta-v2"  # which has losses of its own, see docs/differences.md
        if kind == "number":
            num_labels = (
                num_labels if said else 1
            )  # several numbers are several classes, unless the problem is said
            labels = torch.randn(*((rows, num_labels) if num_labels > 1 else (rows,)), generator=generator)
        elif kind == "several":
            num_labels += 1
            labels = torch.randint(2, (rows, num_labels), generator=generator).float()
        else:
            num_labels += 1
            labels = torch.randint(num_labels, (rows,), generator=generator)
            labels[1:].masked_fill_(torch.rand(rows - 1, generator=generator) < 0.3, -100)
        problem = {"one": "single_label", "several": "multi_label"}.get(kind)
        problem = "regression" if problem is None else f"{problem}_classification"
        options = {"problem_type": problem} if said else {}
        with (
            pair(config, "sequence-classification", seed, num_labels=num_labels, **options) as p,
            torch.no_grad(),
        ):
            call = {**their_arguments(config, batch), "labels": labels}
            ours = p.model(**arguments(config, batch), labels=labels)
            theirs = p.reference(**call)
            assert ours.logits.shape == (rows, num_labels)
            assert_agree(ours.logits, theirs.logits, p.reference, lambda m: m(**in_dtype_of(m, call)).logits)
            assert_same_loss(ours.loss, p.reference, lambda m: m(**in_dtype_of(m, call)))
        assert p.model.config.problem_type == p.reference.config.problem_type == problem

    check()


@examples(16)
@given(cases("bert"), seeds(), st.booleans())
def test_loss_of_pre_training_is_transformers(case: tuple[Config, Batch], seed: int, both: bool) -> None:
    config, batch = case
    batch = replace(batch, left=False)
    ours, theirs = draw_labels(batch, config["vocab_size"])
    follows = torch.randint(2, (len(batch.lengths),), generator=torch.Generator().manual_seed(seed))
    more = {"next_sentence_label": follows} if both else {}
    with pair(config, "pre-training", seed) as p, torch.no_grad():
        a = p.model(**arguments(config, batch), labels=ours, **more)
        call = {**their_arguments(config, batch), "labels": theirs, **more}
        b = p.reference(**call)
        assert (a.loss is None) == (b.loss is None) == (not both)
        if both:
            assert_same_loss(a.loss, p.reference, lambda m: m(**in_dtype_of(m, call)))
    with pair(config, "next-sentence", seed) as p, torch.no_grad():
        a = p.model(**arguments(config, batch), labels=follows)
        call = {**their_arguments(config, batch), "labels": follows}
        assert_same_loss(a.loss, p.reference, lambda m: m(**in_dtype_of(m, call)))


@pytest.mark.parametrize("family", ANSWERING)
def test_loss_of_answers_is_transformers(family: str) -> None:
    """On rows of one length, with answers inside and outside them; transformers lets padding share the
    probability."""

    @examples(8)
    @given(cases(family, even=True), seeds(), st.booleans())
    def check(case: tuple[Config, Batch], seed: int, column: bool) -> None:
        config, batch = case
        rows, columns = len(batch.lengths), batch.columns
        generator = torch.Generator().manual_seed(seed)
        start, end = torch.randint(columns + 2, (2, rows), generator=generator)
        start[0] = end[0] = columns - 1
        shape = (rows, 1) if column and rows > 1 else (rows,)
        answers = {"start_positions": start.view(shape), "end_positions": end.view(shape)}
        with pair(config, "question-answering", seed) as p, torch.no_grad():
            ours = p.model(**arguments(config, batch), **answers)
            call = their_arguments(config, batch)

            def run(model: Any) -> Any:  # which clamps the positions in place
                return model(**in_dtype_of(model, call), **{k: v.clone() for k, v in answers.items()})

            assert_same_loss(ours.loss, p.reference, run)

    check()


@pytest.mark.parametrize("family", ANSWERING)
def test_answers_are_never_in_padding(family: str) -> None:
    """The loss of a padded batch is the mean of what transformers makes of its rows without padding."""

    @examples(5)
    @given(configs(family), batches(), seeds())
    def check(config: Config, batch: Batch, seed: int) -> None:
        batch = replace(batch, embedded=False, with_positions=False)
        start = torch.tensor([columns.start for columns, _ in rows_alone(batch)])
        end = torch.tensor([columns.stop - 1 for columns, _ in rows_alone(batch)])
        with pair(config, "question-answering", seed) as p, torch.no_grad():
            call = arguments(config, batch)
            ours = p.model(**call, start_positions=start, end_positions=end)

            def mean(model: Any) -> Tensor:
                losses = []
                for columns, row in rows_alone(batch):
                    alone = {key: value[row : row + 1, columns] for key, value in call.items()}
                    inside = {
                        "start_positions": torch.tensor([0]),
                        "end_positions": torch.tensor([batch.lengths[row] - 1]),
                    }
                    if is_dynamic(config):  # whose frequencies remember the longest row so far
                        model.base_model.rotary_emb.__init__(model.config)
                    losses.append(model(**alone, **inside).loss)
                return torch.stack(losses).mean()

            expected = mean(p.reference)
            atol = LOSS * max(1.0, abs(float(expected)))
            assert_agree(ours.loss, expected, p.reference, mean, atol=atol, what="loss")
        padding = batch.mask() == 0
        lowest = torch.finfo(torch.float32).min
        assert (ours.start_logits[padding] == lowest).all()
        assert (ours.end_logits[padding] == lowest).all()

    check()


@pytest.mark.parametrize("family", DECODERS)
def test_label_at_padding_never_counts(family: str) -> None:
    """Not on either side, not through the shift, and a row of padding alone changes nothing."""
    config = small(family)
    batch = Batch(lengths=(5, 2, 3), left=False, extra=0, seed=1)
    with pair(config, "causal-lm") as p, torch.no_grad():
        ids = batch.ids(config)
        alone = []
        for columns, row in rows_alone(batch):
            logits = p.model(ids[row : row + 1, columns]).logits[0, :-1].double()
            alone.append(-logits.log_softmax(-1).gather(1, ids[row, columns][1:, None]).squeeze(1))
        expected = torch.cat(alone).mean().float()
        for left in (False, True):
            for extra in (0, 2):
                placed = replace(batch, left=left, extra=extra)
                noise = torch.randint(
                    1, 41, (3, placed.columns), generator=torch.Generator().manual_seed(extra)
                )
                labels = torch.where(placed.mask().bool(), placed.ids(config), noise)
                loss = p.model(placed.ids(config), placed.mask(), labels=labels).loss
                assert_loss(loss, expected, what=f"left={left}, extra={extra}")
                empty = torch.zeros(1, placed.columns, dtype=torch.int64)
                loss = p.model(
                    torch.cat([empty + 3, placed.ids(config)]),
                    torch.cat([empty, placed.mask()]),
                    labels=torch.cat([empty + 5, labels]),
                ).loss
                assert_loss(loss, expected, what="with an empty row")


@pytest.mark.parametrize("family", DECODERS)
def test_last_token_is_the_last_that_is_not_padding(family: str) -> None:
    """Decoders classify by the last token that is not the padding id, whatever the mask says of it; as
    transformers."""
    config = small(family)
    ids = torch.tensor([[7, 0, 9, 0, 0], [0, 0, 5, 6, 8], [4, 0, 0, 0, 0]])
    with pair(config, "sequence-classification", num_labels=3) as p, torch.no_grad():
        assert_close(p.model(ids).logits, p.reference(ids).logits)
        alone = p.model(ids[:1, :3]).logits
        assert_close(p.model(ids).logits[:1], alone)
        p.model.config.pad_token_id = None
        assert not torch.allclose(p.model(ids).logits[:1], alone, atol=1e-3)


@pytest.mark.parametrize(("family", "head"), TOKEN_HEADS)
def test_no_label_that_counts_gives_nan(family: str, head: Head) -> None:
    """As in PyTorch and transformers: the mean of nothing, not zero."""
    with pair(small(family), head) as p, torch.no_grad():
        ids = torch.tensor([[4, 5, 6]])
        labels = torch.full_like(ids, -100)
        assert p.model(ids, labels=labels).loss.isnan()
        assert p.reference(ids, labels=labels).loss.isnan()


HALF = [
    ("bert", "masked-lm"),
    ("distilbert", "token-classification"),
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
]
HALF += [("qwen3", "sequence-classification"), ("roberta", "base"), ("mistral", "question-answering")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "head"), HALF)
def test_half_precision_is_as_good_as_eager(family: str, head: Head, dtype: torch.dtype) -> None:
    """err(minilm) <= 2 err(transformers, eager attention) + 2 units in the last place, against the same
    weights in float64."""

    @examples(5)
    @given(batches(), seeds())
    def check(batch: Batch, seed: int) -> None:
        batch = replace(batch, left=False, embedded=False)
        config = small(family)
        with pair(config, head, seed) as p, torch.no_grad():
            model = type(p.model).from_pretrained(p.folder, dtype=dtype)
            ours = model(**arguments(config, batch))
            eager = p.reference.to(dtype)(**their_arguments(config, batch))
            exact = p.reference.double()(**their_arguments(config, batch))
        mask = batch.mask().bool()
        for name in fields(head, exact):
            values = [
                out[name][mask] if out[name].shape[:2] == mask.shape else out[name]
                for out in (ours, eager, exact)
            ]
            floor = 2 * torch.finfo(dtype).eps * float(values[2].abs().max())
            assert_as_good_as_eager(*values, floor=floor, what=name)

    check()


def assert_reads_alike(output: ModelOutput, reference: Any) -> None:
    """The ways in which an output is read."""
    assert list(output.keys()) == [key for key in reference if key in output]
    assert isinstance(output.to_tuple(), tuple)
    assert len(output) == len(output.to_tuple()) == len(output[:])
    for position, (key, value) in enumerate(output.items()):
        assert output[key] is value
        assert output[position] is value
        assert getattr(output, key) is value


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_read_by_name_key_and_place(family: str) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for head in heads_of(family):
        with pair(small(family), head) as p, torch.no_grad():
            labels = {"labels": ids} if head in ("masked-lm", "causal-lm") else {}
            show = {"output_hidden_states": True, **labels}
            ours, theirs = p.model(ids, **show), p.reference(ids, **show)
            assert_reads_alike(ours, theirs)
            assert type(ours).__name__.removesuffix("WithPast") in type(theirs).__name__ or head in (
                "base",
                "causal-lm",
            )
            for field in theirs.keys() - {"past_key_values"}:
                assert field in ours, f"{family} {head}: {field}"
            listed = p.model(ids, **show, return_dict=False)
            assert isinstance(listed, tuple)
            assert len(listed) == len(ours)
            assert torch.equal(listed[1 if labels else 0], ours[fields(head, ours)[0]])
            with pytest.raises(AttributeError):
                _ = ours.nothing
            with pytest.raises(KeyError):
                _ = ours["nothing"]


def test_output_can_be_changed() -> None:
    with pair(small("bert"), "base") as p:
        out = p.model(torch.tensor([[5, 6]]))
    out.last_hidden_state = out.last_hidden_state * 2
    assert torch.equal(out["last_hidden_state"], out[0])
    out["pooler_output"] = torch.zeros(3)
    assert torch.equal(out.pooler_output, torch.zeros(3))


WRONG: dict[str, tuple[Head, dict[str, Any], str]] = {
    "no ids": ("base", {}, "exactly one of input_ids and inputs_embeds"),
    "both": (
        "base",
        {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 12)},
        "exactly one",
    ),
    "too high an id": ("base", {"input_ids": torch.tensor([[4, 41]])}, "41.* 41 "),
    "too low an id": ("base", {"input_ids": torch.tensor([[4, -1]])}, "-1"),
    "ids of one row": ("base", {"input_ids": torch.tensor([4, 5])}, r"\[2\]"),
    "fractional ids": ("base", {"input_ids": torch.ones(1, 3)}, "float32"),
    "narrow vectors": ("base", {"inputs_embeds": torch.ones(1, 3, 11)}, r"12\].*\[1, 3, 11\]"),
    "mask of another shape": (
        "base",
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)},
        r"\[2, 3\].*\[2, 4\]",
    ),
    "positions of another shape": (
        "base",
        {"input_ids": torch.ones(2, 3).long(), "position_ids": torch.ones(2, 4).long()},
        r"\[2, 3\].*\[2, 4\]",
    ),
    "labels of another shape": (
        "token-classification",
        {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 4).long()},
        r"\[2, 3\].*\[2, 4\]",
    ),
}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str, family: str) -> None:
    head, call, message = WRONG[name]
    with pair(small(family), head) as p, pytest.raises(ValueError, match=message):
        p.model(**call)


@pytest.mark.parametrize("family", [f for f in (*ENCODERS, "gpt2") if f not in WITHOUT_TABLE])
def test_text_beyond_the_position_table_is_refused(family: str) -> None:
    """Naming both lengths."""
    with pair(small(family), "base") as p:
        longest = p.model.spec.max_positions
        ids = torch.full((1, longest + 1), 5)
        with pytest.raises(ValueError, match=f"{longest + 1}.*{longest}"):
            p.model(ids)
        p.model(ids[:, 1:])


def test_problem_type_that_does_not_exist() -> None:
    with pair(small("bert"), "sequence-classification") as p:
        p.model.config.problem_type = "ranking"
        with pytest.raises(ValueError, match="ranking"):
            p.model(torch.tensor([[5, 6]]), labels=torch.tensor([1]))


def test_empty_row_has_nothing_to_pool() -> None:
    with pair(small("bert"), "sequence-classification") as p, pytest.raises(ValueError, match="row 1 has no"):
        p.model(torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary_resizes(family: str) -> None:
    """Old tokens keep their vectors and scores; new ones can be read and predicted."""
    head: Head = "masked-lm" if family in ENCODERS else "causal-lm"
    for tie in (True, False):
        with pair(small(family, tie_word_embeddings=tie), head) as p, torch.no_grad():
            ids = torch.tensor([[5, 6, 40]])
            before = p.model(ids).logits
            p.model.resize_token_embeddings(45)
            after = p.model(torch.tensor([[5, 6, 40]])).logits
            assert after.shape == (1, 3, 45)
            assert_close(after[..., :41], before, atol=1e-5, what="old tokens")
            assert p.model(torch.tensor([[44]])).logits.isfinite().all()
            p.model.save_pretrained(p.folder / "grown")
            again = type(p.model).from_pretrained(p.folder / "grown")
            assert torch.equal(again(ids).logits, after)
            assert (
                class_of(transformers, family, head).from_pretrained(p.folder / "grown").config.vocab_size
                == 45
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_is_the_model_without_its_head(family: str) -> None:
    """Under the names that programs use; it shares the parameters, and asking for it changes nothing."""
    ids = torch.tensor([[5, 6, 7]])
    for head in heads_of(family):
        with pair(small(family), head) as p, torch.no_grad():
            names = [name for name, _ in p.model.named_parameters()]
            base, theirs = p.model.base_model, p.reference.base_model
            if head == "base":
                assert base is p.model
                continue
            assert_close(base(ids)[0], theirs(ids)[0])
            if p.reference.base_model_prefix != "model" or family in DECODERS:
                attribute = getattr(p.model, p.reference.base_model_prefix)
                assert_close(attribute(ids)[0], theirs(ids)[0])
            own = {id(q) for q in p.model.parameters()}
            assert {id(q) for q in base.parameters()} <= own
            assert sum(q.numel() for q in base.parameters()) == theirs.num_parameters()
            assert [name for name, _ in p.model.named_parameters()] == names
            assert not base.training
            p.model.train()
            assert p.model.base_model.training
            with pytest.raises(AttributeError):
                _ = p.model.nothing
