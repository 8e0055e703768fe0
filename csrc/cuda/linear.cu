// A linear layer for 1 to 8 rows, for decoding steps.
//
//   y = activation(n(x) W^T + bias) + residual        n: nothing, RMSNorm or LayerNorm
//   gated: y = activation(n(x) Wg^T) * (n(x) Wu^T) + residual, W = Wg above Wu
//   W: 16-bit | int8, a scale a row | int8 or 4 bits, a scale (and a minimum) a group of 32 inputs
//
// Codes are exact in 16 bits, so products are taken of codes and inputs, and a group's sum is multiplied by
// its scale in float32. With a minimum, the group's sum of inputs times the minimum is added.
//
// Layout: 16 outputs a block (gated: 8 of gate over the 8 of up that they meet), as the rows of mma.m16n8k16;
// the rows of x are its columns, so up to 8 cost what 1 costs. 8 warps share the inputs in chunks of 128 = 4
// groups:
//
//   inputs:   | chunk 0: warp 0 | chunk 1: warp 1 | ... | chunk 7: warp 7 | chunk 8: warp 0 | ...
//   a group:  lane 4 g + t holds elements 8 t .. 8 t + 7 of rows g and g + 8 of W, and of row g of x
//
//   16-bit    one read of 16 bytes is a row's part of one group, W as it is
//   int8      of two groups   )  W as `pack` leaves it: a warp reads 512 bytes side by side
//   4 bits    of four groups  )
//
// x is normalised once by the block and kept in shared memory (32 KiB: 16,256 inputs of one row, 1,920 of
// eight; longer ones in turns). The warps' sums meet in shared memory, and the epilogue is done there.
//
// Bytes: W once (2, 1.03 to 1.06, 0.56 or 0.63 an element), x from the caches. 2 rows operations an element
// on tensor cores, 1 to 2 instructions an element to unpack 4 bits: memory is the limit. In flight: 128 bytes
// a thread (kAtOnce chunks; 64 of 4-bit codes), with the two blocks of a multiprocessor 32 to 64 KiB.

#include "cuda/device.h"

namespace minilm::cuda {
namespace {

constexpr int kThreads = 32 * kLinearWarps;
constexpr int kGroups = kLinearChunk / kGroup;  // of a chunk
static_assert(kGroups == 4);

// What a lane reads of one row and chunk.
template <Weights kWeights>
struct Piece {
  static constexpr bool kSixteen = kWeights == Weights::k16Bit;
  static constexpr bool kEight = kWeights == Weights::kInt8 || kWeights == Weights::kQ8;
  static constexpr bool kScaled = !kSixteen && kWeights != Weights::kInt8;
  static constexpr bool kMinimum = kWeights == Weights::kQ4WithMinimum;
  static constexpr int kReads = kSixteen ? 4 : kEight ? 2 : 1;
  static constexpr int kAtOnce = kSixteen ? 1 : 2;  // chunks in flight
  Words words[kReads];
  std::uint32_t scales[2], minimums[2];  // four float16 each
};

template <Weights kWeights>
MINILM_DEVICE void read(const LinearParams& p, int row, int chunk, int lane, Piece<kWeights>& piece) {
  using P = Piece<kWeights>;
  const int g = lane / 4, t = lane % 4;
  if constexpr (P::kSixteen) {
    const std::uint16_t* from =
        static_cast<const std::uint16_t*>(p.weight) + static_cast<std::int64_t>(row) * p.in;
#pragma unroll
    for (int i = 0; i < P::kReads; ++i) {
      const int column = chunk * kLinearChunk + i * kGroup + 8 * t;
      if (row < p.out && column < p.in) {
        piece.words[i] = load_once(from + column);
      } else {
        piece.words[i] = {};
      }
    }
  } else {  // padded to whole panels and chunks; `row` may still lie in a panel beyond the last
    const int panel = smaller(row / kPanel, panels_of(p.out) - 1);
    const std::int64_t reads = static_cast<std::int64_t>(chunks_of(p.in)) * P::kReads;
    const Words* from = static_cast<const Words*>(p.weight) + (panel * reads + chunk * P::kReads) * 32 + lane;
#pragma unroll
    for (int i = 0; i < P::kReads; ++i) piece.words[i] = load_once(from + 32 * i);
    if constexpr (P::kScaled) {
      const std::int64_t at = packed_scale(panel * kPanel + g, chunk * kGroups, p.in);
      load_once<8>(static_cast<const std::uint16_t*>(p.scale) + at, piece.scales);
      if constexpr (P::kMinimum) {
        load_once<8>(static_cast<const std::uint16_t*>(p.minimum) + at, piece.minimums);
      }
    }
  }
}

// The 8 weights of group `i` as four pairs of T.
template <typename T, Weights kWeights>
MINILM_DEVICE void unpack(const Piece<kWeights>& piece, int i, std::uint32_t (&pairs)[4]) {
  using P = Piece<kWeights>;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (P::kSixteen) {
      pairs[j] = piece.words[i].x[j];
    } else if constexpr (P::kEight) {
      const std::uint32_t four = piece.words[i / 2].x[i % 2 * 2 + j / 2];
      pairs[j] = pair<T>(code_of(four, j % 2 * 2), code_of(four, j % 2 * 2 + 1));
    } else {
      pairs[j] = nibble_pair<T>(piece.words[0].x[i], j, P::kMinimum ? 0 : 8);
    }
  }
}

MINILM_DEVICE float of_group(const std::uint32_t (&four)[2], int i) {
  return i % 2 ? second_of<Half>(four[i / 2]) : first_of<Half>(four[i / 2]);
}

MINILM_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:
      return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kSilu:
      return x / (1 + exp2f(-kLog2E * x));
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kQuickGelu:
      return x / (1 + exp2f(-1.702f * kLog2E * x));
  }
  return x;
}

