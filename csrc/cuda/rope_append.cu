// Rotary embedding and cache append in one pass: turned queries and keys, and the new keys and values where
// the paged cache keeps them (Su et al. 2021, arXiv:2104.09864). Without angles, the append alone.
//
//   low' = low cos - high sin      high' = high cos + low sin      for the pairs (i, i + D / 2) of a head
//   int8 cache: scale = max |x| / 127 over the head, code = x / scale, rounded to nearest even
//
// Layout: a row is one head of one token; 8 elements of its low half and the 8 that pair with them belong to
// a lane, so D / 16 lanes (of a power of two: the others idle) turn a row without talking to each other.
//
//   rows of token t:   q0 q1 .. q(H-1)  k0 .. k(Hkv-1)  v0 .. v(Hkv-1)
//   lane j of a row:   [8 j .. 8 j + 7] and [D/2 + 8 j .. D/2 + 8 j + 7], 16 bytes each
//
// Bytes: (2 H + 3 Hkv) D b a token for q, k, v and the results, 2 Hkv D c into the cache (b, c: bytes of an
// element), 4 D for the angles, from the caches. Six operations a pair: memory is the limit with many
// tokens, the start of the kernel with few.

#include "cuda/device.h"

namespace minilm::cuda {
namespace {

constexpr int kThreads = 256;

// The 16 elements of a lane into int8 codes; all lanes of the row must come here.
MINILM_DEVICE void store_codes(std::int8_t* to, float* scale_to, const float (&low)[8],
                               const float (&high)[8], int half, bool active, bool first, int lanes) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fmaxf(fabsf(low[i]), fabsf(high[i])));
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, mask));
  }
  if (!active) return;
  const float scale = largest / 127.0f;
  if (first) *scale_to = scale;
  std::uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float code = scale > 0 ? rintf((i < 8 ? low[i] : high[i - 8]) / scale) : 0.0f;
    words[i / 4] |= (static_cast<std::uint32_t>(static_cast<int>(code)) & 0xffu) << 8 * (i % 4);
  }
  std::uint32_t* low_to = reinterpret_cast<std::uint32_t*>(to);
  std::uint32_t* high_to = reinterpret_cast<std::uint32_t*>(to + half);
  low_to[0] = words[0], low_to[1] = words[1];
  high_to[0] = words[2], high_to[1] = words[3];
}

// T: data. C: cache, T or int8.
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppendParams p) {
  const int half = p.head_dim / 2;
  const int lanes = power_of_two_from(p.head_dim / 16);
  const int q_heads = p.q == nullptr ? 0 : p.heads;
  const std::int64_t rows = p.tokens * (q_heads + 2 * p.kv_heads);
  const std::int64_t row = blockIdx.x * static_cast<std::int64_t>(kThreads / lanes) + threadIdx.x / lanes;
  const int begin = static_cast<int>(threadIdx.x) % lanes * 8;
  const bool active = row < rows && begin < half;  // the others stay for the shuffles
  const RopeRow at = rope_row(row < rows ? row : rows - 1, q_heads, p.kv_heads);

  const T* from = static_cast<const T*>(at.role == Role::kQuery ? p.q : at.role == Role::kKey ? p.k : p.v);
  const std::int64_t stride = at.role == Role::kQuery ? p.q_stride
                              : at.role == Role::kKey ? p.k_stride
                                                      : p.v_stride;
  float low[8] = {}, high[8] = {};
  if (active) {
    from += at.token * stride + at.head * p.head_dim + begin;
    load8(from, low);
    load8(from + half, high);
  }
  if (active && p.cos != nullptr && at.role != Role::kValue) {
    const float* cos = p.cos + at.token * half + begin;
    const float* sin = p.sin + at.token * half + begin;
    const bool query = at.role == Role::kQuery;
    T* to = static_cast<T*>(query ? p.q_out : p.k_out) +
            (at.token * (query ? p.heads : p.kv_heads) + at.head) * p.head_dim + begin;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float turned = low[i] * cos[i] - high[i] * sin[i];
      high[i] = high[i] * cos[i] + low[i] * sin[i];
      low[i] = turned;
    }
    const Words low_words = narrow<T>(low), high_words = narrow<T>(high);
    store(to, low_words);
    store(to + half, high_words);
    widen<T>(low_words, low);  // the cache holds what is returned
    widen<T>(high_words, high);
  }

  const std::int64_t slot = p.slots[at.token];
  const bool stored = active && at.role != Role::kQuery && slot >= 0 && slot < p.slot_count;
  const std::int64_t head = slot * p.kv_heads + at.head;
  C* to = static_cast<C*>(at.role == Role::kKey ? p.k_pages : p.v_pages) + head * p.head_dim + begin;
  if constexpr (sizeof(C) == 1) {
    float* scale = (at.role == Role::kKey ? p.k_scales : p.v_scales) + head;
    store_codes(to, scale, low, high, half, stored, begin == 0, lanes);
  } else if (stored) {
    store8(to, low);
    store8(to + half, high);
  }
}

template <typename T>
const char* start(const RopeAppendParams& p, void* stream) {
  const int rows_a_block = kThreads / power_of_two_from(p.head_dim / 16);
  const std::int64_t rows = p.tokens * ((p.q == nullptr ? 0 : p.heads) + 2 * p.kv_heads);
  const Grid grid = {static_cast<unsigned>(ceil_div(rows, rows_a_block))};
  if (rows == 0) return nullptr;
  return p.cache == Data::kInt8 ? launch(rope_append_kernel<T, std::int8_t>, grid, kThreads, p, stream)
                                : launch(rope_append_kernel<T, T>, grid, kThreads, p, stream);
}

}  // namespace

const char* rope_append(const RopeAppendParams& p, void* stream) {
  return p.data == Data::kFloat16 ? start<Half>(p, stream) : start<BFloat16>(p, stream);
}

}  // namespace minilm::cuda
