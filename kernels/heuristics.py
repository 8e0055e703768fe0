"""Block sizes as pure functions of shape, dtype and the properties of a device, so that they can be tested,
and argued about, without a GPU.

Those marked `tunable` are looked up in the tables of measured configurations first (see `tuned`); what is
written here is the answer for everything that nobody has measured.
"""

from __future__ import annotations

from typing import NamedTuple

from .devices import Device
from .tuned import tunable


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


@tunable("norm", "rows")
def norm_block(columns: int, rows: int, device: Device) -> NormBlock:
    """Tiles for rows of `columns` elements, kept whole in registers.

    A warp should own about 512 elements (16 a lane, two or four loads of 16 bytes): at C = 384 that is one
    row a warp, four rows a program of four warps; at C = 4096 one row to eight warps. Few rows are not worth
    blocks of several: the grid should give every multiprocessor a program first.
    """
    first, second = two_tiles(columns)
    width = first + second
    most = min(8, max(1, 2048 // width), max(1, rows // device.processors))
    per_program = next_power_of_2(most + 1) // 2
    warps = max(1, min(16, per_program * width // 512))
    return NormBlock(first, second, per_program, next_power_of_2(warps))


class NormBackwardBlock(NamedTuple):
    """How the backward of a normalisation cuts its rows."""

    first: int
    second: int
    rows: int
    num_warps: int
    programs: int
    """For each multiprocessor, if there are as many blocks of rows."""


@tunable("norm_backward", "rows")
def norm_backward_block(columns: int, rows: int, device: Device) -> NormBackwardBlock:
    """The forward's tiles, by two programs for each multiprocessor.

    Each keeps its share of the weight's gradient in registers and writes one partial row at the end, so their
    number bounds the extra traffic: 2 x 132 x C x 4 bytes on an H100.
    """
    return NormBackwardBlock(*norm_block.heuristic(columns, rows, device), 2)


def sharing_programs(blocks: int, each: int, others: int, device: Device) -> int:
    """Programs that share `blocks` blocks of rows, whose sums they make: `each` for each multiprocessor, less
    by the `others` that do the same for other columns, or one a block if those are fewer."""
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
    """Bytes that the forward keeps in shared memory, at most: the queries once, k and v (and the bias, which
    is loaded beside them) of every stage in flight.

    Below sm_90 the stage that is being multiplied has left it for registers; a single stage has k and v in
    turns. D = 64 in 16 bits with tiles of 128 x 128 and 3 stages: 16 KB + 2 x 32 KB on sm_80, 16 KB + 3 x
    32 KB on sm_90. Where warps share rows, and in float32, the probabilities pass through it too. A few
    hundred bytes of barriers and sums come on top, 4 KB at most.
    """
    row = max(16, next_power_of_2(head_dim)) * itemsize
    scores = block.queries * block.keys * itemsize
    tiles = 2 * block.num_stages if device.capability >= (9, 0) else max(1, 2 * (block.num_stages - 1))
    shared = scores if itemsize == 4 or block.queries < 16 * block.num_warps else 0
    bias = -(-tiles // 2) * scores if biased else 0
    return block.queries * row + tiles * block.keys * row + shared + bias + 4096


def _clipped(block: AttentionBlock, max_queries: int, max_keys: int) -> AttentionBlock:
    """Tiles no longer than the sequences, which would be mostly masks."""
    queries = max(16, min(block.queries, next_power_of_2(max(max_queries, 1))))
    keys = max(16, min(block.keys, next_power_of_2(max(max_keys, 1))))
    warps = block.num_warps if queries * keys == block.queries * block.keys else min(block.num_warps, 4)
    return AttentionBlock(queries, keys, warps, block.num_stages)


def _within(
    head_dim: int, itemsize: int, max_queries: int, max_keys: int, block: AttentionBlock, device: Device,
    biased: bool = False,
) -> AttentionBlock:  # fmt: skip
    """Tiles no longer than the sequences, and no larger than the device's shared memory: first a stage fewer,
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
    """Tiles of the forward: 128 queries keep wgmma fed; keys as many as registers and shared memory hold.

    At D = 64 in 16 bits, k and v of 128 keys are 32 KB a stage; at D = 128, 64 keys are. A bias, or the
    random numbers of the dropout, take the registers of half the keys, at D = 128 a bias those of more, and
    so do the three loops of a window below sm_90. In
    float32 (ieee, no tensor cores) the operands lie in registers too. What is chosen here is the largest of
    those tried that spills on no chip (see the compile report).
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
    """Whether the path with all keys in one block applies. `masked`: causal, or with a window.

    Scores of 64 x 256 fill half of the registers of four warps. Compiled for sm_80 and sm_90, that leaves
    room for D = 32 but not for the output and the addresses of D = 64, nor for masks that differ from row to
    row: there it is 128 keys. (Beyond them the other path also skips what is masked.) Without tensor cores,
    in float32, it is a quarter of that.
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
    """All keys, 64 queries (the rows of one wgmma), and two to four heads a program.

    The heads are the loop that hides the loads: MiniLM's 12 heads are 3 programs of 4. As long as the grid
    does not give every multiprocessor two programs, fewer heads: one sequence of 256 tokens is 4 blocks of
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
    """Tiles of the backward no longer than the sequences, and no larger than the device's shared memory: q,
    do, k and v, those of the loop once a stage, and the probabilities on their way to the other operand's
    place, twice (four times on sm_100, where accumulators pass through as well)."""
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
    """Tiles of the kernel that walks over keys for dq (and of the bias's, which walks over the batch): twice
    the operands of the forward, so half of its tiles.

    From sm_90 on the accumulators of the scores may stay where the tensor cores leave them; below, 64 x 64
    scores and their gradient do not fit beside the operands of 4 warps. D = 256 keeps 64 rows, the fewest
    that wgmma takes, for 16 keys at a time.
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
    """Tiles of the kernel that walks over queries for dk and dv, which holds two accumulators.

    Larger ones spill: compiled for sm_90, 64 x 128 by 8 warps at D = 64 needs more than 255 registers, and so
    does a second stage at D = 128. At D = 256 the accumulators of 64 keys fill the registers by themselves:
    32 keys, and the small tensor-core instruction.
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

    A decode step has 1 to 16 rows, and 16 are the fewest that a tensor core takes; what counts is to have
    loads in flight: k and v of 64 keys at D = 128 in 16 bits are 32 KB, three of them 96 KB (the fourth stage
    is being multiplied), and two programs fit a multiprocessor of 227 KB. A chunk of a prompt has hundreds of
    rows: tiles of 64, as wgmma wants them; from an int8 cache half of the keys at most, where what is widened
    beside the accumulators would spill. The number of keys does not depend on the contexts, so that a
    sequence is summed in the same order alone and beside longer ones.
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
    """How a context is cut: into at most `parts` parts of at least `keys` keys."""

    parts: int
    keys: int


MOST_PARTS = 128
"""Of a context: beyond them they only become longer."""


@tunable("decode_parts", "tiles")
def context_parts(head_dim: int, tiles: int, device: Device) -> ContextParts:
    """As many parts as give every multiprocessor a program when one sequence is decoded alone; `tiles`: the
    programs of a sequence that is not cut (key/value heads x tiles of rows).

    8 heads on 132 processors: 16 parts, 128 programs. The batch has no say in it, so that a sequence is
    summed the same way alone and in a batch (kernels/decode.py tells the price), nor has the context, which
    changes at every step. Parts of fewer than 128 keys would write and read more than a sixteenth of what
    they sum, with 4 heads a group; those of small heads are not worth a program.
    """
    return ContextParts(max(1, min(MOST_PARTS, device.processors // tiles)), 128 if head_dim >= 64 else 256)


class CombineBlock(NamedTuple):
    """How the partial results of a row are added up."""

    parts: int
    """So many at a time."""
    num_warps: int


@tunable("decode_combine")
def combine_block(head_dim: int, device: Device) -> CombineBlock:
    """16 parts at a time, whose loads are in flight together, with 16 numbers a lane: [16, 128] in float32 by
    4 warps. How many parts there are has no say in it: it is the batch's."""
    block_d = max(16, next_power_of_2(head_dim))
    return CombineBlock(16, max(1, min(8, block_d // 32)))


class RopeBlock(NamedTuple):
    """The tile of the rotary embedding: some heads of one token."""

    heads: int
    num_warps: int


@tunable("rope", "tokens")
def rope_block(heads: int, head_dim: int, tokens: int, device: Device) -> RopeBlock:
    """2,048 elements, 16 a lane of four warps, if a token has so many; a warp has 8 elements a lane at least,
    16 bytes in 16 bits.

    A step of decoding has few tokens: as long as there are not two programs a multiprocessor, half of the
    heads. 32 heads of 128 are 2 programs of 16 heads for each token of a prompt, and in a step of 8 sequences
    on 132 processors 32 programs of one head.
    """
    block_d = next_power_of_2(head_dim)
    tile = min(next_power_of_2(max(heads, 1)), max(1, 2048 // block_d))
    while tile > 1 and tokens * -(-heads // tile) < 2 * device.processors:
        tile //= 2
    return RopeBlock(tile, max(1, min(4, tile * block_d // 512)))


class PointwiseBlock(NamedTuple):
    """The tile of a kernel that looks at each element by itself."""

    rows: int
    columns: int
    num_warps: int


@tunable("activation")
def pointwise_block(columns: int, device: Device) -> PointwiseBlock:
    """2,048 elements, 16 a lane of four warps: two loads of 16 bytes in 16 bits.

    At most 512 columns, since those beyond the row are idle lanes: 1536 = 3 x 512 wastes none, 1000 of 1024
    few, and short rows are several to a tile.
    """
    width = min(512, next_power_of_2(max(columns, 1)))
    return PointwiseBlock(2048 // width, width, 4)


class ColumnSumBlock(NamedTuple):
    """The tile of a kernel that adds up the columns of what it computes, too."""

    rows: int
    columns: int
    num_warps: int
    programs: int
    """For each multiprocessor, all blocks of columns together, if there are as many blocks of rows."""


@tunable("activation_backward")
def column_sum_block(columns: int, device: Device) -> ColumnSumBlock:
    """The tiles of `pointwise_block`, by eight programs for each multiprocessor.

    Each writes one partial row, so 8 x 132 / 3 = 352 rows of 1536 columns in float32 are 2 MB on an H100,
    where x of 16,384 rows is 50 MB in 16 bits.
    """
    return ColumnSumBlock(*pointwise_block.heuristic(columns, device), 8)


class VocabularyBlock(NamedTuple):
    """Columns of a row of logits that a program of the cross-entropy holds at once."""

    columns: int
    num_warps: int


@tunable("cross_entropy")
def vocabulary_block(columns: int, device: Device) -> VocabularyBlock:
    """4,096 columns for 8 warps, 16 a lane, so that the two sums over a block (its maximum, its exponentials)
    are far between; a vocabulary that is shorter is one block."""
    width = min(4096, next_power_of_2(max(columns, 16)))
    return VocabularyBlock(width, max(1, width // 512))


class LossChunk(NamedTuple):
    """Rows of hidden states whose logits exist at once."""

    rows: int


@tunable("linear_cross_entropy", "tokens")
def loss_chunk(tokens: int, vocabulary: int, channels: int, itemsize: int, device: Device) -> LossChunk:
    """As many as there are channels: then the logits of a chunk are as large as the gradient of the weight,
    which has to be held anyway, and adding a chunk's part to that gradient (12 bytes an element of it) is
    paid by 6 x rows operations. At most 128 MB of logits: of a vocabulary of 128,256 in 16 bits that is 512
    rows. Multiples of 16, what a tensor core takes.
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
    """Columns of the weight a step, a multiple of 32."""
    splits: int
    """Parts into which the columns are cut, whose sums are added afterwards."""
    num_warps: int
    num_stages: int


@tunable("quantized_matmul", "rows")
def quantized_block(rows: int, outs: int, ins: int, itemsize: int, device: Device) -> QuantizedBlock:
    """64 rows of the weight (wgmma's fewest) by 128 columns: 8 KB of 8-bit codes a stage, 4 KB of 4-bit
    ones; with four stages and two programs a multiprocessor, 32 to 64 KB are in flight.

    The columns are split until there are two programs a multiprocessor, as long as each keeps four steps: a
    weight [576, 1536] is 9 tiles, so 2 parts of 6 steps; [4096, 4096] is 64 tiles, so 8 parts on 132
    processors. The number of rows has no say in it, so that a row is summed in the same order alone and in a
    batch. Stages are as many as fit: with 128 rows of x one is 40 KB, so 2 on a chip of 99 KB. In float32
    (ieee, no tensor cores) the tile of the weight is smaller, as its registers are wider.
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
