// exp, erf and the activation functions on vectors of float32, from polynomials.
#pragma once

#include "cpu/vec.h"
#include "params.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace minilm::MINILM_ISA {

using I32 = VectorOf<std::int32_t, kLanes<float>>::type;

// a > b ? a : b, so b if one is not a number; one instruction, which gcc does not always find.
inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xFFFF, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xFFFF, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// To the nearest, ties to even. Adding 1.5 * 2^23 would do it too, unless it is contracted with what comes
// before, and that differs between instruction sets.
inline I32 round_to_integer(F32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<I32>(_mm512_maskz_cvtps_epi32(0xFFFF, x));
#elif defined(__AVX2__)
  return reinterpret_cast<I32>(_mm256_cvtps_epi32(x));
#elif defined(__x86_64__)
  return reinterpret_cast<I32>(_mm_cvtps_epi32(x));
#elif defined(__aarch64__)
  return reinterpret_cast<I32>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
#else
  I32 out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = static_cast<std::int32_t>(__builtin_rintf(x[i]));
  return out;
#endif
}

// The errors that are stated here are measured in tests/ops/test_native_linear.py.

// e^x, relative error below 2e-7; 0 below -87.3, which is where the result stops being a normal number;
// infinity above 88.7; NaN stays NaN.
//
// x = n log(2) + r with |r| <= log(2) / 2: e^r by its Taylor polynomial to r^7, times 2^n in two steps.
inline F32 exp(F32 x) {
  const F32 bounded = min(max(x, F32{} - 104.0f), F32{} + 89.0f);
  const F32 magic = F32{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F32 shifted = bounded * 1.44269504088896341f + magic;
  const F32 n = shifted - magic;
  const F32 r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = F32{} + 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I32 exponent = bit_cast<I32>(shifted) - 0x4B400000;
  const I32 half = exponent >> 1;
  const F32 low = bit_cast<F32>((half + 127) << 23);
  const F32 high = bit_cast<F32>((exponent - half + 127) << 23);
  F32 y = (p * low) * high;
  y = x < -87.3f ? F32{} : y;
  return x != x ? x : y;
}

// 2^x for x <= 0, relative error below 1.5e-7; what is below 2^-125 becomes that. NaN stays NaN.
//
// x = n + r with |r| <= 1/2: 2^r by a polynomial, fitted to 2e-9, times 2^n.
inline F32 exp2_of_negative(F32 x) {
  const F32 bounded = max(F32{} - 125.0f, x);
  const F32 magic = F32{} + 12582912.0f;  // as in exp
  const F32 shifted = bounded + magic;
  const F32 r = bounded - (shifted - magic);
  F32 p = F32{} + 0.000153458095f;
  p = p * r + 0.00133999309f;
  p = p * r + 0.00961848907f;
  p = p * r + 0.0555032864f;
  p = p * r + 0.240226462f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  return p * bit_cast<F32>((bit_cast<I32>(shifted) - (0x4B400000 - 127)) << 23);
}

inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

// x Phi(x), absolute error below 2.5e-7 |x| (twice that of the formula with a correctly rounded erf, which
// loses as much where 1 + erf is a difference of near numbers). Phi(x) = 1/2 + x P(x^2) / Q(x^2) with P and Q
// of degree 5 fitted on |x| <= 5.4; beyond it, Phi is 0 or 1 in float32.
inline F32 gelu(F32 x) {
  const F32 bounded = min(max(x, F32{} - 5.4f), F32{} + 5.4f);
  const F32 u = bounded * bounded;
  F32 p = F32{} + 2.27743495e-08f;
  p = p * u + 6.49000049e-06f;
  p = p * u + 0.000176266374f;
  p = p * u + 0.00472240616f;
  p = p * u + 0.034492515f;
  p = p * u + 0.398942053f;
  F32 q = F32{} + 1.20855645e-06f;
  q = q * u + 7.65080986e-05f;
  q = q * u + 0.00192549988f;
  q = q * u + 0.0290280934f;
  q = q * u + 0.253124207f;
  q = q * u + 1.0f;
  const F32 phi = bounded * (p / q) + 0.5f;
  return x * (x < -5.4f ? F32{} : phi);
}

// Absolute error below 2e-7 |x|; so that of x sigmoid(1.702 x). Of x sigmoid(x), relative: below 4e-7, down
// to -88.7, where it becomes 0.
inline F32 gelu_tanh(F32 x) {
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));  // tanh(u) = 2 sigmoid(2 u) - 1
}

// Relative error below 1e-6. Near zero, 2 sigmoid(2 x) - 1 is a difference of near numbers.
inline F32 tanh(F32 x) {
  const F32 u = x * x;
  F32 p = F32{} + 0.021869488f;
  p = p * u - 0.053968254f;
  p = p * u + 0.13333333f;
  p = p * u - 0.33333333f;
  const F32 far = 2.0f * sigmoid(2.0f * x) - 1.0f;
  return u < 0.0625f ? x + x * (u * p) : far;
}

// x[0, count) to limit tanh(x / limit), vector by vector; `count` may end within one.
inline void cap(float* x, std::int64_t count, float limit) {
  const float inverse = 1.0f / limit;
  std::int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store(x + i, limit * tanh(load(x + i) * inverse));
  if (i < count)
    store(x + i, limit * tanh(load(x + i, static_cast<int>(count - i)) * inverse),
          static_cast<int>(count - i));
}

inline F32 activate(Activation activation, F32 x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kRelu:
      return x < 0 ? F32{} : x;  // a NaN passes
    case Activation::kQuickGelu:
      return x * sigmoid(1.702f * x);
    case Activation::kTanh:
      return tanh(x);
  }
  return x;
}

}  // namespace minilm::MINILM_ISA
