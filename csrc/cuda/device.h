// Building blocks of the kernels: 16-bit numbers, wide loads, the tensor-core product, block reductions, the
// launch. With nvcc these are instructions; without it emulation.h emulates them, so that the same kernels
// run on a CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda/params.h"
#include "cuda/tiling.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MINILM_DEVICE __device__ __forceinline__
#else
#include "cuda/emulation.h"
#define MINILM_DEVICE inline
#endif

namespace minilm::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

#ifdef __CUDACC__
struct Grid {
  unsigned x, y = 1, z = 1;
};

template <typename Params>
const char* launch(void (*kernel)(Params), Grid grid, int threads, const Params& p, void* stream) {
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// A number that the compiler knows, also where it is an argument.
template <int I>
struct Constant {
  MINILM_HD constexpr operator int() const { return I; }
};

// Calls f(0), f(1) .. f(N - 1) with constants that may size arrays and name registers.
template <typename F, int... I>
MINILM_DEVICE void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}
template <int N, typename F>
MINILM_DEVICE void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

// ---- numbers
// -----------------------------------------------------------------------------------------------

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <typename To, typename From>
MINILM_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

MINILM_DEVICE float to_float(float x) { return x; }
MINILM_DEVICE float to_float(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }

template <typename T>
MINILM_DEVICE T round_to(float x);

#ifdef __CUDACC__
MINILM_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
template <>
MINILM_DEVICE Half round_to<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
MINILM_DEVICE BFloat16 round_to<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
#else
inline float to_float(Half x) { return static_cast<float>(bits_as<_Float16>(x.bits)); }
template <>
inline Half round_to<Half>(float x) {
  return {bits_as<std::uint16_t>(static_cast<_Float16>(x))};
}
template <>
inline BFloat16 round_to<BFloat16>(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
#endif

// Two 16-bit numbers in a register, the first in the low half.
template <typename T>
MINILM_DEVICE std::uint32_t pair(float first, float second) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2 && __is_same(T, Half)) {
    return bits_as<std::uint32_t>(__floats2half2_rn(first, second));
  } else {
    return bits_as<std::uint32_t>(__floats2bfloat162_rn(first, second));
  }
#else
  return round_to<T>(first).bits | static_cast<std::uint32_t>(round_to<T>(second).bits) << 16;
#endif
}
template <typename T>
MINILM_DEVICE float first_of(std::uint32_t two) {
  return to_float(T{static_cast<std::uint16_t>(two)});
}
template <typename T>
MINILM_DEVICE float second_of(std::uint32_t two) {
  return to_float(T{static_cast<std::uint16_t>(two >> 16)});
}

// The low halves of two registers, and the high ones.
MINILM_DEVICE std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) { return (a & 0xffffu) | b << 16; }
MINILM_DEVICE std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) {
  return a >> 16 | (b & 0xffff0000u);
}

// Code i of four int8 codes. 2^23 + u is the float with bits 0x4b000000 + u; integer conversions are slower.
MINILM_DEVICE float code_of(std::uint32_t four, int i) {
  const std::uint32_t biased = (four >> 8 * i & 0xffu) ^ 0x80u;
  return bits_as<float>(0x4b000000u | biased) - 8388736.0f;
}

// Codes i and i + 4 of eight 4-bit codes, less `zero`, as two 16-bit numbers: 1024 + n has the bits 0x6400 +
// n in float16, 128 + n has 0x4300 + n in bfloat16, and the difference is exact.
template <typename T>
MINILM_DEVICE std::uint32_t nibble_pair(std::uint32_t eight, int i, int zero) {
  constexpr bool half = __is_same(T, Half);
  const std::uint32_t two = (eight >> 4 * i & 0x000f000fu) | (half ? 0x64006400u : 0x43004300u);
  const float offset = static_cast<float>((half ? 1024 : 128) + zero);
#ifdef __CUDACC__
  if constexpr (half) {
    return bits_as<std::uint32_t>(__hsub2(bits_as<__half2>(two), __float2half2_rn(offset)));
  } else {
    return bits_as<std::uint32_t>(__hsub2(bits_as<__nv_bfloat162>(two), __float2bfloat162_rn(offset)));
  }
#else
  return pair<T>(first_of<T>(two) - offset, second_of<T>(two) - offset);
#endif
}

