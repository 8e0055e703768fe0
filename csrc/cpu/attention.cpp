// Attention on packed sequences: softmax(scale q k^T) v, one head of one sequence at a time.
//
// Many queries (encoders, prompts). Queries are in the lanes, a block of kPanel of them at a time:
//
//   panel = scale q^T                 [D, queries]
//   for each tile of kTileRows keys:  s = K panel                 [keys, queries]: numbers of K, broadcast
//   highest score of each query, lane by lane; then for each key  p = exp(s - highest), sum += p
//   for each tile of queries:         out = p^T V / sum           [queries, channels]: numbers of p,
//   broadcast
//
// Keys and values are read where they are, nothing is added up across lanes, and all keys of a query are at
// hand, so nothing is rescaled. (Rows of 16 bits, of pages, or of sizes that leave lanes empty are copied
// first.) Operations: 4 queries keys D, and an exponential for each score: for 16 scores 2 D vector
// multiply-adds and about 12 for the exponential, so that small heads feel the exponentials. Bytes: q, k, v
// and out once, from cache; the scores of a block, 4 kPanel bytes a key, stay in the first or second.
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

// The scale of that row, where keys and values are codes.
inline float scale_of(const AttentionParams& p, const float* scales, std::int64_t sequence, std::int64_t key,
                      std::int64_t kv_head) {
  const std::int64_t page = p.block_table[sequence * p.table_width + key / p.page_size];
  return scales[(page * p.page_size + key % p.page_size) * p.kv_heads + kv_head];
}

// Rows of keys or values, `stride` elements apart.
struct Rows {
  const float* first;
  std::int64_t stride;
};

// The keys or values of one head where they are, or copied to `memory` in float32, zeros up to whole vectors.
template <typename T>
Rows copied(const AttentionParams& p, const void* base, const float* scales, std::int64_t sequence,
            std::int64_t kv_head, std::int64_t keys, float* memory) {
  const std::int64_t stride = round_up(p.head_dim, kLanes<float>);
  for (std::int64_t key = 0; key < keys; ++key) {
    const T* row = row_of<T>(p, base, sequence, key, kv_head);
    const float scale = scales == nullptr ? 1.0f : scale_of(p, scales, sequence, key, kv_head);
    for (std::int64_t d = 0; d < p.head_dim; d += kLanes<float>) {
      store(memory + key * stride + d, read(row + d, lanes_left(p.head_dim - d)) * scale);
    }
  }
  return {memory, stride};
}
Rows rows_of(const AttentionParams& p, const void* base, const float* scales, std::int64_t sequence,
             std::int64_t kv_head, std::int64_t keys, float* memory) {
  if (p.block_table == nullptr && p.head_dim % kLanes<float> == 0) {
    return {row_of<float>(p, base, sequence, 0, kv_head), p.kv_stride};
  }
  if (p.block_table == nullptr || p.cache_dtype == DType::kFloat32) {
    return copied<float>(p, base, nullptr, sequence, kv_head, keys, memory);
  }
  switch (p.cache_dtype) {
    case DType::kBFloat16:
      return copied<BFloat16>(p, base, nullptr, sequence, kv_head, keys, memory);
    case DType::kInt8:
      return copied<Int8>(p, base, scales, sequence, kv_head, keys, memory);
    default:
      return copied<Float16>(p, base, nullptr, sequence, kv_head, keys, memory);
  }
}

// Lanes 0, 1, ... as template arguments.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using Type = Lanes<I...>;
};

