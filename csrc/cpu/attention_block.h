// A block of queries on the keys of one head, in tiles; see attention.cpp for the loops.
#pragma once

#include "cpu/attention.h"
#include "cpu/keys.h"
#include "cpu/linear.h"
#include "cpu/rows.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace minilm::MINILM_ISA {
namespace {

// Rows of keys or values (two keys', where they are pairs), `stride` words of 32 bits apart.
struct Rows {
  const float* first;
  std::int64_t stride;
};

#if defined(__AVX512BF16__)
constexpr bool kCanPair = true;

// a and b in bfloat16, a number of each in a word.
inline F32 pairs_of(F32 a, F32 b) {
  const U32 low = __builtin_convertvector(bit_cast<U16>(_mm512_cvtneps_pbh(a)), U32);
  const U32 high = __builtin_convertvector(bit_cast<U16>(_mm512_cvtneps_pbh(b)), U32);
  return bit_cast<F32>(low | high << 16);
}
// a and b one after the other.
inline void store_halves(float* to, F32 a, F32 b) {
  auto* halves = reinterpret_cast<BFloat16*>(to);
  store(halves, bit_cast<U16>(_mm512_cvtneps_pbh(a)));
  store(halves + kLanes<float>, bit_cast<U16>(_mm512_cvtneps_pbh(b)));
}
inline F32 add_pairs(F32 sum, F32 a, F32 b) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
#else
constexpr bool kCanPair = false;
inline F32 pairs_of(F32 a, F32) { return a; }
inline void store_halves(float*, F32, F32) {}
inline F32 add_pairs(F32 sum, F32, F32) { return sum; }
#endif

// sum + word * x, or with pairs the sum and both products.
template <bool kPairs>
inline F32 add_product(F32 sum, float word, F32 x) {
  if constexpr (kPairs) return add_pairs(sum, F32{} + word, x);
  return sum + word * x;
}

// Some channels of the row of a key, from `d` on, in float32; zeros beyond the head.
template <typename T>
inline F32 channels_of(const AttentionParams& p, const T* row, float scale, std::int64_t d) {
  return d < p.head_dim ? read(row + d, lanes_left(p.head_dim - d)) * scale : F32{};
}

// The keys or values [begin, end) of one head, copied to `memory`: in float32, pairs of channels, or pairs of
// keys.
enum class Copy { kFloats, kChannels, kKeys };
// Rows of pages that are asked for before they are copied: hardware prefetchers do not detect the pattern.
constexpr std::int64_t kCopiesAhead = 16;
template <typename T>
Rows copied(const AttentionParams& p, Copy copy, const void* base, const float* scales, std::int64_t sequence,
            std::int64_t kv_head, std::int64_t begin, std::int64_t end, float* memory) {
  constexpr int L = kLanes<float>;
  const std::int64_t per_word = copy == Copy::kChannels ? 2 : 1, per_row = copy == Copy::kKeys ? 2 : 1;
  const std::int64_t stride = round_up(p.head_dim, per_word * L) / per_word;
  const auto scale_at = [&](std::int64_t key) {
    return scales == nullptr ? 1.0f : scale_of(p, scales, sequence, key, kv_head);
  };
  for (std::int64_t key = begin; key < end; key += per_row) {
    const T* row = row_of<T>(p, base, sequence, key, kv_head);
    const float scale = scale_at(key);
    float* to = memory + (key - begin) / per_row * stride;
    const std::int64_t asked = p.block_table == nullptr ? 0 : least(key + kCopiesAhead + per_row, end);
    for (std::int64_t ahead = key + kCopiesAhead; ahead < asked; ++ahead) {
      const char* next = reinterpret_cast<const char*>(row_of<T>(p, base, sequence, ahead, kv_head));
      for (std::int64_t byte = 0; byte < p.head_dim * std::int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(next + byte, 0, 2);
      }
    }
    if (copy == Copy::kFloats) {
      for (std::int64_t d = 0; d < p.head_dim; d += L) store(to + d, channels_of(p, row, scale, d));
    } else if (copy == Copy::kChannels) {
      for (std::int64_t d = 0; d < p.head_dim; d += 2 * L) {
        store_halves(to + d / 2, channels_of(p, row, scale, d), channels_of(p, row, scale, d + L));
      }
    } else {
      const bool alone = key + 1 == end;
      const T* next = alone ? row : row_of<T>(p, base, sequence, key + 1, kv_head);
      const float next_scale = alone ? 0.0f : scale_at(key + 1);
      for (std::int64_t d = 0; d < p.head_dim; d += L) {
        const F32 other = alone ? F32{} : channels_of(p, next, next_scale, d);
        store(to + d, pairs_of(channels_of(p, row, scale, d), other));
      }
    }
  }
  return {memory, stride};
}
inline Rows rows_of(const AttentionParams& p, Copy copy, const void* base, const float* scales,
                    std::int64_t sequence, std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                    float* memory) {
  if (copy == Copy::kFloats && p.block_table == nullptr && p.head_dim % kLanes<float> == 0) {
    return {row_of<float>(p, base, sequence, begin, kv_head), p.kv_stride};
  }
  if (p.block_table == nullptr || p.cache_dtype == DType::kFloat32) {
    return copied<float>(p, copy, base, nullptr, sequence, kv_head, begin, end, memory);
  }
  switch (p.cache_dtype) {
    case DType::kBFloat16:
      return copied<BFloat16>(p, copy, base, nullptr, sequence, kv_head, begin, end, memory);
    case DType::kInt8:
      return copied<Int8>(p, copy, base, scales, sequence, kv_head, begin, end, memory);
    default:
      return copied<Float16>(p, copy, base, nullptr, sequence, kv_head, begin, end, memory);
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

// `count` queries to panel [D][W vectors], or pairs [D / 2][W vectors], times `scale`; lanes beyond `count`
// and channels beyond `size` are zero.
template <int W, bool kPairs>
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
      if constexpr (kPairs) {
#pragma GCC unroll 8
        for (int i = 0; i < L; i += 2) {
          if (i < n) store(panel + ((d + i) / 2 * W + w) * L, pairs_of(rows[i], rows[i + 1]));
        }
      } else {
        for (int i = 0; i < n; ++i) store(panel + ((d + i) * W + w) * L, rows[i]);
      }
    }
  }
}

