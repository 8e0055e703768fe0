// Attention of one head or one stretch of keys; see attention.cpp.
#pragma once

#include "cpu/vec.h"
#include "params.h"

namespace minilm::MINILM_ISA {

// A decoding step cuts the keys of a sequence into stretches, so that threads share them: a sixteenth each,
// but no fewer than kShortest keys and no more than kChunk. How many depends on the sequence's own length
// alone.
constexpr std::int64_t kShortest = 32, kChunk = 128;
inline std::int64_t stretch_keys(std::int64_t keys) {
  const std::int64_t share = (keys + 255) / 256 * 16;
  return share < kShortest ? kShortest : share < kChunk ? share : kChunk;
}
inline std::int64_t stretches(std::int64_t keys) {
  return (keys + stretch_keys(keys) - 1) / stretch_keys(keys);
}

// No sequence of up to max_keys has more.
inline std::int64_t most_stretches(std::int64_t max_keys) {
  const std::int64_t short_ones = (max_keys + kShortest - 1) / kShortest;
  const std::int64_t long_ones = (max_keys + kChunk - 1) / kChunk;
  return short_ones < 16 ? short_ones : long_ones < 16 ? 16 : long_ones;
}

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
