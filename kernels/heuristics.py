"""Block sizes as pure functions of shape, dtype and device properties, so that they can be tested without a
GPU.

Functions marked `tunable` first look up the tables of measured configurations (see `tuned`); the code here is
for everything that has not been measured.
"""

from __future__ import annotations

from typing import NamedTuple

from .devices import Device
from .tuned import tunable


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def two_tiles(columns: int) -> tuple[int, int]:
    """Two powers of two, (first, second), that together cover `columns` with few unused columns.

    The first is the largest that fits, the second covers the rest and may reach beyond it; 0: no second tile.
    384 = 256 + 128, 768 = 512 + 256 and 576 = 512 + 64 waste nothing, where one padded tile would leave a
    quarter to three sevenths of its lanes idle; the worst case is 1 + 2^k + 1 columns.
    """
    first = next_power_of_2(columns + 1) // 2
    rest = columns - first
    return first, next_power_of_2(rest) if rest else 0


class NormBlock(NamedTuple):
    """Tiles of a normalisation kernel."""

    first: int
    second: int
    """Columns of the two tiles (see `two_tiles`)."""
    rows: int
    """Rows per program."""
    num_warps: int


@tunable("norm", "rows")
def norm_block(columns: int, rows: int, device: Device) -> NormBlock:
    """Tiles for rows of `columns` elements, which stay in registers.

    A warp should process about 512 elements (16 per lane, two or four loads of 16 bytes): at C = 384 that is
    one row per warp, four rows per program of four warps; at C = 4096 one row per eight warps. With few rows,
    a program has one row: first every multiprocessor should have a program.
    """
    first, second = two_tiles(columns)
    width = first + second
    most = min(8, max(1, 2048 // width), max(1, rows // device.processors))
    per_program = next_power_of_2(most + 1) // 2
    warps = max(1, min(16, per_program * width // 512))
    return NormBlock(first, second, per_program, next_power_of_2(warps))


class NormBackwardBlock(NamedTuple):
    """Tiles of the backward of a normalisation."""

    first: int
    second: int
    rows: int
    num_warps: int
    programs: int
    """Programs per multiprocessor, if there are enough blocks of rows."""


@tunable("norm_backward", "rows")
def norm_backward_block(columns: int, rows: int, device: Device) -> NormBackwardBlock:
    """The forward's tiles, with two programs per multiprocessor.

    Each accumulates its part of the weight's gradient in registers and writes one partial row at the end, so
    their number limits the extra traffic: 2 x 132 x C x 4 bytes on an H100.
    """
    return NormBackwardBlock(*norm_block.heuristic(columns, rows, device), 2)


def sharing_programs(blocks: int, each: int, others: int, device: Device) -> int:
    """Number of programs that sum over `blocks` blocks of rows: `each` per multiprocessor, divided by the
    `others` that process other columns, or one per block if there are fewer blocks."""
    return max(1, min(blocks, each * device.processors // max(others, 1)))


class AttentionBlock(NamedTuple):
    """Tiles of an attention kernel."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def attention_shared_memory(
    head_dim: int, itemsize: int, block: AttentionBlock, device: Device, biased: bool = False
) -> int:
    """Maximum bytes of shared memory of the forward: the queries once, and k and v (and the bias) of every
    stage in flight.

    Below sm_90 the stage that is being multiplied is already in registers; with a single stage, k and v share
    memory. D = 64 in 16 bits with tiles of 128 x 128 and 3 stages: 16 KB + 2 x 32 KB on sm_80, 16 KB + 3 x
    32 KB on sm_90. If warps share rows, and in float32, the probabilities pass through it too. Barriers and
    sums take a few hundred bytes more, at most 4 KB.
    """
    row = max(16, next_power_of_2(head_dim)) * itemsize
    scores = block.queries * block.keys * itemsize
    tiles = 2 * block.num_stages if device.capability >= (9, 0) else max(1, 2 * (block.num_stages - 1))
    shared = scores if itemsize == 4 or block.queries < 16 * block.num_warps else 0
    bias = -(-tiles // 2) * scores if biased else 0
    return block.queries * row + tiles * block.keys * row + shared + bias + 4096


def _clipped(block: AttentionBlock, max_queries: int, max_keys: int) -> AttentionBlock:
    """Limit tiles to the length of the sequences; longer ones would be mostly masked."""
    queries = max(16, min(block.queries, next_power_of_2(max(max_queries, 1))))
    keys = max(16, min(block.keys, next_power_of_2(max(max_keys, 1))))
    warps = block.num_warps if queries * keys == block.queries * block.keys else min(block.num_warps, 4)
    return AttentionBlock(queries, keys, warps, block.num_stages)


def _within(
    head_dim: int, itemsize: int, max_queries: int, max_keys: int, block: AttentionBlock, device: Device,
    biased: bool = False,
) -> AttentionBlock:  # fmt: skip
    """Limit tiles to the length of the sequences and to the device's shared memory: first one stage fewer,
    then half the keys, then half the queries."""
    block = _clipped(block, max_queries, max_keys)
    while attention_shared_memory(head_dim, itemsize, block, device, biased) > device.shared_memory:
        if block.num_stages > 1:
            block = block._replace(num_stages=block.num_stages - 1)
        elif block.keys > 16:
            block = block._replace(keys=block.keys // 2)
        else:
            block = block._replace(queries=block.queries // 2)
    return block


@tunable("attention", "max_queries", "max_keys")
def attention_block(
    head_dim: int, itemsize: int, max_queries: int, max_keys: int, biased: bool, dropout: bool,
    windowed: bool, device: Device,
) -> AttentionBlock:  # fmt: skip
    """Tiles of the forward: 128 queries keep wgmma busy; as many keys as registers and shared memory allow.

    At D = 64 in 16 bits, k and v of 128 keys are 32 KB per stage; at D = 128, those of 64 keys. A bias, or
    the random numbers of the dropout, need the registers of half the keys, at D = 128 a bias those of more,
    and so do the three loops of a window below sm_90. In float32 (ieee, no tensor cores) the operands are in
    registers too. These are the largest tiles tried that spill on no chip (see the compile report).
    """
    if itemsize == 4 and head_dim <= 32:
        block = AttentionBlock(64, 32, 4, 2)
    elif itemsize == 4 and head_dim <= 64:
        block = AttentionBlock(32, 32, 4, 2)
    elif itemsize == 4:
        block = AttentionBlock(32, 16, 8, 2)
    elif head_dim <= 64:
        block = AttentionBlock(128, 64 if biased or dropout else 128, 8, 3)
    elif head_dim <= 128:
        block = AttentionBlock(64, 32, 8, 2) if biased else AttentionBlock(128, 64, 8, 3)
        if windowed and not biased and device.capability < (9, 0):
            block = AttentionBlock(128, 32, 8, 4)
    else:
        block = AttentionBlock(64, 64, 8, 2)
    return _within(head_dim, itemsize, max_queries, max_keys, block, device, biased)


def attention_is_short(head_dim: int, itemsize: int, max_queries: int, max_keys: int, masked: bool) -> bool:
    """Whether the kernel with all keys in one block applies. `masked`: causal, or with a window.

    Scores of 64 x 256 fill half of the registers of four warps. Compiled for sm_80 and sm_90, that leaves
    room for D = 32 but not for the output and the addresses of D = 64, nor for masks that differ from row to
    row: there the limit is 128 keys. (For more keys the other kernel also skips masked blocks.) Without
    tensor cores, in float32, it is a quarter of that.
    """
    keys = min(128 if masked else 256, (8192 if itemsize == 2 else 2048) // head_dim)
    return head_dim in (16, 32, 64) and max(max_queries, max_keys) <= keys


class ShortBlock(NamedTuple):
    """Tiles of attention on short sequences."""

    queries: int
    keys: int
    heads: int
    num_warps: int
    num_stages: int


@tunable("attention_short", "sequences", "max_queries", "max_keys")
def attention_short_block(
    head_dim: int, itemsize: int, heads: int, sequences: int, max_queries: int, max_keys: int, device: Device
) -> ShortBlock:
    """All keys, 64 queries (the rows of one wgmma), and two to four heads per program.

    The loop over heads hides the loads: MiniLM's 12 heads are 3 programs of 4. If the grid does not give
    every multiprocessor two programs, a program has fewer heads: one sequence of 256 tokens is 4 blocks of
    queries x 12 heads = 48 programs of one head on 132 processors.
    """
    queries = max(16, min(64, next_power_of_2(max(max_queries, 1))))
    keys = max(16, next_power_of_2(max(max_keys, 1)))
    if itemsize == 4:  # products on the FMA units, whose operands wait in registers
        queries = 16
    grid = -(-max_queries // queries) * sequences * heads
    shared = [n for n in (4, 3, 2) if heads % n == 0 and grid // n >= 2 * device.processors]
    return ShortBlock(queries, keys, shared[0] if shared else 1, 4, 2)


def _backward_within(
    head_dim: int, itemsize: int, max_queries: int, max_keys: int, block: AttentionBlock, device: Device
) -> AttentionBlock:
    """Limit tiles of the backward to the length of the sequences and to the device's shared memory: q, do, k
    and v (those of the loop once per stage), and the probabilities twice, while they are moved to the other
    operand's layout (four times on sm_100, where accumulators are moved as well)."""
    block = _clipped(block, max_queries, max_keys)
    row = max(16, next_power_of_2(head_dim)) * itemsize
    copies = 4 if device.capability >= (10, 0) else 2

    def needed(block: AttentionBlock) -> int:
        tiles = 2 * (block.queries + block.keys) + 2 * (block.num_stages - 1) * max(block.queries, block.keys)
        return tiles * row + copies * block.queries * block.keys * itemsize + 4096

    while needed(block) > device.shared_memory:
        if block.num_stages > 1:
            block = block._replace(num_stages=block.num_stages - 1)
        elif block.keys >= block.queries:
            block = block._replace(keys=block.keys // 2)
        else:
            block = block._replace(queries=block.queries // 2)
    return block


@tunable("attention_dq", "max_queries", "max_keys")
def attention_dq_block(
    head_dim: int, itemsize: int, max_queries: int, max_keys: int, device: Device
) -> AttentionBlock:
    """Tiles of the kernel that loops over keys for dq (and of the bias's kernel, which loops over the batch):
    twice the operands of the forward, so half of its tiles.

    From sm_90 on the accumulators of the scores can stay where the tensor cores write them; below, 64 x 64
    scores and their gradient do not fit in addition to the operands of 4 warps. D = 256 has 64 rows, the
    minimum of wgmma, with 16 keys at a time.
    """
    wgmma = device.capability >= (9, 0)
    if itemsize == 4:
        block = AttentionBlock(32, 32 if head_dim <= 64 else 16, 4, 1)
    elif head_dim <= 64:
        block = AttentionBlock(64, 64 if wgmma else 32, 4, 2)
    elif head_dim <= 128:
        block = AttentionBlock(64, 64 if wgmma else 32, 8, 1)
    else:
        block = AttentionBlock(64, 16, 4, 1) if wgmma else AttentionBlock(32, 32, 4, 1)
    return _backward_within(head_dim, itemsize, max_queries, max_keys, block, device)


@tunable("attention_dkdv", "max_queries", "max_keys")
def attention_dkdv_block(
    head_dim: int, itemsize: int, max_queries: int, max_keys: int, device: Device
) -> AttentionBlock:
    """Tiles of the kernel that loops over queries for dk and dv, which has two accumulators.

    Larger ones spill: compiled for sm_90, 64 x 128 with 8 warps at D = 64 needs more than 255 registers, and
    so does a second stage at D = 128. At D = 256 the accumulators of 64 keys alone would fill the registers,
    so there are 32 keys, with the small tensor-core instruction.
    """
    if itemsize == 4 and head_dim <= 64:
        block = AttentionBlock(32, 32 if head_dim <= 32 else 16, 4, 1)
    elif itemsize == 4:
        block = AttentionBlock(32, 32, 8, 1)
    elif head_dim <= 64:
        fits = head_dim <= 32 or device.capability >= (9, 0)
        block = AttentionBlock(64, 64, 4, 2) if fits else AttentionBlock(32, 64, 8, 1)
    elif head_dim <= 128:
        block = AttentionBlock(64, 64, 8, 1)
    else:
        block = AttentionBlock(32, 32, 8, 1)
    return _backward_within(head_dim, itemsize, max_queries, max_keys, block, device)


@tunable("decode", "rows")
def paged_block(head_dim: int, itemsize: int, int8: bool, rows: int, device: Device) -> AttentionBlock:
    """Tiles of attention over the paged cache; `rows`: new tokens of a sequence x heads of a group, `int8`:
    whether the cache is in 8 bits.

    A decoding step has 1 to 16 rows, and 16 is the minimum of a tensor core. Loads must be in flight: k and v
    of 64 keys at D = 128 in 16 bits are 32 KB, three stages of them 96 KB (the fourth is being multiplied),
    and two programs fit a multiprocessor with 227 KB. A chunk of a prompt has hundreds of rows: tiles of 64,
    for wgmma; with an int8 cache at most half of the keys, since the converted values would spill in addition
    to the accumulators. The number of keys does not depend on the contexts, so that a sequence is summed in
    the same order alone and together with longer ones.
    """
    if itemsize == 4:
        # Without tensor cores keys and values lie in registers, those of 8 warps.
        block = AttentionBlock(16, 64 if head_dim <= 64 else 16, 8, 3)
    else:
        keys = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
        if int8 and rows > 16:
            keys = min(keys // 2, 64 if device.capability >= (9, 0) else 32)
        # But on sm_90 accumulators of 64 rows and 128 columns, or what is widened, need the registers of 8
        # warps.
        wide = head_dim > 64 and device.capability < (9, 0)
        warps = 8 if rows > 16 and (wide or (int8 and device.capability[0] != 9)) else 4
        block = AttentionBlock(64, keys, warps, 4 if rows <= 16 else 3)
    return _within(head_dim, itemsize, rows, block.keys, block, device)


class ContextParts(NamedTuple):
    """How to split a context: into at most `parts` parts of at least `keys` keys."""

    parts: int
    keys: int


MOST_PARTS = 128
"""Maximum number of parts of a context; longer contexts have longer parts."""


@tunable("decode_parts", "tiles")
def context_parts(head_dim: int, tiles: int, device: Device) -> ContextParts:
    """As many parts as give every multiprocessor a program when one sequence is decoded alone; `tiles`:
    number of programs of an unsplit sequence (key/value heads x tiles of rows).

    8 heads on 132 processors: 16 parts, 128 programs. The number does not depend on the batch, so that a
    sequence is summed the same way alone and in a batch (for the price see kernels/decode.py), nor on the
    context, which changes at every step. Parts of fewer than 128 keys would write and read more than a
    sixteenth of what they sum, with 4 heads per group; with small heads they are not worth a program.
    """
    return ContextParts(max(1, min(MOST_PARTS, device.processors // tiles)), 128 if head_dim >= 64 else 256)


class CombineBlock(NamedTuple):
    """How the partial results of a row are added."""

    parts: int
    """Number of parts at a time."""
    num_warps: int


@tunable("decode_combine")
def combine_block(head_dim: int, device: Device) -> CombineBlock:
    """16 parts at a time, loaded together, with 16 numbers per lane: [16, 128] in float32 with 4 warps.
    Independent of the number of parts, which depends on the batch."""
    block_d = max(16, next_power_of_2(head_dim))
    return CombineBlock(16, max(1, min(8, block_d // 32)))


class RopeBlock(NamedTuple):
    """The tile of the rotary embedding: some heads of one token."""

    heads: int
    num_warps: int


@tunable("rope", "tokens")
def rope_block(heads: int, head_dim: int, tokens: int, device: Device) -> RopeBlock:
    """2,048 elements, 16 per lane of four warps, if a token has that many; a warp has at least 8 elements per
    lane, 16 bytes in 16 bits.

    A decoding step has few tokens: the number of heads is halved until there are two programs per
    multiprocessor. 32 heads of 128 are 2 programs of 16 heads for each token of a prompt, and in a step of 8
    sequences on 132 processors 32 programs of one head.
    """
    block_d = next_power_of_2(head_dim)
    tile = min(next_power_of_2(max(heads, 1)), max(1, 2048 // block_d))
    while tile > 1 and tokens * -(-heads // tile) < 2 * device.processors:
        tile //= 2
    return RopeBlock(tile, max(1, min(4, tile * block_d // 512)))


class PointwiseBlock(NamedTuple):
    """The tile of an elementwise kernel."""

    rows: int
    columns: int
    num_warps: int


@tunable("activation")
def pointwise_block(columns: int, device: Device) -> PointwiseBlock:
    """2,048 elements, 16 per lane of four warps: two loads of 16 bytes in 16 bits.

    At most 512 columns, since lanes beyond the row are idle: 1536 = 3 x 512 wastes none, 1000 of 1024 few.
    A tile has several short rows.
    """
    width = min(512, next_power_of_2(max(columns, 1)))
    return PointwiseBlock(2048 // width, width, 4)


class ColumnSumBlock(NamedTuple):
    """The tile of an elementwise kernel that also sums its results over rows."""

    rows: int
    columns: int
    num_warps: int
    programs: int
    """Programs per multiprocessor, for all blocks of columns together, if there are enough blocks of rows."""


@tunable("activation_backward")
def column_sum_block(columns: int, device: Device) -> ColumnSumBlock:
    """The tiles of `pointwise_block`, with eight programs per multiprocessor.

    Each writes one partial row, so 8 x 132 / 3 = 352 rows of 1536 columns in float32 are 2 MB on an H100,
    where x of 16,384 rows is 50 MB in 16 bits.
    """
    return ColumnSumBlock(*pointwise_block.heuristic(columns, device), 8)


class VocabularyBlock(NamedTuple):
    """Columns of a row of logits that a program of the cross-entropy processes at a time."""

    columns: int
    num_warps: int


@tunable("cross_entropy")
def vocabulary_block(columns: int, device: Device) -> VocabularyBlock:
    """4,096 columns for 8 warps, 16 per lane, so that the two reductions over a block (maximum, sum) are
    rare; a smaller vocabulary is one block."""
    width = min(4096, next_power_of_2(max(columns, 16)))
    return VocabularyBlock(width, max(1, width // 512))


class LossChunk(NamedTuple):
    """Number of rows of hidden states whose logits are in memory at a time."""

    rows: int


@tunable("linear_cross_entropy", "tokens")
def loss_chunk(tokens: int, vocabulary: int, channels: int, itemsize: int, device: Device) -> LossChunk:
    """C rows: then the logits of a chunk are as large as the gradient of the weight, which has to be in
    memory anyway, and adding a chunk's part to that gradient (12 bytes per element) is amortised over 6 x
    rows operations. At most 128 MB of logits: 512 rows for a vocabulary of 128,256 in 16 bits. Multiples of
    16, for the tensor cores.
    """
    rows = min(channels, 2**27 // (itemsize * max(vocabulary, 1))) // 16 * 16
    return LossChunk(max(1, min(max(16, rows), tokens)))


class QuantizedBlock(NamedTuple):
    """Tiles of the product with a quantised weight."""

    rows: int
    """Rows of x."""
    outs: int
    """Rows of the weight."""
    ins: int
    """Columns of the weight per step, a multiple of 32."""
    splits: int
    """Number of parts into which the columns are split; their sums are added afterwards."""
    num_warps: int
    num_stages: int


@tunable("quantized_matmul", "rows")
def quantized_block(rows: int, outs: int, ins: int, itemsize: int, device: Device) -> QuantizedBlock:
    """64 rows of the weight (wgmma's minimum) by 128 columns: 8 KB of 8-bit codes per stage, 4 KB of 4-bit
    codes; with four stages and two programs per multiprocessor, 32 to 64 KB are in flight.

    The columns are split until there are two programs per multiprocessor, as long as each has four steps: a
    weight [576, 1536] is 9 tiles, so 2 parts of 6 steps; [4096, 4096] is 64 tiles, so 8 parts on 132
    processors. This does not depend on the number of rows, so that a row is summed in the same order alone
    and in a batch. The number of stages is the largest that fits: with 128 rows of x one is 40 KB, so 2 on a
    chip with 99 KB. In float32 (ieee, no tensor cores) the tile of the weight is smaller, as it needs more
    registers.
    """
    tile_rows = min(128, max(16, next_power_of_2(max(rows, 1))))
    tile_outs, tile_ins, stages = (64, 128, 4) if itemsize == 2 else (32, 64, 2)
    stage = (tile_rows * itemsize + tile_outs) * tile_ins  # x, and the codes at a byte each
    while stages > 1 and stages * stage > device.shared_memory:
        stages -= 1
    tiles, steps = -(-outs // tile_outs), -(-ins // tile_ins)
    splits = 1
    while splits * tiles < 2 * device.processors and 8 * splits <= steps and splits < 16:
        splits *= 2
    return QuantizedBlock(tile_rows, tile_outs, tile_ins, splits, 4, stages)
