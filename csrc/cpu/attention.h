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

// Attention over packed rows, one head of one sequence. Floats of scratch memory that it needs for sequences
// of up to max_keys keys.
std::int64_t attention_scratch(const AttentionParams& p, std::int64_t max_keys);
void attention(const AttentionParams& p, std::int64_t sequence, std::int64_t head, float* scratch);

// Attention of any number of queries over pages (paged_attention.cpp). Either every chunk of keys for every
// key head, then `paged_merge` for every query and head; `partials`: paged_partial floats for each query,
// head and chunk, of `chunks`, the most that a sequence has. Or every block of rows for every key head.
// `scratch` belongs to the thread: paged_scratch floats.
constexpr std::int64_t kPagedKeys = 256;
std::int64_t paged_chunks(std::int64_t keys);
std::int64_t paged_blocks(const AttentionParams& p, std::int64_t queries);
std::int64_t paged_partial(const AttentionParams& p);
std::int64_t paged_scratch(const AttentionParams& p);
void paged_chunk(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t chunk,
                 std::int64_t chunks, float* partials, float* scratch);
void paged_merge(const AttentionParams& p, std::int64_t sequence, std::int64_t query, std::int64_t head,
                 std::int64_t chunks, float* partials);
void paged_block(const AttentionParams& p, std::int64_t sequence, std::int64_t kv_head, std::int64_t block,
                 float* scratch);

// Attention of a sequence's only query over its pages: every stretch of keys, then every head. `partials`
// belongs to the sequence: decode_partials floats; `scratch` to the thread: decode_scratch floats.
std::int64_t decode_partials(const AttentionParams& p, std::int64_t max_keys);
std::int64_t decode_scratch(const AttentionParams& p);
void decode(const AttentionParams& p, std::int64_t sequence, std::int64_t number, float* partials,
            float* scratch);
void combine(const AttentionParams& p, std::int64_t sequence, std::int64_t head, const float* partials);

}  // namespace minilm::MINILM_ISA
