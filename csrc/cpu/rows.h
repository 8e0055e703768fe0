// Walking along a row, vector by vector; what the normalisations share.
#pragma once

#include "cpu/vec.h"

namespace minilm::MINILM_ISA {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// Calls f(i, n, k) over [0, channels): whole vectors (n = lanes) with k = 0, 1, 2, 3 in turn, so that four
// sums can run side by side, then the rest (n < lanes), if there is one.
template <typename A, typename F>
inline __attribute__((always_inline)) void for_each_vector(std::int64_t channels, F f) {
  constexpr int lanes = kLanes<A>;
  std::int64_t i = 0;
  for (; i + 4 * lanes <= channels; i += 4 * lanes) {
    f(i, lanes, 0);
    f(i + lanes, lanes, 1);
    f(i + 2 * lanes, lanes, 2);
    f(i + 3 * lanes, lanes, 3);
  }
  for (; i + lanes <= channels; i += lanes) f(i, lanes, 0);
  if (i < channels) f(i, static_cast<int>(channels - i), 1);
}

template <typename T>
inline Vec<Accumulator<T>> read(const T* p, int n) {
  return Storage<T>::widen(n == kLanes<Accumulator<T>> ? load(p) : load(p, n));
}

template <typename T>
inline void write(T* p, Raw<T> raw, int n) {
  n == kLanes<Accumulator<T>> ? store(p, raw) : store(p, raw, n);
}

// to[0, count) += x[0, count)
inline void add_rows(const float* x, float* to, std::int64_t count) {
  for_each_vector<float>(
      count, [&](std::int64_t i, int n, int) { write(to + i, read(to + i, n) + read(x + i, n), n); });
}

// x[0, count) to the nearest that a T can be.
template <typename T>
inline void round_to(float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<float>) {
    const int n = count - i < kLanes<float> ? static_cast<int>(count - i) : kLanes<float>;
    write(x + i, Storage<T>::widen(Storage<T>::round(read(x + i, n))), n);
  }
}

// Where the highest of x[0, count) stands first; if there is a NaN, where the first one does.
inline std::int64_t first_of_highest(const float* x, std::int64_t count) {
  constexpr int L = kLanes<float>;
  Vec<float> high = Vec<float>{} - __builtin_inff();
  auto unordered = high != high;
  std::int64_t i = 0;
  for (; i + L <= count; i += L) {
    const Vec<float> values = load(x + i);
    unordered |= values != values;
    high = values > high ? values : high;
  }
  float top = -__builtin_inff();
  bool nan = false;
  for (int lane = 0; lane < L; ++lane) {
    nan = nan || unordered[lane];
    top = high[lane] > top ? high[lane] : top;
  }
  for (; i < count; ++i) {
    nan = nan || x[i] != x[i];
    top = x[i] > top ? x[i] : top;
  }
  for (i = 0; i + 1 < count; ++i) {
    if (nan ? x[i] != x[i] : x[i] == top) break;
  }
  return i;
}

}  // namespace minilm::MINILM_ISA
