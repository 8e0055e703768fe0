// The machine's limits on a CPU, as plain loops: compiled by limits.py with -O3 -march=native when the bench
// runs.
//
// Each function runs `threads` threads that start together, and returns the seconds of the slowest (first
// start to last end). Memory: every thread has its own part of the arrays, touched first by itself.
// Arithmetic: enough independent accumulators to hide the latency, nothing read from memory.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(kLanes * 4)));
constexpr int kChains = kLanes == 4   ? 24
                        : kLanes == 8 ? 12
                                      : 20;  // latency x throughput, within the registers

template <class Body>
double together(int threads, Body body) {
  std::atomic<int> waiting{0};
  std::vector<Clock::time_point> begin(threads), end(threads);
  auto work = [&](int t) {
    waiting.fetch_add(1);
    while (waiting.load() < threads) std::this_thread::yield();
    begin[t] = Clock::now();
    body(t);
    end[t] = Clock::now();
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (auto& thread : pool) thread.join();
  Clock::time_point first = begin[0], last = end[0];
  for (int t = 1; t < threads; ++t) {
    if (begin[t] < first) first = begin[t];
    if (end[t] > last) last = end[t];
  }
  return std::chrono::duration<double>(last - first).count();
}

volatile float sink_float;
volatile int64_t sink_int;

float* part(float* base, int64_t count, int threads, int t) { return base + count / threads * t; }

}  // namespace

extern "C" {

// Touch the pages from the threads that will use them. Large pages: with small ones a core waits for their
// addresses before the memory is at its limit.
void fill(float* x, int64_t count, int threads) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(x) + kPage - 1) / kPage * kPage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(x + count) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  together(threads, [&](int t) {
    float* p = part(x, count, threads, t);
    for (int64_t i = 0; i < count / threads; ++i) p[i] = 1e-3f * float(i % 1013) - 0.5f;
  });
}

// Reads count floats.
double read_all(float* x, int64_t count, int threads) {
  return together(threads, [&](int t) {
    const float* p = part(x, count, threads, t);
    Floats sums[8] = {};
    for (int64_t i = 0; i + 8 * kLanes <= count / threads; i += 8 * kLanes)
      for (int c = 0; c < 8; ++c) {
        Floats v;
        std::memcpy(&v, p + i + c * kLanes, sizeof v);
        sums[c] += v;
      }
    float total = 0;
    for (int c = 0; c < 8; ++c)
      for (int l = 0; l < kLanes; ++l) total += sums[c][l];
    sink_float = total;
  });
}

// Reads count floats and writes as many. memcpy: the C library knows the machine's best stores.
double copy_all(float* x, float* y, int64_t count, int threads) {
  return together(threads, [&](int t) {
    std::memcpy(part(y, count, threads, t), part(x, count, threads, t), size_t(count / threads) * 4);
  });
}

// 2 * kLanes * kChains * rounds operations a thread.
double fma_all(int64_t rounds, int threads) {
  return together(threads, [&](int t) {
    Floats sums[kChains];
    for (int c = 0; c < kChains; ++c) sums[c] = Floats{} + float(c + t);
    Floats a = Floats{} + 0.999f, b = Floats{} + 1e-6f;
    asm volatile("" : "+m"(a), "+m"(b));  // not known to the compiler
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
      for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * a + b;
    }
    float total = 0;
    for (int c = 0; c < kChains; ++c) total += sums[c][0];
    sink_float = total;
  });
}
int fma_operations() { return 2 * kLanes * kChains; }

// 8-bit dot products into 32 bits, with the machine's best instruction; int8_name says which.
double int8_all(int64_t rounds, int threads) {
  return together(threads, [&](int t) {
#if defined(__AVX512VNNI__)
    __m512i sums[12], a = _mm512_set1_epi8(char(t + 3)), b = _mm512_set1_epi8(5);
    for (int c = 0; c < 12; ++c) sums[c] = _mm512_set1_epi32(c);
    for (int64_t i = 0; i < rounds; ++i) {
      asm volatile("" : "+v"(a), "+v"(b));  // not known to the compiler
#pragma GCC unroll 32
      for (int c = 0; c < 12; ++c) sums[c] = _mm512_dpbusd_epi32(sums[c], a, b);
    }
    for (int c = 0; c < 12; ++c) sink_int = sink_int + _mm512_reduce_add_epi32(sums[c]);
#elif defined(__AVX2__)
    const __m256i a = _mm256_set1_epi8(char(t + 3)), b = _mm256_set1_epi8(5), one = _mm256_set1_epi16(1);
    __m256i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, product;
    // In assembler, since the products are all the same and a compiler would make one.
    auto step = [&](__m256i& sum) __attribute__((always_inline)) {
      asm volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                   : "+x"(sum), "=&x"(product)
                   : "x"(a), "x"(b), "x"(one));
    };
    for (int64_t i = 0; i < rounds; ++i) step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
    for (const __m256i& s : {s0, s1, s2, s3, s4, s5}) sink_int = sink_int + _mm256_extract_epi32(s, 0);
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t sums[16];
    int8x16_t a = vdupq_n_s8(int8_t(t + 3)), b = vdupq_n_s8(5);
    for (int c = 0; c < 16; ++c) sums[c] = vdupq_n_s32(c);
    for (int64_t i = 0; i < rounds; ++i) {
      asm volatile("" : "+w"(a), "+w"(b));
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) sums[c] = vdotq_s32(sums[c], a, b);
    }
    for (int c = 0; c < 16; ++c) sink_int = sink_int + vgetq_lane_s32(sums[c], 0);
#else
    (void)t;
    for (int64_t i = 0; i < rounds; ++i) sink_int = i;
#endif
  });
}
#if defined(__AVX512VNNI__)
int int8_operations() { return 2 * 64 * 12; }
const char* int8_name() { return "vpdpbusd, 512 bits"; }
#elif defined(__AVX2__)
int int8_operations() { return 2 * 32 * 6; }
const char* int8_name() { return "vpmaddubsw + vpmaddwd + vpaddd, 256 bits"; }
#elif defined(__ARM_FEATURE_DOTPROD)
int int8_operations() { return 2 * 16 * 16; }
const char* int8_name() { return "sdot, 128 bits"; }
#else
int int8_operations() { return 0; }
const char* int8_name() { return ""; }
#endif

int float_lanes() { return kLanes; }

// A chain of dependent additions, one a clock: rounds of 64 clocks.
double clock_chain(int64_t rounds) {
  return together(1, [&](int) {
    int64_t x = 1, y = 3;
    asm volatile("" : "+r"(y));
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 64
      for (int c = 0; c < 64; ++c) {
#if defined(__x86_64__)
        asm volatile("add %1, %0" : "+r"(x) : "r"(y));
#elif defined(__aarch64__)
        asm volatile("add %0, %0, %1" : "+r"(x) : "r"(y));
#else
        x += y;
        asm volatile("" : "+r"(x));
#endif
      }
    }
    sink_int = x;
  });
}
}