// Of two rows of a matrix that are S apart, the halves of 2 x 2 blocks of S x S elements change places.
template <int S, int... I>
inline void exchange(F32& a, F32& b, Lanes<I...>) {
  constexpr int L = kLanes<float>;
#if defined(__clang__)
  const F32 low = __builtin_shufflevector(a, b, ((I & S) ? I - S + L : I)...);
  const F32 high = __builtin_shufflevector(a, b, ((I & S) ? I + L : I + S)...);
#else
  const F32 low = __builtin_shuffle(a, b, I32{((I & S) ? I - S + L : I)...});
  const F32 high = __builtin_shuffle(a, b, I32{((I & S) ? I + L : I + S)...});
#endif
  a = low;
  b = high;
}
template <int S = 1>
inline void transpose(F32 (&rows)[kLanes<float>]) {
  if constexpr (S < kLanes<float>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) {
      if ((i & S) == 0) exchange<S>(rows[i], rows[i + S], typename LanesUpTo<kLanes<float>>::Type{});
    }
    transpose<2 * S>(rows);
  }
}

// `count` queries to panel [D][W vectors], times `scale`; lanes beyond `count` are zero.
template <int W>
void to_panel(const float* q, std::int64_t stride, int count, std::int64_t size, float scale, float* panel) {
  constexpr int L = kLanes<float>;
  for (int w = 0; w < W; ++w) {
    for (std::int64_t d = 0; d < size; d += L) {
      const int n = lanes_left(size - d);
      F32 rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        rows[i] = w * L + i < count ? read(q + (w * L + i) * stride + d, n) * scale : F32{};
      }
      transpose(rows);
      for (int i = 0; i < n; ++i) store(panel + ((d + i) * W + w) * L, rows[i]);
    }
  }
}

// Tiles are not inlined: their pointers and sums fill the registers.

// scores [R][W vectors] = R keys times the panel. Keys are reached from three pointers, as in linear.cpp.
template <int W, int R>
__attribute__((noinline)) void score_tile(Rows k, const float* panel, std::int64_t size, float* scores) {
  constexpr int L = kLanes<float>;
  const std::int64_t stride = k.stride * 4, three = 3 * stride;
  const char* first = reinterpret_cast<const char*>(k.first);
  const char* base[3] = {first, first + 4 * stride, first + 8 * stride};
  F32 sums[R][W] = {};
  for (std::int64_t d = 0; d < size; ++d) {
    F32 q[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) q[w] = load(panel + (d * W + w) * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float value;
      __builtin_memcpy(&value, base[r / 4] + (r % 4 == 3 ? three : r % 4 * stride), 4);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sums[r][w] += value * q[w];
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) base[i] += 4;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) store(scores + (r * W + w) * L, sums[r][w]);
  }
}
template <int W, int R = 1>
void score(int keys, Rows k, const float* panel, std::int64_t size, float* scores) {
  if (keys == R) return score_tile<W, R>(k, panel, size, scores);
  if constexpr (R < kTileRows) score<W, R + 1>(keys, k, panel, size, scores);
}

// sums [R queries][V vectors of channels] = sum_key weights[key][query] v[key], key after key.
template <int V, int R>
__attribute__((noinline)) void value_tile(const float* weights, std::int64_t step, std::int64_t keys,
                                          const float* v, std::int64_t stride, Tile& tile) {
  F32 sums[R][V] = {};
  for (std::int64_t key = 0; key < keys; ++key) {
    F32 x[V];
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) x[i] = load(v + i * kLanes<float>);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) sums[r][i] += weights[r] * x[i];
    }
    weights += step;
    v += stride;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) tile.sums[r][i] = sums[r][i];
  }
}
template <int V, int R = 1>
void values(int queries, const float* weights, std::int64_t step, std::int64_t keys, const float* v,
            std::int64_t stride, Tile& tile) {
  if (queries == R) return value_tile<V, R>(weights, step, keys, v, stride, tile);
  if constexpr (R < kTileRows) values<V, R + 1>(queries, weights, step, keys, v, stride, tile);
}

// What one head of one sequence is computed from, and memory for a block of queries.
struct Head {
  const float* q;
  Rows k, v;
  float* out;
  std::int64_t queries, keys;
  float* panel;   // [D][kPanel]
  float* scores;  // [keys][kPanel]
};

