// Attention of many queries on packed sequences (encoders, prompts): softmax(scale q k^T) v, one head of one
// sequence at a time.
//
// SIMD lanes hold queries, a block of kPanel at a time:
//
//   panel = scale q^T                 [D, queries]
//   for each tile of kTileRows keys:  s = K panel                 [keys, queries]: numbers of K, broadcast
//   highest score of each query, lane by lane; then for each key  p = exp(s - highest), sum += p
//   for each tile of queries:         out = p^T V / sum           [queries, channels]: numbers of p,
//   broadcast
//
// Keys and values are read in place, nothing is summed across lanes, and all keys of a query are available,
// so nothing is rescaled. (Rows of sizes that leave lanes empty are copied first.)
// Operations: 4 queries keys D, and one exponential per score: for 16 scores 2 D vector multiply-adds and
// about 12 for the exponential, so exponentials matter for small heads. Bytes: q, k, v and out once, from
// cache; the scores of a block, 4 kPanel bytes per key, stay in the first- or second-level cache.
//
// With a soft cap c, s is first q k^T scale / c, and then c tanh(s).
//
// With `pairs`, if the instruction set multiplies pairs of bfloat16: queries, keys, probabilities and values
// are rounded to bfloat16; a 32-bit word of K has two channels, one of p two keys. The loops are the same,
// with half the steps.
//
//   panel  [D / 2][queries][2]    p  [keys / 2][queries][2]    V  [keys / 2][channels][2]
//
// A query's result depends only on its own sequence: the order of every sum follows the positions of the
// keys.

#include "cpu/attention_block.h"

namespace minilm::MINILM_ISA {
namespace {

// Results of queries that see all their keys at once.
struct Whole {
  float* out;
  std::int64_t stride;
  float factor(int, float, float total) const { return total == 0 ? 0.0f : 1.0f / total; }  // 0: no keys
  float* row(int i) const { return out + i * stride; }
};

template <bool kPairs>
void all_queries(const AttentionParams& p, std::int64_t sequence, std::int64_t head, Block b) {
  const std::int64_t start = p.cu_q[sequence], queries = p.cu_q[sequence + 1] - start;
  const std::int64_t keys = key_count(p, sequence);
  for (std::int64_t query = 0; query < queries; query += kPanel) {
    b.q = p.q + (start + query) * p.q_stride + head * p.head_dim;
    b.count = static_cast<int>(least(kPanel, queries - query));
    const Whole out = {p.out + ((start + query) * p.heads + head) * p.head_dim, p.heads * p.head_dim};
    block_of<kPairs>(p, b, [&](int i) { return seen(p, query + i, queries, keys); }, out);
  }
}

}  // namespace

std::int64_t attention_scratch(const AttentionParams& p, std::int64_t max_keys) {
  const std::int64_t copies = 2 * max_keys * round_up(p.head_dim, kLanes<float>);
  return kPanel * p.head_dim + (max_keys + kTileRows) * kPanel + copies;
}

void attention(const AttentionParams& p, std::int64_t sequence, std::int64_t head, float* scratch) {
  const std::int64_t size = p.head_dim, kv_head = head / (p.heads / p.kv_heads);
  const std::int64_t keys = key_count(p, sequence);
  if (p.cu_q[sequence] == p.cu_q[sequence + 1]) return;
  Block b = {};
  b.q_stride = p.q_stride;
  b.panel = scratch;
  b.scores = b.panel + kPanel * size;
  float* copies = b.scores + (keys + kTileRows) * kPanel;
  const bool pairs = kCanPair && p.pairs;
  b.k = rows_of(p, pairs ? Copy::kChannels : Copy::kFloats, p.k, p.k_scales, sequence, kv_head, 0, keys,
                copies);
  b.v = rows_of(p, pairs ? Copy::kKeys : Copy::kFloats, p.v, p.v_scales, sequence, kv_head, 0, keys,
                copies + keys * round_up(size, kLanes<float>));
  pairs ? all_queries<kCanPair>(p, sequence, head, b) : all_queries<false>(p, sequence, head, b);
}

}  // namespace minilm::MINILM_ISA
