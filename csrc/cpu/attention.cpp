// Attention on packed sequences: softmax(scale q k^T) v, one head of one sequence at a time.
//
// Many queries (encoders, prompts). The head's keys and values are copied once into panels (see linear.h), so
// that both products are the tiles of a linear layer, with keys or head channels in the lanes:
//
//   for each tile of kTileRows queries:   s = scale q K^T     [rows, keys], stays in the first or second
//   cache
//                                         p = exp(s - max s)  zero where a query does not see
//                                         out = p V / sum p
//
// All keys of a row are at hand, so nothing is rescaled. Operations: 4 queries keys D, and an exponential for
// each score; bytes: q, k, v and out once, from cache. With D = 32 a score costs two loads and about 4 vector
// multiply-adds of 16 lanes beside 1 exponential of some 20 instructions: exponentials are half of the work.
//
// One query (decoding, see `decode`). Keys and values are read where they stand, in the pages, by all query
// heads that share them, a stretch of kChunk keys at a time; stretches are tasks of their own, and their
// partial results (maximum, sum, weighted values) are put together by `combine`. Bytes: 2 context D b for
// each key head, and about as many multiply-adds for each query head: memory is the limit from the
// second-level cache on.
//
// A query's result depends on its own sequence alone: the order of every sum is given by the places of the
// keys.

#include "cpu/attention.h"

#include "cpu/linear.h"
#include "cpu/rows.h"

