// Rope and attention in double.
#pragma once

#include "cpu/dispatch.h"
#include "numbers.h"

namespace minilm::tests {

// The first `rotated` channels of a head.
inline void turn(double* x, const float* cos, const float* sin, std::int64_t rotated) {
  for (std::int64_t i = 0; i < rotated / 2; ++i) {
    const double low = x[i], high = x[i + rotated / 2];
    x[i] = low * cos[i] - high * sin[i];
    x[i + rotated / 2] = high * cos[i] + low * sin[i];
  }
}

// x times weight over the root of its mean square, in place.
inline void root_norm(double* x, const float* weight, std::int64_t size, double eps) {
  double squares = 0;
  for (std::int64_t i = 0; i < size; ++i) squares += x[i] * x[i] / static_cast<double>(size);
  for (std::int64_t i = 0; i < size; ++i) x[i] *= weight[i] / std::sqrt(squares + eps);
}

// Whether pairs of bfloat16 are multiplied.
inline bool has_pairs() { return cpu_kernels().prepared_row_bytes(Format::kBFloat16, 2) > 0; }

// softmax(scale q k^T) v in double, for one query; `seen(key)` tells which keys count; a soft cap of 0 is
// none. With `pairs` what is multiplied is rounded to bfloat16: q after scaling, and probabilities before
// they are divided by their sum.
template <typename Seen, typename At>
inline Doubles attended(const float* q, std::int64_t keys, std::int64_t size, float scale, float soft_cap,
                        Seen seen, At at, bool pairs) {
  const auto half = [&](double x) { return pairs ? rounded(DType::kBFloat16, x) : x; };
  constexpr float kLog2E = 1.44269504088896341f;
  const float factor = soft_cap > 0 ? scale / soft_cap : scale * kLog2E;
  Doubles scores, out(size);
  double top = -INFINITY, total = 0;
  for (std::int64_t key = 0; key < keys; ++key) {
    double score = 0;
    for (std::int64_t i = 0; i < size; ++i) score += half(q[i] * factor) * half(at(false, key, i));
    if (soft_cap > 0) score = soft_cap * kLog2E * std::tanh(score);
    scores.push_back(seen(key) ? score : -INFINITY);
    top = std::max(top, scores.back());
  }
  for (double& score : scores) total += score = std::exp2(score - top);
  for (std::int64_t key = 0; key < keys; ++key) {
    for (std::int64_t i = 0; i < size; ++i) out[i] += half(scores[key]) / total * half(at(true, key, i));
  }
  return out;
}

}  // namespace minilm::tests
