// What all checks need: random numbers, the number types of the kernels, and the count of what was compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "params.h"

namespace minilm::tests {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

inline std::string isa;
inline long compared = 0, wrong = 0;

// |got - want| <= allowed; a NaN is never right.
inline void expect(const std::string& what, double got, double want, double allowed) {
  ++compared;
  if (std::abs(got - want) <= allowed) return;
  if (++wrong <= 20) std::printf("%s, %s: %.9g, expected %.9g\n", isa.c_str(), what.c_str(), got, want);
}

inline std::uint32_t state = 1;
inline std::uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
inline int random_below(int n) { return static_cast<int>(random_bits() % static_cast<std::uint32_t>(n)); }
inline float random_float() { return static_cast<float>(random_bits()) * 0x1p-23f - 1.0f; }
inline Floats random_floats(std::int64_t count, float scale = 1, float offset = 0) {
  Floats out(count);
  for (float& v : out) v = random_float() * scale + offset;
  return out;
}

struct Kind {
  DType type;
  std::size_t bytes;
  int bits;  // of the mantissa, with the leading one
  int least_exponent;
};
constexpr Kind kKinds[] = {{DType::kFloat32, 4, 24, -126},
                           {DType::kFloat64, 8, 53, -1022},
                           {DType::kBFloat16, 2, 8, -126},
                           {DType::kFloat16, 2, 11, -14},
                           {DType::kInt8, 1, 8, 7}};  // whole numbers
inline const Kind& kind_of(DType type) { return kKinds[static_cast<int>(type)]; }
inline double unit(DType type) { return std::ldexp(1.0, 1 - kind_of(type).bits); }

inline double rounded(DType type, double x) {
  if (x == 0) return 0;
  const Kind& kind = kind_of(type);
  const int step = std::max(std::ilogb(x), kind.least_exponent) - kind.bits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(x, -step)), step);
}

// What the bytes of a number are, for a number of the type.
inline void put(DType type, double x, char* to) {
  if (type == DType::kFloat64) {
    std::memcpy(to, &x, 8);
    return;
  }
  if (type == DType::kInt8) {
    *to = static_cast<char>(static_cast<int>(x));
    return;
  }
  const float narrow = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (type == DType::kFloat16) {  // a number of it times 2^-112 has its bits where float32 has them
    const float scaled = narrow * 0x1p-112f;
    std::memcpy(&bits, &scaled, 4);
    bits = (bits >> 31 << 15) | ((bits & 0x7FFFFFFF) >> 13);
    std::memcpy(to, &bits, 2);
  } else if (type == DType::kBFloat16) {
    bits >>= 16;
    std::memcpy(to, &bits, 2);
  } else {
    std::memcpy(to, &bits, 4);
  }
}

inline double get(DType type, const char* from) {
  double wide;
  float narrow;
  std::uint32_t bits = 0;
  switch (type) {
    case DType::kFloat64:
      std::memcpy(&wide, from, 8);
      return wide;
    case DType::kFloat32:
      std::memcpy(&narrow, from, 4);
      return narrow;
    case DType::kInt8:
      return static_cast<signed char>(*from);
    default:
      std::memcpy(&bits, from, 2);
      bits = type == DType::kBFloat16 ? bits << 16 : (bits >> 15 << 31) | ((bits & 0x7FFF) << 13);
      std::memcpy(&narrow, &bits, 4);
      return type == DType::kBFloat16 ? narrow : narrow * 0x1p112;
  }
}

// An array of the type, and what it holds.
struct Array {
  DType type;
  Doubles values;
  std::vector<char> bytes;
  Array(DType type, const Doubles& from)
      : type(type), values(from), bytes(from.size() * kind_of(type).bytes) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      values[i] = rounded(type, from[i]);
      put(type, values[i], bytes.data() + i * kind_of(type).bytes);
    }
  }
  Array(DType type, std::size_t count) : Array(type, Doubles(count)) {}
  double at(std::size_t i) const { return get(type, bytes.data() + i * kind_of(type).bytes); }
};
inline Array random_array(DType type, std::int64_t count, float scale = 1, float offset = 0) {
  const Floats from = random_floats(count, scale, offset);
  return {type, Doubles(from.begin(), from.end())};
}

}  // namespace minilm::tests