// mean[row] and rstd[row] of the rows of x, by all threads of the block. The variance is summed around the
// mean.
template <typename T>
MINILM_DEVICE void statistics(const LinearParams& p, float* mean, float* rstd) {
  __shared__ float sums[kLinearWarps][kMostRows];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x < kMostRows) mean[threadIdx.x] = 0;
  __syncthreads();
  for (int pass = p.norm == Norm::kLayer ? 0 : 1; pass < 2; ++pass) {  // the mean, then squares around it
    for (int row = 0; row < p.rows; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      float sum = 0;
      for (int column = static_cast<int>(threadIdx.x) * 8; column < p.in; column += kThreads * 8) {
        float values[8];
        load8(x + column, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float d = values[i] - mean[row];
          sum += pass == 0 ? d : d * d;
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) sums[warp][row] = sum;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < p.rows) {
      float sum = 0;
      for (int w = 0; w < kLinearWarps; ++w) sum += sums[w][threadIdx.x];
      sum /= static_cast<float>(p.in);
      if (pass == 0) {
        mean[threadIdx.x] = sum;
      } else {
        rstd[threadIdx.x] = 1 / sqrtf(sum + p.eps);
      }
    }
    __syncthreads();
  }
}

// Columns [begin, begin + columns) of the normalised x into `to`, zeros beyond its end.
template <typename T>
MINILM_DEVICE void stage(const LinearParams& p, int begin, int columns, const float* mean, const float* rstd,
                         T* to) {
  const int octets = columns / 8;
  for (int i = static_cast<int>(threadIdx.x); i < p.rows * octets; i += kThreads) {
    const int row = i / octets, column = i % octets * 8;
    Words words = {};
    if (begin + column < p.in) {
      const T* from = static_cast<const T*>(p.x) + row * p.x_stride + begin + column;
      words = load(from);
      if (p.norm != Norm::kNone) {
        float x[8], weight[8], bias[8] = {};
        widen<T>(words, x);
        load8(static_cast<const T*>(p.norm_weight) + begin + column, weight);
        if (p.norm_bias != nullptr) load8(static_cast<const T*>(p.norm_bias) + begin + column, bias);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          x[k] = (x[k] - mean[row]) * rstd[row];
          if (p.norm == Norm::kRms) x[k] = to_float(round_to<T>(x[k]));  // as Llama rounds
          x[k] = x[k] * weight[k] + bias[k];
        }
        words = narrow<T>(x);
      }
    }
    store(to + row * tile_stride(columns) + column, words);
  }
}

