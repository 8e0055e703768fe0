// A team of threads that run the same phases, with a barrier after each.
//
// Every thread calls run() for the same phases in the same order. A counter assigns the tasks of a phase to
// threads, and a phase ends for all when its last task is done: its results may be read after run(). The
// number of threads and their timing do not matter: a single thread does all tasks, and a late thread finds
// none left. So this runs on any thread pool, and any thread may do any task.
//
// The invariant: a thread with an unfinished task keeps the phase from ending, so results of earlier phases
// do not change while it reads them. A thread without a task may be late: the others may be several phases
// ahead and writing anywhere. So all reads of shared memory must be in a task, or in the `first` function of
// a phase, which a thread runs when it has got its first task of the phase.
//
// A thread without work spins for some 100 microseconds, longer than most phases and than a wake-up takes,
// and then sleeps until the last task is done. If another program uses a core, its time slice is some
// milliseconds: a spinning thread could keep its own core from the thread that it waits for. The waiting time
// is counted, so that the caller can use fewer threads for the next pass (threads.h).
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
  // Two cache lines: the number of tasks assigned; those of tasks done and of sleeping threads.
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

  // The time in which this thread did not work.
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
