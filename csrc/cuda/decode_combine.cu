// Merges the parts of a split context: each part is the softmax over its own tokens with the log-sum-exp of
// its scores.
//
//   out = sum_s w_s part_s / sum_s w_s        w_s = exp2(lse_s - max lse)
//
// A part without tokens has lse = -infinity, weighs nothing, and its values are not read.
//
// Layout: a warp for each query head of a sequence; a lane owns 4 elements, read as 16 bytes:
//
//   lane 0: [0..3]   lane 1: [4..7]   ...   lane D/4 - 1        splits one after another, two reads each
//
// Bytes: B H splits (4 D + 4), from the second-level cache, as the parts were just written. Limited by the
// launch of a kernel.

#include "cuda/device.h"

namespace minilm::cuda {
namespace {

constexpr int kWarps = 4;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) decode_combine_kernel(DecodeParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = blockIdx.x * static_cast<std::int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= static_cast<std::int64_t>(p.batch) * p.heads) return;  // whole warps
  const float* lse = p.lse + row * p.splits;
  float top = kMinusInfinity;
  for (int split = lane; split < p.splits; split += 32) top = fmaxf(top, lse[split]);
  top = warp_max(top);
  if (4 * lane >= p.head_dim) return;
  float total = 0, out[4] = {};
  const float* part = p.partial + row * p.splits * p.head_dim + 4 * lane;
  for (int split = 0; split < p.splits; ++split, part += p.head_dim) {
    const float weight = softmax_weight(lse[split], top);
    if (weight == 0) continue;
    const Words words = load(part);
    total += weight;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] += weight * bits_as<float>(words.x[i]);
  }
  const float inverse = total > 0 ? 1 / total : 0.0f;
  std::uint32_t* to = reinterpret_cast<std::uint32_t*>(static_cast<T*>(p.out) + row * p.head_dim + 4 * lane);
  to[0] = pair<T>(out[0] * inverse, out[1] * inverse);
  to[1] = pair<T>(out[2] * inverse, out[3] * inverse);
}

}  // namespace

const char* decode_combine(const DecodeParams& p, void* stream) {
  const Grid grid = {static_cast<unsigned>(ceil_div(static_cast<std::int64_t>(p.batch) * p.heads, kWarps))};
  return p.data == Data::kFloat16 ? launch(decode_combine_kernel<Half>, grid, 32 * kWarps, p, stream)
                                  : launch(decode_combine_kernel<BFloat16>, grid, 32 * kWarps, p, stream);
}

}  // namespace minilm::cuda
