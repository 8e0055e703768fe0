// The next token of each row, chosen on the device: the best one, or one drawn after temperature, top-k,
// top-p and min-p, in this order. A block for each row of scores.
//
//   w_i = exp((x_i - max x) / temperature)      relative probability, at most 1
//   top-k:   x_i >= the k-th best
//   top-p:   x_i >= t, the largest t from which on the w add up to p of all that is left
//   min-p:   w_i >= p                           equal scores stand or fall together
//   token:   the smallest i with w_0 + .. + w_i > u (w_0 + .. + w_(V-1)),  u from Philox at (seed, sequence,
//            step)
//
// Weights are summed as whole numbers, w 2^40: then sums do not depend on the order of threads, and what is
// drawn depends on the row and its (seed, sequence, step) alone, in any batch.
//
// Layout: thresholds are found by radix selection on the scores' bits, made to sort as unsigned numbers do;
// each warp counts into a histogram of its own:
//
//   bits 31..24   256 sums, from the highest bin down until `need` is met: the bin, and the rest of `need`
//   bits 23..16   the same among the scores in that bin; then bits 15..8 and 7..0
//
// To draw, 16 warps sum a sixteenth of the row each, the part that holds the point is cut in 16 again, and so
// on until 32 tokens are left.
//
// Bytes: 4 V to find the best, and 4 V for each of up to 12 further passes, from the second-level cache. A
// row has one multiprocessor: its bandwidth and its shared-memory atomics are the limit, not memory.

#include "cuda/device.h"
#include "cuda/philox.h"

namespace minilm::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kBins = 256;
constexpr float kOne = 1099511627776.0f;  // 2^40
using Sum = unsigned long long;

// Bits that sort as the numbers do; -0 below 0.
MINILM_DEVICE std::uint32_t sortable(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Row {
  float largest, inverse;  // exponent = (x - largest) * inverse, to base 2
  std::uint32_t floor;     // scores below are ruled out
  Sum least;               // so are smaller weights
};

MINILM_DEVICE Sum weight(const Row& row, float x) {
  if (sortable(x) < row.floor) return 0;
  const Sum w = static_cast<Sum>(rintf(exp2f((x - row.largest) * row.inverse) * kOne));
  return w >= row.least ? w : 0;
}

// The sum of x over the block, in every thread.
MINILM_DEVICE Sum block_sum(Sum x, Sum* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  Sum total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  __syncthreads();
  return total;
}

// The largest key such that the scores from it upwards weigh `need` or more together. `counted`: each
// weighs 1.
template <typename T>
MINILM_DEVICE std::uint32_t threshold(const T* x, int count, const Row& row, bool counted, Sum need) {
  __shared__ Sum bins[kWarps][kBins];
  __shared__ std::uint32_t found;
  __shared__ Sum rest;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  std::uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = lane; bin < kBins; bin += 32) bins[warp][bin] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const float score = to_float(x[i]);
      const std::uint32_t key = sortable(score);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      const Sum w = counted ? 1 : weight(row, score);
      if (w != 0) atomicAdd(&bins[warp][key >> shift & 0xff], w);
    }
    __syncthreads();
    if (warp == 0) {  // 8 bins a lane, lane 0 the highest
      Sum own[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        own[i] = 0;
        for (int w = 0; w < kWarps; ++w) own[i] += bins[w][kBins - 1 - 8 * lane - i];
        sum += own[i];
      }
      Sum through = sum;  // of this lane and those before
      for (int by = 1; by < 32; by *= 2) {
        const Sum before = __shfl_up_sync(kAllLanes, through, by);
        if (lane >= by) through += before;
      }
      if (through >= need && through - sum < need) {
        Sum left = need - (through - sum);
        bool open = true;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (open && own[i] >= left) {
            found = static_cast<std::uint32_t>(kBins - 1 - 8 * lane - i);
            rest = left;
            open = false;
          }
          left -= own[i];
        }
      }
    }
    __syncthreads();
    prefix = prefix << 8 | found;
    need = rest;
    __syncthreads();
  }
  return prefix;
}

