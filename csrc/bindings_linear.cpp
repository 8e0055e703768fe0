// PyTorch bindings of packed linear layers: packing, and the layer itself.
//
// A packed weight is a uint8 tensor in the layout of the instruction set in use (see cpu/linear.h): it is
// created when a model first runs and never saved. All sizes are checked here against the bytes available.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "memory.h"
#include "parallel.h"
#include "params.h"

namespace {

using minilm::Activation;
using minilm::Format;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargest = int64_t{1} << 28;  // of the sizes of a weight: products of two do not overflow

void check(bool ok, const char* op, const char* what) { STD_TORCH_CHECK(ok, op, ": ", what); }

Format format_of(const char* op, int64_t format) {
  STD_TORCH_CHECK(format >= 0 && format <= 5, op, ": unknown weight format ", format);
  return static_cast<Format>(format);
}

bool plain(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.is_cpu() && t.is_contiguous() && t.scalar_type() == type &&
         (columns < 0 ? t.dim() == 1 : t.dim() == 2 && t.size(1) == columns) && t.size(0) == rows;
}

int64_t panel_width() { return minilm::cpu_kernels().panel; }

Tensor pack_linear(const Tensor& values, std::optional<Tensor> scales, std::optional<Tensor> minimums,
                   std::optional<Tensor> bias, const Tensor& order, int64_t format_code, int64_t in) {
  const char* op = "pack_linear";
  const Format format = format_of(op, format_code);
  const bool grouped = format == Format::kQ8 || format == Format::kQ4;
  check(values.dim() == 2 && in >= 1 && values.size(0) >= 1, op,
        "values must be [out, in], and not be empty");
  const int64_t out = values.size(0);
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                              ScalarType::Char,  ScalarType::Char,     ScalarType::Byte};
  check(plain(values, types[format_code], out, format == Format::kQ4 ? in / 2 : in), op,
        "values must be contiguous on the CPU, of the format's type, [out, in] ([out, in / 2] for 4 bits)");
  check(!grouped || in % minilm::kGroup == 0, op, "a grouped format needs a multiple of 32 inputs");
  check((format >= Format::kInt8) == scales.has_value(), op, "scales belong to the quantised formats");
  check((format == Format::kQ4) == minimums.has_value(), op, "minimums belong to the 4-bit format");
  if (scales.has_value()) {
    check(plain(*scales, ScalarType::Float, out, grouped ? in / minilm::kGroup : -1), op,
          "scales must be contiguous float32 [out], or [out, in / 32] for a grouped format");
  }
  if (minimums.has_value()) {
    check(plain(*minimums, ScalarType::Float, out, in / minilm::kGroup), op,
          "minimums must be contiguous float32 [out, in / 32]");
  }
  if (bias.has_value()) check(plain(*bias, ScalarType::Float, out, -1), op, "bias must be float32 [out]");
  check(order.dim() == 1 && plain(order, ScalarType::Int, order.size(0), -1), op,
        "order must be int32 [places]");
  const int64_t places = order.size(0);
  check(places >= 1 && places % panel_width() == 0, op, "order must fill whole panels");
  const int32_t* rows = static_cast<const int32_t*>(order.const_data_ptr());
  check(std::all_of(rows, rows + places, [&](int32_t row) { return row >= -1 && row < out; }), op,
        "order must hold rows of the weight, or -1");

  const auto& kernels = minilm::cpu_kernels();
  const Tensor packed =
      torch::stable::new_empty(values, {kernels.packed_bytes(format, in, places)}, ScalarType::Byte);
  minilm::prefer_large_pages(packed.mutable_data_ptr(), packed.numel());
  std::memset(packed.mutable_data_ptr(), 0, packed.numel());  // also what lies between the parts
  minilm::PackParams p = {};
  p.format = format;
  p.out = out;
  p.in = in;
  p.values = values.const_data_ptr();
  p.scales = scales.has_value() ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  p.minimums = minimums.has_value() ? static_cast<const float*>(minimums->const_data_ptr()) : nullptr;
  p.bias = bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.order = rows;
  p.places = places;
  p.packed = packed.mutable_data_ptr();
  kernels.pack(p);
  return packed;
}

