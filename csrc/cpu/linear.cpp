// y = activation(x W^T + bias) on packed weights: the float tiles, packing, and the epilogue after the sums.
//
//   for each panel of W                      read once from memory, then from the second-level cache
//     for each tile of kTileRows rows of x   sums = x_tile panel, in registers over all inputs
//       y_tile = activation(sums + bias)     (gated: of two panels; residual: y_tile += sums + bias)
//
// Operations: 2 rows in out. Bytes: the weights once, x once per panel (from cache), y once. With AVX2, a
// tile of 6 x 16 does 12 multiply-adds for 2 loads of W and 6 broadcasts of x per input; with AVX-512, 12 x
// 32 does 24 for
// 14. So with many rows arithmetic is the limit. With one row (decoding) two multiply-adds use 2 vectors of
// weights, and memory is the limit: 2 operations per 4 bytes (2 bytes in 16-bit formats).
//
// 16-bit weights are converted to float32. If the instruction set multiplies pairs of bfloat16 (AVX512_BF16),
// rows of x are rounded to bfloat16 for such weights, and a word (4 bytes of a row and of each output of the
// panel) has two inputs instead of one: twice the multiply-adds for the same loads. Sums are float32;
// subnormal numbers count as zero.

#include "cpu/linear.h"

namespace minilm::MINILM_ISA {
namespace {

constexpr std::int64_t kStretch = 384;      // inputs
constexpr std::int64_t kPairStretch = 512;  // inputs that are multiplied in pairs

// A word of x and of a vector of outputs: an input of weights kept as T.
template <typename T>
struct Word {
  static constexpr int kInputs = 1;
  using OfRow = float;
  static F32 weights(const T* p) { return Storage<T>::widen(load(p)); }
  static F32 add(F32 sum, OfRow x, F32 weights) { return sum + x * weights; }
};

#if defined(__AVX512BF16__)
template <>
struct Word<BFloat16> {
  static constexpr int kInputs = 2;
  using OfRow = std::int32_t;
  static I32 weights(const BFloat16* p) {
    I32 pairs;
    __builtin_memcpy(&pairs, p, sizeof(pairs));
    return pairs;
  }
  static F32 add(F32 sum, OfRow x, I32 weights) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(weights), bit_cast<__m512bh>(_mm512_set1_epi32(x)));
  }
};

// To the nearest bfloat16, ties to even; the second input of the last word may be none.
void round_rows(const float* x, std::int64_t x_stride, std::int64_t in, std::int64_t begin, std::int64_t end,
                char* to) {
  const auto rounded = [](F32 values) { return bit_cast<U16>(_mm512_cvtneps_pbh(values)); };
  for (std::int64_t row = begin; row < end; ++row) {
    const float* from = x + row * x_stride;
    auto* halves = reinterpret_cast<BFloat16*>(to + row * prepared_row_bytes(Format::kBFloat16, in));
    std::int64_t k = 0;
    for (; k + kLanes<float> <= in; k += kLanes<float>) store(halves + k, rounded(load(from + k)));
    const int left = static_cast<int>(in - k);
    if (left > 0) store(halves + k, rounded(load(from + k, left)), left + left % 2);
  }
}
#endif

inline int word_inputs(Format format) { return format == Format::kBFloat16 ? Word<BFloat16>::kInputs : 1; }

// x_tile panel for R rows; kAsks: prefetch the memory `ahead` bytes further on.
template <typename T, int R, bool kAsks>
inline __attribute__((always_inline)) void sums_of(const char* x, std::int64_t stride, std::int64_t words,
                                                   const T* panel, std::int64_t ahead, Tile& tile) {
  using W = Word<T>;
  // Rows are reached from three pointers, by one and three strides: twelve pointers would not leave
  // registers.
  const std::int64_t three = 3 * stride;
  const char* base[3] = {x, x + 4 * stride, x + 8 * stride};
  F32 sums[R][2] = {};
  for (std::int64_t k = 0; k < words; ++k) {
    if (kAsks) {
      const char* next = reinterpret_cast<const char*>(panel) + ahead;
      __builtin_prefetch(next, 0, 2);
      if (kPanel * W::kInputs * sizeof(T) > 64) __builtin_prefetch(next + 64, 0, 2);
    }
    const auto w0 = W::weights(panel);
    const auto w1 = W::weights(panel + kLanes<float> * W::kInputs);
    panel += kPanel * W::kInputs;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      typename W::OfRow value;
      __builtin_memcpy(&value, base[r / 4] + (r % 4 == 3 ? three : r % 4 * stride), 4);
      sums[r][0] = W::add(sums[r][0], value, w0);
      sums[r][1] = W::add(sums[r][1], value, w1);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) base[i] += 4;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    tile.sums[r][0] = sums[r][0];
    tile.sums[r][1] = sums[r][1];
  }
}

