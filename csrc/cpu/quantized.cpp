// x W^T with weights of 8 and 4 bits: packing, the rows of x as codes, and the tiles of sums.
//
//   kInt8    y[o] = v[o] sum_g s[g] sum_{k in g} w[o, k] d[k]             g: 192 inputs
//   kQ8      y[o] = sum_g v[o, g] s[g] sum_{k in g} w[o, k] d[k]          g: 32 inputs
//   kQ4      y[o] = sum_g s[g] sum_{k in g} (v[o, g] w[o, k] + m[o, g]) c[k]
//
// w, v, m: codes, scales and minimums of the weight. A row of x becomes integers and a scale s for each
// group:
//
//   kInt8, kQ8   d = round(x / s), of which the largest is at most 254 above the least: s = (largest - least)
//   /
//                253.98, zero among them. What a norm or an activation gives is skewed, and so is a group
//                with a channel that is larger than all others: this step is up to half of kQ4's. Kept in a
//                row are d, or where codes are bytes, d - d0 and d0 of each group (the least d, or 127 more),
//                and in the panel sum_{k in g} w: d0 times that is what the sums lack.
//   kQ4          c = -127..127, s = the largest magnitude / 127
//
// Sums of codes are integers and exact, the same in every instruction set. Groups are added in float32, in
// order. Groups of 192 and not whole rows in kInt8: a channel that is larger than all others makes the steps
// of its own group larger and no more.
//
// A 32-bit lane is an output. It takes a word of inputs at a time: 4 bytes of x, broadcast to all lanes, that
// hold 4 codes, or 2 or 1 where the instruction set multiplies wider numbers. Words come in pairs:
//
//   8 bits   output 0 [k k+1 k+2 k+3]  output 1 [k ... k+3]  ... kPanel: the first word
//            output 0 [k+4 ... k+7]    ...                               the second
//   4 bits   one such line; the low halves of its bytes are the first word, the high halves the second
//
//   panel    kQ4     pairs of group 0 | scales [kPanel] | minimums [kPanel] | pairs of group 1 | ...
//            kQ8     pairs of group 0 | scales [kPanel] | sums of codes [kPanel] | pairs of group 1 | ...
//            kInt8   pairs of group 0 | sums of codes [kPanel] | pairs of group 1 | ... | scales [kPanel]
//   row      codes | scales | s sum c, or s d0          each part a multiple of 64 bytes
//
// The panel's scales and minimums are float16, as files have them; kInt8's, one for the whole row, float32;
// sums of codes int16, and only where codes of x are bytes.
//
// Bytes a weight: 1.01 + 4 / in, 1.125, 0.625; with few rows of x they are the limit. With many,
// multiply-adds are: 128 integer operations an instruction in 64-byte vectors with VNNI. For 8 of these in
// kQ8 and kQ4 and 48 in kInt8, the end of a group costs 4 more (kInt8: 3): the sum made a float, the two
// scales' product, and two multiply-adds.

#include "cpu/linear.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace minilm::MINILM_ISA {
namespace {

constexpr int kRowGroup = 192;  // inputs of a row of x that share a scale in kInt8

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

// What an instruction set does in kInt8 and kQ8 (Eight), and in kQ4 (Four):
//   Code       a code of x in a prepared row
//   Weights    one word of kLanes outputs
//   Sum        sums of products, an output a lane
//   kFromZero  codes of Eight are d itself; else the least is kLowest
#if defined(__AVX512VNNI__)

// Unsigned bytes times signed ones.
struct Eight {
  using Code = std::uint8_t;
  using Weights = __m512i;
  using Sum = __m512i;
  static constexpr bool kFromZero = false;
  static constexpr int kLowest = 0;
  static Weights load(const char* p) { return read<__m512i>(p); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(read<std::int32_t>(word)), w);
  }
  static I32 total(Sum sum) { return reinterpret_cast<I32>(sum); }
};
struct Four : Eight {
  using Code = std::int8_t;
  static Weights load(const char* p, int word) { return reinterpret_cast<Weights>(halves_of_bytes(p, word)); }
  static Sum dot(Sum sum, Weights w, const char* word) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(read<std::int32_t>(word)));
  }
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
  static constexpr bool kFromZero = true;
  static constexpr int kLowest = 0;
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
  static constexpr bool kFromZero = false;
  static constexpr int kLowest = -127;
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
  static constexpr bool kFromZero = true;
  static constexpr int kLowest = 0;
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

inline F32 load_float16(const char* p) { return widen_float16(read<U16>(p)); }

