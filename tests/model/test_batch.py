"""The border between padded batches and packed sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

from minilm.model.batch import Packed, pack

CPU = torch.device("cpu")


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Any mask: padding on either side, in the middle, whole rows, no rows, no columns."""
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    values = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.bool).view(rows, columns)


def packed_of(mask: Tensor) -> Packed:
    return pack(*mask.shape, mask, CPU)


@examples(100)
@given(masks(), st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8]))
def test_packs_the_real_tokens_in_order(mask: Tensor, dtype: torch.dtype) -> None:
    x = torch.arange(mask.numel()).view(mask.shape)
    packed = packed_of(mask.to(dtype))
    expected = [int(value) for row, real in zip(x, mask, strict=True) for value in row[real]]
    assert packed.pack(x).tolist() == expected
    lengths = [int(row.sum()) for row in mask]
    assert packed.lengths == lengths
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.max_seqlen == max(lengths, default=0)
    assert packed.tokens == sum(lengths)
    positions = [
        column - int(row.nonzero()[0]) for row in mask for column in range(mask.shape[1]) if row[column]
    ]
    assert packed.positions.tolist() == positions


@examples(60)
@given(masks(), st.lists(st.integers(1, 3), max_size=2))
def test_padding_again_gives_zeros_where_no_token_is(mask: Tensor, more: list[int]) -> None:
    x = torch.randn(*mask.shape, *more) + 10
    packed = packed_of(mask)
    again = packed.pad(packed.pack(x))
    assert again.shape == x.shape
    assert torch.equal(again[mask], x[mask])
    assert not again[~mask].any()


@examples(60)
@given(masks(), st.integers(0, 8))
def test_last_columns_is_the_part_of_the_batch(mask: Tensor, count: int) -> None:
    if count == 0:
        return
    packed, x = packed_of(mask), torch.randn(*mask.shape, 2)
    part, kept = packed.last_columns(count)
    tokens = packed.pack(x)
    tokens = tokens if kept is None else tokens[kept]
    expected = torch.where(mask[..., None], x, 0.0)[:, -count:]
    assert torch.equal(part.pad(tokens), expected)


@examples(40)
@given(masks())
def test_first_and_last(mask: Tensor) -> None:
    packed = packed_of(mask)
    if 0 in packed.lengths:
        row = packed.lengths.index(0)
        for which in (packed.first, packed.last):
            with pytest.raises(ValueError, match=f"row {row} has no real token"):
                which()
        return
    x = torch.arange(mask.numel()).view(mask.shape)
    tokens = packed.pack(x)
    assert tokens[packed.first()].tolist() == [int(r[real][0]) for r, real in zip(x, mask, strict=True)]
    assert tokens[packed.last()].tolist() == [int(r[real][-1]) for r, real in zip(x, mask, strict=True)]


@given(st.integers(0, 4), st.integers(0, 5))
def test_no_mask_is_a_mask_of_ones(rows: int, columns: int) -> None:
    """And neither costs an index."""
    plain, ones = pack(rows, columns, None, CPU), pack(rows, columns, torch.ones(rows, columns), CPU)
    for packed in (plain, ones):
        assert packed.indices is None
        assert packed.lengths == [columns] * rows
        assert packed.cu_seqlens.tolist() == [columns * i for i in range(rows + 1)]
        assert packed.positions.tolist() == list(range(columns)) * rows


def test_gradients_pass_both_ways() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    packed = packed_of(mask)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packed.pad(packed.pack(x) ** 2), (x,))


@pytest.mark.parametrize("shape", [(2,), (2, 4), (3, 3), (1, 2, 3), ()])
def test_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[batch, tokens\] = \[2, 3\], and is"
    ) as error:
        pack(2, 3, torch.ones(shape), CPU)
    assert str(list(shape)) in str(error.value)