template <typename T, int R = 1>
void tile_of(int rows, const char* x, std::int64_t x_stride, std::int64_t words, const T* panel,
             std::int64_t ahead, Tile& tile) {
  if (rows == R && ahead != 0) return sums_of<T, R, true>(x, x_stride, words, panel, ahead, tile);
  if (rows == R) return sums_of<T, R, false>(x, x_stride, words, panel, ahead, tile);
  if constexpr (R < kTileRows) tile_of<T, R + 1>(rows, x, x_stride, words, panel, ahead, tile);
}

template <typename T>
void pack_values(const PackParams& p, std::int64_t panel, T* to) {
  const T* values = static_cast<const T*>(p.values);
  const int inputs = word_inputs(p.format);
  for (int place = 0; place < kPanel; ++place) {
    const std::int64_t row = p.order[panel * kPanel + place];
    T* word = to + place * inputs;
    for (std::int64_t k = 0; k < p.in; k += inputs, word += kPanel * inputs) {
      for (int i = 0; i < inputs; ++i) word[i] = row < 0 || k + i >= p.in ? T{} : values[row * p.in + k + i];
    }
  }
}

inline std::int64_t panel_bytes(Format format, std::int64_t in) {
  return is_quantized(format) ? quantized_panel_bytes(format, in) : float_panel_bytes(format, in);
}

// Prefetch distance in bytes for a panel in memory. With several rows the hardware prefetches less far ahead.
inline std::int64_t ahead_of(std::int64_t rows) { return rows <= 4 ? 2048 : 8192; }

inline void put(float* y, F32 value, std::int64_t left, bool accumulate) {
  if (left <= 0) return;
  if (left >= kLanes<float>) {
    store(y, accumulate ? load(y) + value : value);
  } else {
    const int n = static_cast<int>(left);
    store(y, accumulate ? load(y, n) + value : value, n);
  }
}

void fill(const LinearParams& p, std::int64_t row, int rows, const char* panel, std::int64_t ahead,
          Tile& tile) {
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride;
  if (is_quantized(p.format)) {
    quantized_tile(p.format, rows, x, p.x_stride, p.in, panel, ahead, tile);
    return;
  }
  // Stretches of inputs are summed separately: the rounding error of a long sum grows with its length.
  const std::int64_t bytes = kPanel * (p.format == Format::kFloat32 ? 4 : 2);
  const std::int64_t stretch = word_inputs(p.format) == 1 ? kStretch : kPairStretch;
  for (std::int64_t k = 0; k < p.in; k += stretch) {
    const std::int64_t inputs = p.in - k < stretch ? p.in - k : stretch;
    Tile part;
    float_tile(p.format, rows, x + k * 4 / word_inputs(p.format), p.x_stride, inputs, panel + k * bytes,
               ahead, k == 0 ? tile : part);
    if (k == 0) continue;
    for (int r = 0; r < rows; ++r) {
      tile.sums[r][0] += part.sums[r][0];
      tile.sums[r][1] += part.sums[r][1];
    }
  }
}

// Prefetches the tile's part of y: stores that wait for cache lines would stall the sums.
inline __attribute__((always_inline)) void ask_for(const float* y, std::int64_t stride, int rows) {
  for (int r = 0; r < rows; ++r) {
    __builtin_prefetch(y + r * stride, 1);
    __builtin_prefetch(y + r * stride + kPanel - 1, 1);
  }
}

}  // namespace

std::int64_t float_panel_bytes(Format format, std::int64_t in) {
  return round_up(round_up(in, word_inputs(format)) * kPanel * (format == Format::kFloat32 ? 4 : 2), 64);
}

void pack_float(const PackParams& p, std::int64_t panel, void* to) {
  if (p.format == Format::kFloat32) {
    pack_values(p, panel, static_cast<float*>(to));
  } else {
    pack_values(p, panel, static_cast<std::uint16_t*>(to));
  }
}

