// Decode attention on tensor cores: the query heads that share a key/value head (GQA) are the rows of one
// product, so that a group of up to 16 reads the cache once.
//
//   S = Q K^T  [16 heads, 16 tokens]      P = exp2(scale log2(e) S - m)      O += P V  [16 heads, D]
//
// with m and l online as in decode_attention.cu. Larger groups take several blocks, smaller ones leave rows
// empty.
//
// Layout: nothing goes through shared memory on the way in. A fragment of mma.m16n8k16 asks of lane 4 g + t
// for pairs of neighbours along the inner axis; which elements these are is free as long as both factors
// agree, so a lane takes neighbours in memory and reads 16 bytes at once (tiling.h: key_element,
// value_element, value_token). For 16-bit D = 64 and a chunk of 16 tokens:
//
//   keys     of tokens g and g + 8:
//            t=0 [0..7]    t=1 [8..15]    t=2 [16..23]    t=3 [24..31]       and 32 elements further on
//            Two steps of 16 inner places from each read. Q is read in the same order, before the loop.
//   values   of tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9:
//            g=0 [0..7]    g=1 [8..15]    ...             g=7 [56..63]
//            Column g of tile i is element 8 g + i; one permute puts two tokens' elements into a register.
//
// S in its accumulators already is the left factor of P V: its columns 2 t, 2 t + 1 are the tokens above.
// Warps take chunks in turn and merge at the end through shared memory.
//
// Bytes: as decode_attention.cu, but once for the whole group. Operations: 64 D a token, on tensor cores.
// Memory is the limit; in flight are 2 D c bytes a lane, of 16-bit D = 64 16 KiB a block.

#include "cuda/decode_attention.h"

namespace minilm::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kThreads = 32 * kDecodeWarps;

// Elements e and e + 1 of the keys that a lane has read, as a pair of T.
template <typename T, typename C>
MINILM_DEVICE std::uint32_t key_pair(const std::uint32_t* words, int e) {
  if constexpr (sizeof(C) == 1) {
    return pair<T>(code_of(words[e / 4], e % 4), code_of(words[e / 4], e % 4 + 1));
  } else {
    return words[e / 2];
  }
}

// Element e of the tokens that `a` and `b` hold, as a pair of T. int8 values are scaled here: their scales
// are the tokens', which are the inner axis.
template <typename T, typename C>
MINILM_DEVICE std::uint32_t value_pair(const std::uint32_t* a, const std::uint32_t* b, int e, float a_scale,
                                       float b_scale) {
  if constexpr (sizeof(C) == 1) {
    return pair<T>(code_of(a[e / 4], e % 4) * a_scale, code_of(b[e / 4], e % 4) * b_scale);
  } else {
    return e % 2 ? high_halves(a[e / 2], b[e / 2]) : low_halves(a[e / 2], b[e / 2]);
  }
}

// T: queries and result. C: cache, T or int8. D: head size.
template <typename T, typename C, int D>
__global__ void __launch_bounds__(kThreads, 2) decode_attention_mma_kernel(DecodeParams p) {
  constexpr int kBytes = sizeof(C);
  using Keys = Segments<D / 16, 4 / kBytes>;    // steps of 16 elements, of which a lane has 4
  using Values = Segments<D / 8, 16 / kBytes>;  // tiles of 8 elements, of which a lane has 1
  constexpr int kKeyWords = D * kBytes / 16;    // of a token
  constexpr int kValueWords = Values::kCount * 4;
  const int group = p.heads / p.kv_heads;
  const int row_tiles = static_cast<int>(ceil_div(group, kRows));
  const int split = static_cast<int>(blockIdx.x) / row_tiles;
  const int first_row = static_cast<int>(blockIdx.x) % row_tiles * kRows;
  const int rows = smaller(kRows, group - first_row);
  const int kv_head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int first_head = kv_head * group + first_row;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const Range range = split_range(visible(p.context_lens[sequence], p.window), split, p.splits);
  const std::int32_t* table = p.block_table + sequence * p.table_stride;
  const float scale = p.scale * kLog2E;

  std::uint32_t q[D / 16][4];  // left fragments
  unrolled<Keys::kCount>([&](auto segment) {
    constexpr int first = Keys::first(segment), steps = Keys::units(segment);
#pragma unroll
    for (int s = 0; s < steps; ++s) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {  // rows g and g + 8
        const int row = g + 8 * upper;
        q[first + s][upper] = q[first + s][upper + 2] = 0;
        if (row < rows) {
          const T* from = static_cast<const T*>(p.q) + sequence * p.q_stride + (first_head + row) * D +
                          key_element(first, steps, s, t);
          q[first + s][upper] = *reinterpret_cast<const std::uint32_t*>(from);
          q[first + s][upper + 2] = *reinterpret_cast<const std::uint32_t*>(from + 2);
        }
      }
    }
  });

  float out[D / 8][4] = {};
  float top[2] = {kMinusInfinity, kMinusInfinity}, total[2] = {};
  for (int chunk = range.begin / kChunk + warp; chunk * kChunk < range.end; chunk += kDecodeWarps) {
    const int begin = chunk * kChunk;
    const auto head_at = [&](int token) {  // a token that is not seen is replaced by one that is
      const int seen = larger(range.begin, smaller(token, range.end - 1));
      return cache_row(table, seen, p.page_size) * p.kv_heads + kv_head;
    };
    std::uint32_t keys[2][kKeyWords], values[4][kValueWords];
    float key_scale[4] = {1, 1, 1, 1}, value_scale[4] = {1, 1, 1, 1};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const C* from = static_cast<const C*>(p.k_pages) + head_at(begin + 8 * j + g) * D;
      unrolled<Keys::kCount>([&](auto segment) {
        constexpr int first = Keys::first(segment), steps = Keys::units(segment);
        load_once<4 * steps * kBytes>(from + key_element(first, steps, 0, t), keys[j] + first * kBytes);
      });
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t at = head_at(begin + value_token(i, t));
      const C* from = static_cast<const C*>(p.v_pages) + at * D;
      unrolled<Values::kCount>([&](auto segment) {
        constexpr int first = Values::first(segment), tiles = Values::units(segment);
        load_once<tiles * kBytes>(from + value_element(first, tiles, 0, g), values[i] + segment * 4);
      });
      if constexpr (kBytes == 1) key_scale[i] = p.k_scales[at], value_scale[i] = p.v_scales[at];
    }

    float scores[2][4] = {};  // tile j: columns 2 t, 2 t + 1 of row g, then of row g + 8
    unrolled<Keys::kCount>([&](auto segment) {
      constexpr int first = Keys::first(segment), steps = Keys::units(segment);
#pragma unroll
      for (int s = 0; s < steps; ++s) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const std::uint32_t* words = keys[j] + first * kBytes;
          mma<T>(scores[j], q[first + s], key_pair<T, C>(words, 4 * s), key_pair<T, C>(words, 4 * s + 2));
        }
      }
    });

    std::uint32_t weights[4];  // the left fragment of P V
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float s[4], new_top = top[upper];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // the lane's tokens, in the order of value_token
        const int token = begin + value_token(i, t);
        s[i] = scores[i / 2][2 * upper + i % 2] * (scale * key_scale[i]);
        if (token < range.begin || token >= range.end) s[i] = kMinusInfinity;
        new_top = fmaxf(new_top, s[i]);
      }
      new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 1));  // the lanes of a row: t = 0 .. 3
      new_top = fmaxf(new_top, __shfl_xor_sync(kAllLanes, new_top, 2));
      const float kept = softmax_weight(top[upper], new_top);
      top[upper] = new_top;
      total[upper] *= kept;