// Also of -0, which F32{} + x would lose.
inline std::uint16_t float16_of(float x) {
  return round_float16(bit_cast<F32>(I32{} + bit_cast<std::int32_t>(x)))[0];
}

// The largest of all lanes, halving the vector as sum_lanes does.
template <typename T, int N = kLanes<T>>
inline T max_of(typename VectorOf<T, N>::type x) {
  if constexpr (N == 2) {
    return x[0] > x[1] ? x[0] : x[1];
  } else {
    struct Halves {
      typename VectorOf<T, N / 2>::type low, high;
    };
    const Halves halves = bit_cast<Halves>(x);
    return max_of<T, N / 2>(halves.low > halves.high ? halves.low : halves.high);
  }
}
inline std::int32_t max_lanes(I32 x) { return max_of<std::int32_t>(x); }
inline float max_lanes(F32 x) { return max_of<float>(x); }

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
  static constexpr bool kFour = F == Format::kQ4;
  static constexpr bool kRowScale = F == Format::kInt8;        // the weight's
  static constexpr bool kSecond = kFour || !Eight::kFromZero;  // a row has s sum c, or s d0
  static constexpr int kSize = kRowScale ? kRowGroup : kGroup;
  static constexpr int kWord = 4 / static_cast<int>(sizeof(Code));
  static constexpr int kPairInputs = 2 * kWord;
  static constexpr int kPairBytes = (kFour ? 1 : 2) * kPanel * kWord;
  static constexpr int kPairs = kSize / kPairInputs;  // of words in a group, but for the last one of kInt8
  static constexpr int kAfter = ((kRowScale ? 0 : 1) + (kSecond ? 1 : 0)) * 2 * kPanel;  // bytes
  static constexpr int kGroupBytes = kPairs * kPairBytes + kAfter;

  std::int64_t groups, last_pairs;  // last_pairs: in the last group
  std::int64_t panel_scales_at, panel_bytes;
  std::int64_t scales_at, seconds_at, row_bytes;

  explicit Places(std::int64_t in) {
    groups = (in + kSize - 1) / kSize;
    last_pairs = (in - (groups - 1) * kSize + kPairInputs - 1) / kPairInputs;
    panel_scales_at = groups * kGroupBytes - (kPairs - last_pairs) * kPairBytes;
    panel_bytes = round_up(panel_scales_at + (kRowScale ? 4 * kPanel : 0), 64);
    scales_at = groups * kPairs * 8;
    seconds_at = scales_at + round_up(groups * 4, 64);
    row_bytes = seconds_at + (kSecond ? round_up(groups * 4, 64) : 0);
  }
  std::int64_t pairs(std::int64_t group) const {
    return !kRowScale || group + 1 < groups ? std::int64_t{kPairs} : last_pairs;
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

// Vectors of a group's values, one an output.
inline F32 scales(const char* p, int half) { return load_float16(p + half * kLanes<float> * 2); }
inline F32 code_sums(const char* p, int half) {
  using I16 = VectorOf<std::int16_t, kLanes<float>>::type;
  return __builtin_convertvector(__builtin_convertvector(read<I16>(p + half * kLanes<float> * 2), I32), F32);
}

// Some of x[0, count) from `i` on, zeros beyond.
inline F32 load_some(const float* x, std::int64_t i, std::int64_t count) {
  const std::int64_t left = count - i;
  return left >= kLanes<float> ? load(x + i) : load(x + i, left > 0 ? static_cast<int>(left) : 0);
}

// How a group of x becomes integers: round(inverse * x), which scale makes numbers again. Of a group that is
// as good as zero both are 0; where something is infinite or not a number, scale is NaN.
struct Steps {
  float inverse, scale;
  bool usable;
};
inline Steps steps(bool finite, float extent, float count) {
  constexpr float kSmallest = 0x1p-119f;  // its scale is the smallest normal number
  if (!finite) return {0.0f, __builtin_nanf(""), false};
  if (extent < kSmallest) return {0.0f, 0.0f, false};
  return {count / extent, extent / count, true};
}

// The codes of a group of kGroup from -127 to 127, and their sum; returns their scale.
template <typename Code>
inline float quantize(const float* x, Code* codes, std::int32_t* sum) {
  I32 magnitudes = {};  // as integers, floats order like their values, infinity above all and NaN above it
  for (int i = 0; i < kGroup; i += kLanes<float>) {
    const I32 magnitude = bit_cast<I32>(load(x + i)) & 0x7FFFFFFF;
    magnitudes = magnitude > magnitudes ? magnitude : magnitudes;
  }
  const float largest = bit_cast<float>(max_lanes(magnitudes));
  const Steps by = steps(largest <= __FLT_MAX__, largest, 127.0f);
  const std::int32_t keep = by.usable ? -1 : 0;  // 0 times infinity is not a number
  I32 sums = {};
  for (int i = 0; i < kGroup; i += kLanes<float>) {
    const I32 rounded = round_to_integer(bit_cast<F32>(bit_cast<I32>(load(x + i)) & keep) * by.inverse);
    sums += rounded;
    store_codes(codes + i, rounded);
  }
  *sum = sum_lanes<std::int32_t>(sums);
  return by.scale;
}

// The codes of x[0, count), count <= N, with others up to N, and the integer that the lowest of them stands
// for; returns their scale. From the least to the largest, zero between them, there are at most 254 steps: a
// little more than half a step is left over for the rounding of both ends.
template <typename Dot, int N>
inline __attribute__((always_inline)) float quantize_skewed(const float* x, std::int64_t count,
                                                            typename Dot::Code* codes, std::int32_t* lowest) {
  constexpr int kVectors = N / kLanes<float>;
  constexpr float kHalfOfSteps = 126.99f;
  F32 some[kVectors], low = {}, high = {}, nothing = {};
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    const std::int64_t left = count - i * kLanes<float>;
    some[i] = left >= kLanes<float> ? load(x + i * kLanes<float>)
                                    : load(x + i * kLanes<float>, left > 0 ? static_cast<int>(left) : 0);
    low = min(some[i], low);
    high = max(some[i], high);
    nothing += some[i] * 0.0f;  // NaN, where something is not finite
  }
  const float least = -max_lanes(-low), extent = 0.5f * max_lanes(high) - 0.5f * least;
  const Steps by = steps(sum_lanes<float>(nothing) == 0, extent, kHalfOfSteps);
  if (!by.usable) {
    for (int i = 0; i < N; ++i) codes[i] = 0;
    *lowest = 0;
    return by.scale;
  }
  const std::int32_t first =
      Dot::kFromZero ? 0 : round_to_integer(F32{} + least * by.inverse)[0] - Dot::kLowest;
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    store_codes(codes + i * kLanes<float>, round_to_integer(some[i] * by.inverse) - first);
  }
  *lowest = first;
  return by.scale;
}