// The smallest token whose weights, summed up to and with it, exceed `target`.
template <typename T>
MINILM_DEVICE int token_at(const T* x, int count, const Row& row, Sum target) {
  __shared__ Sum sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int begin = 0, end = count;
  while (end - begin > 32) {
    const int part = static_cast<int>(ceil_div(end - begin, kWarps));
    Sum sum = 0;
    for (int i = begin + warp * part + lane; i < smaller(end, begin + (warp + 1) * part); i += 32) {
      sum += weight(row, to_float(x[i]));
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    int w = 0;
    while (w < kWarps - 1 && sums[w] <= target) target -= sums[w++];
    begin += w * part;
    end = smaller(end, begin + part);
    __syncthreads();
  }
  Sum through = begin + lane < end ? weight(row, to_float(x[begin + lane])) : 0;
  for (int by = 1; by < 32; by *= 2) {
    const Sum before = __shfl_up_sync(kAllLanes, through, by);
    if (lane >= by) through += before;
  }
  return begin + __ffs(__ballot_sync(kAllLanes, through > target)) - 1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleParams p) {
  __shared__ Sum shared[kWarps];
  __shared__ int undefined;
  const std::int64_t index = blockIdx.x;
  const T* x = static_cast<const T*>(p.logits) + index * p.stride;
  const int count = p.vocabulary;
  if (threadIdx.x == 0) undefined = 0;
  __syncthreads();

  Sum best = 0;  // key, then the first index of it
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const float score = to_float(x[i]);
    if (score != score) undefined = 1;
    const Sum candidate = static_cast<Sum>(sortable(score)) << 32 | (0xffffffffu - static_cast<unsigned>(i));
    best = candidate > best ? candidate : best;
  }
  best = warp_max(best);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) best = shared[w] > best ? shared[w] : best;
  __syncthreads();
  const int first = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
  const float largest = to_float(x[first]);
  const float temperature = p.temperature[index];
  const bool drawn = temperature > 0;
  if (undefined != 0 || largest == kMinusInfinity || (drawn && largest == -kMinusInfinity)) {
    if (threadIdx.x == 0) p.token[index] = -1;
    return;
  }
  if (!drawn) {
    if (threadIdx.x == 0) p.token[index] = first;
    return;
  }

  Row row = {largest, kLog2E / temperature, 0, 1};
  const int top_k = p.top_k[index];
  if (top_k > 0 && top_k < count) row.floor = threshold(x, count, row, true, static_cast<Sum>(top_k));
  const auto total = [&] {
    Sum sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) sum += weight(row, to_float(x[i]));
    return block_sum(sum, shared);
  };
  Sum all = total();
  const float top_p = p.top_p[index];
  if (top_p < 1) {
    const Sum need = static_cast<Sum>(ceil(static_cast<double>(top_p) * static_cast<double>(all)));
    const Sum within = need > all ? all : need;
    row.floor = threshold(x, count, row, false, within > 1 ? within : 1);
    all = total();
  }
  const float min_p = p.min_p[index];
  if (min_p > 0) {
    row.least = static_cast<Sum>(ceilf(min_p * kOne));
    all = total();
  }
  const Sum bits = random_bits(p.seed[index], p.sequence[index], p.step[index]);
  const int token = token_at(x, count, row, __umul64hi(all, bits));
  if (threadIdx.x == 0) p.token[index] = token;
}

}  // namespace

const char* sample(const SampleParams& p, void* stream) {
  const Grid grid = {static_cast<unsigned>(p.rows)};
  if (p.rows == 0) return nullptr;
  switch (p.data) {
    case Data::kFloat16:
      return launch(sample_kernel<Half>, grid, kThreads, p, stream);
    case Data::kBFloat16:
      return launch(sample_kernel<BFloat16>, grid, kThreads, p, stream);
    default:
      return launch(sample_kernel<float>, grid, kThreads, p, stream);
  }
}

}  // namespace minilm::cuda