#pragma unroll
      for (int tile = 0; tile < D / 8; ++tile) {
        out[tile][2 * upper] *= kept;
        out[tile][2 * upper + 1] *= kept;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i] = softmax_weight(s[i], new_top);
        total[upper] += s[i];
      }
      weights[upper] = pair<T>(s[0], s[1]);
      weights[upper + 2] = pair<T>(s[2], s[3]);
    }

    unrolled<Values::kCount>([&](auto segment) {
      constexpr int first = Values::first(segment), tiles = Values::units(segment), at = 4 * segment;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        mma<T>(out[first + i], weights,
               value_pair<T, C>(values[0] + at, values[1] + at, i, value_scale[0], value_scale[1]),
               value_pair<T, C>(values[2] + at, values[3] + at, i, value_scale[2], value_scale[3]));
      }
    });
  }

  __shared__ float outs[kDecodeWarps][kRows][D], tops[kDecodeWarps][kRows], totals[kDecodeWarps][kRows];
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int row = g + 8 * upper;
    total[upper] += __shfl_xor_sync(kAllLanes, total[upper], 1);
    total[upper] += __shfl_xor_sync(kAllLanes, total[upper], 2);
    if (t == 0) tops[warp][row] = top[upper], totals[warp][row] = total[upper];
    unrolled<Values::kCount>([&](auto segment) {
      constexpr int first = Values::first(segment), tiles = Values::units(segment);
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          outs[warp][row][value_element(first, tiles, i, 2 * t + c)] = out[first + i][2 * upper + c];
        }
      }
    });
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * D; i += kThreads) {
    const int row = i / D, d = i % D;
    float merged_top = kMinusInfinity, merged_total = 0, merged = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) merged_top = fmaxf(merged_top, tops[w][row]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = softmax_weight(tops[w][row], merged_top);
      merged_total += totals[w][row] * weight;
      merged += outs[w][row][d] * weight;
    }
    store_attention<T>(p, sequence, first_head + row, split, d, merged, merged_total, merged_top);
  }
}

template <typename T, typename C>
const char* start(const DecodeParams& p, void* stream) {
  const int row_tiles = static_cast<int>(ceil_div(p.heads / p.kv_heads, kRows));
  const Grid grid = {static_cast<unsigned>(p.splits * row_tiles), static_cast<unsigned>(p.kv_heads),
                     static_cast<unsigned>(p.batch)};
  switch (p.head_dim) {
    case 32:
      return launch(decode_attention_mma_kernel<T, C, 32>, grid, kThreads, p, stream);
    case 64:
      return launch(decode_attention_mma_kernel<T, C, 64>, grid, kThreads, p, stream);
    case 80:
      return launch(decode_attention_mma_kernel<T, C, 80>, grid, kThreads, p, stream);
    case 96:
      return launch(decode_attention_mma_kernel<T, C, 96>, grid, kThreads, p, stream);
    case 128:
      return launch(decode_attention_mma_kernel<T, C, 128>, grid, kThreads, p, stream);
    default:
      return "decode_attention: there is no kernel for this head size";
  }
}

}  // namespace

const char* decode_attention_mma(const DecodeParams& p, void* stream) {
  const bool int8 = p.cache == Data::kInt8;
  if (p.data == Data::kFloat16)
    return int8 ? start<Half, std::int8_t>(p, stream) : start<Half, Half>(p, stream);
  return int8 ? start<BFloat16, std::int8_t>(p, stream) : start<BFloat16, BFloat16>(p, stream);
}

}  // namespace minilm::cuda
