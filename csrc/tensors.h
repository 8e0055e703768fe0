// Checks of tensors in the bindings, before a kernel gets a pointer, and their error messages.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace minilm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

// A size of -1, where sizes are expected, stands for any.
inline std::string text(const std::vector<int64_t>& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    out += (i ? ", " : "") + (sizes[i] < 0 ? "*" : std::to_string(sizes[i]));
  }
  return out + "]";
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Char:
      return "int8";
    default:
      return "of another type";
  }
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16, and is ",
                      name_of(t.scalar_type()));
  }
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// `t` is of this type and shape, and on the CPU.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType type,
                         const std::vector<int64_t>& sizes) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || t.size(i) == sizes[i];
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(fits && t.scalar_type() == type, op, ": ", name, " must be ", name_of(type), " ",
                  text(sizes), ", and is ", name_of(t.scalar_type()), " ", text(shape_of(t)));
}

// Heads [T, H, D] whose heads of a token are contiguous, as in a part of a fused projection. Other layouts
// are copied.
inline Tensor as_heads(const Tensor& t) {
  const bool side_by_side =
      (t.size(2) == 1 || t.stride(2) == 1) && (t.size(1) == 1 || t.stride(1) == t.size(2));
  return side_by_side && t.numel() > 0 ? t : as_contiguous(t);
}

// Pages [pages, page size, Hkv, D] in a type that the kernels read and write; keys and values alike.
inline DType check_pages(const char* op, const Tensor& k_pages, const Tensor& v_pages, int64_t kv_heads,
                         int64_t head_dim) {
  const ScalarType type = k_pages.scalar_type();
  const DType dtype = type == ScalarType::Char ? DType::kInt8 : dtype_of(op, "k_pages", k_pages);
  STD_TORCH_CHECK(dtype != DType::kFloat64, op,
                  ": k_pages must be float32, bfloat16, float16 or int8, and is float64");
  check_tensor(op, "k_pages", k_pages, type, {-1, -1, kv_heads, head_dim});
  check_tensor(op, "v_pages", v_pages, type, shape_of(k_pages));
  STD_TORCH_CHECK(k_pages.is_contiguous() && v_pages.is_contiguous(), op,
                  ": k_pages and v_pages must be contiguous");
  STD_TORCH_CHECK(k_pages.size(1) >= 1, op, ": a page must have room for a token, and k_pages is ",
                  text(shape_of(k_pages)));
  return dtype;
}

// The scales beside int8 pages [pages, page size, Hkv, D]: float32 [pages, page size, Hkv]; others have none.
inline void check_scales(const char* op, const Tensor& pages, const std::optional<Tensor>& k_scales,
                         const std::optional<Tensor>& v_scales) {
  for (const auto* scales : {&k_scales, &v_scales}) {
    const char* name = scales == &k_scales ? "k_scales" : "v_scales";
    STD_TORCH_CHECK(scales->has_value() == (pages.scalar_type() == ScalarType::Char), op,
                    ": int8 pages come with ", name, ", and others without");
    if (!scales->has_value()) continue;
    check_tensor(op, name, **scales, ScalarType::Float, {pages.size(0), pages.size(1), pages.size(2)});
    STD_TORCH_CHECK((*scales)->is_contiguous(), op, ": ", name, " must be contiguous");
  }
}

}  // namespace minilm
