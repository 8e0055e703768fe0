// Attention of some new tokens of a sequence over its pages (prompts in chunks, turns of a conversation,
// speculation): softmax(scale q k^T) v with a bound on memory, whatever the context.
//
// A row is a query of one head. The rows of all heads that share a key head are taken together, token after
// token, in blocks of kPanel; keys and values are read a chunk of kPagedKeys at a time, copied to float32
// once for all rows of a task, and used as in attention.cpp:
//
//   per chunk   m = max(s), l = sum exp(s - m), o = sum exp(s - m) v           with s = scale q k
//   per row     the chunks' results merged, one after the other: M = max(M, m),
//               L = exp(M' - M) L + exp(m - M) l, O likewise; out = O / L
//
// Few rows: every chunk is a task and leaves its results, which `paged_merge` merges. Many rows: a block of
// rows is a task, which merges chunk by chunk. Both compute the same numbers, and a row's result depends only
// on its own sequence, since chunks begin at multiples of kPagedKeys.
//
// Bytes: 2 context D b per key head and task. Operations: 4 D per row and key, with kLanes rows at a time.

#include "cpu/attention_block.h"

namespace minilm::MINILM_ISA {
namespace {

// Results of a row on some keys: [D], padded, then the highest score (in base 2) and the sum of exponentials.
// Those of chunks without a key of the row have a sum of 0, and are not read otherwise.
inline std::int64_t statistics_at(const AttentionParams& p) { return round_up(p.head_dim, 16); }

inline float exp2_of(float x) { return exp2_of_negative(F32{} + x)[0]; }

// Adds the results of later keys to `sum`.
void merge(const AttentionParams& p, float* sum, const float* part) {
  const float* other = part + statistics_at(p);
  float* own = sum + statistics_at(p);
  if (other[1] == 0) return;
  if (own[1] == 0) {
    __builtin_memcpy(sum, part, paged_partial(p) * sizeof(float));
    return;
  }
  const float top = other[0] > own[0] ? other[0] : own[0];
  const float keep = exp2_of(own[0] - top), add = exp2_of(other[0] - top);
  for (std::int64_t d = 0; d < p.head_dim; ++d) sum[d] = sum[d] * keep + part[d] * add;
  own[0] = top;
  own[1] = own[1] * keep + other[1] * add;
}

void write_out(const AttentionParams& p, const float* sum, std::int64_t row, std::int64_t head) {
  const float total = sum[statistics_at(p) + 1], factor = 1.0f / total;
  float* out = p.out + (row * p.heads + head) * p.head_dim;
  for (std::int64_t d = 0; d < p.head_dim; ++d) out[d] = total == 0 ? 0.0f : sum[d] * factor;
}

// The rows of a sequence that share a key head: number r is head r % group of token r / group.
struct Sequence {
  std::int64_t start, queries, keys, group, kv_head;
  std::int64_t rows() const { return queries * group; }
  std::int64_t token(std::int64_t row) const { return row / group; }
  std::int64_t head(std::int64_t row) const { return kv_head * group + row % group; }
};
Sequence sequence_of(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head) {
  const std::int64_t start = p.cu_q[sequence];
  return {start, p.cu_q[sequence + 1] - start, key_count(p, sequence), p.heads / p.kv_heads, kv_head};
}

struct Memory {
  float* panel;    // [D][kPanel]
  float* scores;   // [kPagedKeys][kPanel]
  float* queries;  // [kPanel][D]
  float* keys;     // [kPagedKeys][D], padded
  float* values;
  float* sums;   // [kPanel] results, of many rows
  float* parts;  // [kPanel] results
};
Memory memory_of(const AttentionParams& p, float* at) {
  Memory m = {};
  const std::int64_t copy = kPagedKeys * round_up(p.head_dim, kLanes<float>), size = paged_partial(p);
  m.panel = at;
  m.scores = m.panel + kPanel * p.head_dim;
  m.queries = m.scores + (kPagedKeys + kTileRows) * kPanel;
  m.keys = m.queries + kPanel * p.head_dim;
  m.values = m.keys + copy;
  m.sums = m.values + copy;
  m.parts = m.sums + kPanel * size;
  return m;
}

// The keys [begin, end) of a chunk that a row sees; none: end <= begin.
Seen seen_of_chunk(const AttentionParams& p, const Sequence& s, std::int64_t row, std::int64_t chunk) {
  const Seen all = seen(p, s.token(row), s.queries, s.keys);
  const std::int64_t begin = chunk * kPagedKeys, end = least(begin + kPagedKeys, s.keys);
  return {most(all.first, begin), least(all.last, end)};
}

Block chunk_of(const AttentionParams& p, std::int64_t sequence, const Sequence& s, std::int64_t chunk,
               const Memory& m) {
  const bool pairs = kCanPair && p.pairs;
  Block b = {};
  b.begin = chunk * kPagedKeys;
  const std::int64_t end = least(b.begin + kPagedKeys, s.keys);
  b.k = rows_of(p, pairs ? Copy::kChannels : Copy::kFloats, p.k, p.k_scales, sequence, s.kv_head, b.begin,
                end, m.keys);
  b.v = rows_of(p, pairs ? Copy::kKeys : Copy::kFloats, p.v, p.v_scales, sequence, s.kv_head, b.begin, end,
                m.values);
  b.panel = m.panel;
  b.scores = m.scores;
  return b;
}

// The rows [first, last) of a block on a chunk whose keys are copied. to(row): where its results go.
template <typename To>
void rows_on_chunk(const AttentionParams& p, const Sequence& s, std::int64_t first, std::int64_t last,
                   std::int64_t chunk, Block b, const Memory& m, To to) {
  const auto sees_any = [&](std::int64_t row) {
    const Seen keys = seen_of_chunk(p, s, row, chunk);
    return keys.first < keys.last;
  };
  for (std::int64_t row = first; row < last; ++row) {  // until a block has seen them
    to(row)[statistics_at(p)] = kLowest;
    to(row)[statistics_at(p) + 1] = 0;
  }
  // Rows that see a key of the chunk stand next to each other.
  while (first < last && !sees_any(first)) ++first;
  while (first < last && !sees_any(last - 1)) --last;
  if (first == last) return;
  for (std::int64_t row = first; row < last; ++row) {
    const float* q = p.q + (s.start + s.token(row)) * p.q_stride + s.head(row) * p.head_dim;
    __builtin_memcpy(m.queries + (row - first) * p.head_dim, q, p.head_dim * sizeof(float));
  }
  b.q = m.queries;
  b.q_stride = p.head_dim;
  b.count = static_cast<int>(last - first);
  const auto sees = [&](int i) { return seen_of_chunk(p, s, first + i, chunk); };
  struct Out {
    To to;
    std::int64_t first, statistics;
    float factor(int i, float top, float total) const {
      float* at = row(i) + statistics;
      at[0] = top;
      at[1] = total;
      return 1.0f;
    }
    float* row(int i) const { return to(first + i); }
  };
  const Out out = {to, first, statistics_at(p)};
  kCanPair&& p.pairs ? block_of<kCanPair>(p, b, sees, out) : block_of<false>(p, b, sees, out);
}

}  // namespace

std::int64_t paged_partial(const AttentionParams& p) { return statistics_at(p) + 16; }

std::int64_t paged_chunks(std::int64_t keys) { return (keys + kPagedKeys - 1) / kPagedKeys; }

std::int64_t paged_blocks(const AttentionParams& p, std::int64_t queries) {
  return (queries * (p.heads / p.kv_heads) + kPanel - 1) / kPanel;
}

std::int64_t paged_scratch(const AttentionParams& p) {
  const std::int64_t copy = kPagedKeys * round_up(p.head_dim, kLanes<float>);
  return kPanel * 2 * (p.head_dim + paged_partial(p)) + (kPagedKeys + kTileRows) * kPanel + 2 * copy;
}

void paged_chunk(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t chunk,
                 std::int64_t chunks, float* partials, float* scratch) {
  const Sequence s = sequence_of(p, sequence, kv_head);
  if (s.queries == 0 || chunk >= paged_chunks(s.keys)) return;
  const Memory m = memory_of(p, scratch);
  const std::int64_t size = paged_partial(p);
  const Block b = chunk_of(p, sequence, s, chunk, m);
  for (std::int64_t first = 0; first < s.rows(); first += kPanel) {
    rows_on_chunk(p, s, first, least(first + kPanel, s.rows()), chunk, b, m, [&](std::int64_t row) {
      return partials + (((s.start + s.token(row)) * p.heads + s.head(row)) * chunks + chunk) * size;
    });
  }
}

void paged_merge(const AttentionParams& p, std::int64_t sequence, std::int64_t query, std::int64_t head,
                 std::int64_t chunks, float* partials) {
  const std::int64_t row = p.cu_q[sequence] + query, size = paged_partial(p);
  float* sum = partials + (row * p.heads + head) * chunks * size;
  for (std::int64_t chunk = 1; chunk < paged_chunks(p.context[sequence]); ++chunk) {
    merge(p, sum, sum + chunk * size);
  }
  write_out(p, sum, row, head);
}

void paged_block(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t block,
                 float* scratch) {
  const Sequence s = sequence_of(p, sequence, kv_head);
  const std::int64_t first = block * kPanel, last = least(first + kPanel, s.rows()), size = paged_partial(p);
  if (first >= last) return;
  const Memory m = memory_of(p, scratch);
  for (std::int64_t row = first; row < last; ++row) {
    m.sums[(row - first) * size + statistics_at(p) + 1] = 0;
  }
  for (std::int64_t chunk = 0; chunk < paged_chunks(s.keys); ++chunk) {
    const Seen early = seen_of_chunk(p, s, first, chunk), late = seen_of_chunk(p, s, last - 1, chunk);
    if (early.first >= early.last && late.first >= late.last) continue;
    const Block b = chunk_of(p, sequence, s, chunk, m);
    rows_on_chunk(p, s, first, last, chunk, b, m,
                  [&](std::int64_t row) { return m.parts + (row - first) * size; });
    for (std::int64_t row = first; row < last; ++row) {
      merge(p, m.sums + (row - first) * size, m.parts + (row - first) * size);
    }
  }
  for (std::int64_t row = first; row < last; ++row) {
    write_out(p, m.sums + (row - first) * size, s.start + s.token(row), s.head(row));
  }
}

}  // namespace minilm::MINILM_ISA
