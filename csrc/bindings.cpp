// PyTorch bindings of the normalisations: schemas, checks, CPU registration. In the CPU extension only the
// bindings include torch, and only its stable ABI, so the binary works with every PyTorch from 2.10 on. Fake
// implementations and autograd are in minilm/ops/backends/native.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "tensors.h"

namespace {

using namespace minilm;

// The layout that the kernels accept: contiguous channels, rows at a constant distance. Others are copied.
Tensor as_rows(const Tensor& t) {
  const bool one_stride = t.dim() == 2 && t.stride(1) == 1 && t.numel() > 0;
  return one_stride ? t : as_contiguous(t);
}

int64_t row_stride(const Tensor& t, int64_t channels) {
  return t.dim() == 2 && t.numel() > 0 ? t.stride(0) : channels;
}

void check_parameter(const char* op, const char* name, const Tensor& t, const Tensor& x,
                     ScalarType expected) {
  const int64_t channels = x.size(x.dim() - 1);
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU as x is");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, op, ": ", name, " must be [", channels,
                  "], the last size of x, and is ", text(shape_of(t)));
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", name_of(expected), " as ",
                  std::string(name) == "bias" ? "weight" : "x",
                  " is (or, beside 16-bit data, float32), and is ", name_of(t.scalar_type()));
}

struct NormTypes {
  DType data, parameters;
};

NormTypes check_norm(const char* op, const Tensor& x, const std::optional<Tensor>& residual,
                     const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType data = dtype_of(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, ": x must be [..., C] with C >= 1, and is ",
                  text(shape_of(x)));
  const std::vector<int64_t> sizes = shape_of(x);
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->is_cpu(), op, ": residual must be on the CPU as x is");
    STD_TORCH_CHECK(shape_of(*residual) == sizes, op, ": x ", text(sizes), " and residual ",
                    text(shape_of(*residual)), " must have the same shape");
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), op,
                    ": x and residual must have the same type, and are ", name_of(x.scalar_type()), " and ",
                    name_of(residual->scalar_type()));
  }
  const DType parameters = dtype_of(op, "weight", weight);
  const bool data_is_16_bit = data == DType::kBFloat16 || data == DType::kFloat16;
  const bool parameters_are_wide = data_is_16_bit && parameters == DType::kFloat32;
  check_parameter(op, "weight", weight, x, parameters_are_wide ? ScalarType::Float : x.scalar_type());
  if (bias.has_value()) check_parameter(op, "bias", *bias, x, weight.scalar_type());
  return {data, parameters};
}

// A task of at least 16,384 elements takes some microseconds, about what it costs to wake a thread.
int64_t rows_a_task(int64_t channels) { return std::max<int64_t>(1, 16384 / channels); }

struct NormOutputs {
  Tensor y, sum, mean, rstd;  // sum is x itself without a residual, and not returned then
};

NormOutputs norm(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                 const std::optional<Tensor>& bias, double eps) {
  const NormTypes types = check_norm(op, x, residual, weight, bias);
  LayerNormParams p = {};
  p.dtype = types.data;
  p.parameter_dtype = types.parameters;
  std::vector<int64_t> sizes = shape_of(x);
  const int64_t channels = sizes.back();
  const int64_t rows = x.numel() / channels;
  const auto statistics = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  // Kept alive until the kernel is done: copies, if the layout required them.
  const Tensor x_rows = as_rows(x);
  const Tensor residual_rows = residual.has_value() ? as_rows(*residual) : x_rows;
  const Tensor weight_row = as_contiguous(weight);
  const Tensor bias_row = bias.has_value() ? as_contiguous(*bias) : weight_row;

  Tensor y = torch::stable::new_empty(x, sizes);
  Tensor sum = residual.has_value() ? torch::stable::new_empty(x, sizes) : x;
  sizes.back() = 1;
  Tensor mean = torch::stable::new_empty(x, sizes, statistics);
  Tensor rstd = torch::stable::new_empty(x, sizes, statistics);

  p.x = x_rows.const_data_ptr();
  p.residual = residual.has_value() ? residual_rows.const_data_ptr() : nullptr;
  p.weight = weight_row.const_data_ptr();
  p.bias = bias.has_value() ? bias_row.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.sum = residual.has_value() ? sum.mutable_data_ptr() : nullptr;
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.channels = channels;
  p.x_stride = row_stride(x_rows, channels);
  p.residual_stride = row_stride(residual_rows, channels);
  p.eps = eps;
  const auto kernel = cpu_kernels().layer_norm;
  torch::stable::parallel_for(0, rows, rows_a_task(channels),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight,
                                              std::optional<Tensor> bias, double eps) {
  NormOutputs out = norm("layer_norm", x, std::nullopt, weight, bias, eps);
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const Tensor& weight, std::optional<Tensor> bias,
                                                          double eps) {
  NormOutputs out = norm("add_layer_norm", x, residual, weight, bias, eps);
  return {out.y, out.sum, out.mean, out.rstd};
}

struct RmsOutputs {
  Tensor y, sum;  // sum is x itself without a residual, and not returned then
};

RmsOutputs rms(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
               double eps) {
  const NormTypes types = check_norm(op, x, residual, weight, std::nullopt);
  RmsNormParams p = {};
  p.dtype = types.data;
  p.parameter_dtype = types.parameters;
  const std::vector<int64_t> sizes = shape_of(x);
  const int64_t channels = sizes.back();
  const int64_t rows = x.numel() / channels;
  const Tensor x_rows = as_rows(x);
  const Tensor residual_rows = residual.has_value() ? as_rows(*residual) : x_rows;
  const Tensor weight_row = as_contiguous(weight);

  Tensor y = torch::stable::new_empty(x, sizes);
  Tensor sum = residual.has_value() ? torch::stable::new_empty(x, sizes) : x;
  p.x = x_rows.const_data_ptr();
  p.residual = residual.has_value() ? residual_rows.const_data_ptr() : nullptr;
  p.weight = weight_row.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.sum = residual.has_value() ? sum.mutable_data_ptr() : nullptr;
  p.channels = p.y_stride = channels;
  p.x_stride = row_stride(x_rows, channels);
  p.residual_stride = row_stride(residual_rows, channels);
  p.eps = eps;
  const auto kernel = cpu_kernels().rms_norm;
  torch::stable::parallel_for(0, rows, rows_a_task(channels),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, sum};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return rms("rms_norm", x, std::nullopt, weight, eps).y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                        double eps) {
  RmsOutputs out = rms("add_rms_norm", x, residual, weight, eps);
  return {out.y, out.sum};
}

}  // namespace

// mean and rstd are [..., 1], float32 (float64 for float64 data), for the backward.
STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}
