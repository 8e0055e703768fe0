// Mean pooling of a sentence encoder: the mean of each text's tokens, scaled to length 1.
//
//   y = sum_t x_t / T        a text without tokens gives zeros
//   y / max(|y|, 1e-12)      optional
//
// Bytes: the hidden states once. Threads split the texts. Stretches of tokens are summed separately, as the
// rounding error of a long sum grows with its length; a text's result does not depend on the others.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kStretch = 64;  // tokens

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "pool: ", what); }

// y [C] = mean of `tokens` rows.
void mean(const float* x, int64_t tokens, int64_t channels, float* part, float* y) {
  std::fill(y, y + channels, 0.0f);
  for (int64_t begin = 0; begin < tokens; begin += kStretch) {
    std::fill(part, part + channels, 0.0f);
    for (int64_t t = begin; t < std::min(tokens, begin + kStretch); ++t) {
      for (int64_t c = 0; c < channels; ++c) part[c] += x[t * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) y[c] += part[c];
  }
  if (tokens == 0) return;
  for (int64_t c = 0; c < channels; ++c) y[c] /= static_cast<float>(tokens);
}

void scale_to_one(float* y, int64_t channels) {
  double squares = 0;
  for (int64_t c = 0; c < channels; ++c) squares += static_cast<double>(y[c]) * y[c];
  const auto length = static_cast<float>(std::max(std::sqrt(squares), 1e-12));
  for (int64_t c = 0; c < channels; ++c) y[c] /= length;
}

// x float32 [T, C], cu_seqlens int32 [B + 1] -> float32 [B, C].
Tensor pool(const Tensor& x, const Tensor& cu_seqlens, bool unit) {
  check(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.dim() == 2,
        "x must be contiguous float32 [T, C]");
  check(cu_seqlens.is_cpu() && cu_seqlens.is_contiguous() && cu_seqlens.scalar_type() == ScalarType::Int &&
            cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
        "cu_seqlens must be contiguous int32 [B + 1]");
  const int64_t tokens = x.size(0), channels = x.size(1), texts = cu_seqlens.size(0) - 1;
  const auto* ends = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  check(ends[0] == 0 && ends[texts] == tokens && std::is_sorted(ends, ends + texts + 1),
        "cu_seqlens must rise from 0 to T");
  Tensor y = torch::stable::new_empty(x, {texts, channels}, ScalarType::Float);
  if (texts == 0 || channels == 0) return y;
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 65536 * texts / std::max<int64_t>(1, tokens * channels));
  minilm::parallel(texts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> part(static_cast<size_t>(channels));
    for (int64_t b = begin; b < end; ++b) {
      float* row = to + b * channels;
      mean(from + ends[b] * channels, ends[b + 1] - ends[b], channels, part.data(), row);
      if (unit) scale_to_one(row, channels);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) { m.def("pool(Tensor x, Tensor cu_seqlens, bool unit) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) { m.impl("pool", TORCH_BOX(&pool)); }
