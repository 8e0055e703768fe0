// Threads that go through the same phases side by side.
//
// Every thread calls run() for the same phases in the same order. The tasks of a phase are handed out by a
// counter, and a phase ends for all when its last task has been done: its results may be read after run().
// Nothing depends on how many threads came, or when: one alone does all tasks, and one that comes late finds
// none left. So it runs on any thread pool, and it does not matter which thread does which task.
#pragma once

#include <sched.h>

#include <cstdint>

namespace minilm::MINILM_ISA {

class Team {
 public:
  static constexpr std::int64_t kBytesAPhase =
      128;  // two cache lines: counters of tasks begun, of tasks done

  explicit Team(char* counters) : counters_(counters) {}

  template <typename F>
  void run(std::int64_t tasks, F task) {
    auto* begun = reinterpret_cast<std::int64_t*>(counters_);
    auto* done = reinterpret_cast<std::int64_t*>(counters_ + 64);
    counters_ += kBytesAPhase;
    for (;;) {
      const std::int64_t number = __atomic_fetch_add(begun, 1, __ATOMIC_RELAXED);
      if (number >= tasks) break;
      task(number);
      __atomic_fetch_add(done, 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < tasks; ++spins) {
      if (spins < 20000) {  // a thread that was put aside takes longer
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  char* counters_;
};

}  // namespace minilm::MINILM_ISA
