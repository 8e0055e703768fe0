// Rotary embedding (Su et al. 2021, arXiv:2104.09864) of q and k, in place, and the append of k and v to the
// pages of the cache, in one pass over the rows of the fused projection. The first R channels of a head are
// turned, in most families all of its D.
//
//   (x_i, x_{i + R/2})  ->  (x_i cos_i - x_{i + R/2} sin_i,  x_{i + R/2} cos_i + x_i sin_i)     i < R / 2
//
//   row t:   q 0 | q 1 | ... | k 0 | ... | v 0 | ...        slot s of the pages:   k 0 | k 1 | ...
//
// Bytes a row: 8 (H + Hkv) D read and written in place, 2 Hkv D b appended; 6 operations for two elements.
// The rows have just been computed, so this runs from cache.

#include "cpu/math.h"
#include "cpu/rows.h"
#include "params.h"

namespace minilm::MINILM_ISA {
namespace {

inline std::int32_t most(std::int32_t a, std::int32_t b) { return a > b ? a : b; }

void turn(float* x, const float* cos, const float* sin, std::int64_t half) {
  std::int64_t i = 0;
  for (; i < half; i += kLanes<float>) {
    const int n = half - i < kLanes<float> ? static_cast<int>(half - i) : kLanes<float>;
    const F32 low = read(x + i, n), high = read(x + half + i, n), c = read(cos + i, n), s = read(sin + i, n);
    write(x + i, low * c - high * s, n);
    write(x + half + i, high * c + low * s, n);
  }
}

void normalise(float* x, const float* weight, std::int64_t size, float eps) {
  F32 squares[4] = {};
  for_each_vector<float>(size, [&](std::int64_t i, int n, int k) {
    const F32 value = read(x + i, n);
    squares[k] += value * value;
  });
  const float total = sum_lanes<float>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const float rstd = 1.0f / square_root(total / static_cast<float>(size) + eps);
  for_each_vector<float>(size, [&](std::int64_t i, int n, int) {
    write(x + i, (read(x + i, n) * rstd) * read(weight + i, n), n);
  });
}

template <typename T>
void append(const float* x, void* pages, std::int64_t slot, std::int64_t size) {
  T* to = static_cast<T*>(pages) + slot * size;
  for_each_vector<float>(
      size, [&](std::int64_t i, int n, int) { write(to + i, Storage<T>::round(read(x + i, n)), n); });
}

// A head as codes of -127..127 and the scale that its largest magnitude makes 127; NaN and infinity make the
// scale NaN or infinite, and so the head.
void append_codes(const float* x, std::int64_t size, std::int8_t* to, float* scale) {
  I32 magnitudes = {};  // as integers, floats order like their values, infinity above all and NaN above it
  for_each_vector<float>(size, [&](std::int64_t i, int n, int) {
    const I32 magnitude = bit_cast<I32>(read(x + i, n)) & 0x7FFFFFFF;
    magnitudes = magnitude > magnitudes ? magnitude : magnitudes;
  });
  std::int32_t largest = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) largest = most(largest, magnitudes[lane]);
  *scale = bit_cast<float>(largest) / 127.0f;
  const float step = *scale == 0 || !(*scale <= __FLT_MAX__) ? 1.0f : *scale;
  const bool finite = *scale <= __FLT_MAX__;
  for_each_vector<float>(size, [&](std::int64_t i, int n, int) {
    const F32 steps = finite ? read(x + i, n) / step : F32{};
    const I8 codes =
        __builtin_convertvector(round_to_integer(min(max(steps, F32{} - 127.0f), F32{} + 127.0f)), I8);
    __builtin_memcpy(to + i, &codes, n);
  });
}

// All heads of a row of keys or values to their slot.
void append(const AppendParams& p, const float* x, std::int64_t slot) {
  const std::int64_t size = p.heads * p.head_dim;
  switch (p.dtype) {
    case DType::kBFloat16:
      return append<BFloat16>(x, p.pages, slot, size);
    case DType::kFloat16:
      return append<Float16>(x, p.pages, slot, size);
    case DType::kInt8:
      for (std::int64_t head = 0; head < p.heads; ++head) {
        append_codes(x + head * p.head_dim, p.head_dim,
                     static_cast<std::int8_t*>(p.pages) + slot * size + head * p.head_dim,
                     p.scales + slot * p.heads + head);
      }
      return;
    default:
      return append<float>(x, p.pages, slot, size);
  }
}

}  // namespace

void append_rows(const AppendParams& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) append(p, p.x + row * p.x_stride, p.slots[row]);
}

void rope(const RopeParams& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t half = p.rotated / 2;
  const float* q_norm = p.norm_of_all ? nullptr : p.q_norm;
  const float* k_norm = p.norm_of_all ? nullptr : p.k_norm;
  const AppendParams keys = {p.cache_dtype, p.k,       p.stride,   p.kv_heads,
                             p.head_dim,    p.k_pages, p.k_scales, p.slots};
  const AppendParams values = {p.cache_dtype, p.v,       p.stride,   p.kv_heads,
                               p.head_dim,    p.v_pages, p.v_scales, p.slots};
  for (std::int64_t row = begin; row < end; ++row) {
    float* q = p.q + row * p.stride;
    float* k = p.k + row * p.stride;
    if (p.norm_of_all && p.q_norm != nullptr) normalise(q, p.q_norm, p.heads * p.head_dim, p.eps);
    if (p.norm_of_all && p.k_norm != nullptr) normalise(k, p.k_norm, p.kv_heads * p.head_dim, p.eps);
    for (std::int64_t head = 0; head < p.heads + p.kv_heads; ++head) {
      const bool is_key = head >= p.heads;
      float* x = is_key ? k + (head - p.heads) * p.head_dim : q + head * p.head_dim;
      const float* norm = is_key ? k_norm : q_norm;
      if (norm != nullptr) normalise(x, norm, p.head_dim, p.eps);
      if (p.cos != nullptr) turn(x, p.cos + row * half, p.sin + row * half, half);
    }
    if (p.k_pages != nullptr) {
      append_rows(keys, row, row + 1);
      append_rows(values, row, row + 1);
    }
  }
}

}  // namespace minilm::MINILM_ISA
