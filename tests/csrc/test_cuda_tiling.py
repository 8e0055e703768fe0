"""The index arithmetic of the CUDA kernels: nothing is left out, and nothing is done twice."""

from __future__ import annotations

import ctypes

import pytest
from cuda_emulation import driver
from hypothesis import given
from hypothesis import strategies as st

L, U = ctypes.c_longlong, ctypes.c_uint


def pair(function: str, *args: int) -> tuple[int, int]:
    out = (ctypes.c_int * 2)()
    getattr(driver(), function)(*args, out)
    return out[0], out[1]


@given(
    context=st.integers(0, 3000),
    window=st.one_of(st.just(0), st.integers(1, 3100)),
    splits=st.integers(1, 128),
)
def test_splits_cover_what_is_seen_once(context: int, window: int, splits: int) -> None:
    seen: list[int] = []
    for split in range(splits):
        begin, end = pair("visible_range", context, window, split, splits)
        assert begin <= end
        if begin < end:
            assert split == 0 or begin % 16 == 0 or not seen, "splits meet at chunks"
        seen += range(begin, end)
    assert seen == list(range(max(0, context - window) if window else 0, context))


@given(
    tiles=st.integers(1, 400), context=st.integers(0, 100_000), count=st.sampled_from([1, 28, 108, 132, 148])
)
def test_the_number_of_splits(tiles: int, context: int, count: int) -> None:
    splits = driver().splits_for(L(tiles), context, count)
    assert 1 <= splits <= 128
    if tiles >= 0.8 * count or context <= 256:
        assert splits == 1
    else:
        assert splits <= min(count, -(-context // 64))

        def efficiency(splits: int) -> float:
            return tiles * splits / count / -(-tiles * splits // count)

        best = max(map(efficiency, range(1, min(128, count, -(-context // 64)) + 1)))
        assert efficiency(splits) >= 0.85 * best - 1e-9


def test_the_worked_example_of_the_splits() -> None:
    assert driver().splits_for(L(3), 8192, 132) == 38


@given(tokens=st.integers(1, 9), q_heads=st.integers(0, 9), kv_heads=st.integers(1, 9))
def test_every_head_has_a_row(tokens: int, q_heads: int, kv_heads: int) -> None:
    found = set()
    for row in range(tokens * (q_heads + 2 * kv_heads)):
        out = (L * 3)()
        driver().rope_row_of(L(row), q_heads, kv_heads, out)
        found.add(tuple(out))
    roles = {0: q_heads, 1: kv_heads, 2: kv_heads}
    assert found == {
        (t, role, h) for t in range(tokens) for role, heads in roles.items() for h in range(heads)
    }


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("size", [1, 2])
def test_fragments_hold_each_element_of_a_head_once(head_dim: int, size: int) -> None:
    keys, values = (ctypes.c_int * head_dim)(), (ctypes.c_int * head_dim)()
    driver().head_elements(head_dim, size, keys, values)
    assert sorted(keys) == list(range(head_dim))
    assert sorted(values) == list(range(head_dim))


def test_lanes_hold_each_token_of_a_chunk_once() -> None:
    assert sorted(driver().token_of(i, t) for i in range(4) for t in range(4)) == list(range(16))


@given(out=st.integers(1, 200), gated=st.booleans())
def test_tiles_hold_each_row_once(out: int, gated: bool) -> None:
    out *= 16 if gated else 1
    rows = [
        driver().row_of(tile, r, out, gated)
        for tile in range(driver().tiles_of(out, gated))
        for r in range(16)
    ]
    assert sorted(row for row in rows if row < out) == list(range(out))
    if gated:  # up stands eight below its gate
        assert all(rows[i + 8] == rows[i] + out // 2 for i in range(len(rows)) if i % 16 < 8)


@pytest.mark.parametrize("rows", range(1, 9))
def test_what_is_held_of_x_fits_and_spreads_over_the_banks(rows: int) -> None:
    columns = driver().columns_held(rows)
    stride = driver().stride_held(columns)
    assert columns >= 128
    assert columns % 128 == 0
    assert rows * stride <= 16384
    assert 2 * stride % 128 == 64


@given(out=st.integers(1, 40), columns=st.integers(1, 400), bits=st.sampled_from([4, 8]))
def test_packing_is_a_bijection(out: int, columns: int, bits: int) -> None:
    count = driver().words(out, columns, bits) * (32 // bits)
    assert count == -(-out // 8) * 8 * -(-columns // 128) * 128, "padded to panels and chunks, and no more"
    places = set()
    for row in range(out):
        for column in range(columns):
            place = driver().place(row, column, columns, bits)
            assert pair("code_at", L(place), columns, bits) == (row, column)
            places.add(place)
    assert len(places) == out * columns
    assert min(places) >= 0
    assert max(places) < count


@given(out=st.integers(1, 40), groups=st.integers(1, 20))
def test_packing_scales_is_a_bijection(out: int, groups: int) -> None:
    places = {}
    for row in range(out):
        for group in range(groups):
            place = driver().scale_place(row, group, 32 * groups)
            assert pair("scale_at", L(place), 32 * groups) == (row, group)
            places[place] = row, group
    assert len(places) == out * groups
    assert max(places) < driver().scales(out, 32 * groups)


def test_lanes_read_side_by_side() -> None:
    """The 16 bytes of lane 4 g + t are elements 8 t .. 8 t + 7 of the groups of row g."""
    for bits, groups in ((8, 2), (4, 4)):
        for lane in range(32):
            first = lane * 8 * groups
            codes = {pair("code_at", L(first + i), 256, bits) for i in range(8 * groups)}
            assert codes == {
                (lane // 4, 32 * group + 8 * (lane % 4) + i) for group in range(groups) for i in range(8)
            }


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of the authors' Random123
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: int, expected: tuple[int, ...]
) -> None:
    out = (U * 4)()
    driver().philox_of((U * 4)(*counter), ctypes.c_ulonglong(key), out)
    assert tuple(out) == expected