// The planes that a quantised weight was packed from, into tensors of their shapes.
void unpack_linear(const Tensor& packed, const Tensor& order, int64_t format_code, int64_t in, Tensor codes,
                   Tensor scale, std::optional<Tensor> minimum) {
  const char* op = "unpack_linear";
  const Format format = format_of(op, format_code);
  check(format >= Format::kInt8, op, "the weight must be quantised");
  const bool grouped = format != Format::kInt8, four = format == Format::kQ4;
  check(in >= 1 && in <= kLargest && (!grouped || in % minilm::kGroup == 0), op,
        "a grouped format needs a multiple of 32 inputs");
  check(codes.dim() == 2 && codes.size(0) >= 1, op, "codes must be [out, in], and not be empty");
  const int64_t out = codes.size(0);
  check(plain(codes, four ? ScalarType::Byte : ScalarType::Char, out, four ? in / 2 : in), op,
        "codes must be contiguous on the CPU, of the format's type, [out, in] ([out, in / 2] for 4 bits)");
  check(plain(scale, grouped ? ScalarType::Half : ScalarType::Float, out, grouped ? in / minilm::kGroup : -1),
        op, "scale must be contiguous float32 [out], or float16 [out, in / 32] for a grouped format");
  check(!minimum.has_value() || (four && plain(*minimum, ScalarType::Half, out, in / minilm::kGroup)), op,
        "minimum must be contiguous float16 [out, in / 32], and the format one of 4 bits");
  check(order.dim() == 1 && plain(order, ScalarType::Int, order.size(0), -1), op,
        "order must be int32 [places]");
  const int64_t places = order.size(0);
  check(places >= 1 && places <= kLargest && places % panel_width() == 0, op, "order must fill whole panels");
  const int32_t* rows = static_cast<const int32_t*>(order.const_data_ptr());
  std::vector<bool> there(out, false);
  for (int64_t place = 0; place < places; ++place) {
    check(rows[place] >= -1 && rows[place] < out, op, "order must hold rows of the weight, or -1");
    if (rows[place] >= 0) there[rows[place]] = true;
  }
  check(std::all_of(there.begin(), there.end(), [](bool found) { return found; }), op,
        "order must hold every row of the weight");
  const auto& kernels = minilm::cpu_kernels();
  check(packed.dim() == 1 && plain(packed, ScalarType::Byte, kernels.packed_bytes(format, in, places), -1),
        op, "packed was not made for this format and these sizes");
  minilm::UnpackParams p = {};
  p.format = format;
  p.in = in;
  p.places = places;
  p.order = rows;
  p.packed = packed.const_data_ptr();
  p.values = codes.mutable_data_ptr();
  p.scales = scale.mutable_data_ptr();
  p.minimums = minimum.has_value() ? minimum->mutable_data_ptr() : nullptr;
  kernels.unpack(p, 0, places);
}

// activation(x W^T + bias) of x [rows, in] float32 -> [rows, columns] float32.
Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t format_code, int64_t columns,
                     int64_t places, int64_t activation, bool gated) {
  const char* op = "packed_linear";
  const Format format = format_of(op, format_code);
  check(x.dim() == 2 && x.size(1) >= 1 && plain(x, ScalarType::Float, x.size(0), x.size(1)), op,
        "x must be contiguous float32 [rows, in] on the CPU");
  const int64_t rows = x.size(0);
  const int64_t in = x.size(1);
  const int64_t width = panel_width() * (gated ? 2 : 1);
  check(activation >= 0 && activation <= 6, op, "unknown activation");
  check(in <= kLargest && places <= kLargest, op, "the sizes are too large");
  check(places >= 1 && places % width == 0 && columns >= 1 && columns <= places / (gated ? 2 : 1), op,
        "columns and places do not belong together");
  check(!(format == Format::kQ8 || format == Format::kQ4) || in % minilm::kGroup == 0, op,
        "a grouped format needs a multiple of 32 inputs");
  const auto& kernels = minilm::cpu_kernels();
  check(packed.dim() == 1 && plain(packed, ScalarType::Byte, kernels.packed_bytes(format, in, places), -1),
        op, "packed was not made for this format and these sizes");

  Tensor y = torch::stable::new_empty(x, {rows, columns});
  const int64_t row_bytes = kernels.prepared_row_bytes(format, in);
  const Tensor prepared = torch::stable::new_empty(x, {rows * row_bytes}, ScalarType::Byte);
  minilm::LinearParams p = {};
  p.format = format;
  p.activation = static_cast<Activation>(activation);
  p.gated = gated;
  p.in = in;
  p.places = places;
  p.columns = columns;
  p.packed = packed.const_data_ptr();
  p.x = x.const_data_ptr();
  p.x_stride = in * 4;
  p.rows = rows;
  p.y = static_cast<float*>(y.mutable_data_ptr());
  p.y_stride = columns;
  if (row_bytes > 0) {
    char* to = static_cast<char*>(prepared.mutable_data_ptr());
    const float* from = static_cast<const float*>(x.const_data_ptr());
    minilm::parallel(rows, std::max<int64_t>(1, 16384 / in), [&](int64_t begin, int64_t end) {
      kernels.prepare_rows(format, from, in, in, begin, end, to);
    });
    p.x = to;
    p.x_stride = row_bytes;
  }
  const int64_t panels = (columns + panel_width() - 1) / panel_width();
  const int64_t work = std::max<int64_t>(1, rows * in * width);
  minilm::parallel(panels, std::max<int64_t>(1, 65536 / work),
                   [&](int64_t begin, int64_t end) { kernels.linear(p, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "pack_linear(Tensor values, Tensor? scales, Tensor? minimums, Tensor? bias, Tensor order, int format,"
      " int in_features) -> Tensor");
  m.def(
      "unpack_linear(Tensor packed, Tensor order, int format, int in_features, Tensor(a!) codes,"
      " Tensor(b!) scale, Tensor(c!)? minimum) -> ()");
  m.def(
      "packed_linear(Tensor x, Tensor packed, int format, int columns, int places, int activation, bool "
      "gated)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("unpack_linear", TORCH_BOX(&unpack_linear));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}
