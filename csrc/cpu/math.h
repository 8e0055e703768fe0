// exp, erf and the activation functions on vectors of float32, from polynomials.
#pragma once

#include "cpu/vec.h"
#include "params.h"

namespace minilm::MINILM_ISA {

using I32 = VectorOf<std::int32_t, kLanes<float>>::type;

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }

// e^x, relative error below 2e-7 (measured over all of float32 in tests/test_native_linear.py); 0 below
// -87.3, which is where the result stops being a normal number; infinity above 88.7; NaN stays NaN.
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

inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

// x Phi(x) = x / 2 erfc(-x / sqrt(2)). For a >= 0, erfc(a) = exp(-a^2) q(t) with t = 1 / (1 + a / 2) and a
// polynomial q fitted to exp(a^2) erfc(a); no difference of near numbers is taken, so that the left tail
// keeps its relative precision.
inline F32 gelu(F32 x) {
  const F32 a = (x < 0 ? -x : x) * 0.707106781186547524f;
  const F32 t = 1.0f / (1.0f + 0.5f * a);
  F32 q = F32{} + -0.0602450073f;
  q = q * t + 0.290092319f;
  q = q * t - 0.498125225f;
  q = q * t + 0.289944708f;
  q = q * t - 0.0343445763f;
  q = q * t + 0.205742702f;
  q = q * t + 0.242387518f;
  q = q * t + 0.282465786f;
  q = q * t + 0.282081723f;
  const F32 tail = 0.5f * exp(-a * a) * (q * t);
  return x * (x < 0 ? tail : 1.0f - tail);
}

inline F32 gelu_tanh(F32 x) {
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));  // tanh(u) = 2 sigmoid(2 u) - 1
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
  }
  return x;
}

}  // namespace minilm::MINILM_ISA
