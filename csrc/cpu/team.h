// Threads that go through the same phases side by side.
//
// Every thread calls run() for the same phases in the same order. The tasks of a phase are handed out by a
// counter, and a phase ends for all when its last task has been done: its results may be read after run().
// Nothing depends on how many threads came, or when: one alone does all tasks, and one that comes late finds
// none left. So it runs on any thread pool, and it does not matter which thread does which task.
//
// The invariant: a thread that has drawn a task which it has not done yet keeps the phase from ending, so
// that what earlier phases wrote stays as it is while it reads that. One that has drawn none may be late: the
// others may be phases ahead, and be writing to anything. So whatever reads shared memory stands in a task,
// or in the `first` of a phase, which a thread runs when it has drawn its first task there.
//
// Who has nothing left to do spins for some 100 microseconds, longer than most phases take and than it takes
// to be woken, and then sleeps until the last task is done. Where another program has a core, its turn is
// some milliseconds long: a thread that spun on would keep its own core from the one that it waits for. How
// long it waited is counted, so that the caller can tell whether the next pass wants fewer threads
// (threads.h).
#pragma once

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <climits>
#include <cstdint>
#include <ctime>

#include "params.h"

namespace minilm::MINILM_ISA {

class Team {
 public:
  // Two cache lines: the number of tasks drawn; that of tasks done, and of threads that sleep.
  static constexpr std::int64_t kBytesAPhase = 128;

  explicit Team(char* counters) : counters_(counters) {}

  template <typename F>
  void run(std::int64_t tasks, F task) {
    run(tasks, [] {}, task);
  }

  // first(): before the thread's first task of this phase, if it gets one.
  template <typename First, typename F>
  void run(std::int64_t tasks, First first, F task) {
    auto* drawn = reinterpret_cast<std::int64_t*>(counters_);
    auto* done = reinterpret_cast<std::int32_t*>(counters_ + 64);
    auto* sleeping = done + 1;
    counters_ += kBytesAPhase;
    const auto all = static_cast<std::int32_t>(tasks);
    std::int64_t number = __atomic_fetch_add(drawn, 1, __ATOMIC_RELAXED);
    if (number < tasks) first();
    for (; number < tasks; number = __atomic_fetch_add(drawn, 1, __ATOMIC_RELAXED)) {
      task(number);
      // In one order with what a thread does that goes to sleep: either it sees this, or it is seen.
      if (__atomic_add_fetch(done, 1, __ATOMIC_SEQ_CST) == all &&
          __atomic_load_n(sleeping, __ATOMIC_SEQ_CST) != 0) {
        wake(done);
      }
    }
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE) < all) wait(done, sleeping, all);
  }

  // What this thread did not work in.
  const Waited& waited() const { return waited_; }

 private:
  static constexpr std::int64_t kSpinning = 100000;  // nanoseconds

  static std::int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<std::int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
  }

  void wait(std::int32_t* done, std::int32_t* sleeping, std::int32_t all) {
    const std::int64_t begun = now();
    std::int64_t spun = 0;
    for (int spins = 1; __atomic_load_n(done, __ATOMIC_ACQUIRE) < all && spun < kSpinning; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins % 16 == 0) spun = now() - begun;
    }
    // Another program may have had the core in the meantime: that was not spinning.
    waited_.spun += spun < kSpinning ? spun : kSpinning;
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE) >= all) return;
    __atomic_add_fetch(sleeping, 1, __ATOMIC_SEQ_CST);
    const std::int64_t fell_asleep = now();
    for (;;) {
      const std::int32_t seen = __atomic_load_n(done, __ATOMIC_SEQ_CST);
      if (seen >= all) break;
      sleep(done, seen);
    }
    waited_.slept += now() - fell_asleep;
  }

  // Until somebody wakes, unless the counter is not `seen` any more.
  static void sleep(std::int32_t* counter, std::int32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, counter, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    (void)counter;
    (void)seen;
    sched_yield();
#endif
  }
  static void wake(std::int32_t* counter) {
#if defined(__linux__)
    syscall(SYS_futex, counter, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    (void)counter;
#endif
  }

  char* counters_;
  Waited waited_;
};

}  // namespace minilm::MINILM_ISA
