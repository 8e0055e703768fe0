// x W^T with weights of 8 and 4 bits: packing, the rows of x as codes, and the tiles of sums.
//
//   kInt8    y[o] = v[o] s sum_k w[o, k] c[k]
//   kQ8      y[o] = sum_g v[o, g] s[g] sum_{k in g} w[o, k] c[k]
//   kQ4      as kQ8, and in each group + m[o, g] s[g] sum_{k in g} c[k]
//
// w, v, m: codes, scales and minimums of the weight. A row of x becomes codes c of -127..127 and a scale s,
// the largest magnitude / 127: one for a row (kInt8), or one for each group g of 32. Sums of codes are
// integers and exact, the same in every instruction set (kInt8: up to 2^17 inputs). Groups are added in
// float32, in order.
//
// A 32-bit lane is an output. It takes a word of inputs at a time: 4 bytes of x, broadcast to all lanes, that
// hold 4 codes, or 2 or 1 where the instruction set multiplies wider numbers. Words come in pairs:
//
//   8 bits   output 0 [k k+1 k+2 k+3]  output 1 [k ... k+3]  ... kPanel: the first word
//            output 0 [k+4 ... k+7]    ...                               the second
//   4 bits   one such line; the low halves of its bytes are the first word, the high halves the second
//
//   panel    pairs of group 0 | scales [kPanel] | kQ4: minimums [kPanel] | pairs of group 1 | ...
//   row      codes | scales | sums of codes                each part a multiple of 64 bytes
//
// The panel's scales and minimums are float16, as files have them; kInt8's, one for the whole row, float32.
//
// Bytes a weight: 1 + 4 / in, 1.06, 0.625; with few rows of x they are the limit. With many, multiply-adds
// are: 128 integer operations an instruction in 64-byte vectors with VNNI. For 8 of these, the end of a group
// costs 2 float operations (kQ4: 3).

#include "cpu/linear.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace minilm::MINILM_ISA {
namespace {

template <typename T>
inline T read(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}
template <typename T>
inline void write(void* p, T value) {
  __builtin_memcpy(p, &value, sizeof(value));
}

// The low (word 0) or the high half (word 1) of each byte.
[[maybe_unused]] inline U32 halves_of_bytes(const char* p, int word) {
  return (read<U32>(p) >> (4 * word)) & 0x0F0F0F0F;
}

// What an instruction set does with 8-bit codes (Eight) and 4-bit codes (Four):
//   Code     a code of x in a prepared row
//   Weights  one word of kLanes outputs
//   Sum      sums of products, an output a lane
//   kOffset  is added to the weight's codes in the panel; the sums start at what takes it off again
#if defined(__AVX512VNNI__)

// Unsigned bytes times signed ones.
struct Eight {
  using Code = std::int8_t;
  using Weights = __m512i;
  using Sum = __m512i;
  static constexpr int kOffset = 128;
  static Weights load(const char* p) { return read<__m512i>(p); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(read<std::int32_t>(word)));
  }
  static I32 total(Sum sum) { return reinterpret_cast<I32>(sum); }
};
struct Four : Eight {
  static constexpr int kOffset = 0;
  static Weights load(const char* p, int word) { return reinterpret_cast<Weights>(halves_of_bytes(p, word)); }
};

#elif defined(__AVX2__)

