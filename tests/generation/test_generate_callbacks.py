"""`generate` with functions of the caller: each sees, and does, what it does in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_decoders import EOS, PAD, VOCABULARY, batch, decoder, prompts
from torch import Tensor

ENDS = [EOS, *range(40, 80)]
"""Many end tokens, so that rows end at different times."""


class Recorder:
    """Changes the scores by what the rows are, and keeps what it was shown."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.append(input_ids.clone())
        self.scores.append(scores.clone())
        likes = (input_ids.sum(1, keepdim=True) + torch.arange(scores.shape[1])) % 7 == 0
        return scores + 3.0 * likes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": ENDS},
        {"repetition_penalty": 1.3, "min_new_tokens": 4, "eos_token_id": ENDS},
        {"do_sample": True, "temperature": 1.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "eos_token_id": ENDS},
    ],
    ids=["plain", "ends", "penalties", "sampled", "several"],
)
@pytest.mark.parametrize("whole_list", [False, True], ids=["list", "LogitsProcessorList"])
def test_a_logits_processor(options: dict[str, Any], whole_list: bool) -> None:
    d = decoder("llama")
    call = batch(prompts([9, 3, 6]))
    found = []
    seen = []
    for model in (d.ours, d.theirs):
        recorder = Recorder()
        functions: Any = [recorder]
        if whole_list or model is d.theirs:
            functions = transformers.LogitsProcessorList(functions)
        torch.manual_seed(3)
        settings = {"eos_token_id": None, "pad_token_id": PAD, **options}
        found.append(model.generate(**call, max_new_tokens=25, logits_processor=functions, **settings))
        seen.append(recorder)
    assert torch.equal(*found)
    ours, theirs = seen
    assert len(ours.rows) == len(theirs.rows)
    for mine, other in zip(ours.rows, theirs.rows, strict=True):
        assert torch.equal(mine, other)
    growing = torch.ones(len(ours.rows[0]), dtype=torch.bool)
    for step, (mine, other) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        ended = settings["eos_token_id"] is not None and step > 0
        if ended:
            growing &= ~torch.isin(ours.rows[step][:, -1], torch.tensor(settings["eos_token_id"]))
        mine[:, PAD] = other[:, PAD]  # transformers penalises the padding of a prompt, too
        torch.testing.assert_close(mine[growing], other[growing], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tensor", "one for all", "list", "with scores"])
def test_stopping_criteria(kind: str) -> None:
    d = decoder("qwen2")
    call = batch(prompts([9, 3, 6], seed=4))

    def row_by_row(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert (scores is None) == (kind != "with scores")
        return input_ids[:, -1] % 5 == 0

    def at_length(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 16)

    def one_for_all(input_ids: Tensor, scores: Any, **_: Any) -> bool:
        return input_ids.shape[1] >= 16

    functions = {"one for all": [at_length], "list": [row_by_row, at_length]}.get(kind, [row_by_row])
    as_dict = {"return_dict_in_generate": True, "output_scores": True} if kind == "with scores" else {}
    # Without an end token transformers goes on with rows that have ended.
    options = {"max_new_tokens": 30, "eos_token_id": EOS, "pad_token_id": PAD, **as_dict}
    mine = [one_for_all] if kind == "one for all" else functions
    ours = d.ours.generate(**call, stopping_criteria=mine, **options)
    theirs = d.theirs.generate(
        **call, stopping_criteria=transformers.StoppingCriteriaList(functions), **options
    )
    if as_dict:
        assert len(ours.scores) == len(theirs.scores)
        ours, theirs = ours.sequences, theirs.sequences
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < 9 + 30 or kind in ("tensor", "with scores")


def test_transformers_own_criteria_and_processors() -> None:
    d = decoder("llama")
    call = batch(prompts([7, 7]))
    options = {
        "max_new_tokens": 20,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "logits_processor": transformers.LogitsProcessorList(
            [transformers.NoBadWordsLogitsProcessor([[5], [9, 12]], eos_token_id=torch.tensor([EOS]))]
        ),
        "stopping_criteria": transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(19)]),
    }
    ours = d.ours.generate(**call, **options)
    assert torch.equal(ours, d.theirs.generate(**call, **options))
    assert ours.shape[1] == 19


def test_tokens_that_may_come_next() -> None:
    d = decoder("llama")
    call = batch(prompts([7, 4]))

    def allowed(row: int, tokens: Tensor) -> list[int]:
        return [int(tokens[-1] + 1) % VOCABULARY, 30 + row]

    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": PAD}
    ours = d.ours.generate(**call, prefix_allowed_tokens_fn=allowed, **options)
    assert torch.equal(ours, d.theirs.generate(**call, prefix_allowed_tokens_fn=allowed, **options))
    with pytest.raises(ValueError, match="allows no token for row 0, which has 7 tokens"):
        d.ours.generate(**call, prefix_allowed_tokens_fn=lambda row, tokens: [], **options)


def test_functions_that_make_no_sense() -> None:
    d = decoder("llama")
    call = batch(prompts([7, 4]))
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": PAD}
    with pytest.raises(ValueError, match=r"must return scores \[2, \d+\], and <lambda> returned NoneType"):
        d.ours.generate(**call, logits_processor=[lambda ids, scores: None], **options)
    with pytest.raises(ValueError, match=r"returned \[1, \d+\]"):
        d.ours.generate(**call, logits_processor=[lambda ids, scores: scores[:1]], **options)
    with pytest.raises(ValueError, match=r"one for each of 2 rows, and <lambda> returned \[3\]"):
        d.ours.generate(**call, stopping_criteria=[lambda ids, scores: torch.zeros(3)], **options)
    with pytest.raises(TypeError, match=r"stopping_criteria must hold functions .* and holds 7"):
        d.ours.generate(**call, stopping_criteria=[7], **options)
    with pytest.raises(ValueError, match="give a pad_token_id"):
        d.ours.generate(
            **call,
            stopping_criteria=[lambda ids, scores: True],
            max_new_tokens=3,
            eos_token_id=[],
            pad_token_id=None,
        )


def test_an_error_in_a_function_leaves_the_cache_as_it_was() -> None:
    d = decoder("llama")
    call = batch(prompts([7, 4]))
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": PAD}
    first = d.ours.generate(**call, return_dict_in_generate=True, **options)
    cache = first.past_key_values
    before = [cache.lengths[row] for row in cache.rows]

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > first.sequences.shape[1] + 2:
            raise KeyError("mine")
        return scores

    mask = torch.cat((call["attention_mask"], torch.ones(2, 6, dtype=torch.int64)), dim=1)
    with pytest.raises(KeyError, match="mine"):
        d.ours.generate(
            first.sequences, attention_mask=mask, past_key_values=cache, logits_processor=[fail], **options
        )
    assert [cache.lengths[row] for row in cache.rows] == before