// Up to W vectors of queries from number `query` on.
template <int W>
void block(const AttentionParams& p, const Head& h, std::int64_t query, int count) {
  constexpr int L = kLanes<float>, kStep = W * L;
  constexpr float kLog2E = 1.44269504088896341f;
  to_panel<W>(h.q + query * p.q_stride, p.q_stride, count, p.head_dim, p.scale * kLog2E, h.panel);

  // Together the queries see the keys [from, last): both ends grow with the query. Tiles begin at multiples
  // of their height, so that sums over keys do not depend on what else is in the block.
  const Seen first_sees = seen(p, query, h.queries, h.keys);
  const Seen last_sees = seen(p, query + count - 1, h.queries, h.keys);
  const std::int64_t from = first_sees.first / kTileRows * kTileRows, last = last_sees.last;
  const bool masked = p.causal || p.window > 0;
  I32 firsts[W] = {}, lasts[W] = {};
  if (masked) {
    for (int lane = 0; lane < kStep; ++lane) {
      const Seen s = seen(p, query + least(lane, count - 1), h.queries, h.keys);
      firsts[lane / L][lane % L] = static_cast<std::int32_t>(s.first);
      lasts[lane / L][lane % L] = static_cast<std::int32_t>(s.last);
    }
  }
  F32 top[W];
  for (int w = 0; w < W; ++w) top[w] = F32{} + kLowest;
  for (std::int64_t key = from; key < last; key += kTileRows) {
    const int n = static_cast<int>(least(kTileRows, last - key));
    float* scores = h.scores + (key - from) * kStep;
    score<W>(n, {h.k.first + key * h.k.stride, h.k.stride}, h.panel, p.head_dim, scores);
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        F32 s = load(scores + i * kStep + w * L);
        if (masked) {
          const std::int32_t here = static_cast<std::int32_t>(key + i);
          s = (firsts[w] <= here) & (lasts[w] > here) ? s : F32{} + kLowest;
          store(scores + i * kStep + w * L, s);
        }
        top[w] = max(s, top[w]);
      }
    }
  }

  F32 total[W] = {};
  for (std::int64_t key = from; key < last; key += kTileRows) {
    const int n = static_cast<int>(least(kTileRows, last - key));
    float* scores = h.scores + (key - from) * kStep;
    F32 part[W] = {};
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        const F32 s = load(scores + i * kStep + w * L);
        F32 e = exp2_of_negative(s - top[w]);
        if (masked) e = s == kLowest ? F32{} : e;
        store(scores + i * kStep + w * L, e);
        part[w] += e;
      }
    }
    for (int w = 0; w < W; ++w) total[w] += part[w];
  }
  float inverse[kStep];
  for (int w = 0; w < W; ++w) store(inverse + w * L, total[w] == 0 ? F32{} : 1.0f / total[w]);  // 0: no keys

  for (int q = 0, tiles = (count + kTileRows - 1) / kTileRows; q < count; --tiles) {
    const int rows = (count - q + tiles - 1) / tiles;  // of nearly equal height
    const std::int64_t begin = seen(p, query + q, h.queries, h.keys).first;
    const std::int64_t end = seen(p, query + q + rows - 1, h.queries, h.keys).last;
    const float* weights = h.scores + (begin - from) * kStep + q;
    for (std::int64_t d = 0; d < p.head_dim; d += kPanel) {
      Tile tile;
      const float* v = h.v.first + begin * h.v.stride + d;
      if (p.head_dim - d > L) {
        values<2>(rows, weights, kStep, end - begin, v, h.v.stride, tile);
      } else {
        values<1>(rows, weights, kStep, end - begin, v, h.v.stride, tile);
      }
      for (int r = 0; r < rows; ++r) {
        float* out = h.out + (query + q + r) * p.heads * p.head_dim + d;
        for (int i = 0; i < 2; ++i) {
          const std::int64_t left = p.head_dim - d - i * L;
          if (left > 0) write(out + i * L, tile.sums[r][i] * inverse[q + r], lanes_left(left));
        }
      }
    }
    q += rows;
  }
}