template <Format F>
void quantize_row(const Places<F>& at, const float* x, std::int64_t in, char* to) {
  using P = Places<F>;
  for (std::int64_t g = 0; g < at.groups; ++g) {
    std::int32_t number;
    float scale;
    auto* codes = reinterpret_cast<typename P::Code*>(to) + g * P::kSize;
    if constexpr (P::kFour) {
      scale = quantize(x + g * P::kSize, codes, &number);
    } else {
      using Dot = typename P::Dot;
      const std::int64_t left = in - g * P::kSize;
      // A whole group apart, so that its loops have no conditions.
      scale = left >= P::kSize ? quantize_skewed<Dot, P::kSize>(x + g * P::kSize, P::kSize, codes, &number)
                               : quantize_skewed<Dot, P::kSize>(x + g * P::kSize, left, codes, &number);
    }
    write(to + at.scales_at + 4 * g, scale);
    if (P::kSecond) write(to + at.seconds_at + 4 * g, scale * static_cast<float>(number));
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
      char* code = to + g * P::kGroupBytes + place * P::kWord;
      const std::int64_t start = g * P::kSize, end = start + at.pairs(g) * P::kPairInputs;
      std::int16_t sum = 0;
      for (std::int64_t k = start; k < end; k += P::kPairInputs, code += P::kPairBytes) {
        for (int i = 0; i < P::kWord; ++i) {
          const int first = code_of<F>(p, row, k + i), second = code_of<F>(p, row, k + P::kWord + i);
          sum = static_cast<std::int16_t>(sum + first + second);
          code[i] = static_cast<char>(P::kFour ? first | second << 4 : first);
          if (!P::kFour) code[kPanel * P::kWord + i] = static_cast<char>(second);
        }
      }
      char* after = to + g * P::kGroupBytes + at.pairs(g) * P::kPairBytes + 2 * place;
      const std::int64_t group = row * at.groups + g;
      if (!P::kRowScale) {
        write(after, float16_of(row < 0 ? 0.0f : p.scales[group]));
        after += 2 * kPanel;
      }
      if (P::kFour) write(after, float16_of(row < 0 ? 0.0f : p.minimums[group]));
      if (P::kSecond && !P::kFour) write(after, sum);
    }
    if (P::kRowScale) write(to + at.panel_scales_at + 4 * place, row < 0 ? 0.0f : p.scales[row]);
  }
}

