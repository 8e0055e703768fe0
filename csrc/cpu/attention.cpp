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
// each score; bytes: q, k, v and out once, from cache. For 16 scores that is 2 D vector multiply-adds of 16
// lanes and one vector exponential, so that small heads feel the exponentials most.
//
// One query (decoding, see `decode`). Keys and values are read where they stand, in the pages, all heads of a
// token together, a stretch of keys at a time; stretches are tasks of their own, and their partial
// results (maximum, sum, weighted values) are put together by `combine`. Bytes: 2 context D b for each key
// head, and 2 context D multiply-adds for each query head: with few query heads a key head, memory is the
// limit.
//
// A query's result depends on its own sequence alone: the order of every sum is given by the places of the
// keys.

#include "cpu/attention.h"

#include "cpu/linear.h"
#include "cpu/rows.h"

namespace minilm::MINILM_ISA {
namespace {

constexpr float kLowest = -__builtin_inff();

template <int N>
struct Number {
  static constexpr int value = N;
};

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// How many lanes of a vector `n` elements fill: 1..kLanes.
inline int lanes_left(std::int64_t n) {
  return n < 1 ? 1 : n > kLanes<float> ? kLanes<float> : static_cast<int>(n);
}

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

// Partial results of a stretch, for one head: its weighted values, then the highest score and the sum of the
// weights. On borders of 64 bytes: a vector that lies across two lines is slow to read back.
inline std::int64_t statistics_at(const AttentionParams& p) { return round_up(p.head_dim, 16); }
inline std::int64_t partial_size(const AttentionParams& p) { return statistics_at(p) + 16; }

using Four = VectorOf<float, 4>::type;

// The sums of all lanes of four vectors, each in the order of sum_lanes.
template <int N = kLanes<float>>
inline Four sums_of_lanes(const typename VectorOf<float, N>::type (&x)[4]) {
  if constexpr (N > 4) {
    using Half = typename VectorOf<float, N / 2>::type;
    struct Halves {
      Half low, high;
    };
    Half sums[4];
    for (int i = 0; i < 4; ++i) {
      const Halves halves = bit_cast<Halves>(x[i]);
      sums[i] = halves.low + halves.high;
    }
    return sums_of_lanes<N / 2>(sums);
  } else {
    const Four a =
        __builtin_shufflevector(x[0], x[1], 0, 1, 4, 5) + __builtin_shufflevector(x[0], x[1], 2, 3, 6, 7);
    const Four b =
        __builtin_shufflevector(x[2], x[3], 0, 1, 4, 5) + __builtin_shufflevector(x[2], x[3], 2, 3, 6, 7);
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  }
}

// sums[g][j] += q_g k_j, lane by lane, in the `n` channels from `d` on.
template <typename T, int G, int N>
inline __attribute__((always_inline)) void add_products(F32 (&sums)[G][N], const float* q,
                                                        std::int64_t head_dim, const T* k,
                                                        std::int64_t distance, std::int64_t d, int n) {
  F32 x[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) x[j] = read(k + j * distance + d, n);
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    const F32 y = read(q + g * head_dim + d, n);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[g][j] += x[j] * y;
  }
}

// scores[g][j] = scale q_g k_j for G query heads and N keys, whose rows lie `distance` apart.
template <typename T, int G, int N>
void dots(const AttentionParams& p, const float* q, const T* k, std::int64_t distance, float* scores) {
  constexpr int L = kLanes<float>;
  F32 sums[G][N] = {};
  std::int64_t d = 0;
  for (; d + L <= p.head_dim; d += L) add_products<T, G, N>(sums, q, p.head_dim, k, distance, d, L);
  if (d < p.head_dim) {
    add_products<T, G, N>(sums, q, p.head_dim, k, distance, d, static_cast<int>(p.head_dim - d));
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    if constexpr (N == 4) {
      const Four four = sums_of_lanes(sums[g]) * p.scale;
      __builtin_memcpy(scores + g * kChunk, &four, sizeof(four));
    } else {
      for (int j = 0; j < N; ++j) scores[g * kChunk + j] = sum_lanes<float>(sums[g][j]) * p.scale;
    }
  }
}

// out_g += sum_j weights[g][j] v_j, key after key, for W vectors of channels; the last may be filled by
// `left` elements only.
template <typename T, int G, int N, int W>
void weigh(const float* weights, const T* v, std::int64_t distance, float* out, std::int64_t out_stride,
           int left) {
  constexpr int L = kLanes<float>;
  F32 sums[G][W];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[g][w] = read(out + g * out_stride + w * L, W == 1 ? left : L);
  }
#pragma GCC unroll 1
  for (int j = 0; j < N; ++j, v += distance) {  // unrolled, its many pointers would not leave registers
    F32 x[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) x[w] = read(v + w * L, W == 1 ? left : L);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const float weight = weights[g * kChunk + j];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[g][w] += weight * x[w];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) write(out + g * out_stride + w * L, sums[g][w], W == 1 ? left : L);
  }
}