// Partial results of a stretch, for one head: its weighted values, then the highest score and the sum of the
// weights. On borders of 64 bytes: a vector that lies across two lines is slow to read back.
inline std::int64_t statistics_at(const AttentionParams& p) { return round_up(p.head_dim, 16); }
inline std::int64_t partial_size(const AttentionParams& p) { return statistics_at(p) + 16; }

using Four = VectorOf<float, 4>::type;

// Four of the eight elements of a and b.
template <int... I>
inline Four pick(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, VectorOf<std::int32_t, 4>::type{I...});
#endif
}

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
    const Four a = pick<0, 1, 4, 5>(x[0], x[1]) + pick<2, 3, 6, 7>(x[0], x[1]);
    const Four b = pick<0, 1, 4, 5>(x[2], x[3]) + pick<2, 3, 6, 7>(x[2], x[3]);
    return pick<0, 2, 4, 6>(a, b) + pick<1, 3, 5, 7>(a, b);
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

// Of codes, scores and weights take the scales of their keys or values: scores[head][key] *=
// scales[key][head].
void scale_rows(const AttentionParams& p, const float* scales, std::int64_t sequence, std::int64_t first,
                std::int64_t last, float* scores) {
  const std::int64_t group = p.heads / p.kv_heads;
  for (std::int64_t key = first; key < last; ++key) {
    for (std::int64_t head = 0; head < p.kv_heads; ++head) {
      const float scale = scale_of(p, scales, sequence, key, head);
      float* row = scores + head * group * kChunk + key - first;
      for (std::int64_t i = 0; i < group; ++i) row[i * kChunk] *= scale;
    }
  }
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
  constexpr bool kCodes = std::int64_t{sizeof(T)} == 1;
  if (kCodes) scale_rows(p, p.k_scales, sequence, first, last, scores);
  for (std::int64_t head = 0; head < p.heads; ++head) {
    float* partial = partials + head * stride;
    exponentials(scores + head * kChunk, last - first, partial + statistics_at(p));
    for (std::int64_t d = 0; d < p.head_dim; ++d) partial[d] = 0;
  }
  if (kCodes) scale_rows(p, p.v_scales, sequence, first, last, scores);
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
  const std::int64_t copies = 2 * max_keys * round_up(p.head_dim, kLanes<float>);
  return kPanel * p.head_dim + (max_keys + kTileRows) * kPanel + copies;
}

void attention(const AttentionParams& p, std::int64_t sequence, std::int64_t head, float* scratch) {
  const std::int64_t start = p.cu_q[sequence], size = p.head_dim, kv_head = head / (p.heads / p.kv_heads);
  Head h = {};
  h.queries = p.cu_q[sequence + 1] - start;
  h.keys = key_count(p, sequence);
  if (h.queries == 0) return;
  h.q = p.q + start * p.q_stride + head * size;
  h.out = p.out + (start * p.heads + head) * size;
  h.panel = scratch;
  h.scores = h.panel + kPanel * size;
  float* copies = h.scores + (h.keys + kTileRows) * kPanel;
  h.k = rows_of(p, p.k, p.k_scales, sequence, kv_head, h.keys, copies);
  h.v =
      rows_of(p, p.v, p.v_scales, sequence, kv_head, h.keys, copies + h.keys * round_up(size, kLanes<float>));
  for (std::int64_t query = 0; query < h.queries; query += kPanel) {
    const int count = static_cast<int>(least(kPanel, h.queries - query));
    count > kLanes<float> ? block<2>(p, h, query, count) : block<1>(p, h, query, count);
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
  } else if (p.cache_dtype == DType::kInt8) {
    stretch<Int8>(p, sequence, first, last, scratch, to, count * size);
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
