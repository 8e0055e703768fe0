// The number of threads of a native pass, whose threads synchronise all the time (cpu/team.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>

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

inline std::int64_t nanoseconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<std::int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Uses fewer threads while other programs use the cores.
//
// If a thread loses its core in the middle of a task, all others wait for some milliseconds: in passes with
// many short phases, two threads next to one busy program take twice the time of one thread. So if threads
// lost their cores in a pass, and all together did less than the others would have done alone, the passes of
// the next milliseconds run without them. Then they are tried again, after a pause that doubles, up to a
// second, until it goes well for some time.
class Crowding {
 public:
  static constexpr std::int64_t kFirstPause = 4000000, kLongestPause = 1000000000;  // nanoseconds
  static constexpr std::int64_t kWell = 10000000;  // more than a program's turn on a core
  static constexpr std::int64_t kShort = 20000000;
  static constexpr std::int64_t kNoLoss = 300000;  // waking up takes a part of that

  struct Share {
    std::int64_t worked, lost;  // on tasks; ready, and without a core
  };

  std::int64_t allowed(std::int64_t threads, std::int64_t now) const {
    const std::int64_t allowed = allowed_.load(std::memory_order_relaxed);
    return now < until_.load(std::memory_order_relaxed) && allowed < threads ? allowed : threads;
  }

  // After a pass of some threads that took `wall` nanoseconds in all.
  void note(const Share* shares, std::int64_t threads, std::int64_t wall, std::int64_t now) {
    const std::int64_t most = wall / 8 > kNoLoss ? wall / 8 : kNoLoss;
    std::int64_t worked = 0, others = 0;
    for (std::int64_t i = 0; i < threads; ++i) {
      worked += shares[i].worked;
      others += shares[i].lost <= most;
    }
    if (others == 0) others = 1;
    // Short passes wait for memory: what a thread does in it takes longer beside others than alone.
    const std::int64_t alone = wall < kShort ? worked * 2 / 3 : worked;
    if (others == threads) well_.fetch_add(wall, std::memory_order_relaxed);
    if (others == threads || alone >= others * wall) return;
    const bool at_once = well_.exchange(0, std::memory_order_relaxed) < kWell;
    const std::int64_t twice = 2 * pause_.load(std::memory_order_relaxed);
    const std::int64_t longer = twice < kLongestPause ? twice : kLongestPause;
    const std::int64_t pause = at_once && longer > 0 ? longer : kFirstPause;
    pause_.store(pause, std::memory_order_relaxed);
    allowed_.store(others, std::memory_order_relaxed);
    until_.store(now + pause, std::memory_order_relaxed);
  }

 private:
  // One pass's advice may be mixed with another's: each of them is sound.
  std::atomic<std::int64_t> allowed_{0}, until_{0}, pause_{0}, well_{0};
};

inline Crowding& crowding() {
  static Crowding crowding;
  return crowding;
}

}  // namespace minilm
