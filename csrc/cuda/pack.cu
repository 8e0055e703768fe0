// A quantised weight into the order in which the lanes of linear.cu read it; once, when a model is loaded.
//
//   a row of codes, as stored     [group 0: 32 codes] [group 1] [group 2] ...
//   packed                        [panel of 8 rows] [read] [lane 4 g + t]: 16 bytes, row g of the panel, of
//                                 elements 8 t .. 8 t + 7 of
//       int8                          two groups, a byte a code
//       4 bits                        four groups, 4 bytes each, the pair (2 i, 2 i + 1) at nibbles i, i + 4
//   scales [out, in / 32] packed  [panel] [chunk of 4 groups] [row of the panel]: 4 scales, 8 bytes
//
// so that a warp reads 512 bytes side by side. Rows are padded to whole panels and to 128 inputs with zeros.
//
// Bytes: read and written once. A gather of single bytes, limited by the second-level cache.

#include "cuda/device.h"

namespace minilm::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_kernel(PackParams p) {
  const std::int64_t i = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  if (p.what == PackParams::What::kScales) {
    if (i >= packed_scales(p.out, p.in)) return;
    const Code code = packed_scale_code(i, p.in);
    const bool there = code.row < p.out && code.column < p.in / kGroup;
    const std::int64_t at = static_cast<std::int64_t>(code.row) * (p.in / kGroup) + code.column;
    static_cast<std::uint16_t*>(p.to)[i] = there ? static_cast<const std::uint16_t*>(p.from)[at] : 0;
    return;
  }
  const int bits = p.what == PackParams::What::kInt8 ? 8 : 4;
  if (i >= packed_words(p.out, p.in, bits)) return;
  std::uint32_t word = 0;
  for (int k = 0; k < 32 / bits; ++k) {
    const Code code = packed_code(i * (32 / bits) + k, p.in, bits);
    if (code.row >= p.out || code.column >= p.in) continue;
    const std::uint8_t* row = static_cast<const std::uint8_t*>(p.from) + code.row * (p.in * bits / 8);
    std::uint32_t value;
    if (bits == 8) {
      value = row[code.column];
    } else {  // byte 16 b + j of a row: element 32 b + j below, element 32 b + j + 16 above
      const int within = code.column % kGroup;
      value = row[code.column / kGroup * 16 + within % 16] >> within / 16 * 4 & 0xf;
    }
    word |= value << bits * k;
  }
  static_cast<std::uint32_t*>(p.to)[i] = word;
}

}  // namespace

const char* pack(const PackParams& p, void* stream) {
  const std::int64_t count = p.what == PackParams::What::kScales
                                 ? packed_scales(p.out, p.in)
                                 : packed_words(p.out, p.in, p.what == PackParams::What::kInt8 ? 8 : 4);
  if (count == 0) return nullptr;
  return launch(pack_kernel, {static_cast<unsigned>(ceil_div(count, kThreads))}, kThreads, p, stream);
}

}  // namespace minilm::cuda
