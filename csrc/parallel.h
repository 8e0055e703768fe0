// Parallel loops on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "threads.h"

namespace minilm {

// f(begin, end) for parts of [0, count) of at least `grain`, on all threads; only on this one if the others
// have no free cores.
template <typename F>
void parallel(int64_t count, int64_t grain, F f) {
  if (count <= 0) return;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (crowding().allowed(threads, nanoseconds(CLOCK_MONOTONIC)) == 1) {
    f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

}  // namespace minilm