// Tiles are not inlined: their pointers and sums fill the registers.

// scores [R][W vectors] = R keys times the panel, over `words` channels or pairs of them. Keys are reached
// from three pointers, as in linear.cpp.
template <bool kPairs, int W, int R>
__attribute__((noinline)) void score_tile(Rows k, const float* panel, std::int64_t words, float* scores) {
  constexpr int L = kLanes<float>;
  const std::int64_t stride = k.stride * 4, three = 3 * stride;
  const char* first = reinterpret_cast<const char*>(k.first);
  const char* base[3] = {first, first + 4 * stride, first + 8 * stride};
  F32 sums[R][W] = {};
  for (std::int64_t d = 0; d < words; ++d) {
    F32 q[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) q[w] = load(panel + (d * W + w) * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float value;
      __builtin_memcpy(&value, base[r / 4] + (r % 4 == 3 ? three : r % 4 * stride), 4);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sums[r][w] = add_product<kPairs>(sums[r][w], value, q[w]);
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
template <bool kPairs, int W, int R = 1>
void score(int keys, Rows k, const float* panel, std::int64_t words, float* scores) {
  if (keys == R) return score_tile<kPairs, W, R>(k, panel, words, scores);
  if constexpr (R < kTileRows) score<kPairs, W, R + 1>(keys, k, panel, words, scores);
}

// sums [R queries][V vectors of channels] = sum_key weights[key][query] v[key], key after key or pair after
// pair.
template <bool kPairs, int V, int R>
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
      for (int i = 0; i < V; ++i) sums[r][i] = add_product<kPairs>(sums[r][i], weights[r], x[i]);
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
template <bool kPairs, int V, int R = 1>
void values(int queries, const float* weights, std::int64_t step, std::int64_t keys, const float* v,
            std::int64_t stride, Tile& tile) {
  if (queries == R) return value_tile<kPairs, V, R>(weights, step, keys, v, stride, tile);
  if constexpr (R < kTileRows) values<kPairs, V, R + 1>(queries, weights, step, keys, v, stride, tile);
}

// `count` scores, whole vectors, in units of the cap, to the base-2 logarithms that the softmax expects.
[[maybe_unused]] __attribute__((noinline)) void cap_scores(float* scores, std::int64_t count, float limit) {
  for (std::int64_t i = 0; i < count; i += kLanes<float>) store(scores + i, limit * tanh(load(scores + i)));
}

// A block of queries, the keys and values that it may see, and memory.
struct Block {
  const float* q;
  std::int64_t q_stride;
  int count;
  Rows k, v;
  std::int64_t begin;  // the number of the first key there, even
  float* panel;        // [D][kPanel]
  float* scores;       // [keys][kPanel]
};

// Up to W vectors of queries, of which number i sees the keys sees(i), none before b.begin; both ends grow
// with i. out.factor(i, highest score, sum of exponentials) gives what the sums of query i are multiplied by,
// and out.row(i) where they go.
template <bool kPairs, int W, typename Sees, typename Out>
void block(const AttentionParams& p, const Block& b, Sees sees, Out out) {
  constexpr int L = kLanes<float>, kStep = W * L;
  constexpr float kLog2E = 1.44269504088896341f;
  const bool capped = p.soft_cap > 0;
  to_panel<W, kPairs>(b.q, b.q_stride, b.count, p.head_dim, capped ? p.scale / p.soft_cap : p.scale * kLog2E,
                      b.panel);

  // Together the queries see the keys [from, last), counted from b.begin. Tiles begin at multiples of their
  // height, so that sums over keys do not depend on what else is in the block.
  const auto sees_from_begin = [&](int i) {
    const Seen s = sees(i);
    return Seen{s.first - b.begin, s.last - b.begin};
  };
  const std::int64_t from = sees_from_begin(0).first / kTileRows * kTileRows;
  const std::int64_t last = sees_from_begin(b.count - 1).last;
  const std::int64_t words = kPairs ? (p.head_dim + 1) / 2 : p.head_dim;
  const bool masked = p.causal || p.window > 0;
  I32 firsts[W] = {}, lasts[W] = {};
  if (masked) {
    for (int lane = 0; lane < kStep; ++lane) {
      const Seen s = sees_from_begin(static_cast<int>(least(lane, b.count - 1)));
      firsts[lane / L][lane % L] = static_cast<std::int32_t>(s.first);
      lasts[lane / L][lane % L] = static_cast<std::int32_t>(s.last);
    }
  }
  F32 top[W];
  for (int w = 0; w < W; ++w) top[w] = F32{} + kLowest;
  for (std::int64_t key = from; key < last; key += kTileRows) {
    const int n = static_cast<int>(least(kTileRows, last - key));
    float* scores = b.scores + (key - from) * kStep;
    score<kPairs, W>(n, {b.k.first + key * b.k.stride, b.k.stride}, b.panel, words, scores);
    if (capped) cap_scores(scores, n * kStep, p.soft_cap * kLog2E);
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
    float* scores = b.scores + (key - from) * kStep;
    F32 part[W] = {};
    const auto probability = [&](int i, int w) {
      const F32 s = load(scores + i * kStep + w * L);
      F32 e = exp2_of_negative(s - top[w]);
      if (masked) e = s == kLowest ? F32{} : e;
      part[w] += e;
      return e;
    };
    // Pairs go to where the first half of the scores was.
    float* to = kPairs ? b.scores + (key - from) / 2 * kStep : scores;
    for (int i = 0; i < n; i += kPairs ? 2 : 1, to += kStep) {
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        F32 e = probability(i, w);
        if constexpr (kPairs) e = pairs_of(e, i + 1 < n ? probability(i + 1, w) : F32{});
        store(to + w * L, e);
      }
    }
    for (int w = 0; w < W; ++w) total[w] += part[w];
  }
  float factors[kStep];
  for (int i = 0; i < b.count; ++i) factors[i] = out.factor(i, top[i / L][i % L], total[i / L][i % L]);

  for (int q = 0, tiles = (b.count + kTileRows - 1) / kTileRows; q < b.count; --tiles) {
    const int rows = (b.count - q + tiles - 1) / tiles;  // of nearly equal height
    constexpr std::int64_t kKeys = kPairs ? 2 : 1;       // of a row; rows begin at multiples of it
    const std::int64_t begin = sees_from_begin(q).first / kKeys;
    const std::int64_t end = (sees_from_begin(q + rows - 1).last + kKeys - 1) / kKeys;
    const float* weights = b.scores + (begin - from / kKeys) * kStep + q;
    for (std::int64_t d = 0; d < p.head_dim; d += kPanel) {
      Tile tile;
      const float* v = b.v.first + begin * b.v.stride + d;
      if (p.head_dim - d > L) {
        values<kPairs, 2>(rows, weights, kStep, end - begin, v, b.v.stride, tile);
      } else {
        values<kPairs, 1>(rows, weights, kStep, end - begin, v, b.v.stride, tile);
      }
      for (int r = 0; r < rows; ++r) {
        float* to = out.row(q + r) + d;
        for (int i = 0; i < 2; ++i) {
          const std::int64_t left = p.head_dim - d - i * L;
          if (left > 0) write(to + i * L, tile.sums[r][i] * factors[q + r], lanes_left(left));
        }
      }
    }
    q += rows;
  }
}

template <bool kPairs, typename Sees, typename Out>
void block_of(const AttentionParams& p, const Block& b, Sees sees, Out out) {
  b.count > kLanes<float> ? block<kPairs, 2>(p, b, sees, out) : block<kPairs, 1>(p, b, sees, out);
}

}  // namespace
}  // namespace minilm::MINILM_ISA
