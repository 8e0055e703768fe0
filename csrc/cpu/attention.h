// Attention of one head or one stretch of keys; attention.cpp explains.
#pragma once

#include "cpu/vec.h"
#include "params.h"

namespace minilm::MINILM_ISA {

constexpr std::int64_t kChunk = 128;  // keys in a stretch of decoding
inline std::int64_t stretches(std::int64_t keys) { return (keys + kChunk - 1) / kChunk; }

// Floats of scratch memory that `attention` needs for sequences of up to max_keys keys.
std::int64_t attention_scratch(const AttentionParams& p, std::int64_t max_keys);
void attention(const AttentionParams& p, std::int64_t sequence, std::int64_t head, float* scratch);

// Attention of a sequence's only query over its pages: every stretch of keys, then every head. `partials`
// belongs to the sequence: decode_partials floats; `scratch` to the thread: decode_scratch floats.
std::int64_t decode_partials(const AttentionParams& p, std::int64_t max_keys);
std::int64_t decode_scratch(const AttentionParams& p);
void decode(const AttentionParams& p, std::int64_t sequence, std::int64_t number, float* partials,
            float* scratch);
void combine(const AttentionParams& p, std::int64_t sequence, std::int64_t head, const float* partials);

}  // namespace minilm::MINILM_ISA
