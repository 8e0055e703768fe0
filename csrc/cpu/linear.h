// Linear layers on packed weights: code shared by the float and the quantised kernels.
//
// The rows of a weight [out, in] (its outputs) are packed into panels of kPanel outputs, two vectors wide, so
// that a lane of a vector is an output. A panel is stored input by input,
//
//   panel p, input k:   W[order[p kPanel + 0], k]  W[order[p kPanel + 1], k] ...  (kPanel values)
//
// contiguously, and is read from start to end for any number of rows of x. If bfloat16 is multiplied in
// pairs, it is stored in pairs: W[order[p kPanel + 0], k and k + 1] ..., the last one padded with zero.
// `order` is the order of the outputs: unchanged, or alternating between gate and up, so that a gated layer
// finds both in neighbouring panels.
//
// packed:  bias, float32 [places]  |  panel 0  |  panel 1  | ...     each part a multiple of 64 bytes
//
// A tile is kTileRows rows of x times one panel. Its sums stay in registers over all inputs, and each output
// adds its products in the order of the inputs, in stretches of fixed length: its result depends only on its
// own row and weights, not on other rows, on the tile, or on the thread.
#pragma once

#include "cpu/math.h"
#include "cpu/vec.h"
#include "params.h"

namespace minilm::MINILM_ISA {

constexpr int kPanel = 2 * kLanes<float>;
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;  // the sums fill the register file, less three or four

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
inline std::int64_t bias_bytes(std::int64_t places) { return round_up(places * 4, 64); }

// The part of a row block's outputs that a tile holds, before bias and activation: [rows][kPanel].
struct Tile {
  F32 sums[kTileRows][2];
};

// Bytes of one packed panel.
std::int64_t float_panel_bytes(Format format, std::int64_t in);
std::int64_t quantized_panel_bytes(Format format, std::int64_t in);

void pack_float(const PackParams& p, std::int64_t panel, void* to);
void pack_quantized(const PackParams& p, std::int64_t panel, void* to);
// The row at `lane` of a panel, to row `row` of p.values and the other planes.
void unpack_quantized(const UnpackParams& p, const void* panel, int lane, std::int64_t row);

// Bytes of one prepared row of x for the quantised kernels, and the preparation of the rows [begin, end) of
// x.
std::int64_t quantized_row_bytes(Format format, std::int64_t in);
void quantize_rows(Format format, const float* x, std::int64_t x_stride, std::int64_t in, std::int64_t begin,
                   std::int64_t end, void* to);

// tile.sums[r] = row r of x times `panel`, for rows 1..kTileRows. Prefetches the memory `ahead` bytes beyond
// what is read.
void float_tile(Format format, int rows, const char* x, std::int64_t x_stride, std::int64_t in,
                const void* panel, std::int64_t ahead, Tile& tile);
void quantized_tile(Format format, int rows, const void* x, std::int64_t x_stride, std::int64_t in,
                    const void* panel, std::int64_t ahead, Tile& tile);

// The functions of the kernel table (see dispatch.h).
std::int64_t packed_bytes(Format format, std::int64_t in, std::int64_t places);
void pack(const PackParams& p);
void unpack(const UnpackParams& p, std::int64_t begin, std::int64_t end);
std::int64_t prepared_row_bytes(Format format, std::int64_t in);
void prepare_rows(Format format, const float* x, std::int64_t x_stride, std::int64_t in, std::int64_t begin,
                  std::int64_t end, void* to);
void linear(const LinearParams& p, std::int64_t begin, std::int64_t end);

inline bool is_quantized(Format format) { return format >= Format::kInt8; }

}  // namespace minilm::MINILM_ISA
