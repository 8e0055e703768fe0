// The embeddings: the vectors of a token, its position and its type, added and normalised.
//
// Bytes: each vector once, the result once. Threads split the rows; a row's sum is in the order of its
// tables, so it does not depend on the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "parallel.h"
#include "params.h"
#include "vector_table.h"

namespace {

using minilm::VectorTable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "embed: ", what); }

bool plain(const Tensor& t, ScalarType type, int64_t size) {
  return t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.dim() == 1 && t.size(0) == size;
}

// Rows of one table, and the row of each token: numbers[t], or the first row if there are no numbers.
struct Part {
  VectorTable table;
  const int64_t* numbers;

  Part(VectorTable rows, const std::optional<Tensor>& chosen, int64_t tokens, const char* what)
      : table(rows), numbers(nullptr) {
    if (!chosen.has_value()) {
      check(table.rows() > 0, "a table is empty");
      return;
    }
    check(plain(*chosen, ScalarType::Long, tokens), what);
    numbers = static_cast<const int64_t*>(chosen->const_data_ptr());
    check(std::all_of(numbers, numbers + tokens, [&](int64_t n) { return n >= 0 && n < table.rows(); }),
          "a number of a token, position or type is beyond its table");
  }

  void add(int64_t token, float* y) const { table.add(numbers == nullptr ? 0 : numbers[token], y); }
};

// norm(factor token + type + position), float32 [T, C]; without norm_weight there is no norm. With a
// packed_format the table is that of tokens as the output matrix is packed.
Tensor embed(const Tensor& tokens, const Tensor& table, std::optional<Tensor> scale,
             std::optional<Tensor> minimum, std::optional<Tensor> types, std::optional<Tensor> type_table,
             std::optional<Tensor> positions, std::optional<Tensor> position_table,
             std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, bool rms,
             double factor, int64_t packed_format, int64_t packed_rows, int64_t packed_channels) {
  check(tokens.is_cpu() && tokens.dim() == 1, "tokens must be int64 [T]");
  const int64_t count = tokens.size(0);
  const bool packed = packed_format >= 0;
  check(packed || table.dim() == 2, "a table must be [rows, C]");
  check(!packed || !(scale.has_value() || minimum.has_value()), "a packed table has its scales in it");
  const int64_t channels =
      packed ? packed_channels : table.size(1) * (table.scalar_type() == ScalarType::Byte ? 2 : 1);
  check(channels >= 1, "a table has no channels");
  std::vector<Part> parts;
  parts.emplace_back(packed ? VectorTable(table, packed_format, packed_rows, channels)
                            : VectorTable(table, scale, minimum, channels),
                     tokens, count, "tokens must be int64 [T]");
  if (type_table.has_value()) {
    parts.emplace_back(VectorTable(*type_table, std::nullopt, std::nullopt, channels), types, count,
                       "types must be int64 [T]");
  }
  if (position_table.has_value()) {
    check(positions.has_value(), "a table of positions needs positions");
    parts.emplace_back(VectorTable(*position_table, std::nullopt, std::nullopt, channels), positions, count,
                       "positions must be int64 [T]");
  }
  for (const auto* vector : {&norm_weight, &norm_bias}) {
    check(!vector->has_value() || plain(**vector, ScalarType::Float, channels),
          "weight and bias of the norm must be float32 [C]");
  }

  Tensor y = torch::stable::new_empty(tokens, {count, channels}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(tokens, {2, std::max<int64_t>(count, 1)}, ScalarType::Float);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  float* means = static_cast<float*>(statistics.mutable_data_ptr());
  const auto& kernels = minilm::cpu_kernels();
  minilm::LayerNormParams layer = {};
  minilm::RmsNormParams root = {};
  if (norm_weight.has_value()) {
    layer.x = root.x = layer.y = root.y = out;
    layer.weight = root.weight = norm_weight->const_data_ptr();
    layer.bias = norm_bias.has_value() ? norm_bias->const_data_ptr() : nullptr;
    layer.mean = means;
    layer.rstd = means + count;
    layer.channels = layer.x_stride = root.channels = root.x_stride = root.y_stride = channels;
    layer.eps = root.eps = eps;
  }
  const auto times = static_cast<float>(factor);
  const int64_t grain = std::max<int64_t>(1, 32768 / channels);
  minilm::parallel(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      float* row = out + token * channels;
      std::fill(row, row + channels, 0.0f);
      for (const Part& part : parts) {
        part.add(token, row);
        if (&part == parts.data() && times != 1.0f) {
          std::transform(row, row + channels, row, [&](float value) { return value * times; });
        }
      }
    }
    if (norm_weight.has_value())
      rms ? kernels.rms_norm(root, begin, end) : kernels.layer_norm(layer, begin, end);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "embed(Tensor tokens, Tensor table, Tensor? scale, Tensor? minimum, Tensor? types, Tensor? type_table,"
      " Tensor? positions, Tensor? position_table, Tensor? norm_weight, Tensor? norm_bias, float eps,"
      " bool rms, float factor=1, int packed_format=-1, int packed_rows=0, int packed_channels=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) { m.impl("embed", TORCH_BOX(&embed)); }
