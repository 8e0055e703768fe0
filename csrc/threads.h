// How many threads a pass has that keeps them together all along (cpu/team.h).
#pragma once

#include <atomic>
#include <cstdint>

namespace minilm {

struct ThreadLimit {
  std::atomic<std::int64_t> usual{0};  // PyTorch's own number of threads, which nobody chose
  std::atomic<std::int64_t> limit{0};  // that many instead, if they are fewer; 0: no limit
};

inline ThreadLimit& thread_limit() {
  static ThreadLimit limit;
  return limit;
}

// Of the threads that PyTorch has now. A number that somebody chose is kept.
inline std::int64_t team_threads(std::int64_t threads) {
  const std::int64_t limit = thread_limit().limit.load(std::memory_order_relaxed);
  const bool chosen = threads != thread_limit().usual.load(std::memory_order_relaxed);
  return chosen || limit <= 0 || limit > threads ? threads : limit;
}

}  // namespace minilm
