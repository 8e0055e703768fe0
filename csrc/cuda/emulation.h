// Emulates a thread block on the CPU, so that a C++ compiler can build the unchanged kernels and tests can
// run them.
//
// Every thread of a block is a coroutine with its own stack. It runs until it waits for others: at
// __syncthreads, or where lanes of a warp exchange values. Between two such points threads run one after
// another, in ascending or descending order (`falling`): if the result depends on the order, the kernel lacks
// a barrier. Waiting for a thread that has ended is an error, not a hang. Blocks run one after another.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

namespace minilm::cuda {

struct Index3 {
  unsigned x, y, z;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline bool falling = false;

struct Barrier {
  unsigned arrived = 0;
  std::uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char values[2][32][32];  // of this exchange and of the next
};

struct Thread {
  static constexpr std::size_t kStack = 256 * 1024;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  std::jmp_buf at;
  bool entered = false;
  bool done = false;
  const std::uint64_t* watched = nullptr;  // runs again when this is no longer `seen`
  std::uint64_t seen = 0;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  Thread* running = nullptr;
  ucontext_t home;
  std::jmp_buf at;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  std::exception_ptr error;
};
inline Block block;

inline void to_scheduler() {
  if (_setjmp(block.running->at) == 0) _longjmp(block.at, 1);
}

inline void enter() {
  for (;;) {  // once for each block
    try {
      block.body(block.argument);
    } catch (...) {
      block.error = std::current_exception();
    }
    block.running->done = true;
    to_scheduler();
  }
}

inline void resume(Thread& thread) {
  block.running = &thread;
  if (_setjmp(block.at) != 0) return;
  if (thread.entered) _longjmp(thread.at, 1);
  thread.entered = true;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = Thread::kStack;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
  setcontext(&thread.context);
}

inline void wait(Barrier& barrier, unsigned count) {
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  block.running->watched = &barrier.generation;
  block.running->seen = barrier.generation;
  to_scheduler();
}

inline Warp& warp() { return block.warps[threadIdx.x / 32]; }

// Values that the lanes of a warp exchange: all write, all wait, all may read until the next but one
// exchange.
template <typename T>
inline const unsigned char (&exchange(const T& value))[32][32] {
  static_assert(sizeof(T) <= 32);
  Warp& w = warp();
  auto& values = w.values[w.barrier.generation & 1];
  std::memcpy(values[threadIdx.x % 32], &value, sizeof(T));
  wait(w.barrier, 32);
  return values;
}

template <typename T>
inline T from_lane(const unsigned char (&values)[32][32], unsigned lane) {
  T value;
  std::memcpy(&value, values[lane % 32], sizeof(T));
  return value;
}

// A read or write of `bytes` at once, which a GPU refuses where its address is no multiple of them.
inline void check_alignment(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    throw std::runtime_error("emulation: a misaligned address");
  }
}

inline void run_block(unsigned count) {
  block.barrier = {};
  block.warps.assign(count / 32, {});
  while (block.threads.size() < count) block.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < count; ++i) block.threads[i]->done = false, block.threads[i]->watched = nullptr;
  for (unsigned left = count; left > 0;) {
    bool progress = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned index = falling ? count - 1 - i : i;
      Thread& thread = *block.threads[index];
      if (thread.done || (thread.watched != nullptr && *thread.watched == thread.seen)) continue;
      thread.watched = nullptr;
      threadIdx = {index, 0, 0};
      resume(thread);
      progress = true;
      left -= thread.done;
      if (block.error != nullptr) {
        block.threads.clear();
        std::rethrow_exception(std::exchange(block.error, nullptr));
      }
    }
    if (!progress) {
      block.threads.clear();
      throw std::runtime_error("emulation: threads wait at a barrier that others never reach");
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block.barrier, blockDim.x); }
inline void __syncwarp() { emulation::wait(emulation::warp().barrier, 32); }

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane<T>(emulation::exchange(value), threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}
template <typename T>
inline T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::from_lane<T>(emulation::exchange(value), lane < by ? lane : lane - by);
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_lane<T>(emulation::exchange(value), static_cast<unsigned>(lane));
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const auto& values = emulation::exchange(value);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    bits |= unsigned{emulation::from_lane<bool>(values, lane)} << lane;
  return bits;
}
template <typename T>
inline T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

struct Grid {
  unsigned x, y = 1, z = 1;
};

template <typename Params>
const char* launch(void (*kernel)(Params), Grid grid, int threads, const Params& p, void*) {
  struct Call {
    void (*kernel)(Params);
    const Params* p;
  } call = {kernel, &p};
  emulation::block.body = [](const void* c) {
    const Call& made = *static_cast<const Call*>(c);
    made.kernel(*made.p);
  };
  emulation::block.argument = &call;
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        emulation::run_block(static_cast<unsigned>(threads));
      }
  return nullptr;
}

}  // namespace minilm::cuda
