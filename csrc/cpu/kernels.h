// The table of CPU kernels, one for each instruction set.
#pragma once

#include <cstdint>

#include "params.h"

namespace minilm {

// One instruction set's kernels. Those with [begin, end) process that part of the rows (linear: of the panels
// of y) and may be called from several threads at once.
struct CpuKernels {
  const char* name;
  int panel;  // outputs a panel of a packed linear layer
  void (*layer_norm)(const LayerNormParams& params, std::int64_t begin, std::int64_t end);
  std::int64_t (*packed_bytes)(Format format, std::int64_t in, std::int64_t places);
  void (*pack)(const PackParams& params);
  void (*unpack)(const UnpackParams& params, std::int64_t begin, std::int64_t end);  // places
  // Bytes of a row of x as `linear` reads it, and rows brought there. 0: it reads them as they are, float32.
  std::int64_t (*prepared_row_bytes)(Format format, std::int64_t in);
  void (*prepare_rows)(Format format, const float* x, std::int64_t x_stride, std::int64_t in,
                       std::int64_t begin, std::int64_t end, void* to);
  void (*linear)(const LinearParams& params, std::int64_t begin, std::int64_t end);
  void (*rms_norm)(const RmsNormParams& params, std::int64_t begin, std::int64_t end);
  void (*rope)(const RopeParams& params, std::int64_t begin, std::int64_t end);
  void (*append_rows)(const AppendParams& params, std::int64_t begin, std::int64_t end);

  // Packed rows: one head of one sequence; scratch: attention_scratch floats.
  std::int64_t (*attention_scratch)(const AttentionParams& params, std::int64_t max_keys);
  void (*attention)(const AttentionParams& params, std::int64_t sequence, std::int64_t head, float* scratch);

  // Some queries over pages: all chunks of keys for all key heads, then every query and head; or all blocks
  // of queries. See cpu/attention.h.
  std::int64_t (*paged_chunks)(std::int64_t keys);
  std::int64_t (*paged_blocks)(const AttentionParams& params, std::int64_t queries);
  std::int64_t (*paged_partial)(const AttentionParams& params);
  std::int64_t (*paged_scratch)(const AttentionParams& params);
  void (*paged_chunk)(const AttentionParams& params, std::int64_t sequence, std::int64_t kv_head,
                      std::int64_t chunk, std::int64_t chunks, float* partials, float* scratch);
  void (*paged_merge)(const AttentionParams& params, std::int64_t sequence, std::int64_t query,
                      std::int64_t head, std::int64_t chunks, float* partials);
  void (*paged_block)(const AttentionParams& params, std::int64_t sequence, std::int64_t kv_head,
                      std::int64_t block, float* scratch);

  // Decoding: every stretch of keys of a sequence, then every head. The sequence's partial results take
  // decode_partials floats, a thread's scratch decode_scratch.
  std::int64_t (*stretches)(std::int64_t keys);
  std::int64_t (*most_stretches)(std::int64_t max_keys);  // of any sequence of up to max_keys
  std::int64_t (*decode_partials)(const AttentionParams& params, std::int64_t max_keys);
  std::int64_t (*decode_scratch)(const AttentionParams& params);
  void (*decode)(const AttentionParams& params, std::int64_t sequence, std::int64_t number, float* partials,
                 float* scratch);
  void (*combine)(const AttentionParams& params, std::int64_t sequence, std::int64_t head,
                  const float* partials);

  // All blocks of a Transformer: every thread of a team calls it once. Workspace in bytes; those that must be
  // zero come first.
  std::int64_t (*transformer_counters)(const TransformerParams& params);
  std::int64_t (*transformer_workspace)(const TransformerParams& params);
  Waited (*transformer)(const TransformerParams& params);
};

}  // namespace minilm
