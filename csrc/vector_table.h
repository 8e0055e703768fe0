// Embedding tables: floats, or one of the quantised formats.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>

#include "params.h"

namespace minilm {

// A table of vectors [rows, C] in a float dtype, or quantised (see minilm/ops/quantized.py).
class VectorTable {
  using Tensor = torch::stable::Tensor;
  using Type = torch::headeronly::ScalarType;

 public:
  VectorTable(const Tensor& values, const std::optional<Tensor>& scale, const std::optional<Tensor>& minimum,
              int64_t channels)
      : type_(values.scalar_type()), channels_(channels), values_(data(values)) {
    const bool four = type_ == Type::Byte;
    const bool floats = type_ == Type::Float || type_ == Type::BFloat16 || type_ == Type::Half;
    check(values.is_cpu() && values.is_contiguous() && values.dim() == 2 &&
              (floats || four || type_ == Type::Char),
          "a table of vectors must be contiguous [rows, C], of floats or of codes");
    rows_ = values.size(0);
    check(values.size(1) == (four ? channels / 2 : channels), "a table's vectors have another length");
    check(scale.has_value() == !floats, "a table has scales if it holds codes");
    check(!minimum.has_value() || four, "only a table of 4-bit codes has minimums");
    if (floats) return;
    grouped_ = scale->dim() == 2;
    check(grouped_ || !four, "4-bit codes have a scale for each group");
    check(!grouped_ || channels % kGroup == 0, "a grouped format needs a multiple of 32 channels");
    const int64_t groups = channels / kGroup;
    check(grouped_ ? plain(*scale, Type::Half, 2) && scale->size(1) == groups : plain(*scale, Type::Float, 1),
          "scales must be float16 [rows, C / 32], or float32 [rows]");
    check(scale->size(0) == rows_, "a table needs scales for every row");
    scale_ = data(*scale);
    if (!minimum.has_value()) return;
    check(plain(*minimum, Type::Half, 2) && minimum->size(0) == rows_ && minimum->size(1) == groups,
          "minimums must be float16 [rows, C / 32]");
    minimum_ = data(*minimum);
  }

  int64_t rows() const { return rows_; }

  // y += row
  void add(int64_t row, float* y) const {
    switch (type_) {
      case Type::Float:
        return add_floats<float>(row, y);
      case Type::BFloat16:
        return add_floats<c10::BFloat16>(row, y);
      case Type::Half:
        return add_floats<c10::Half>(row, y);
      default:
        for (int64_t k = 0; k < channels_; ++k) y[k] += value(row, k);
    }
  }

 private:
  static void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "embeddings: ", what); }

  static bool plain(const Tensor& t, Type type, int64_t dims) {
    return t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.dim() == dims;
  }

  static const char* data(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

  template <typename T>
  void add_floats(int64_t row, float* y) const {
    const T* from = reinterpret_cast<const T*>(values_) + row * channels_;
    for (int64_t k = 0; k < channels_; ++k) y[k] += static_cast<float>(from[k]);
  }

  float value(int64_t row, int64_t k) const {
    const int64_t group = row * (channels_ / kGroup) + k / kGroup;
    const float scale = grouped_ ? half(scale_, group) : reinterpret_cast<const float*>(scale_)[row];
    if (type_ == Type::Char) return scale * static_cast<signed char>(values_[row * channels_ + k]);
    const int byte = static_cast<unsigned char>(values_[group * 16 + k % 16]);
    const auto code = static_cast<float>(k % kGroup < 16 ? byte & 15 : byte >> 4);
    return minimum_ == nullptr ? scale * (code - 8) : scale * code + half(minimum_, group);
  }

  static float half(const char* numbers, int64_t i) { return reinterpret_cast<const c10::Half*>(numbers)[i]; }

  Type type_;
  int64_t channels_, rows_ = 0;
  const char* values_;
  const char* scale_ = nullptr;
  const char* minimum_ = nullptr;
  bool grouped_ = false;
};

}  // namespace minilm
