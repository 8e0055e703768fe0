// All blocks of a Transformer in one call; see transformer.cpp.
#pragma once

#include <cstdint>

#include "params.h"

namespace minilm::MINILM_ISA {

std::int64_t transformer_counters(const TransformerParams& p);
std::int64_t transformer_workspace(const TransformerParams& p);
Waited transformer(const TransformerParams& p);

}  // namespace minilm::MINILM_ISA
