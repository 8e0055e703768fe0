// The CPU kernels of the best instruction set that this machine runs, chosen once when the extension is
// loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace minilm {

// One row of the table: a kernel processes the rows [begin, end) and may be called from several threads at
// once.
struct CpuKernels {
  const char* name;
  void (*layer_norm)(const LayerNormParams& params, std::int64_t begin, std::int64_t end);
};

// The instruction sets that were compiled in and that this machine can run, the best last.
std::vector<std::string> runnable_isas();

// Makes `wanted` the table in use; empty: the best. Throws std::runtime_error if it is unknown or cannot run
// here.
void select_isa(const std::string& wanted);

const CpuKernels& cpu_kernels();

}  // namespace minilm
