// The keys that a query sees, and the location of keys and values: packed rows, or pages of a cache.
#pragma once

#include "cpu/vec.h"
#include "params.h"

namespace minilm::MINILM_ISA {

constexpr float kLowest = -__builtin_inff();

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// How many lanes of a vector `n` elements fill: 1..kLanes.
inline int lanes_left(std::int64_t n) {
  return n < 1 ? 1 : n > kLanes<float> ? kLanes<float> : static_cast<int>(n);
}

// The keys that query number `query` of a sequence sees: [first, last).
struct Seen {
  std::int64_t first, last;
};
inline Seen seen(const AttentionParams& p, std::int64_t query, std::int64_t queries, std::int64_t keys) {
  const std::int64_t place = query + keys - queries;  // the last query stands at the last key
  Seen s = {0, keys};
  if (p.causal) s.last = least(keys, place + 1);
  if (p.window > 0) {
    s.first = most(0, place - p.window + 1);
    s.last = least(s.last, place + p.window);
  }
  return s;
}

// Row `key` of the keys or values of `sequence`, for its key head.
template <typename T>
inline const T* row_of(const AttentionParams& p, const void* base, std::int64_t sequence, std::int64_t key,
                       std::int64_t kv_head) {
  const T* rows = static_cast<const T*>(base);
  if (p.block_table == nullptr) return rows + (p.cu_k[sequence] + key) * p.kv_stride + kv_head * p.head_dim;
  const std::int64_t page = p.block_table[sequence * p.table_width + key / p.page_size];
  return rows + ((page * p.page_size + key % p.page_size) * p.kv_heads + kv_head) * p.head_dim;
}

// The scale of that row, where keys and values are codes.
inline float scale_of(const AttentionParams& p, const float* scales, std::int64_t sequence, std::int64_t key,
                      std::int64_t kv_head) {
  const std::int64_t page = p.block_table[sequence * p.table_width + key / p.page_size];
  return scales[(page * p.page_size + key % p.page_size) * p.kv_heads + kv_head];
}

inline std::int64_t key_count(const AttentionParams& p, std::int64_t sequence) {
  return p.block_table != nullptr ? p.context[sequence] : p.cu_k[sequence + 1] - p.cu_k[sequence];
}

}  // namespace minilm::MINILM_ISA