#if defined(__AVX512F__)
using Bits = __m512i;
inline Bits widened(const char* p) { return _mm512_cvtepi8_epi16(read<__m256i>(p)); }
inline Bits broadcast(std::int32_t word) { return _mm512_set1_epi32(word); }
inline Bits madd(Bits a, Bits b) { return _mm512_madd_epi16(a, b); }
inline Bits maddubs(Bits a, Bits b) { return _mm512_maddubs_epi16(a, b); }
inline Bits add16(Bits a, Bits b) { return _mm512_add_epi16(a, b); }
inline Bits add32(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
#else
using Bits = __m256i;
inline Bits widened(const char* p) { return _mm256_cvtepi8_epi16(read<__m128i>(p)); }
inline Bits broadcast(std::int32_t word) { return _mm256_set1_epi32(word); }
inline Bits madd(Bits a, Bits b) { return _mm256_madd_epi16(a, b); }
inline Bits maddubs(Bits a, Bits b) { return _mm256_maddubs_epi16(a, b); }
inline Bits add16(Bits a, Bits b) { return _mm256_add_epi16(a, b); }
inline Bits add32(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
#endif

// Codes widened to 16 bits, two a word. Products of bytes would be added in 16 bits and saturate; to prevent
// that (the sign moved from w to x, each product widened) costs as many instructions, and fails at -128.
struct Eight {
  using Code = std::int16_t;
  using Weights = Bits;
  using Sum = Bits;
  static constexpr int kOffset = 0;
  static Weights load(const char* p) { return widened(p); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    return add32(sum, madd(w, broadcast(read<std::int32_t>(word))));
  }
  static I32 total(Sum sum) { return reinterpret_cast<I32>(sum); }
};

// Products of bytes, added in 16 bits over a group: at most 16 * 15 * 127 = 30,480.
struct Four {
  using Code = std::int8_t;
  using Weights = Bits;
  using Sum = Bits;
  static constexpr int kOffset = 0;
  static Weights load(const char* p, int word) { return reinterpret_cast<Weights>(halves_of_bytes(p, word)); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    return add16(sum, maddubs(w, broadcast(read<std::int32_t>(word))));
  }
  static I32 total(Sum sum) { return reinterpret_cast<I32>(madd(sum, broadcast(0x00010001))); }
};

#elif defined(__aarch64__)

struct Eight {
  using Code = std::int8_t;
  using Weights = int8x16_t;
  using Sum = int32x4_t;
  static constexpr int kOffset = 0;
  static Weights load(const char* p) { return read<int8x16_t>(p); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(read<std::int32_t>(word)));
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, w, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    const int16x8_t high = vmull_high_s8(w, x);
    return vpadalq_s16(sum, vpaddq_s16(low, high));  // two products: at most 2 * 128 * 127 = 32,512
#endif
  }
  static I32 total(Sum sum) { return reinterpret_cast<I32>(sum); }
};
struct Four : Eight {
  static Weights load(const char* p, int word) { return reinterpret_cast<Weights>(halves_of_bytes(p, word)); }
};

#else

// Plain vectors, a code a word. Products are made in float32, which holds them exactly.
struct Eight {
  using Code = float;
  using Weights = F32;
  using Sum = I32;
  using Bytes = VectorOf<std::int8_t, kLanes<float>>::type;
  static constexpr int kOffset = 0;
  static Weights load(const char* p) { return __builtin_convertvector(read<Bytes>(p), F32); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    return sum + __builtin_convertvector(w * read<float>(word), I32);
  }
  static I32 total(Sum sum) { return sum; }
};
struct Four : Eight {
  static Weights load(const char* p, int word) {
    const Bytes bytes = read<Bytes>(p);
    return __builtin_convertvector(word == 0 ? bytes & 15 : (bytes >> 4) & 15, F32);
  }
};

#endif

// To the nearest, ties to even. Adding 1.5 * 2^23 would do it too, unless it is contracted with what comes
// before, and that differs between instruction sets.
inline I32 round_to_integer(F32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<I32>(_mm512_maskz_cvtps_epi32(0xFFFF, x));
#elif defined(__AVX2__)
  return reinterpret_cast<I32>(_mm256_cvtps_epi32(x));
#elif defined(__x86_64__)
  return reinterpret_cast<I32>(_mm_cvtps_epi32(x));
#elif defined(__aarch64__)
  return reinterpret_cast<I32>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
#else
  I32 out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = static_cast<std::int32_t>(__builtin_rintf(x[i]));
  return out;
#endif
}

inline F32 load_float16(const char* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, read<__m256i>(p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(read<__m128i>(p));
#else
  return widen_float16(read<U16>(p));
#endif
}

inline std::uint16_t float16_of(float x) { return round_float16(F32{} + x)[0]; }

// The largest of all lanes, halving the vector as sum_lanes does.
template <int N = kLanes<float>>
inline std::int32_t max_lanes(typename VectorOf<std::int32_t, N>::type x) {
  if constexpr (N == 2) {
    return x[0] > x[1] ? x[0] : x[1];
  } else {
    struct Halves {
      typename VectorOf<std::int32_t, N / 2>::type low, high;
    };
    const Halves halves = bit_cast<Halves>(x);
    return max_lanes<N / 2>(halves.low > halves.high ? halves.low : halves.high);
  }
}

template <typename Code>
inline void store_codes(Code* to, I32 codes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(Code) == 1) {  // gcc would move byte by byte
    const __m256i wide = reinterpret_cast<__m256i>(codes);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    return write(to, _mm_packs_epi16(half, half)[0]);
  }
#endif
  write(to, __builtin_convertvector(codes, typename VectorOf<Code, kLanes<float>>::type));
}

template <int bytes>
inline void ask_for(const char* p) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Nothing to the machine; to the compiler, a place where `x` is in a register and has this value: without it,
// gcc adds the products of several words to each other first, and runs out of registers.
template <typename V>
inline V in_register(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <Format F>
struct DotOf {
  using Type = Eight;
};
template <>
struct DotOf<Format::kQ4> {
  using Type = Four;
};

// Where things stand in a panel and in a row, for `in` inputs.
template <Format F>
struct Places {
  using Dot = typename DotOf<F>::Type;
  using Code = typename Dot::Code;
  static constexpr bool kGrouped = F != Format::kInt8;
  static constexpr bool kFour = F == Format::kQ4;
  static constexpr bool kSums = kFour || Dot::kOffset != 0;
  static constexpr int kWord = 4 / static_cast<int>(sizeof(Code));
  static constexpr int kPairInputs = 2 * kWord;
  static constexpr int kPairBytes = (kFour ? 1 : 2) * kPanel * kWord;
  static constexpr int kScaleBytes = (kGrouped ? 2 : 4) * kPanel;

  std::int64_t groups, pairs;  // pairs: of words in a group
  std::int64_t group_bytes, panel_bytes;
  std::int64_t scales_at, sums_at, row_bytes;

  explicit Places(std::int64_t in) {
    groups = kGrouped ? in / kGroup : 1;
    pairs = kGrouped ? kGroup / kPairInputs : (in + kPairInputs - 1) / kPairInputs;
    group_bytes = pairs * kPairBytes + (kFour ? 2 : 1) * kScaleBytes;
    panel_bytes = round_up(groups * group_bytes, 64);
    scales_at = round_up(groups * pairs * 8, 64);
    sums_at = scales_at + round_up(groups * 4, 64);
    row_bytes = sums_at + (kSums ? round_up(groups * 4, 64) : 0);
  }
};

// Calls f(Places<F>) for the format.
template <typename Function>
inline auto for_format(Format format, std::int64_t in, Function f) {
  switch (format) {
    case Format::kQ8:
      return f(Places<Format::kQ8>(in));
    case Format::kQ4:
      return f(Places<Format::kQ4>(in));
    default:
      return f(Places<Format::kInt8>(in));
  }
}

// The weights of one word of a pair, for half of the panel.
template <typename P>
inline auto weights(const char* pair, int word, int half) {
  const char* p = pair + half * kLanes<float> * P::kWord;
  if constexpr (P::kFour) {
    return P::Dot::load(p, word);
  } else {
    return P::Dot::load(p + word * kPanel * P::kWord);
  }
}

template <typename P>
inline F32 scales(const char* p, int half) {
  return P::kGrouped ? load_float16(p + half * kLanes<float> * 2) : read<F32>(p + half * kLanes<float> * 4);
}

// The codes of x[0, count), as many as `padded` with zeros, and their sum; returns their scale: 0 if all are
// as good as zero, NaN if one is infinite or not a number.
template <typename Code>
inline float quantize(const float* x, std::int64_t count, std::int64_t padded, Code* codes,
                      std::int32_t* sum) {
  constexpr float kSmallest = 0x1p-119f;  // its scale is the smallest normal number
  const auto load_some = [=](std::int64_t i) {
    const std::int64_t left = count - i;
    return left >= kLanes<float> ? load(x + i) : load(x + i, left > 0 ? static_cast<int>(left) : 0);
  };
  I32 magnitudes = {};  // as integers, floats order like their values, infinity above all and NaN above it
  for (std::int64_t i = 0; i < count; i += kLanes<float>) {
    const I32 magnitude = bit_cast<I32>(load_some(i)) & 0x7FFFFFFF;
    magnitudes = magnitude > magnitudes ? magnitude : magnitudes;
  }
  const float largest = bit_cast<float>(max_lanes(magnitudes));
  const bool finite = largest <= __FLT_MAX__;
  const bool usable = finite && largest >= kSmallest;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  const std::int32_t keep = usable ? -1 : 0;
  I32 sums = {};
  for (std::int64_t i = 0; i < padded; i += kLanes<float>) {
    const I32 rounded = round_to_integer(bit_cast<F32>(bit_cast<I32>(load_some(i)) & keep) * inverse);
    sums += rounded;
    store_codes(codes + i, rounded);
  }
  *sum = sum_lanes<std::int32_t>(sums);
  return usable ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
}

template <Format F>
void quantize_row(const Places<F>& at, const float* x, std::int64_t in, char* to) {
  using P = Places<F>;
  const std::int64_t padded = at.pairs * P::kPairInputs;
  for (std::int64_t g = 0; g < at.groups; ++g) {
    std::int32_t sum;
    auto* codes = reinterpret_cast<typename P::Code*>(to) + g * padded;
    const float scale =
        quantize(x + g * padded, P::kGrouped ? kGroup : in, P::kGrouped ? kGroup : padded, codes, &sum);
    write(to + at.scales_at + 4 * g, scale);
    if (P::kFour) write(to + at.sums_at + 4 * g, scale * static_cast<float>(sum));
    if (!P::kFour && P::kSums) write(to + at.sums_at + 4 * g, -P::Dot::kOffset * sum);
  }
}

template <Format F>
inline int code_of(const PackParams& p, std::int64_t row, std::int64_t k) {
  if (row < 0 || k >= p.in) return 0;
  if (F != Format::kQ4) return static_cast<const std::int8_t*>(p.values)[row * p.in + k];
  const int byte =
      static_cast<const std::uint8_t*>(p.values)[(row * p.in + k / kGroup * kGroup) / 2 + k % 16];
  return k % kGroup < 16 ? byte & 15 : byte >> 4;
}

template <Format F>
void pack_panel(const Places<F>& at, const PackParams& p, std::int64_t panel, char* to) {
  using P = Places<F>;
  for (int place = 0; place < kPanel; ++place) {
    const std::int64_t row = p.order[panel * kPanel + place];
    for (std::int64_t g = 0; g < at.groups; ++g) {
      char* scales = to + g * at.group_bytes + at.pairs * P::kPairBytes;
      char* code = scales - at.pairs * P::kPairBytes + place * P::kWord;
      for (std::int64_t k = g * kGroup; code < scales; k += P::kPairInputs, code += P::kPairBytes) {
        for (int i = 0; i < P::kWord; ++i) {
          const int first = code_of<F>(p, row, k + i) + P::Dot::kOffset;
          const int second = code_of<F>(p, row, k + P::kWord + i) + P::Dot::kOffset;
          code[i] = static_cast<char>(P::kFour ? first | second << 4 : first);
          if (!P::kFour) code[kPanel * P::kWord + i] = static_cast<char>(second);
        }
      }
      const float scale = row < 0 ? 0.0f : p.scales[row * at.groups + g];
      const float minimum = row < 0 || !P::kFour ? 0.0f : p.minimums[row * at.groups + g];
      if (P::kGrouped) write(scales + 2 * place, float16_of(scale));
      if (P::kFour) write(scales + P::kScaleBytes + 2 * place, float16_of(minimum));
      if (!P::kGrouped) write(scales + 4 * place, scale);
    }
  }
}

// The sums of a group are in registers, those over the groups in `tile`: there are not registers for both.
template <Format F, int R>
inline __attribute__((always_inline)) void sums_of(const Places<F>& at, const char* x, std::int64_t x_stride,
                                                   const char* panel, std::int64_t ahead, Tile& tile) {
  using P = Places<F>;
  using Dot = typename P::Dot;
  using Sum = typename Dot::Sum;
  const std::int64_t groups = P::kGrouped ? at.groups : 1;
  const std::int64_t pairs = P::kGrouped ? kGroup / P::kPairInputs : at.pairs;
  for (int r = 0; r < R; ++r) tile.sums[r][0] = tile.sums[r][1] = F32{};
  for (std::int64_t g = 0; g < groups; ++g) {
    Sum dots[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const std::int32_t start =
          Dot::kOffset != 0 ? read<std::int32_t>(x + r * x_stride + at.sums_at + 4 * g) : 0;
      dots[r][0] = in_register(bit_cast<Sum>(I32{} + start));
      dots[r][1] = in_register(bit_cast<Sum>(I32{} + start));
    }
    const char* words = x + g * pairs * 8;
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      ask_for<P::kPairBytes>(panel + ahead);
#pragma GCC unroll 2
      for (int word = 0; word < 2; ++word) {
        const auto w0 = weights<P>(panel, word, 0);
        const auto w1 = weights<P>(panel, word, 1);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          dots[r][0] = in_register(Dot::dot(dots[r][0], w0, words + r * x_stride + 4 * word));
          dots[r][1] = in_register(Dot::dot(dots[r][1], w1, words + r * x_stride + 4 * word));
        }
      }
      panel += P::kPairBytes;
      words += 8;
    }
    ask_for<P::kScaleBytes>(panel + ahead);
    asm("" : "+m"(tile));  // the compiler is not to keep a copy
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const F32 scale = scales<P>(panel, half);
      const F32 minimum = P::kFour ? scales<P>(panel + P::kScaleBytes, half) : F32{};
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const char* row = x + r * x_stride + 4 * g;
        F32 sum = tile.sums[r][half];
        sum += (scale * read<float>(row + at.scales_at)) *
               __builtin_convertvector(Dot::total(dots[r][half]), F32);
        if (P::kFour) sum += minimum * read<float>(row + at.sums_at);
        tile.sums[r][half] = sum;
      }
    }
    panel += (P::kFour ? 2 : 1) * P::kScaleBytes;
  }
}

