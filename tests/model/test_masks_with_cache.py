"""Batches read in parts, with a cache and masks of any kind, against one pass of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tiny_decoders import VOCABULARY, decoder
from torch import Tensor

FAMILIES = ("gpt2", "llama", "qwen3", "phi3")


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, columns), generator=generator)


@torch.no_grad()
def whole(family: str, ids: Tensor, mask: Tensor) -> Tensor:
    """One pass of transformers; positions are columns from the first real one of each row."""
    positions = (torch.arange(ids.shape[1]) - mask.int().argmax(1, keepdim=True)).clamp(min=0)
    found: Tensor = decoder(family).theirs(ids, attention_mask=mask, position_ids=positions).logits
    return found


@torch.no_grad()
def read(family: str, ids: Tensor, mask: Tensor | None, cache: Any = None) -> Any:
    return decoder(family).ours(ids, attention_mask=mask, past_key_values=cache, use_cache=True)


def same(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=2e-4)


def goes_on(mask: Tensor, start: int) -> bool:
    """No row has padding behind its tokens, which a mask of new columns alone would pass over."""
    return start == 0 or bool((mask[:, start - 1].bool() | ~mask[:, :start].any(1)).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_with_any_mask_are_one_pass(family: str) -> None:
    @examples(15)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        parts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        rows = data.draw(st.integers(1, 3))
        columns = sum(parts)
        # A sliding window counts tokens here and columns there; those of the tiny decoders, of 9, hold all.
        bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
        mask = torch.tensor(data.draw(st.lists(bits, min_size=rows, max_size=rows))).long()
        if data.draw(st.booleans()):
            mask[:, : parts[0]] = 1
        ids = tokens(rows, columns, data.draw(st.integers(0, 99)))
        expected = whole(family, ids, mask)
        cache, start = None, 0
        for part in parts:
            end = start + part
            own = mask[:, start:end]
            how = data.draw(st.sampled_from(("full", "new", "none"))) if goes_on(mask, start) else "full"
            told = mask[:, :end] if how == "full" else None if how == "none" and bool(own.all()) else own
            if data.draw(st.booleans()) and told is not None:
                told = told.bool()
            output = read(family, ids[:, start:end], told, cache)
            same(output.logits, expected[:, start:end], own)
            cache, start = output.past_key_values, end
            assert cache.get_seq_length() == end
            assert [cache.lengths[row] for row in cache.rows] == mask[:, :end].sum(1).tolist()

    check()


@examples(40)
@given(st.data())
def test_what_is_cropped_can_be_read_again(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor(data.draw(st.lists(bits, min_size=rows, max_size=rows))).long()
    ids = tokens(rows, columns)
    expected = whole("llama", ids, mask)
    cache = read("llama", ids, mask).past_key_values
    cut = data.draw(st.integers(-columns - 2, columns + 2))
    theirs = decoder("llama").theirs(ids, use_cache=True).past_key_values
    theirs.crop(cut)
    cache.crop(cut)
    left = theirs.get_seq_length()
    assert cache.get_seq_length() == left
    assert [cache.lengths[row] for row in cache.rows] == mask[:, :left].sum(1).tolist()
    if left < columns:
        told = mask[:, left:] if goes_on(mask, left) and data.draw(st.booleans()) else mask
        output = read("llama", ids[:, left:], told, cache)
        same(output.logits, expected[:, left:], mask[:, left:])


@pytest.mark.parametrize("count", [1.0, True, "1", None])
def test_a_cut_is_a_whole_number(count: Any) -> None:
    cache = read("llama", tokens(1, 3), None).past_key_values
    with pytest.raises(TypeError, match="whole number of columns"):
        cache.crop(count)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ([[1, 1, 1]], [[1, 0, 1, 1]], "hides a token that is cached, row 0, column 1"),
        ([[1, 1, 1]], [[0, 0, 0, 1]], "hides a token that is cached, row 0, column 0"),
        (
            [[0, 1, 1], [1, 1, 1]],
            [[1, 1, 1, 1], [1, 1, 1, 1]],
            "shows what was hidden before, row 0, column 0",
        ),
        ([[1, 1, 1], [0, 1, 1]], [[1, 1, 1, 1], [1, 0, 1, 1]], "row 1, column 0"),
        ([[1, 1, 1]], [[1, 1, 1]], r"\[1, 1\], or \[1, 4\].*and is \[1, 3\]"),
        ([[1, 1, 1]], [[1, 1, 1, 1, 1]], r"\[1, 1\], or \[1, 4\].*and is \[1, 5\]"),
        ([[1, 1, 1], [1, 1, 1]], [[1, 1, 1, 1]], r"\[2, 1\], or \[2, 4\].*and is \[1, 4\]"),
        ([[1, 1, 1]], [[[[1, 1, 1, 1]]]], r"attention_mask must be \[batch, tokens\] = \[1, 1\]"),
    ],
    ids=str,
)
def test_what_a_paged_cache_cannot_do_is_refused(first: Any, then: Any, words: str) -> None:
    first, then = torch.tensor(first), torch.tensor(then)
    ids = tokens(len(first), 4)
    cache = read("llama", ids[:, :3], first).past_key_values
    before = dict(cache.lengths)
    with pytest.raises(ValueError, match=words):
        read("llama", ids[:, 3:], then, cache)
    assert cache.lengths == before
    good = torch.cat((first, torch.ones_like(first[:, :1])), 1)  # and nothing is spoilt by the attempt
    output = read("llama", ids[:, 3:], good, cache)
    same(output.logits, whole("llama", ids, good)[:, 3:], good[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int16])
def test_a_mask_of_any_dtype(dtype: torch.dtype) -> None:
    ids, mask = tokens(2, 5), torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 1, 1]])
    cache = read("gpt2", ids[:, :3], mask[:, :3].to(dtype)).past_key_values
    found = read("gpt2", ids[:, 3:], mask.to(dtype), cache).logits
    same(found, whole("gpt2", ids, mask)[:, 3:], mask[:, 3:])


def test_an_error_in_a_pass_leaves_the_cache_as_it_was() -> None:
    model = decoder("llama").ours
    ids, mask = tokens(2, 6), torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    cache = read("llama", ids[:, :3], mask[:, :3]).past_key_values

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.head.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            read("llama", ids[:, 3:], mask, cache)
    finally:
        handle.remove()
    assert cache.get_seq_length() == 3
    assert list(cache.lengths.values()) == [2, 3]
    same(read("llama", ids[:, 3:], mask, cache).logits, whole("llama", ids, mask)[:, 3:], mask[:, 3:])


def test_a_padded_past_is_forked_and_reordered_with_its_columns() -> None:
    ids, mask = tokens(2, 5), torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    expected = whole("llama", ids, mask)
    cache = read("llama", ids[:, :4], mask[:, :4]).past_key_values
    cache.reorder(cache.rows[::-1])
    same(read("llama", ids[:, 4:].flip(0), mask.flip(0), cache).logits, expected[:, 4:].flip(0), mask[:, 4:])
    cache.crop(-1)
    child = cache.fork(cache.rows[1])
    cache.free_row(cache.rows[0])
    assert cache.rows[1] == child
    found = read("llama", ids[:1, 4:].repeat(2, 1), mask[:1].repeat(2, 1), cache).logits
    same(found, expected[:1, 4:].repeat(2, 1, 1), torch.ones(2, 1))