// ---- memory
// ------------------------------------------------------------------------------------------------

struct alignas(16) Words {
  std::uint32_t x[4];
};

// 16 bytes at once.
MINILM_DEVICE Words load(const void* from) {
#ifndef __CUDACC__
  emulation::check_alignment(from, 16);
#endif
  return *static_cast<const Words*>(from);
}
MINILM_DEVICE void store(void* to, const Words& words) {
#ifndef __CUDACC__
  emulation::check_alignment(to, 16);
#endif
  *static_cast<Words*>(to) = words;
}

// `Bytes` (2, 4, 8, 16) that are read once, past the first-level cache, into the first of `to`.
template <int Bytes>
MINILM_DEVICE void load_once(const void* from, std::uint32_t* to) {
#ifdef __CUDACC__
  if constexpr (Bytes == 16) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "l"(from));
  } else if constexpr (Bytes == 8) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  } else if constexpr (Bytes == 4) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  } else {
    static_assert(Bytes == 2);
    to[0] = *static_cast<const std::uint16_t*>(from);
  }
#else
  emulation::check_alignment(from, Bytes);
  to[0] = 0;
  memcpy(to, from, Bytes);
#endif
}
MINILM_DEVICE Words load_once(const void* from) {
  Words words;
  load_once<16>(from, words.x);
  return words;
}

// Eight 16-bit numbers as floats, and back.
template <typename T>
MINILM_DEVICE void widen(const Words& w, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = first_of<T>(w.x[i]);
    x[2 * i + 1] = second_of<T>(w.x[i]);
  }
}
template <typename T>
MINILM_DEVICE Words narrow(const float (&x)[8]) {
  Words w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.x[i] = pair<T>(x[2 * i], x[2 * i + 1]);
  return w;
}
template <typename T>
MINILM_DEVICE void load8(const T* from, float (&x)[8]) {
  widen<T>(load(from), x);
}
template <typename T>
MINILM_DEVICE void store8(T* to, const float (&x)[8]) {
  store(to, narrow<T>(x));
}

// ---- the tensor core
// ---------------------------------------------------------------------------------------

// c += a b for a [16, 16], b [16, 8], c [16, 8] spread over a warp (PTX ISA, "Matrix fragments for
// mma.m16n8k16"). Lane 4 g + t holds
//
//   a: rows g, g + 8 of columns 2 t, 2 t + 1, then of columns 2 t + 8, 2 t + 9     (a[0] .. a[3])
//   b: column g of rows 2 t, 2 t + 1, then of rows 2 t + 8, 2 t + 9                (b0, b1)
//   c: columns 2 t, 2 t + 1 of row g, then of row g + 8                            (c[0] .. c[3])
template <typename T>
MINILM_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (__is_same(T, Half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  struct Fragments {
    std::uint32_t a[4], b[2];
  };
  const auto& lanes = emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto at = [](std::uint32_t two, int i) { return i % 2 ? second_of<T>(two) : first_of<T>(two); };
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const Fragments left = emulation::from_lane<Fragments>(lanes, row % 8 * 4 + holder);
      const Fragments right = emulation::from_lane<Fragments>(lanes, column * 4 + holder);
      sum += at(left.a[row / 8 + 2 * (k / 8)], k) * at(right.b[k / 8], k);
    }
    c[i] += sum;
  }
#endif
}

// ---- reductions
// --------------------------------------------------------------------------------------------

template <typename T>
MINILM_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

template <typename T>
MINILM_DEVICE T warp_max(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// exp2(m - top), where m may be -infinity: the weight of a part of a softmax whose largest score is m in one
// whose largest is top. Nothing seen weighs nothing, also beside nothing.
MINILM_DEVICE float softmax_weight(float m, float top) { return m == kMinusInfinity ? 0.0f : exp2f(m - top); }

}  // namespace minilm::cuda