void float_tile(Format format, int rows, const char* x, std::int64_t x_stride, std::int64_t in,
                const void* panel, std::int64_t ahead, Tile& tile) {
  const std::int64_t words = (in + word_inputs(format) - 1) / word_inputs(format);
  switch (format) {
    case Format::kBFloat16:
      return tile_of(rows, x, x_stride, words, static_cast<const BFloat16*>(panel), ahead, tile);
    case Format::kFloat16:
      return tile_of(rows, x, x_stride, words, static_cast<const Float16*>(panel), ahead, tile);
    default:
      return tile_of(rows, x, x_stride, words, static_cast<const float*>(panel), ahead, tile);
  }
}

std::int64_t packed_bytes(Format format, std::int64_t in, std::int64_t places) {
  return bias_bytes(places) + places / kPanel * panel_bytes(format, in);
}

void pack(const PackParams& p) {
  float* bias = static_cast<float*>(p.packed);
  for (std::int64_t place = 0; place < p.places; ++place) {
    const std::int64_t row = p.order[place];
    bias[place] = p.bias != nullptr && row >= 0 ? p.bias[row] : 0.0f;
  }
  char* to = static_cast<char*>(p.packed) + bias_bytes(p.places);
  for (std::int64_t panel = 0; panel < p.places / kPanel; ++panel, to += panel_bytes(p.format, p.in)) {
    is_quantized(p.format) ? pack_quantized(p, panel, to) : pack_float(p, panel, to);
  }
}

void unpack(const UnpackParams& p, std::int64_t begin, std::int64_t end) {
  const char* panels = static_cast<const char*>(p.packed) + bias_bytes(p.places);
  for (std::int64_t place = begin; place < end; ++place) {
    const std::int64_t row = p.order[place - begin];
    if (row < 0) continue;
    const char* panel = panels + place / kPanel * panel_bytes(p.format, p.in);
    unpack_quantized(p, panel, static_cast<int>(place % kPanel), row);
  }
}

std::int64_t prepared_row_bytes(Format format, std::int64_t in) {
  if (is_quantized(format)) return quantized_row_bytes(format, in);
  return word_inputs(format) == 2 ? round_up(in * 2, 4) : 0;
}

void prepare_rows(Format format, const float* x, std::int64_t x_stride, std::int64_t in, std::int64_t begin,
                  std::int64_t end, void* to) {
  if (is_quantized(format)) return quantize_rows(format, x, x_stride, in, begin, end, to);
#if defined(__AVX512BF16__)
  round_rows(x, x_stride, in, begin, end, static_cast<char*>(to));
#endif
}

// Columns [begin, end) of y, counted in panels' widths. Gated, column c comes from the panels 2 c and 2 c
// + 1.
void linear(const LinearParams& p, std::int64_t begin, std::int64_t end) {
  const float* bias = static_cast<const float*>(p.packed);
  const char* panels = static_cast<const char*>(p.packed) + bias_bytes(p.places);
  const std::int64_t bytes = panel_bytes(p.format, p.in);
  for (std::int64_t column = begin; column < end; ++column) {
    const std::int64_t first = p.gated ? 2 * column : column;
    const float* b = bias + first * kPanel;
    const std::int64_t left = p.columns - column * kPanel;
    // Tiles of nearly equal height: a last tile of one or two rows would cost as much as one of six.
    std::int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
    for (std::int64_t row = 0, height; row < p.rows; row += height, --tiles) {
      height = (p.rows - row + tiles - 1) / tiles;
      const int rows = static_cast<int>(height);
      // The last tile has the next panel brought nearer; a tile that is the only one, its own panel's next
      // lines.
      const std::int64_t ahead = p.rows <= kTileRows ? ahead_of(p.rows)
                                 : tiles == 1        ? bytes * (p.gated ? 2 : 1)
                                                     : 0;
      ask_for(p.y + row * p.y_stride + column * kPanel, p.y_stride, rows);
      Tile tile;
      fill(p, row, rows, panels + first * bytes, ahead, tile);
      Tile up;
      if (p.gated) fill(p, row, rows, panels + (first + 1) * bytes, ahead, up);
      for (int r = 0; r < rows; ++r) {
        float* y = p.y + (row + r) * p.y_stride + column * kPanel;
        for (int half = 0; half < 2; ++half) {
          F32 value = activate(p.activation, tile.sums[r][half] + load(b + half * kLanes<float>));
          if (p.gated) value *= up.sums[r][half] + load(b + kPanel + half * kLanes<float>);
          put(y + half * kLanes<float>, value, left - half * kLanes<float>, p.accumulate);
        }
      }
    }
  }
}

}  // namespace minilm::MINILM_ISA
