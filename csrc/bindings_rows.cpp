// PyTorch bindings of rotary embedding and of the append to a paged cache. Fake implementations are in
// minilm/ops/backends/native_attention.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/dispatch.h"
#include "parallel.h"
#include "tensors.h"

namespace {

using namespace minilm;

// Rows of heads with `channels` numbers each: a task of at least 16,384 of them.
int64_t rows_a_task(int64_t channels) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, channels)); }

struct Angles {
  Tensor cos, sin;  // [T, D / 2], contiguous
};

Angles check_angles(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_tensor(op, "q", q, ScalarType::Float, {-1, -1, -1});
  check_tensor(op, "k", k, ScalarType::Float, {q.size(0), -1, q.size(2)});
  STD_TORCH_CHECK(q.size(2) % 2 == 0, op, ": the head size must be even, and is ", q.size(2));
  for (const auto* angles : {&cos, &sin}) {
    check_tensor(op, angles == &cos ? "cos" : "sin", *angles, ScalarType::Float, {q.size(0), q.size(2) / 2});
  }
  return {as_contiguous(cos), as_contiguous(sin)};
}

// Heads that are copied and rotated.
class Turned {
 public:
  Turned(const Tensor& x, const Angles& angles)
      : from_(as_heads(x)), to(torch::stable::new_empty(x, shape_of(x))), size_(x.size(1) * x.size(2)) {
    if (to.numel() == 0) return;
    p_.q = static_cast<float*>(to.mutable_data_ptr());
    p_.cos = data<float>(angles.cos);
    p_.sin = data<float>(angles.sin);
    p_.heads = x.size(1);
    p_.head_dim = p_.rotated = x.size(2);
    p_.stride = size_;
  }
  void rows(int64_t begin, int64_t end) const {
    if (size_ == 0) return;
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(p_.q + row * size_, data<float>(from_) + row * from_.stride(0), size_ * sizeof(float));
    }
    cpu_kernels().rope(p_, begin, end);
  }

 private:
  Tensor from_;

 public:
  Tensor to;  // [T, H, D]

 private:
  RopeParams p_ = {};
  int64_t size_;
};

// Heads that are stored in slots of the pages.
class Appended {
 public:
  Appended(const Tensor& x, Tensor& pages, std::optional<Tensor>& scales, DType dtype, const int64_t* slots)
      : from_(as_heads(x)) {
    p_.dtype = dtype;
    p_.x = data<float>(from_);
    p_.x_stride = from_.stride(0);
    p_.heads = from_.size(1);
    p_.head_dim = from_.size(2);
    p_.pages = pages.mutable_data_ptr();
    p_.scales = scales.has_value() ? static_cast<float*>(scales->mutable_data_ptr()) : nullptr;
    p_.slots = slots;
  }
  void rows(int64_t begin, int64_t end) const { cpu_kernels().append_rows(p_, begin, end); }

 private:
  Tensor from_;
  AppendParams p_ = {};
};

// The slots, int64 [T], contiguous, each within the pages.
Tensor check_slots(const char* op, const Tensor& slots, int64_t tokens, const Tensor& pages) {
  check_tensor(op, "slots", slots, ScalarType::Long, {tokens});
  const Tensor row = as_contiguous(slots);
  const int64_t* begin = data<int64_t>(row);
  const int64_t room = pages.size(0) * pages.size(1);
  const int64_t* bad = std::find_if(begin, begin + tokens, [&](int64_t s) { return s < 0 || s >= room; });
  if (bad != begin + tokens) {
    STD_TORCH_CHECK(false, op, ": slots holds ", *bad, ", and the pages ", text(shape_of(pages)), " have ",
                    room, " slots");
  }
  return row;
}

DType check_values(const char* op, const Tensor& k, const Tensor& v, const Tensor& k_pages,
                   const Tensor& v_pages) {
  check_tensor(op, "k", k, ScalarType::Float, {-1, -1, -1});
  check_tensor(op, "v", v, ScalarType::Float, shape_of(k));
  return check_pages(op, k_pages, v_pages, k.size(1), k.size(2));
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  const Angles angles = check_angles("rope", q, k, cos, sin);
  const Turned turned_q(q, angles), turned_k(k, angles);
  minilm::parallel(q.size(0), rows_a_task((q.size(1) + k.size(1)) * q.size(2)),
                   [&](int64_t begin, int64_t end) {
                     turned_q.rows(begin, end);
                     turned_k.rows(begin, end);
                   });
  return {turned_q.to, turned_k.to};
}

void append_kv(const Tensor& k, const Tensor& v, Tensor k_pages, Tensor v_pages, const Tensor& slots,
               std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  const char* op = "append_kv";
  const DType dtype = check_values(op, k, v, k_pages, v_pages);
  const Tensor places = check_slots(op, slots, k.size(0), k_pages);
  check_scales(op, k_pages, k_scales, v_scales);
  const Appended keys(k, k_pages, k_scales, dtype, data<int64_t>(places));
  const Appended values(v, v_pages, v_scales, dtype, data<int64_t>(places));
  minilm::parallel(k.size(0), rows_a_task(2 * k.size(1) * k.size(2)), [&](int64_t begin, int64_t end) {
    keys.rows(begin, end);
    values.rows(begin, end);
  });
}

std::tuple<Tensor, Tensor> rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                                       const Tensor& sin, Tensor k_pages, Tensor v_pages, const Tensor& slots,
                                       std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  const char* op = "rope_append";
  const Angles angles = check_angles(op, q, k, cos, sin);
  const DType dtype = check_values(op, k, v, k_pages, v_pages);
  const Tensor places = check_slots(op, slots, k.size(0), k_pages);
  const Turned turned_q(q, angles), turned_k(k, angles);
  check_scales(op, k_pages, k_scales, v_scales);
  const Appended keys(turned_k.to, k_pages, k_scales, dtype, data<int64_t>(places));
  const Appended values(v, v_pages, v_scales, dtype, data<int64_t>(places));
  minilm::parallel(q.size(0), rows_a_task((q.size(1) + 2 * k.size(1)) * q.size(2)),
                   [&](int64_t begin, int64_t end) {
                     turned_q.rows(begin, end);
                     turned_k.rows(begin, end);
                     keys.rows(begin, end);
                     values.rows(begin, end);
                   });
  return {turned_q.to, turned_k.to};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q, Tensor k)");
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots,"
      " Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()");
  m.def(
      "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_pages,"
      " Tensor(b!) v_pages, Tensor slots, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None)"
      " -> (Tensor q, Tensor k)");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("rope_append", TORCH_BOX(&rope_append));
}
