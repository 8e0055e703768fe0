// y = activation(x W^T + bias) on packed weights: the float tiles, packing, and what comes after the sums.
//
//   for each panel of W                      read once from memory, then from the second-level cache
//     for each tile of kTileRows rows of x   sums = x_tile panel, in registers over all inputs
//       y_tile = activation(sums + bias)     (gated: of two panels; residual: y_tile += sums + bias)
//
// Operations: 2 rows in out. Bytes: the weights once, x once a panel (from cache), y once. With AVX2, a tile
// of 6 x 16 does 12 multiply-adds for 2 loads of W and 6 broadcasts of x an input; with AVX-512, 12 x 32 does
// 24 for 14. So with many rows arithmetic is the limit. With one row (decoding) two multiply-adds use 2
// vectors of weights, and memory is the limit: 2 operations for each 4 bytes (2 bytes in 16-bit formats).

#include "cpu/linear.h"

namespace minilm::MINILM_ISA {
namespace {

constexpr std::int64_t kStretch = 384;  // inputs

// x_tile panel for R rows; kAsks: what lies `ahead` bytes further on is asked for in advance.
template <typename T, int R, bool kAsks>
inline __attribute__((always_inline)) void sums_of(const float* x, std::int64_t x_stride, std::int64_t in,
                                                   const T* panel, std::int64_t ahead, Tile& tile) {
  // Rows are reached from three pointers, by one and three strides: twelve pointers would not leave
  // registers.
  const std::int64_t stride = x_stride * 4, three = 3 * stride;
  const char* base[3] = {reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(x + 4 * x_stride),
                         reinterpret_cast<const char*>(x + 8 * x_stride)};
  F32 sums[R][2] = {};
  for (std::int64_t k = 0; k < in; ++k) {
    if (kAsks) {
      const char* next = reinterpret_cast<const char*>(panel) + ahead;
      __builtin_prefetch(next, 0, 2);
      if (kPanel * sizeof(T) > 64) __builtin_prefetch(next + 64, 0, 2);
    }
    const F32 w0 = Storage<T>::widen(load(panel));
    const F32 w1 = Storage<T>::widen(load(panel + kLanes<float>));
    panel += kPanel;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float value;
      __builtin_memcpy(&value, base[r / 4] + (r % 4 == 3 ? three : r % 4 * stride), 4);
      sums[r][0] += value * w0;
      sums[r][1] += value * w1;
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
void tile_of(int rows, const float* x, std::int64_t x_stride, std::int64_t in, const T* panel,
             std::int64_t ahead, Tile& tile) {
  if (rows == R && ahead != 0) return sums_of<T, R, true>(x, x_stride, in, panel, ahead, tile);
  if (rows == R) return sums_of<T, R, false>(x, x_stride, in, panel, ahead, tile);
  if constexpr (R < kTileRows) tile_of<T, R + 1>(rows, x, x_stride, in, panel, ahead, tile);
}

template <typename T>
void pack_values(const PackParams& p, std::int64_t panel, T* to) {
  const T* values = static_cast<const T*>(p.values);
  for (int place = 0; place < kPanel; ++place) {
    const std::int64_t row = p.order[panel * kPanel + place];
    for (std::int64_t k = 0; k < p.in; ++k) to[k * kPanel + place] = row < 0 ? T{} : values[row * p.in + k];
  }
}

inline std::int64_t panel_bytes(Format format, std::int64_t in) {
  return is_quantized(format) ? quantized_panel_bytes(format, in) : float_panel_bytes(format, in);
}

// Bytes that a panel read from memory is asked for in advance. With some rows the processor looks less far
// ahead by itself.
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
  // Stretches of inputs are added up for themselves: the rounding error of a long sum grows with its length.
  const std::int64_t bytes = kPanel * (p.format == Format::kFloat32 ? 4 : 2);
  for (std::int64_t k = 0; k < p.in; k += kStretch) {
    const std::int64_t inputs = p.in - k < kStretch ? p.in - k : kStretch;
    Tile part;
    float_tile(p.format, rows, reinterpret_cast<const float*>(x) + k, p.x_stride / 4, inputs,
               panel + k * bytes, ahead, k == 0 ? tile : part);
    if (k == 0) continue;
    for (int r = 0; r < rows; ++r) {
      tile.sums[r][0] += part.sums[r][0];
      tile.sums[r][1] += part.sums[r][1];
    }
  }
}

// Asks for the tile's part of y, which is in no near cache: stores that wait for their lines hold up the
// sums.
inline __attribute__((always_inline)) void ask_for(const float* y, std::int64_t stride, int rows) {
  for (int r = 0; r < rows; ++r) {
    __builtin_prefetch(y + r * stride, 1);
    __builtin_prefetch(y + r * stride + kPanel - 1, 1);
  }
}

}  // namespace

std::int64_t float_panel_bytes(Format format, std::int64_t in) {
  return round_up(in * kPanel * (format == Format::kFloat32 ? 4 : 2), 64);
}

void pack_float(const PackParams& p, std::int64_t panel, void* to) {
  if (p.format == Format::kFloat32) {
    pack_values(p, panel, static_cast<float*>(to));
  } else {
    pack_values(p, panel, static_cast<std::uint16_t*>(to));
  }
}

void float_tile(Format format, int rows, const float* x, std::int64_t x_stride, std::int64_t in,
                const void* panel, std::int64_t ahead, Tile& tile) {
  switch (format) {
    case Format::kBFloat16:
      return tile_of(rows, x, x_stride, in, static_cast<const BFloat16*>(panel), ahead, tile);
    case Format::kFloat16:
      return tile_of(rows, x, x_stride, in, static_cast<const Float16*>(panel), ahead, tile);
    default:
      return tile_of(rows, x, x_stride, in, static_cast<const float*>(panel), ahead, tile);
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

std::int64_t prepared_row_bytes(Format format, std::int64_t in) {
  return is_quantized(format) ? quantized_row_bytes(format, in) : in * 4;
}

void prepare_rows(Format format, const float* x, std::int64_t x_stride, std::int64_t in, std::int64_t begin,
                  std::int64_t end, void* to) {
  if (is_quantized(format)) return quantize_rows(format, x, x_stride, in, begin, end, to);
  for (std::int64_t row = begin; row < end; ++row) {
    __builtin_memcpy(static_cast<float*>(to) + row * in, x + row * x_stride, in * 4);
  }
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
