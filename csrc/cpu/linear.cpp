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

constexpr int kAhead = 2048;  // bytes that the panel is asked for in advance when few rows are computed

template <typename T, int R>
inline __attribute__((always_inline)) void sums_of(const float* x, std::int64_t x_stride, std::int64_t in,
                                                   const T* panel, Tile& tile) {
  F32 sums[R][2] = {};
  for (std::int64_t k = 0; k < in; ++k) {
    if (R <= 4) __builtin_prefetch(reinterpret_cast<const char*>(panel) + kAhead);
    if (R <= 4 && kPanel * sizeof(T) > 64)
      __builtin_prefetch(reinterpret_cast<const char*>(panel) + kAhead + 64);
    const F32 w0 = Storage<T>::widen(load(panel));
    const F32 w1 = Storage<T>::widen(load(panel + kLanes<float>));
    panel += kPanel;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const float value = x[r * x_stride + k];
      sums[r][0] += value * w0;
      sums[r][1] += value * w1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    tile.sums[r][0] = sums[r][0];
    tile.sums[r][1] = sums[r][1];
  }
}

template <typename T>
void tile_of(int rows, const float* x, std::int64_t x_stride, std::int64_t in, const T* panel, Tile& tile) {
  switch (rows) {
    case 1:
      return sums_of<T, 1>(x, x_stride, in, panel, tile);
    case 2:
      return sums_of<T, 2>(x, x_stride, in, panel, tile);
    case 3:
      return sums_of<T, 3>(x, x_stride, in, panel, tile);
    case 4:
      return sums_of<T, 4>(x, x_stride, in, panel, tile);
    case 5:
      return sums_of<T, 5>(x, x_stride, in, panel, tile);
    case 6:
      return sums_of<T, 6>(x, x_stride, in, panel, tile);
    default:
      break;
  }
  if constexpr (kTileRows == 12) {
    switch (rows) {
      case 7:
        return sums_of<T, 7>(x, x_stride, in, panel, tile);
      case 8:
        return sums_of<T, 8>(x, x_stride, in, panel, tile);
      case 9:
        return sums_of<T, 9>(x, x_stride, in, panel, tile);
      case 10:
        return sums_of<T, 10>(x, x_stride, in, panel, tile);
      case 11:
        return sums_of<T, 11>(x, x_stride, in, panel, tile);
      case 12:
        return sums_of<T, 12>(x, x_stride, in, panel, tile);
      default:
        break;
    }
  }
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

inline void put(float* y, F32 value, std::int64_t left, bool accumulate) {
  if (left <= 0) return;
  if (left >= kLanes<float>) {
    store(y, accumulate ? load(y) + value : value);
  } else {
    const int n = static_cast<int>(left);
    store(y, accumulate ? load(y, n) + value : value, n);
  }
}

void fill(const LinearParams& p, std::int64_t row, int rows, const char* panel, Tile& tile) {
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride;
  if (is_quantized(p.format)) {
    quantized_tile(p.format, rows, x, p.x_stride, p.in, panel, tile);
  } else {
    float_tile(p.format, rows, reinterpret_cast<const float*>(x), p.x_stride / 4, p.in, panel, tile);
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
                const void* panel, Tile& tile) {
  switch (format) {
    case Format::kBFloat16:
      return tile_of(rows, x, x_stride, in, static_cast<const BFloat16*>(panel), tile);
    case Format::kFloat16:
      return tile_of(rows, x, x_stride, in, static_cast<const Float16*>(panel), tile);
    default:
      return tile_of(rows, x, x_stride, in, static_cast<const float*>(panel), tile);
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
      Tile tile;
      fill(p, row, rows, panels + first * bytes, tile);
      Tile up;
      if (p.gated) fill(p, row, rows, panels + (first + 1) * bytes, up);
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
