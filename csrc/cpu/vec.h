// Vectors of one instruction set, with the compiler's GNU vector extensions (g++ and clang++), so that one
// source serves SSE2, AVX2, AVX-512 and NEON. The standard library is not used here: the linker could keep
// the AVX-512 copy of one of its inline functions for all instruction sets.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef MINILM_ISA
#error "compile with -DMINILM_ISA=name, once for each instruction set (see setup.py)"
#endif

namespace minilm::MINILM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
struct Int8 {
  std::int8_t code;
};

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// A: float or double, the type computed in. Data of another type is widened on load and rounded on store.
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <typename A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

using F32 = Vec<float>;
using U32 = VectorOf<std::uint32_t, kLanes<float>>::type;
using U16 = VectorOf<std::uint16_t, kLanes<float>>::type;
using I8 = VectorOf<std::int8_t, kLanes<float>>::type;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline F32 widen_bfloat16(U16 bits) { return bit_cast<F32>(__builtin_convertvector(bits, U32) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline U16 round_bfloat16(F32 x) {
  const U32 u = bit_cast<U32>(x);
  const U32 rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const U32 nan = (u >> 16) | 0x40;
  return __builtin_convertvector((u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded, U16);
}

inline F32 widen_int8(I8 codes) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bit_cast<__m128i>(codes)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set1_epi64x(bit_cast<long long>(codes))));
#else
  return __builtin_convertvector(codes, F32);
#endif
}

inline F32 widen_float16(U16 bits) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, bit_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  const U32 h = __builtin_convertvector(bits, U32);
  const U32 magnitude = (h & 0x7FFF) << 13;      // exponent and mantissa where float32 has them
  const U32 normal = magnitude + (112u << 23);   // exponent bias 127 instead of 15
  const U32 special = magnitude + (224u << 23);  // infinity and NaN: exponent 255
  // Subnormals count steps of 2^-24, which are float32's steps from 0.5 to 1.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(0x3F000000 + (h & 0x7FFF)) - 0.5f);
  U32 out = (h & 0x7C00) == 0 ? subnormal : normal;
  out = (h & 0x7C00) == 0x7C00 ? special : out;
  return bit_cast<F32>(out | ((h & 0x8000) << 16));
#endif
}

inline U16 round_float16(F32 x) {
  const U32 u = bit_cast<U32>(x);
  const U32 sign = (u >> 16) & 0x8000;
  const U32 a = u & 0x7FFFFFFF;
  // Below 2^-14: added to 0.5, float32 itself rounds to float16's subnormal steps.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(a) + 0.5f) - 0x3F000000;
  const U32 normal = (a + 0xFFF + ((a >> 13) & 1) - (112u << 23)) >> 13;  // ties to even
  U32 out = a < (113u << 23) ? subnormal : normal;
  out = a >= 0x477FF000 ? U32{} + 0x7C00 : out;                 // 65520 and above: infinity
  out = a > 0x7F800000 ? (((a >> 13) & 0x3FF) | 0x7E00) : out;  // NaN, kept quiet
  return __builtin_convertvector(out | sign, U16);
}

// Raw<T>: the vector of T as it lies in memory, as many elements as Vec<A> has lanes.
template <typename T>
struct Storage {
  using Accumulator = T;
  using Raw = Vec<T>;
  static Vec<T> widen(Raw raw) { return raw; }
  static Raw round(Vec<T> x) { return x; }
};
template <>
struct Storage<BFloat16> {
  using Accumulator = float;
  using Raw = U16;
  static F32 widen(Raw raw) { return widen_bfloat16(raw); }
  static Raw round(F32 x) { return round_bfloat16(x); }
};
template <>
struct Storage<Float16> {
  using Accumulator = float;
  using Raw = U16;
  static F32 widen(Raw raw) { return widen_float16(raw); }
  static Raw round(F32 x) { return round_float16(x); }
};

template <>
struct Storage<Int8> {
  using Accumulator = float;
  using Raw = I8;
  static F32 widen(Raw raw) { return widen_int8(raw); }
};

template <typename T>
using Accumulator = typename Storage<T>::Accumulator;
template <typename T>
using Raw = typename Storage<T>::Raw;

// Any alignment. With `count` the first elements only; the lanes beyond are zero, and the memory beyond is
// not touched.
template <typename T>
inline Raw<T> load(const T* p) {
  Raw<T> raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return raw;
}
template <typename T>
inline Raw<T> load(const T* p, int count) {
  Raw<T> raw = {};
  __builtin_memcpy(&raw, p, count * sizeof(T));
  return raw;
}
template <typename T>
inline void store(T* p, Raw<T> raw) {
  __builtin_memcpy(p, &raw, sizeof(raw));
}
template <typename T>
inline void store(T* p, Raw<T> raw, int count) {
  __builtin_memcpy(p, &raw, count * sizeof(T));
}

// Zero in the lanes from `count` on.
template <typename A>
inline Vec<A> keep(Vec<A> x, int count) {
  for (int lane = count; lane < kLanes<A>; ++lane) x[lane] = 0;
  return x;
}

// The sum of all lanes, halving the vector until two lanes are left.
template <typename A, int N = kLanes<A>>
inline A sum_lanes(typename VectorOf<A, N>::type x) {
  if constexpr (N == 2) {
    return x[0] + x[1];
  } else {
    struct Halves {
      typename VectorOf<A, N / 2>::type low, high;
    };
    const Halves halves = bit_cast<Halves>(x);
    return sum_lanes<A, N / 2>(halves.low + halves.high);
  }
}

}  // namespace minilm::MINILM_ISA