template <typename T, Weights kWeights>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(LinearParams p) {
  using P = Piece<kWeights>;
  __shared__ Words held[kTileElements / 8];
  __shared__ float input_sums[P::kMinimum ? kTileElements / kGroup : 1];  // [group][row]
  __shared__ float partial[kLinearWarps][2 * kPanel][kMostRows];
  __shared__ float mean[kMostRows], rstd[kMostRows];
  T* x = reinterpret_cast<T*>(held);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int chunks = chunks_of(p.in);
  const int columns = smaller(tile_columns(p.rows), chunks * kLinearChunk);
  const int tile_chunks = columns / kLinearChunk;
  const int stride = tile_stride(columns);
  const int tiles = linear_tiles(p.out, p.gated);
  if (p.norm != Norm::kNone) statistics<T>(p, mean, rstd);

  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    float sums[4] = {};
    for (int begin = 0; begin < chunks; begin += tile_chunks) {
      if (tile_chunks < chunks || tile == static_cast<int>(blockIdx.x)) {
        __syncthreads();
        stage(p, begin * kLinearChunk, columns, mean, rstd, x);
        __syncthreads();
        if constexpr (P::kMinimum) {
          for (int i = static_cast<int>(threadIdx.x); i < p.rows * columns / kGroup; i += kThreads) {
            const T* from = x + i % p.rows * stride + i / p.rows * kGroup;
            float sum = 0;
            for (int k = 0; k < kGroup; ++k) sum += to_float(from[k]);
            input_sums[i] = sum;
          }
          __syncthreads();
        }
      }
      const int end = smaller(begin + tile_chunks, chunks);
      for (int first = begin + warp; first < end; first += kLinearWarps * P::kAtOnce) {
        P pieces[P::kAtOnce][2];
#pragma unroll
        for (int u = 0; u < P::kAtOnce; ++u) {
          const int chunk = smaller(first + u * kLinearWarps, end - 1);
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            read<kWeights>(p, linear_row(tile, g + 8 * upper, p.out, p.gated), chunk, lane, pieces[u][upper]);
          }
        }
#pragma unroll
        for (int u = 0; u < P::kAtOnce; ++u) {
          const int chunk = first + u * kLinearWarps;
          if (chunk >= end) break;  // the whole warp
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            const int column = (chunk - begin) * kLinearChunk + i * kGroup;
            Words in = {};
            if (g < p.rows) in = load(x + g * stride + column + 8 * t);
            std::uint32_t low[4], high[4];
            unpack<T>(pieces[u][0], i, low);
            unpack<T>(pieces[u][1], i, high);
            float group[4] = {};
            float (&to)[4] = P::kScaled ? group : sums;
            mma<T>(to, {low[0], high[0], low[1], high[1]}, in.x[0], in.x[1]);
            mma<T>(to, {low[2], high[2], low[3], high[3]}, in.x[2], in.x[3]);
            if constexpr (P::kScaled) {
#pragma unroll
              for (int k = 0; k < 4; ++k) sums[k] += group[k] * of_group(pieces[u][k / 2].scales, i);
            }
            if constexpr (P::kMinimum) {
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                const int row = 2 * t + k % 2;
                if (row >= p.rows) continue;
                const float sum = input_sums[column / kGroup * p.rows + row];
                sums[k] += sum * of_group(pieces[u][k / 2].minimums, i);
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int k = 0; k < 4; ++k) partial[warp][g + k / 2 * 8][2 * t + k % 2] = sums[k];
    __syncthreads();
    const int shown = p.gated ? kPanel : 2 * kPanel;  // results of a tile
    const int r = static_cast<int>(threadIdx.x) % shown, row = static_cast<int>(threadIdx.x) / shown;
    const int width = p.gated ? p.out / 2 : p.out;
    const int column = tile * shown + r;
    if (row < p.rows && column < width) {
      const auto total = [&](int of) {
        const int out = linear_row(tile, of, p.out, p.gated);
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kLinearWarps; ++w) sum += partial[w][of][row];
        if constexpr (kWeights == Weights::kInt8) sum *= static_cast<const float*>(p.scale)[out];
        return p.bias == nullptr ? sum : sum + to_float(static_cast<const T*>(p.bias)[out]);
      };
      float y = activate(p.activation, total(r));
      if (p.gated) y *= total(r + kPanel);
      if (p.residual != nullptr) {
        y += to_float(static_cast<const T*>(p.residual)[row * p.residual_stride + column]);
      }
      static_cast<T*>(p.y)[static_cast<std::int64_t>(row) * width + column] = round_to<T>(y);
    }
    __syncthreads();
  }
}

template <typename T>
const char* start(const LinearParams& p, int multiprocessors, void* stream) {
  // Two blocks a multiprocessor; each goes on to other outputs with x in place.
  const Grid grid = {static_cast<unsigned>(smaller(linear_tiles(p.out, p.gated), 2 * multiprocessors))};
  if (grid.x == 0 || p.rows == 0) return nullptr;
  switch (p.weights) {
    case Weights::k16Bit:
      return launch(linear_kernel<T, Weights::k16Bit>, grid, kThreads, p, stream);
    case Weights::kInt8:
      return launch(linear_kernel<T, Weights::kInt8>, grid, kThreads, p, stream);
    case Weights::kQ8:
      return launch(linear_kernel<T, Weights::kQ8>, grid, kThreads, p, stream);
    case Weights::kQ4:
      return launch(linear_kernel<T, Weights::kQ4>, grid, kThreads, p, stream);
    case Weights::kQ4WithMinimum:
      return launch(linear_kernel<T, Weights::kQ4WithMinimum>, grid, kThreads, p, stream);
  }
  return "linear: there is no kernel for these weights";
}

}  // namespace

const char* linear(const LinearParams& p, int multiprocessors, void* stream) {
  return p.data == Data::kFloat16 ? start<Half>(p, multiprocessors, stream)
                                  : start<BFloat16>(p, multiprocessors, stream);
}

}  // namespace minilm::cuda
