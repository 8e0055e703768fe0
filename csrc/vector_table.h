// Embedding tables: floats, one of the quantised formats, or the packed form of a quantised output matrix.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "params.h"

namespace minilm {

// A table of vectors [rows, C] in a float dtype, or quantised (see minilm/ops/quantized.py); or the table as
// the output matrix is packed (cpu/linear.h), so that a tied table need not be held twice.
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

  // `format`: of the packed matrix, without gates; its bias is not read.
  VectorTable(const Tensor& packed, int64_t format, int64_t rows, int64_t channels)
      : type_(format == static_cast<int64_t>(Format::kQ4) ? Type::Byte : Type::Char),
        channels_(channels),
        rows_(rows),
        values_(data(packed)),
        grouped_(format != static_cast<int64_t>(Format::kInt8)),
        packed_(true) {
    const auto& kernels = cpu_kernels();
    check(format >= static_cast<int64_t>(Format::kInt8) && format <= static_cast<int64_t>(Format::kQ4),
          "a packed table must be quantised");
    format_ = static_cast<Format>(format);
    constexpr int64_t kLargest = int64_t{1} << 28;  // products of two do not overflow
    check(rows >= 1 && rows <= kLargest && channels >= 1 && channels <= kLargest,
          "a packed table has an impossible size");
    check(!grouped_ || channels % kGroup == 0, "a grouped format needs a multiple of 32 channels");
    places_ = (rows + kernels.panel - 1) / kernels.panel * kernels.panel;
    check(plain(packed, Type::Byte, 1) && packed.size(0) == kernels.packed_bytes(format_, channels, places_),
          "the packed table was not made for this format and these sizes");
  }

  int64_t rows() const { return rows_; }

  // y += row
  void add(int64_t row, float* y) const {
    if (packed_) return add_packed(row, y);
    switch (type_) {
      case Type::Float:
        return add_floats<float>(row, y);
      case Type::BFloat16:
        return add_floats<c10::BFloat16>(row, y);
      case Type::Half:
        return add_floats<c10::Half>(row, y);
      default:
        for (int64_t k = 0; k < channels_; ++k) y[k] += value(values_, scale_, minimum_, row, k);
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

  // One row is unpacked to planes of one row.
  void add_packed(int64_t row, float* y) const {
    const int64_t groups = grouped_ ? channels_ / kGroup : 2;  // two halves: one float32
    std::vector<uint16_t> planes((channels_ + 1) / 2 + 2 * groups + 2);
    char* scale = reinterpret_cast<char*>(planes.data());
    char* minimum = scale + 2 * groups;
    char* codes = minimum + 2 * groups;
    const int32_t first = 0;
    UnpackParams p = {};
    p.format = format_;
    p.in = channels_;
    p.places = places_;
    p.order = &first;
    p.packed = values_;
    p.values = codes;
    p.scales = scale;
    p.minimums = format_ == Format::kQ4 ? minimum : nullptr;
    cpu_kernels().unpack(p, row, row + 1);
    for (int64_t k = 0; k < channels_; ++k) {
      y[k] += value(codes, scale, p.minimums == nullptr ? nullptr : minimum, 0, k);
    }
  }

  float value(const char* codes, const char* scales, const char* minimums, int64_t row, int64_t k) const {
    const int64_t group = row * (channels_ / kGroup) + k / kGroup;
    const float scale = grouped_ ? half(scales, group) : reinterpret_cast<const float*>(scales)[row];
    if (type_ == Type::Char) return scale * static_cast<signed char>(codes[row * channels_ + k]);
    const int byte = static_cast<unsigned char>(codes[group * 16 + k % 16]);
    const auto code = static_cast<float>(k % kGroup < 16 ? byte & 15 : byte >> 4);
    return minimums == nullptr ? scale * (code - 8) : scale * code + half(minimums, group);
  }

  static float half(const char* numbers, int64_t i) { return reinterpret_cast<const c10::Half*>(numbers)[i]; }

  Type type_;
  int64_t channels_, rows_ = 0;
  const char* values_;
  const char* scale_ = nullptr;
  const char* minimum_ = nullptr;
  bool grouped_ = false;
  bool packed_ = false;
  Format format_ = Format::kQ8;
  int64_t places_ = 0;  // if packed
};

}  // namespace minilm