template <typename T, int G, int N>
void weigh_all(const AttentionParams& p, const float* weights, const T* v, std::int64_t distance, float* out,
               std::int64_t stride) {
  constexpr int L = kLanes<float>, kWide = kVectorBytes == 64 ? 4 : 2;  // vectors of channels at a time
  std::int64_t d = 0;
  for (; d + kWide * L <= p.head_dim; d += kWide * L) {
    weigh<T, G, N, kWide>(weights, v + d, distance, out + d, stride, L);
  }
  for (; d < p.head_dim; d += L)
    weigh<T, G, N, 1>(weights, v + d, distance, out + d, stride, lanes_left(p.head_dim - d));
}

// The two for `group` query heads of one key head, four at a time.
template <typename T, int N>
void dots_of(const AttentionParams& p, std::int64_t group, const float* q, const T* k, std::int64_t distance,
             float* scores) {
  for (; group >= 4; group -= 4, q += 4 * p.head_dim, scores += 4 * kChunk) {
    dots<T, 4, N>(p, q, k, distance, scores);
  }
  if (group == 1) dots<T, 1, N>(p, q, k, distance, scores);
  if (group == 2) dots<T, 2, N>(p, q, k, distance, scores);
  if (group == 3) dots<T, 3, N>(p, q, k, distance, scores);
}
template <typename T, int N>
void weigh_of(const AttentionParams& p, std::int64_t group, const float* weights, const T* v,
              std::int64_t distance, float* out, std::int64_t stride) {
  for (; group >= 4; group -= 4, out += 4 * stride, weights += 4 * kChunk) {
    weigh_all<T, 4, N>(p, weights, v, distance, out, stride);
  }
  if (group == 1) weigh_all<T, 1, N>(p, weights, v, distance, out, stride);
  if (group == 2) weigh_all<T, 2, N>(p, weights, v, distance, out, stride);
  if (group == 3) weigh_all<T, 3, N>(p, weights, v, distance, out, stride);
}

// Asks for the rows of up to `count` keys from `key` on, before `last`, all heads of them. What the heads
// read of a row is a pattern that processors do not foresee.
template <typename T>
inline __attribute__((always_inline)) void ask_for(const AttentionParams& p, const void* base,
                                                   std::int64_t sequence, std::int64_t key,
                                                   std::int64_t count, std::int64_t last) {
  const std::int64_t row_bytes = p.kv_heads * p.head_dim * std::int64_t{sizeof(T)};
  for (const std::int64_t end = least(last, key + count); key < end;) {
    const std::int64_t keys = least(end, (key / p.page_size + 1) * p.page_size) - key;
    const char* rows = reinterpret_cast<const char*>(row_of<T>(p, base, sequence, key, 0));
    for (std::int64_t byte = 0; byte < keys * row_bytes; byte += 64) __builtin_prefetch(rows + byte, 0, 2);
    key += keys;
  }
}

// Calls f(key, row of the key, Number<how many keys follow each other in memory>), kMost or one, over the
// keys [first, last), whose rows were asked for as far as kKeysAhead; of `next`, which is read afterwards,
// the first rows are asked for meanwhile.
constexpr std::int64_t kKeysAhead = 8;
template <typename T, int kMost, typename F>
inline __attribute__((always_inline)) void for_keys(const AttentionParams& p, const void* base,
                                                    const void* next, std::int64_t sequence,
                                                    std::int64_t first, std::int64_t last, F f) {
  const std::int64_t size = p.kv_heads * p.head_dim;
  for (std::int64_t key = first; key < last;) {
    const std::int64_t end = least(last, (key / p.page_size + 1) * p.page_size);
    const T* row = row_of<T>(p, base, sequence, key, 0);
    for (; key + kMost <= end; key += kMost, row += kMost * size) {
      ask_for<T>(p, base, sequence, key + kKeysAhead, kMost, last);
      if (next != nullptr) ask_for<T>(p, next, sequence, key, kMost, least(last, first + kKeysAhead));
      f(key, row, Number<kMost>{});
    }
    for (; key < end; ++key, row += size) f(key, row, Number<1>{});
  }
}

// scores [H][kChunk] to exp(score - highest), `highest` and the sum into `partial`.
void exponentials(float* scores, std::int64_t keys, float* partial) {
  constexpr int L = kLanes<float>;
  for (std::int64_t key = keys; key % L != 0; ++key) scores[key] = kLowest;
  F32 high = F32{} + kLowest;
  for (std::int64_t key = 0; key < keys; key += L) high = max(load(scores + key), high);
  const float top = max_lanes(high);
  F32 total = {};
  for (std::int64_t key = 0; key < keys; key += L) {
    const F32 e = exp(load(scores + key) - top);
    store(scores + key, e);
    total += e;
  }
  partial[0] = top;
  partial[1] = sum_lanes<float>(total);
}

