// The CPU kernels of the best instruction set of this machine, chosen once when the extension is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace minilm {

// The instruction sets that were compiled in and that this machine can run, the best last.
std::vector<std::string> runnable_isas();

// Makes `wanted` the table in use; empty: the best. Throws std::runtime_error if it is unknown or cannot run
// here.
void select_isa(const std::string& wanted);

const CpuKernels& cpu_kernels();

}  // namespace minilm
