"""Block sizes as pure functions of shape and dtype, so that they can be tested, and argued about, without a
GPU."""

from __future__ import annotations

from typing import NamedTuple


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def two_tiles(columns: int) -> tuple[int, int]:
    """Two powers of two, (first, second), that together cover `columns` with little to spare.

    The first is the largest that fits whole, the second covers the rest and may reach beyond it; 0 is no
    second tile. 384 = 256 + 128, 768 = 512 + 256 and 576 = 512 + 64 waste nothing, where one padded tile
    would leave a quarter to three sevenths of its lanes idle; the worst case is 1 + 2^k + 1 columns.
    """
    first = next_power_of_2(columns + 1) // 2
    rest = columns - first
    return first, next_power_of_2(rest) if rest else 0


class NormBlock(NamedTuple):
    """How a normalisation kernel cuts its rows."""

    first: int
    second: int
    """Columns of the two tiles (see `two_tiles`)."""
    rows: int
    """Rows a program."""
    num_warps: int


def norm_block(columns: int, rows: int) -> NormBlock:
    """Tiles for rows of `columns` elements, kept whole in registers.

    A warp should own about 512 elements (16 a lane, two or four loads of 16 bytes): at C = 384 that is one
    row a warp, four rows a program of four warps; at C = 4096 one row to eight warps. Few rows are not worth
    blocks of several: the grid should fill the chip first.
    """
    first, second = two_tiles(columns)
    width = first + second
    per_program = 1
    while per_program < 8 and per_program * 2 * width <= 2048 and per_program * 2 * 128 <= max(rows, 1):
        per_program *= 2
    warps = max(1, min(16, per_program * width // 512))
    return NormBlock(first, second, per_program, next_power_of_2(warps))


def norm_backward_programs(rows: int, block_rows: int, processors: int) -> int:
    """Programs of the backward grid: two for each multiprocessor, or one a block of rows if those are fewer.

    Each keeps its share of the weight's gradient in registers and writes one partial row at the end, so their
    number bounds the extra traffic: 2 x 132 x C x 4 bytes on an H100.
    """
    blocks = -(-rows // block_rows)
    return max(1, min(blocks, 2 * processors))


class AttentionBlock(NamedTuple):
    """Tiles of an attention kernel."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def attention_block(head_dim: int, itemsize: int, max_queries: int, max_keys: int) -> AttentionBlock:
    """Tiles of the forward: 128 queries keep wgmma fed; keys as many as shared memory holds twice.

    At D = 64 in 16 bits, k and v of 128 keys are 32 KB a stage; at D = 128, 64 keys are. In float32 (ieee, no
    tensor cores) registers bind first. Tiles longer than the sequences would be mostly masks.
    """
    if itemsize == 4:
        queries, keys, warps, stages = 64, 32, 4, 2
    elif head_dim <= 64:
        queries, keys, warps, stages = 128, 128, 8, 3
    elif head_dim <= 128:
        queries, keys, warps, stages = 128, 64, 8, 3
    else:
        queries, keys, warps, stages = 64, 64, 4, 2
    queries = max(16, min(queries, next_power_of_2(max(max_queries, 1))))
    keys = max(16, min(keys, next_power_of_2(max(max_keys, 1))))
    return AttentionBlock(queries, keys, warps if queries >= 128 else min(warps, 4), stages)


def attention_backward_block(head_dim: int, itemsize: int, max_queries: int, max_keys: int) -> AttentionBlock:
    """Tiles of the backward, which holds two accumulators and twice the operands: half of the forward's.

    Larger ones spill: compiled for sm_90, 64 x 128 by 8 warps at D = 64 needs more than 255 registers, and so
    does a second stage at D = 128.
    """
    if itemsize == 4:
        queries, keys, warps, stages = 32, 32, 4, 1
    elif head_dim <= 64:
        queries, keys, warps, stages = 64, 64, 4, 2
    elif head_dim <= 128:
        queries, keys, warps, stages = 64, 64, 8, 1
    else:
        queries, keys, warps, stages = 32, 32, 4, 1
    queries = max(16, min(queries, next_power_of_2(max(max_queries, 1))))
    keys = max(16, min(keys, next_power_of_2(max(max_keys, 1))))
    return AttentionBlock(queries, keys, warps, stages)
