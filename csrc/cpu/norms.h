// Kernels that work on rows: layer_norm.cpp, rms_norm.cpp, rope.cpp.
#pragma once

#include <cstdint>

#include "params.h"

namespace minilm::MINILM_ISA {

void layer_norm(const LayerNormParams& p, std::int64_t begin, std::int64_t end);
void rms_norm(const RmsNormParams& p, std::int64_t begin, std::int64_t end);
void rope(const RopeParams& p, std::int64_t begin, std::int64_t end);
void append_rows(const AppendParams& p, std::int64_t begin, std::int64_t end);

}  // namespace minilm::MINILM_ISA
