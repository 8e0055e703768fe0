// The index arithmetic of the CUDA kernels, as functions that also run on the CPU, where
// tests/csrc/test_cuda_tiling.py tests them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MINILM_HD __host__ __device__ __forceinline__
#else
#define MINILM_HD inline
#endif

namespace minilm::cuda {

MINILM_HD constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
MINILM_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }
MINILM_HD constexpr int larger(int a, int b) { return a > b ? a : b; }

MINILM_HD constexpr int power_of_two_from(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// ---- rope and append: a row is one head of one token, q's heads first, then k's, then v's ----------------

enum class Role : int { kQuery, kKey, kValue };

struct RopeRow {
  std::int64_t token;
  Role role;
  int head;
};

// Row `row` of tokens * (q_heads + 2 kv_heads); q_heads is 0 where there are no queries.
MINILM_HD RopeRow rope_row(std::int64_t row, int q_heads, int kv_heads) {
  const int heads = q_heads + 2 * kv_heads;
  const int head = static_cast<int>(row % heads);
  if (head < q_heads) return {row / heads, Role::kQuery, head};
  if (head < q_heads + kv_heads) return {row / heads, Role::kKey, head - q_heads};
  return {row / heads, Role::kValue, head - q_heads - kv_heads};
}

// ---- decode attention: the context is cut into splits, a split into chunks of 16 tokens -------------------

constexpr int kChunk = 16;       // tokens of one tensor-core product; chunks begin at multiples of it
constexpr int kDecodeWarps = 4;  // of a block; they take the chunks of a split in turn
constexpr int kMostSplits = 128;

struct Range {
  int begin, end;
};

// The tokens that the newest of `context` tokens sees; window 0: all.
MINILM_HD Range visible(int context, int window) {
  return {window > 0 && context > window ? context - window : 0, context};
}

// The tokens of `all` that fall to `split` of `splits`: whole chunks, evenly, the last splits maybe none.
MINILM_HD Range split_range(Range all, int split, int splits) {
  const int first = all.begin / kChunk, last = static_cast<int>(ceil_div(all.end, kChunk));
  const int share = static_cast<int>(ceil_div(last - first, splits));
  const int begin = larger(all.begin, smaller(first + split * share, last) * kChunk);
  const int end = smaller(all.end, smaller(first + (split + 1) * share, last) * kChunk);
  return {begin, larger(begin, end)};
}

// Row of the pages, seen as [pages * page size], that holds token t of the sequence whose row of the block
// table is `table`.
MINILM_HD std::int64_t cache_row(const std::int32_t* table, int t, int page_size) {
  const unsigned page = static_cast<unsigned>(t) / static_cast<unsigned>(page_size);
  return static_cast<std::int64_t>(table[page]) * page_size + (t - static_cast<int>(page) * page_size);
}

// How many splits: one where the sequences fill the machine (8 tiles for 10 multiprocessors), or where the
// context is no more than 4 rounds of a block (64 tokens each); otherwise the fewest whose last wave of
// blocks is nearly as full as any choice's. 132 multiprocessors, 3 tiles, 8,192 tokens (128 rounds): 44
// splits make exactly one wave; 38 make 0.86 of one, which is within 85 %, and are taken.
MINILM_HD int decode_splits(std::int64_t tiles, int context, int multiprocessors) {
  const int rounds = static_cast<int>(ceil_div(context, kChunk * kDecodeWarps));
  if (tiles * 10 >= multiprocessors * 8 || rounds <= 4) return 1;
  const int most = smaller(smaller(kMostSplits, rounds), multiprocessors);
  double best = 0;
  for (int pass = 0; pass < 2; ++pass) {  // the best efficiency, then the first that is near it
    for (int splits = 1; splits <= most; ++splits) {
      const double waves = static_cast<double>(tiles * splits) / multiprocessors;
      const double efficiency = waves / static_cast<double>(ceil_div(tiles * splits, multiprocessors));
      if (pass == 0 && efficiency > best) best = efficiency;
      if (pass == 1 && efficiency >= 0.85 * best) return splits;
    }
  }
  return 1;
}

// ---- fragments of mma.m16n8k16: lane = 4 g + t holds rows or columns g and g + 8 and four of 16 inner
// places. The inner places of a product may be permuted as long as both factors agree, and so may its
// columns. Here they are such that a lane's elements lie side by side in memory.

// A head of `Total` units cut into segments of `Most` units and, of what remains, of powers of two: each is
// what a lane reads at once. 10 units of D = 80 in 16 bits: 8 and 2.
template <int Total, int Most>
struct Segments {
  static constexpr int kFull = Total / Most;
  static constexpr int kRest = Total % Most;
  MINILM_HD static constexpr int bits(int n) { return n == 0 ? 0 : (n & 1) + bits(n >> 1); }
  static constexpr int kCount = kFull + bits(kRest);
  MINILM_HD static constexpr int rest_first(int i, int rest, int first) {
    const int part = power_of_two_from(rest + 1) / 2;
    return i == 0 ? first : rest_first(i - 1, rest - part, first + part);
  }
  MINILM_HD static constexpr int rest_units(int i, int rest) {
    const int part = power_of_two_from(rest + 1) / 2;
    return i == 0 ? part : rest_units(i - 1, rest - part);
  }
  MINILM_HD static constexpr int units(int i) { return i < kFull ? Most : rest_units(i - kFull, kRest); }
  MINILM_HD static constexpr int first(int i) {
    return i < kFull ? i * Most : rest_first(i - kFull, kRest, kFull * Most);
  }
};

// Q K^T: the four elements of a head that lane 4 g + t holds of step `first + step` (16 elements each) in a
// segment of `steps` steps: this one and the next three.
MINILM_HD constexpr int key_element(int first, int steps, int step, int t) {
  return 16 * first + 4 * steps * t + 4 * step;
}

// P V: the element of a head that stands in column `column` (0..7) of tile `first + tile` (8 elements each)
// in a segment of `tiles` tiles.
MINILM_HD constexpr int value_element(int first, int tiles, int tile, int column) {
  return 8 * first + tiles * column + tile;
}

// P V: the token of a chunk that lane 4 g + t holds as its i-th of four.
MINILM_HD constexpr int value_token(int i, int t) { return 2 * t + (i & 1) + 8 * (i >> 1); }

// ---- linear: a block makes 16 outputs, its warps share the inputs in chunks of 128 ------------------------

constexpr int kGroup = 32;         // inputs that share a scale; lane 4 g + t holds 8 t .. 8 t + 7 of each
constexpr int kLinearChunk = 128;  // inputs of one step of a warp: 4 groups
constexpr int kPanel = 8;          // rows of a packed weight that lie together
constexpr int kLinearWarps = 8;
constexpr int kMostRows = 8;          // rows of x
constexpr int kTileElements = 16384;  // of x that a block holds at once

MINILM_HD constexpr int linear_tiles(int out, bool gated) {
  return static_cast<int>(gated ? ceil_div(out / 2, kPanel) : ceil_div(out, 2 * kPanel));
}

// The row of the weight that is row r (0..15) of tile `tile`: gated, 8 rows of gate above the 8 of up that go
// with them.
MINILM_HD constexpr int linear_row(int tile, int r, int out, bool gated) {
  if (!gated) return 2 * kPanel * tile + r;
  return kPanel * tile + (r < kPanel ? r : out / 2 + r - kPanel);
}

// Inputs that a block holds of each row of x at once, and the distance of its rows: 64 bytes modulo 128, so
// that the eight lanes that share a read of shared memory touch different banks.
MINILM_HD constexpr int tile_columns(int rows) {
  return (kTileElements / rows - kGroup) / kLinearChunk * kLinearChunk;
}
MINILM_HD constexpr int tile_stride(int columns) { return columns + kGroup; }

MINILM_HD constexpr int chunks_of(int in) { return static_cast<int>(ceil_div(in, kLinearChunk)); }
MINILM_HD constexpr int panels_of(int out) { return static_cast<int>(ceil_div(out, kPanel)); }

// A packed weight: 16-byte words [panel][read][lane], where a warp reads 32 words at once. A word holds the
// lane's 8 elements of two groups (int8) or four groups (4 bits) of its row.
MINILM_HD constexpr int reads_of(int in, int bits) { return chunks_of(in) * (bits == 8 ? 2 : 1); }
MINILM_HD constexpr std::int64_t packed_words(int out, int in, int bits) {  // of 4 bytes
  return static_cast<std::int64_t>(panels_of(out)) * reads_of(in, bits) * 32 * 4;
}
MINILM_HD constexpr std::int64_t packed_scales(int out, int in) {
  return static_cast<std::int64_t>(panels_of(out)) * chunks_of(in) * kPanel * 4;
}

// The place of a code, in codes: four codes in a 4-byte word of int8, eight in one of 4 bits.
MINILM_HD constexpr std::int64_t packed_place(int row, int column, int in, int bits) {
  const int group = column / kGroup, element = column % 8;
  const int lane = row % kPanel * 4 + column % kGroup / 8;
  const int groups = bits == 8 ? 2 : 4;
  const std::int64_t word =
      (static_cast<std::int64_t>(row / kPanel) * reads_of(in, bits) + group / groups) * 32 + lane;
  // A pair of 4-bit codes stands 16 bits apart: one mask makes both the low bits of two 16-bit numbers.
  const int place = bits == 8 ? element : element / 2 + element % 2 * 4;
  return word * (8 * groups) + group % groups * 8 + place;
}

struct Code {
  int row, column;
};

// The inverse: which code stands at `place`; it may lie beyond the matrix, which is padded to whole panels
// and chunks.
MINILM_HD constexpr Code packed_code(std::int64_t place, int in, int bits) {
  const int groups = bits == 8 ? 2 : 4;
  const int at = static_cast<int>(place % 8), sub = static_cast<int>(place / 8 % groups);
  const std::int64_t word = place / (8 * groups);
  const int lane = static_cast<int>(word % 32);
  const int reads = reads_of(in, bits);
  const int read = static_cast<int>(word / 32 % reads), panel = static_cast<int>(word / 32 / reads);
  const int element = bits == 8 ? at : at % 4 * 2 + at / 4;
  return {panel * kPanel + lane / 4, (read * groups + sub) * kGroup + lane % 4 * 8 + element};
}

// The place of the scale of a group: [panel][chunk][row of the panel][group of the chunk].
MINILM_HD constexpr std::int64_t packed_scale(int row, int group, int in) {
  return ((static_cast<std::int64_t>(row / kPanel) * chunks_of(in) + group / 4) * kPanel + row % kPanel) * 4 +
         group % 4;
}

MINILM_HD constexpr Code packed_scale_code(std::int64_t place, int in) {  // column: the group
  const int chunks = chunks_of(in);
  const int chunk = static_cast<int>(place / (4 * kPanel) % chunks);
  const int panel = static_cast<int>(place / (4 * kPanel) / chunks);
  return {panel * kPanel + static_cast<int>(place / 4 % kPanel), chunk * 4 + static_cast<int>(place % 4)};
}

}  // namespace minilm::cuda
