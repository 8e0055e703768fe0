// What a kernel is told: plain pointers, strides and sizes. Shared by the bindings and by every kernel.
#pragma once

#include <cstdint>

namespace minilm {

enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Rows of C channels. A row is contiguous; row i of x starts x_stride elements after row i - 1. Results are
// contiguous. Statistics are in float64 for float64 data, in float32 for all other.
struct LayerNormParams {
  const void* x;         // [rows, C], dtype
  const void* residual;  // [rows, C], dtype; null: nothing is added
  const void* weight;    // [C], parameter_dtype: dtype or float32
  const void* bias;      // [C], parameter_dtype; null: none
  void* y;               // [rows, C], dtype
  void* sum;             // [rows, C], dtype: x + residual; null without residual
  void* mean;            // [rows], statistics
  void* rstd;            // [rows], statistics: 1 / sqrt(variance + eps)
  std::int64_t channels;
  std::int64_t x_stride;
  std::int64_t residual_stride;
  double eps;
  DType dtype;
  DType parameter_dtype;
};

}  // namespace minilm