// The inverse of pack_panel for one lane.
template <Format F>
void unpack_lane(const Places<F>& at, const UnpackParams& p, const char* panel, int lane, std::int64_t row) {
  using P = Places<F>;
  char* values = static_cast<char*>(p.values) + row * (P::kFour ? p.in / 2 : p.in);
  for (std::int64_t g = 0; g < at.groups; ++g) {
    const char* code = panel + g * P::kGroupBytes + lane * P::kWord;
    const std::int64_t start = g * P::kSize, end = start + at.pairs(g) * P::kPairInputs;
    for (std::int64_t k = start; k < end; k += P::kPairInputs, code += P::kPairBytes) {
      for (int word = 0; word < 2; ++word) {
        for (int i = 0; i < P::kWord; ++i) {
          const std::int64_t input = k + word * P::kWord + i;
          if (P::kFour) {
            const int half = static_cast<unsigned char>(code[i]) >> (4 * word) & 15;
            char& byte = values[start / 2 + input % 16];  // its low half comes first
            byte =
                static_cast<char>(input % kGroup < 16 ? half : static_cast<unsigned char>(byte) | half << 4);
          } else if (input < p.in) {
            values[input] = code[word * kPanel * P::kWord + i];
          }
        }
      }
    }
    if (P::kRowScale) continue;
    const char* after = panel + g * P::kGroupBytes + at.pairs(g) * P::kPairBytes + 2 * lane;
    const std::int64_t group = 2 * (row * at.groups + g);
    write(static_cast<char*>(p.scales) + group, read<std::uint16_t>(after));
    if (P::kFour && p.minimums != nullptr) {
      write(static_cast<char*>(p.minimums) + group, read<std::uint16_t>(after + 2 * kPanel));
    }
  }
  if (P::kRowScale) {
    write(static_cast<char*>(p.scales) + 4 * row, read<float>(panel + at.panel_scales_at + 4 * lane));
  }
}

// The sums of a group are in registers, those over the groups in `tile`: there are not registers for both.
template <Format F, int R>
inline __attribute__((always_inline)) void sums_of(const Places<F>& at, const char* x, std::int64_t x_stride,
                                                   const char* panel, std::int64_t ahead, Tile& tile) {
  using P = Places<F>;
  using Dot = typename P::Dot;
  using Sum = typename Dot::Sum;
  for (int r = 0; r < R; ++r) tile.sums[r][0] = tile.sums[r][1] = F32{};
  for (std::int64_t g = 0; g < at.groups; ++g) {
    Sum dots[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      dots[r][0] = in_register(Sum{});
      dots[r][1] = in_register(Sum{});
    }
    const char* words = x + g * P::kPairs * 8;
    const std::int64_t pairs = at.pairs(g);
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
    ask_for<P::kAfter>(panel + ahead);
    asm("" : "+m"(tile));  // the compiler is not to keep a copy
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const F32 scale = P::kRowScale ? F32{} + 1.0f : scales(panel, half);
      const char* seconds = panel + P::kAfter - 2 * kPanel;
      F32 second = {};
      if (P::kFour) second = scales(seconds, half);
      if (P::kSecond && !P::kFour)
        second = P::kRowScale ? code_sums(seconds, half) : scale * code_sums(seconds, half);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const char* row = x + r * x_stride + 4 * g;
        const float own = read<float>(row + at.scales_at);
        F32 sum = tile.sums[r][half];
        const F32 dot = __builtin_convertvector(Dot::total(dots[r][half]), F32);
        sum += (P::kRowScale ? F32{} + own : scale * own) * dot;
        if (P::kSecond) sum += second * read<float>(row + at.seconds_at);
        tile.sums[r][half] = sum;
      }
    }
    panel += P::kAfter;
  }
  if (!P::kRowScale) return;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const F32 scale = read<F32>(panel + half * kLanes<float> * 4);
    for (int r = 0; r < R; ++r) tile.sums[r][half] *= scale;
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

void unpack_quantized(const UnpackParams& p, const void* panel, int lane, std::int64_t row) {
  for_format(p.format, p.in,
             [&](const auto& at) { unpack_lane(at, p, static_cast<const char*>(panel), lane, row); });
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
