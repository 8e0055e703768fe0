// Decode attention on FMA units: one new token per sequence over its pages, one query head per block. The
// kernel for heads that share no keys (MHA); for grouped heads, decode_attention_mma.cu reads the cache once
// per group.
//
//   s_t = scale log2(e) q k_t      m = max s_t      l = sum exp2(s_t - m)
//   out = sum exp2(s_t - m) v_t / l
//
// online (Milakov and Gimelshein 2018, arXiv:1805.02867): m, l and out follow the tokens as they come, and
// parts of the context are merged by the same rule. int8 cache: s_t is multiplied by the key's scale, the
// weight of v_t by the value's.
//
// Layout: a lane reads 16 bytes of a key, so D c / 16 lanes (of a power of two L) hold a token, and a warp
// 32 / L tokens at a time; kAtOnce tokens are in flight for each. D = 64 in 16 bits, 8 lanes a token:
//
//   warp 0:   lanes 0-7 token 0   |  8-15 token 1  |  16-23 token 2  |  24-31 token 3
//   warp 1:   lanes 0-7 token 4   |  ...                               then the same 16 tokens further on
//
// L lanes add up their products; each such group of lanes keeps its own m, l, out. At the end groups merge by
// shuffles, warps through shared memory, splits in decode_combine.cu.
//
// Bytes: 2 D c a token and key/value head (c: bytes of an element; int8: 8 more for the scales), read once.
// Operations: 4 D. That is far below the balance of any chip, so memory is the limit, and what counts is
// bytes in flight: 128 a thread, 16 KiB a block, several blocks a multiprocessor.

#include "cuda/decode_attention.h"

namespace minilm::cuda {
namespace {

constexpr int kThreads = 32 * kDecodeWarps;
constexpr int kAtOnce = 4;

// T: queries and result. C: cache, T or int8. D: head size.
template <typename T, typename C, int D>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(DecodeParams p) {
  constexpr int kHeld = 16 / sizeof(C);                 // elements of a lane
  constexpr int kLanes = power_of_two_from(D / kHeld);  // of a token
  constexpr int kTokens = 32 / kLanes * kDecodeWarps;   // that a block reads at a time
  static_assert(D % kHeld == 0 && kLanes <= 32);
  const int split = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int sequence = static_cast<int>(blockIdx.z);
  const int kv_head = head / (p.heads / p.kv_heads);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int place = static_cast<int>(threadIdx.x) / kLanes;  // of this lane's token among kTokens
  const int element = lane % kLanes * kHeld;
  const bool active = element < D;
  const Range range = split_range(visible(p.context_lens[sequence], p.window), split, p.splits);
  const std::int32_t* table = p.block_table + sequence * p.table_stride;

  float q[kHeld] = {}, out[kHeld] = {};
  if (active) {
    const T* from = static_cast<const T*>(p.q) + sequence * p.q_stride + head * D + element;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) q[i] = to_float(from[i]) * (p.scale * kLog2E);
  }
  float top = kMinusInfinity, total = 0;

  for (int first = range.begin; first < range.end; first += kTokens * kAtOnce) {
    Words keys[kAtOnce], values[kAtOnce];
    float key_scale[kAtOnce], value_scale[kAtOnce], score[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int t = smaller(first + u * kTokens + place, range.end - 1);
      const std::int64_t at = cache_row(table, t, p.page_size) * p.kv_heads + kv_head;
      keys[u] = values[u] = {};
      if (active) {
        keys[u] = load_once(static_cast<const C*>(p.k_pages) + at * D + element);
        values[u] = load_once(static_cast<const C*>(p.v_pages) + at * D + element);
      }
      key_scale[u] = sizeof(C) == 1 ? p.k_scales[at] : 1.0f;
      value_scale[u] = sizeof(C) == 1 ? p.v_scales[at] : 1.0f;
    }
    float new_top = top;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if constexpr (sizeof(C) == 1) {
          sum += q[i] * code_of(keys[u].x[i / 4], i % 4);
        } else {
          sum += q[i] * (i % 2 ? second_of<T>(keys[u].x[i / 2]) : first_of<T>(keys[u].x[i / 2]));
        }
      }
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
      score[u] = first + u * kTokens + place < range.end ? sum * key_scale[u] : kMinusInfinity;
      new_top = fmaxf(new_top, score[u]);
    }
    const float kept = softmax_weight(top, new_top);
    top = new_top;
    total *= kept;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) out[i] *= kept;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float weight = softmax_weight(score[u], top);
      const float scaled = weight * value_scale[u];
      total += weight;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if constexpr (sizeof(C) == 1) {
          out[i] += scaled * code_of(values[u].x[i / 4], i % 4);
        } else {
          out[i] += scaled * (i % 2 ? second_of<T>(values[u].x[i / 2]) : first_of<T>(values[u].x[i / 2]));
        }
      }
    }
  }

#pragma unroll
  for (int mask = kLanes; mask < 32; mask *= 2) {  // the groups of the warp
    const float other_top = __shfl_xor_sync(kAllLanes, top, mask);
    const float new_top = fmaxf(top, other_top);
    const float mine = softmax_weight(top, new_top), other = softmax_weight(other_top, new_top);
    total = total * mine + __shfl_xor_sync(kAllLanes, total, mask) * other;
    top = new_top;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) out[i] = out[i] * mine + __shfl_xor_sync(kAllLanes, out[i], mask) * other;
  }

  __shared__ float outs[kDecodeWarps][D], tops[kDecodeWarps], totals[kDecodeWarps];
  if (lane < kLanes && active) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) outs[warp][element + i] = out[i];
  }
  if (lane == 0) tops[warp] = top, totals[warp] = total;
  __syncthreads();
  const int d = static_cast<int>(threadIdx.x);
  if (d >= D) return;
  float merged_top = kMinusInfinity, merged_total = 0, merged = 0;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) merged_top = fmaxf(merged_top, tops[w]);
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    const float weight = softmax_weight(tops[w], merged_top);
    merged_total += totals[w] * weight;
    merged += outs[w][d] * weight;
  }
  store_attention<T>(p, sequence, head, split, d, merged, merged_total, merged_top);
}

template <typename T, typename C>
const char* start(const DecodeParams& p, void* stream) {
  const Grid grid = {static_cast<unsigned>(p.splits), static_cast<unsigned>(p.heads),
                     static_cast<unsigned>(p.batch)};
  switch (p.head_dim) {
    case 32:
      return launch(decode_attention_kernel<T, C, 32>, grid, kThreads, p, stream);
    case 64:
      return launch(decode_attention_kernel<T, C, 64>, grid, kThreads, p, stream);
    case 80:
      return launch(decode_attention_kernel<T, C, 80>, grid, kThreads, p, stream);
    case 96:
      return launch(decode_attention_kernel<T, C, 96>, grid, kThreads, p, stream);
    case 128:
      return launch(decode_attention_kernel<T, C, 128>, grid, kThreads, p, stream);
    default:
      return "decode_attention: there is no kernel for this head size";
  }
}

}  // namespace

const char* decode_attention(const DecodeParams& p, void* stream) {
  const bool int8 = p.cache == Data::kInt8;
  if (p.data == Data::kFloat16)
    return int8 ? start<Half, std::int8_t>(p, stream) : start<Half, Half>(p, stream);
  return int8 ? start<BFloat16, std::int8_t>(p, stream) : start<BFloat16, BFloat16>(p, stream);
}

}  // namespace minilm::cuda
