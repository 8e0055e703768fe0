// Shared by the kernels of decode attention: storing a result.
#pragma once

#include "cuda/device.h"

namespace minilm::cuda {

// Stores element `d` of the attention of head `head`, whose unnormalised sum is `sum`, with weights that add
// up to `total`: as the result where there is one split, else as this split's part.
template <typename T>
MINILM_DEVICE void store_attention(const DecodeParams& p, int sequence, int head, int split, int d, float sum,
                                   float total, float top) {
  const std::int64_t row = static_cast<std::int64_t>(sequence) * p.heads + head;
  const float value = total > 0 ? sum / total : 0.0f;
  if (p.splits == 1) {
    static_cast<T*>(p.out)[row * p.head_dim + d] = round_to<T>(value);
    return;
  }
  const std::int64_t part = row * p.splits + split;
  p.partial[part * p.head_dim + d] = value;
  if (d == 0) p.lse[part] = total > 0 ? top + log2f(total) : kMinusInfinity;
}

}  // namespace minilm::cuda
