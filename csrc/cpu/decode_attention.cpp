// Attention of one query per sequence (decoding): softmax(scale q k^T) v over the pages of the cache.
//
// Keys and values are read in place, all heads of a token together, a stretch of keys at a time. Each stretch
// is a task, and `combine` merges their partial results:
//
//   per stretch   m = max(s), l = sum exp(s - m), o = sum exp(s - m) v           with s = scale q k
//   per head      out = sum exp(m - M) o / sum exp(m - M) l                      with M = max(m)
//
// Bytes: 2 context D b per key head, and 2 context D multiply-adds per query head: with few query heads per
// key head, memory is the limit.
//
// A query's result depends only on its own sequence: the number of stretches and the order of every sum
// follow from the number of keys and their positions.

#include "cpu/attention.h"
#include "cpu/keys.h"
#include "cpu/linear.h"
#include "cpu/rows.h"

namespace minilm::MINILM_ISA {
namespace {

inline float max_lanes(F32 x) {
  float m = x[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) m = x[lane] > m ? x[lane] : m;
  return m;
}

template <int N>
struct Number {
  static constexpr int value = N;
};

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

// Prefetches the rows of up to `count` keys from `key` on, before `last`, with all heads. Hardware
// prefetchers do not detect the pattern in which the heads read a row.
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

// For codes, multiply scores or weights by the scales of their keys or values: scores[head][key] *=
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
    if (p.soft_cap > 0) cap(scores + head * kChunk, last - first, p.soft_cap);
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

}  // namespace

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