template <Format F, int R = 1>
void tile_of(const Places<F>& at, int rows, const char* x, std::int64_t x_stride, const char* panel,
             std::int64_t ahead, Tile& tile) {
  if (rows == R) return sums_of<F, R>(at, x, x_stride, panel, ahead, tile);
  if constexpr (R < kTileRows) return tile_of<F, R + 1>(at, rows, x, x_stride, panel, ahead, tile);
}

}  // namespace

std::int64_t quantized_panel_bytes(Format format, std::int64_t in) {
  return for_format(format, in, [](const auto& at) { return at.panel_bytes; });
}

void pack_quantized(const PackParams& p, std::int64_t panel, void* to) {
  for_format(p.format, p.in, [&](const auto& at) { pack_panel(at, p, panel, static_cast<char*>(to)); });
}

std::int64_t quantized_row_bytes(Format format, std::int64_t in) {
  return for_format(format, in, [](const auto& at) { return at.row_bytes; });
}

void quantize_rows(Format format, const float* x, std::int64_t x_stride, std::int64_t in, std::int64_t begin,
                   std::int64_t end, void* to) {
  for_format(format, in, [&](const auto& at) {
    for (std::int64_t row = begin; row < end; ++row) {
      quantize_row(at, x + row * x_stride, in, static_cast<char*>(to) + row * at.row_bytes);
    }
  });
}

void quantized_tile(Format format, int rows, const void* x, std::int64_t x_stride, std::int64_t in,
                    const void* panel, std::int64_t ahead, Tile& tile) {
  for_format(format, in, [&](const auto& at) {
    tile_of(at, rows, static_cast<const char*>(x), x_stride, static_cast<const char*>(panel), ahead, tile);
  });
}

}  // namespace minilm::MINILM_ISA