// All heads over the keys [first, last), so that the cache is read from front to back. partials: of head 0;
// `stride` from one head's to the next.
template <typename T>
void stretch(const AttentionParams& p, std::int64_t sequence, std::int64_t first, std::int64_t last,
             float* scores, float* partials, std::int64_t stride) {
  const std::int64_t group = p.heads / p.kv_heads, distance = p.kv_heads * p.head_dim;
  const float* q = p.q + p.cu_q[sequence] * p.q_stride;
  ask_for<T>(p, p.k, sequence, first, kKeysAhead, last);
  for_keys<T, 4>(p, p.k, p.v, sequence, first, last, [&](std::int64_t key, const T* k, auto count) {
    for (std::int64_t head = 0; head < p.kv_heads; ++head) {
      dots_of<T, decltype(count)::value>(p, group, q + head * group * p.head_dim, k + head * p.head_dim,
                                         distance, scores + head * group * kChunk + key - first);
    }
  });
  for (std::int64_t head = 0; head < p.heads; ++head) {
    float* partial = partials + head * stride;
    exponentials(scores + head * kChunk, last - first, partial + statistics_at(p));
    for (std::int64_t d = 0; d < p.head_dim; ++d) partial[d] = 0;
  }
  for_keys<T, 8>(p, p.v, nullptr, sequence, first, last, [&](std::int64_t key, const T* v, auto count) {
    for (std::int64_t head = 0; head < p.kv_heads; ++head) {
      weigh_of<T, decltype(count)::value>(p, group, scores + head * group * kChunk + key - first,
                                          v + head * p.head_dim, distance, partials + head * group * stride,
                                          stride);
    }
  });
}

inline std::int64_t key_count(const AttentionParams& p, std::int64_t sequence) {
  return p.block_table != nullptr ? p.context[sequence] : p.cu_k[sequence + 1] - p.cu_k[sequence];
}

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
      const float total = softmax_row(scores + r * width, seen(p, query + r, queries, keys), from, to);
      inverse[r] = total == 0 ? 0 : 1.0f / total;  // 0: there are no keys
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
            write(out + half * kLanes<float>, tile.sums[r][half] * inverse[r], lanes_left(left));
          }
        }
      }
    }
  }
}

std::int64_t decode_partials(const AttentionParams& p, std::int64_t max_keys) {
  return p.heads * most_stretches(max_keys) * partial_size(p);
}

std::int64_t decode_scratch(const AttentionParams& p) { return p.heads * kChunk; }

void decode(const AttentionParams& p, std::int64_t sequence, std::int64_t number, float* partials,
            float* scratch) {
  const std::int64_t keys = p.context[sequence], size = partial_size(p), count = stretches(keys);
  const Seen all = seen(p, 0, 1, keys);
  const std::int64_t length = stretch_keys(keys);
  const std::int64_t first = most(number * length, all.first), last = least((number + 1) * length, all.last);
  float* to = partials + number * size;
  if (first >= last) {  // out of the window
    for (std::int64_t head = 0; head < p.heads; ++head) {
      to[head * count * size + statistics_at(p)] = kLowest;
      to[head * count * size + statistics_at(p) + 1] = 0;
    }
  } else if (p.cache_dtype == DType::kFloat32) {
    stretch<float>(p, sequence, first, last, scratch, to, count * size);
  } else if (p.cache_dtype == DType::kBFloat16) {
    stretch<BFloat16>(p, sequence, first, last, scratch, to, count * size);
  } else {
    stretch<Float16>(p, sequence, first, last, scratch, to, count * size);
  }
}

void combine(const AttentionParams& p, std::int64_t sequence, std::int64_t head, const float* partials) {
  const std::int64_t size = partial_size(p), count = stretches(p.context[sequence]);
  const float* from = partials + head * count * size;
  float* out = p.out + (p.cu_q[sequence] * p.heads + head) * p.head_dim;
  const float* statistics = from + statistics_at(p);
  float top = kLowest;
  for (std::int64_t i = 0; i < count; ++i) top = statistics[i * size] > top ? statistics[i * size] : top;
  float total = 0;
  F32 sums[256 / kLanes<float>] = {};  // of up to 256 channels at a time
  for (std::int64_t start = 0; start < p.head_dim; start += 256) {
    const std::int64_t size_here = least(256, p.head_dim - start);
    total = 0;
    for (F32& sum : sums) sum = F32{};
    for (std::int64_t i = 0; i < count; ++i) {
      const float* part = statistics + i * size;
      if (part[1] == 0) continue;  // no key of it is seen
      const float weight = exp(F32{} + (part[0] - top))[0];
      total += part[1] * weight;
      for (std::int64_t d = 0; d < size_here; d += kLanes<float>) {
        sums[d / kLanes<float>] += weight * load(from + i * size + start + d);  // padded: whole vectors
      }
    }
    for (std::int64_t d = 0; d < size_here; d += kLanes<float>) {
      write(out + start + d, sums[d / kLanes<float>] * (1.0f / total), lanes_left(size_here - d));
    }
  }
}

}  // namespace minilm::MINILM_ISA