namespace minilm::MINILM_ISA {
namespace {

constexpr float kLowest = -__builtin_inff();

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

inline float max_lanes(F32 x) {
  float m = x[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) m = x[lane] > m ? x[lane] : m;
  return m;
}

// The keys that query number `query` of a sequence sees: [first, last).
struct Seen {
  std::int64_t first, last;
};
inline Seen seen(const AttentionParams& p, std::int64_t query, std::int64_t queries, std::int64_t keys) {
  const std::int64_t place = query + keys - queries;  // the last query stands at the last key
  Seen s = {0, keys};
  if (p.causal) s.last = least(keys, place + 1);
  if (p.window > 0) {
    s.first = most(0, place - p.window + 1);
    s.last = least(s.last, place + p.window);
  }
  return s;
}

// Row `key` of the keys or values of `sequence`, for its key head.
template <typename T>
inline const T* row_of(const AttentionParams& p, const void* base, std::int64_t sequence, std::int64_t key,
                       std::int64_t kv_head) {
  const T* rows = static_cast<const T*>(base);
  if (p.block_table == nullptr) return rows + (p.cu_k[sequence] + key) * p.kv_stride + kv_head * p.head_dim;
  const std::int64_t page = p.block_table[sequence * p.table_width + key / p.page_size];
  return rows + ((page * p.page_size + key % p.page_size) * p.kv_heads + kv_head) * p.head_dim;
}

// Keys to panels of kPanel keys, [panel][D][kPanel]; values to panels of kPanel channels,
// [panel][keys][kPanel]. Zeros fill them up.
template <typename T>
void to_panels(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t keys,
               float* key_panels, float* value_panels) {
  const std::int64_t size = p.head_dim;
  const std::int64_t value_panel = keys * kPanel;
  for (std::int64_t key = 0; key < round_up(keys, kPanel); ++key) {
    float* to = key_panels + key / kPanel * size * kPanel + key % kPanel;
    if (key >= keys) {
      for (std::int64_t d = 0; d < size; ++d) to[d * kPanel] = 0;
      continue;
    }
    float row[kPanel] = {};
    const T* k = row_of<T>(p, p.k, sequence, key, kv_head);
    const T* v = row_of<T>(p, p.v, sequence, key, kv_head);
    for (std::int64_t d = 0; d < size; d += kLanes<float>) {
      const int n = static_cast<int>(least(size - d, kLanes<float>));
      store(row, read(k + d, n));
      for (int i = 0; i < n; ++i) to[(d + i) * kPanel] = row[i];
      store(value_panels + d / kPanel * value_panel + key * kPanel + d % kPanel, read(v + d, n));
    }
    if (size % kPanel != 0 && size % kPanel <= kLanes<float>) {
      store(value_panels + size / kPanel * value_panel + key * kPanel + kLanes<float>, F32{});
    }
  }
}

// scores[r][key] = scale q_r k for the panels that hold the keys [first, last).
void score_tile(const AttentionParams& p, const float* q, int rows, const float* key_panels,
                std::int64_t first, std::int64_t last, float* scores, std::int64_t width) {
  for (std::int64_t panel = first / kPanel; panel * kPanel < last; ++panel) {
    Tile tile;
    float_tile(Format::kFloat32, rows, q, p.q_stride, p.head_dim, key_panels + panel * p.head_dim * kPanel, 0,
               tile);
    for (int r = 0; r < rows; ++r) {
      float* to = scores + r * width + panel * kPanel;
      store(to, tile.sums[r][0] * p.scale);
      store(to + kLanes<float>, tile.sums[r][1] * p.scale);
    }
  }
}

// One row of scores to exp(score - maximum), zero outside of `s`; returns their sum. [from, to): whole
// panels.
float softmax_row(float* scores, Seen s, std::int64_t from, std::int64_t to) {
  for (std::int64_t key = from; key < s.first; ++key) scores[key] = kLowest;
  for (std::int64_t key = s.last; key < to; ++key) scores[key] = kLowest;
  F32 high = F32{} + kLowest;
  for (std::int64_t key = from; key < to; key += kLanes<float>) high = max(load(scores + key), high);
  const float top = max_lanes(high);
  F32 total[2] = {};
  for (std::int64_t key = from; key < to; key += kPanel) {
    const F32 a = exp(load(scores + key) - top), b = exp(load(scores + key + kLanes<float>) - top);
    store(scores + key, a);
    store(scores + key + kLanes<float>, b);
    total[0] += a;
    total[1] += b;
  }
  return sum_lanes<float>(total[0] + total[1]);
}

// `queries` rows of partial results of one stretch of keys: maximum and sum, then the weighted values.
struct Partial {
  float top, total;
};

// G query heads over the keys [first, last) of their key head. scores: [G][kChunk].
template <typename T, int G>
void stretch(const AttentionParams& p, std::int64_t sequence, const float* q, std::int64_t kv_head,
             std::int64_t first, std::int64_t last, float* scores, Partial* partial, float* out,
             std::int64_t out_stride) {
  const std::int64_t size = p.head_dim;
  constexpr int L = kLanes<float>;
  for (std::int64_t key = first; key < last; key += 4) {
    const int count = static_cast<int>(least(4, last - key));
    const T* rows[4];
    for (int j = 0; j < 4; ++j) rows[j] = row_of<T>(p, p.k, sequence, key + (j < count ? j : 0), kv_head);
    F32 sums[4][G] = {};
    for (std::int64_t d = 0; d < size; d += L) {
      const int n = static_cast<int>(least(size - d, L));
      F32 x[4];
      for (int j = 0; j < 4; ++j) x[j] = read(rows[j] + d, n);
      for (int g = 0; g < G; ++g) {
        const F32 y = read(q + g * size + d, n);
        for (int j = 0; j < 4; ++j) sums[j][g] += x[j] * y;
      }
    }
    for (int j = 0; j < count; ++j) {
      for (int g = 0; g < G; ++g)
        scores[g * kChunk + key - first + j] = sum_lanes<float>(sums[j][g]) * p.scale;
    }
  }
  const std::int64_t keys = last - first;
  for (int g = 0; g < G; ++g) {
    float* s = scores + g * kChunk;
    float top = kLowest;
    for (std::int64_t key = 0; key < keys; ++key) top = s[key] > top ? s[key] : top;
    F32 total = {};
    for (std::int64_t key = 0; key < keys; key += L) {
      const int n = static_cast<int>(least(keys - key, L));
      const F32 e = keep<float>(exp(read(s + key, n) - top), n);
      write(s + key, e, n);
      total += e;
    }
    partial[g] = {top, sum_lanes<float>(total)};
  }
  constexpr int kWide = G <= 2 ? 4 : 2;  // vectors of channels at a time
  for (std::int64_t d = 0; d < size; d += kWide * L) {
    F32 sums[G][kWide] = {};
    for (std::int64_t key = 0; key < keys; ++key) {
      const T* v = row_of<T>(p, p.v, sequence, first + key, kv_head) + d;
      for (int w = 0; w < kWide; ++w) {
        const std::int64_t left = size - d - w * L;
        if (left <= 0) break;
        const F32 x = read(v + w * L, static_cast<int>(least(left, L)));
        for (int g = 0; g < G; ++g) sums[g][w] += scores[g * kChunk + key] * x;
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int w = 0; w < kWide; ++w) {
        const std::int64_t left = size - d - w * L;
        if (left > 0) write(out + g * out_stride + d + w * L, sums[g][w], static_cast<int>(least(left, L)));
      }
    }
  }
}

template <typename T>
void stretch_of(int group, const AttentionParams& p, std::int64_t sequence, const float* q,
                std::int64_t kv_head, std::int64_t first, std::int64_t last, float* scores, Partial* partial,
                float* out, std::int64_t stride) {
  switch (group) {
    case 1:
      return stretch<T, 1>(p, sequence, q, kv_head, first, last, scores, partial, out, stride);
    case 2:
      return stretch<T, 2>(p, sequence, q, kv_head, first, last, scores, partial, out, stride);
    case 3:
      return stretch<T, 3>(p, sequence, q, kv_head, first, last, scores, partial, out, stride);
    default:
      return stretch<T, 4>(p, sequence, q, kv_head, first, last, scores, partial, out, stride);
  }
}

inline std::int64_t key_count(const AttentionParams& p, std::int64_t sequence) {
  return p.block_table != nullptr ? p.context[sequence] : p.cu_k[sequence + 1] - p.cu_k[sequence];
}

// Partial results of a stretch, for one head: top, total, D values.
inline std::int64_t partial_size(const AttentionParams& p) { return 2 + p.head_dim; }

}  // namespace

std::int64_t attention_scratch(const AttentionParams& p, std::int64_t max_keys) {
  const std::int64_t keys = round_up(max_keys, kPanel);
  return keys * p.head_dim + keys * round_up(p.head_dim, kPanel) + kTileRows * keys;
}

void attention(const AttentionParams& p, std::int64_t sequence, std::int64_t head, float* scratch) {
  const std::int64_t start = p.cu_q[sequence], queries = p.cu_q[sequence + 1] - start;
  const std::int64_t keys = key_count(p, sequence);
  const std::int64_t size = p.head_dim, kv_head = head / (p.heads / p.kv_heads);
  if (queries == 0) return;
  const std::int64_t width = round_up(keys, kPanel);
  float* key_panels = scratch;
  float* value_panels = key_panels + width * size;
  float* scores = value_panels + keys * round_up(size, kPanel);
  if (p.block_table == nullptr || p.cache_dtype == DType::kFloat32) {
    to_panels<float>(p, sequence, kv_head, keys, key_panels, value_panels);
  } else if (p.cache_dtype == DType::kBFloat16) {
    to_panels<BFloat16>(p, sequence, kv_head, keys, key_panels, value_panels);
  } else {
    to_panels<Float16>(p, sequence, kv_head, keys, key_panels, value_panels);
  }

  for (std::int64_t query = 0; query < queries; query += kTileRows) {
    const int rows = static_cast<int>(least(kTileRows, queries - query));
    // Together the rows see the keys [first, last): both ends grow with the row.
    const std::int64_t first = seen(p, query, queries, keys).first;
    const std::int64_t last = seen(p, query + rows - 1, queries, keys).last;
    const std::int64_t from = first / kPanel * kPanel, to = round_up(last, kPanel);
    const float* q = p.q + (start + query) * p.q_stride + head * size;
    score_tile(p, q, rows, key_panels, from, to, scores, width);
    float inverse[kTileRows];
    for (int r = 0; r < rows; ++r) {
      inverse[r] = 1.0f / softmax_row(scores + r * width, seen(p, query + r, queries, keys), from, to);
    }
    for (std::int64_t d = 0; d < size; d += kPanel) {
      Tile tile;
      const float* panel = value_panels + d * keys + from * kPanel;
      float_tile(Format::kFloat32, rows, scores + from, width, last - from, panel, 0, tile);
      for (int r = 0; r < rows; ++r) {
        float* out = p.out + ((start + query + r) * p.heads + head) * size + d;
        for (int half = 0; half < 2; ++half) {
          const std::int64_t left = size - d - half * kLanes<float>;
          if (left > 0) {
            write(out + half * kLanes<float>, tile.sums[r][half] * inverse[r],
                  static_cast<int>(least(left, kLanes<float>)));
          }
        }
      }
    }
  }
}

std::int64_t decode_partials(const AttentionParams& p, std::int64_t max_keys) {
  return p.heads * stretches(max_keys) * partial_size(p);
}

void decode(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t number,
            float* partials) {
  const std::int64_t keys = p.context[sequence], group = p.heads / p.kv_heads, size = partial_size(p);
  const Seen all = seen(p, 0, 1, keys);
  const std::int64_t first = most(number * kChunk, all.first), last = least((number + 1) * kChunk, all.last);
  const float* q = p.q + p.cu_q[sequence] * p.q_stride + kv_head * group * p.head_dim;
  const std::int64_t count = stretches(keys);
  float scores[4 * kChunk];
  for (std::int64_t g = 0; g < group; g += 4) {
    const int heads = static_cast<int>(least(4, group - g));
    float* to = partials + ((kv_head * group + g) * count + number) * size;
    Partial partial[4] = {{kLowest, 0}, {kLowest, 0}, {kLowest, 0}, {kLowest, 0}};
    if (first < last) {
      float* values = to + 2;
      if (p.cache_dtype == DType::kFloat32) {
        stretch_of<float>(heads, p, sequence, q + g * p.head_dim, kv_head, first, last, scores, partial,
                          values, count * size);
      } else if (p.cache_dtype == DType::kBFloat16) {
        stretch_of<BFloat16>(heads, p, sequence, q + g * p.head_dim, kv_head, first, last, scores, partial,
                             values, count * size);
      } else {
        stretch_of<Float16>(heads, p, sequence, q + g * p.head_dim, kv_head, first, last, scores, partial,
                            values, count * size);
      }
    }
    for (int i = 0; i < heads; ++i) {
      to[i * count * size] = partial[i].top;
      to[i * count * size + 1] = partial[i].total;
    }
  }
}

void combine(const AttentionParams& p, std::int64_t sequence, std::int64_t head, const float* partials) {
  const std::int64_t size = partial_size(p), count = stretches(p.context[sequence]);
  const float* from = partials + head * count * size;
  float* out = p.out + (p.cu_q[sequence] * p.heads + head) * p.head_dim;
  float top = kLowest;
  for (std::int64_t i = 0; i < count; ++i) top = from[i * size] > top ? from[i * size] : top;
  float total = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (from[i * size + 1] != 0) total += from[i * size + 1] * exp(F32{} + (from[i * size] - top))[0];
  }
  for (std::int64_t d = 0; d < p.head_dim; d += kLanes<float>) {
    const int n = static_cast<int>(least(p.head_dim - d, kLanes<float>));
    F32 sum = {};
    for (std::int64_t i = 0; i < count; ++i) {
      if (from[i * size + 1] != 0)
        sum += exp(F32{} + (from[i * size] - top)) * read(from + i * size + 2 + d, n);
    }
    write(out + d, sum * (1.0f / total), n);
  }
}

}  // namespace minilm::MINILM_ISA
