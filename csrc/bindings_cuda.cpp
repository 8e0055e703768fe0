// PyTorch bindings of the CUDA ops: schemas, checks, registration, using only PyTorch's stable ABI. Kernels
// run on the current stream of the tensors' device without synchronising, and only results and the parts of a
// split context are allocated, so a step can be captured in a CUDA graph. Fake implementations are in
// minilm/ops/backends/cuda.py.
//
// With MINILM_CUDA_EMULATE the same file builds the library minilm_emulated, in which the same kernels run on
// a CPU (csrc/cuda/emulation.h).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/params.h"
#include "cuda/tiling.h"

#ifdef MINILM_CUDA_EMULATE
#define MINILM_CUDA_LIBRARY minilm_emulated
#define MINILM_CUDA_KEY CPU
#else
#define MINILM_CUDA_LIBRARY minilm_cuda
#define MINILM_CUDA_KEY CUDA
#endif

namespace {

using namespace minilm::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Makes the device of `t` current for the lifetime of this object, and has its current stream.
class Place {
 public:
#ifdef MINILM_CUDA_EMULATE
  explicit Place(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Place(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

std::string text(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

void done(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error == nullptr ? "" : error);
}

// Checks of tensors, before any pointer is taken.
struct Check {
  const char* op;
  const Tensor& like;  // whose device all must be on

  void shape(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    std::string expected;
    for (size_t i = 0; i < sizes.size(); ++i) {
      same = same && t.size(static_cast<int64_t>(i)) == sizes[i];
      expected += (i ? ", " : "") + std::to_string(sizes[i]);
    }
    STD_TORCH_CHECK(same, op, ": ", name, " must be [", expected, "], and is ", text(t));
    place(name, t);
  }
  void place(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op,
                    ": ", name, " must be on the device of the first argument");
  }
  void type(const char* name, const Tensor& t, ScalarType expected, const char* expected_name) const {
    STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", expected_name);
  }
  void vector(const char* name, const Tensor& t, int64_t size, ScalarType expected,
              const char* expected_name) const {
    shape(name, t, {size});
    type(name, t, expected, expected_name);
    STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  }
};

Data data_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Data::kFloat16;
    case ScalarType::BFloat16:
      return Data::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float16 or bfloat16");
  }
}

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

Tensor copied(const Tensor& t) {
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

// `t` if its rows (all but the first axis) are contiguous, 16 bytes aligned and a multiple of 16 bytes apart;
// else a copy.
Tensor as_rows(const Tensor& t) {
  int64_t inner = 1;
  bool taken = aligned(t) && t.dim() > 0;
  for (int64_t i = t.dim() - 1; i > 0; --i) {
    taken = taken && (t.stride(i) == inner || t.size(i) == 1);
    inner *= t.size(i);
  }
  const bool apart = t.size(0) <= 1 || t.stride(0) * static_cast<int64_t>(t.element_size()) % 16 == 0;
  return taken && apart ? t : copied(t);
}

int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.numel(); }

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() && aligned(t) ? t : copied(t); }

// Pages [pages, page size, Hkv, D] of `data` or int8 with scales; returns which.
Data check_pages(const Check& check, Data data, ScalarType type, const Tensor& k_pages, const Tensor& v_pages,
                 const Optional& k_scales, const Optional& v_scales) {
  STD_TORCH_CHECK(k_pages.dim() == 4, check.op, ": k_pages must be [pages, page size, Hkv, D], and is ",
                  text(k_pages));
  const int64_t pages = k_pages.size(0), size = k_pages.size(1), heads = k_pages.size(2);
  check.place("k_pages", k_pages);
  check.shape("v_pages", v_pages, {pages, size, heads, k_pages.size(3)});
  const bool int8 = k_pages.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(int8 || k_pages.scalar_type() == type, check.op,
                  ": pages must be int8 or of the type of the first argument");
  check.type("v_pages", v_pages, k_pages.scalar_type(), "of the type of k_pages");
  STD_TORCH_CHECK(k_scales.has_value() == int8 && v_scales.has_value() == int8, check.op,
                  ": int8 pages come with k_scales and v_scales, others without");
  for (const Tensor* t : {&k_pages, &v_pages}) {
    STD_TORCH_CHECK(t->is_contiguous() && aligned(*t), check.op,
                    ": pages must be contiguous, 16 bytes aligned");
  }
  if (int8) {
    for (const Tensor* t : {&*k_scales, &*v_scales}) {
      check.shape("scales", *t, {pages, size, heads});
      check.type("scales", *t, ScalarType::Float, "float32");
      STD_TORCH_CHECK(t->is_contiguous(), check.op, ": scales must be contiguous");
    }
  }
  return int8 ? Data::kInt8 : data;
}

// ---- rope and append
// ---------------------------------------------------------------------------------------

RopeAppendParams append_params(const Check& check, const Tensor& k, const Tensor& v, Tensor& k_pages,
                               Tensor& v_pages, Optional& k_scales, Optional& v_scales, const Tensor& slots) {
  STD_TORCH_CHECK(k.dim() == 3, check.op, ": k must be [T, Hkv, D], and is ", text(k));
  const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2);
  RopeAppendParams p = {};
  p.data = data_of(check.op, "k", k);
  p.cache = check_pages(check, p.data, k.scalar_type(), k_pages, v_pages, k_scales, v_scales);
  check.shape("v", v, {tokens, heads, head_dim});
  check.type("v", v, k.scalar_type(), "of the type of k");
  check.shape("k_pages", k_pages, {k_pages.size(0), k_pages.size(1), heads, head_dim});
  check.vector("slots", slots, tokens, ScalarType::Long, "int64");
  STD_TORCH_CHECK(head_dim % 16 == 0 && head_dim >= 16 && head_dim <= 256, check.op,
                  ": the head size must be a multiple of 16 up to 256, and is ", head_dim);
  p.k_pages = k_pages.mutable_data_ptr();
  p.v_pages = v_pages.mutable_data_ptr();
  if (p.cache == Data::kInt8) {
    p.k_scales = static_cast<float*>(k_scales->mutable_data_ptr());
    p.v_scales = static_cast<float*>(v_scales->mutable_data_ptr());
  }
  p.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  p.slot_count = k_pages.size(0) * k_pages.size(1);
  p.tokens = tokens;
  p.kv_heads = static_cast<int32_t>(heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  return p;
}

std::tuple<Tensor, Tensor> rope_append_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& cos, const Tensor& sin, Tensor k_pages,
                                          Tensor v_pages, const Tensor& slots, Optional k_scales,
                                          Optional v_scales) {
  const Check check = {"rope_append", q};
  const Place place(q);
  check.place("k", k);
  RopeAppendParams p = append_params(check, k, v, k_pages, v_pages, k_scales, v_scales, slots);
  STD_TORCH_CHECK(q.dim() == 3, "rope_append: q must be [T, H, D], and is ", text(q));
  check.shape("q", q, {p.tokens, q.size(1), p.head_dim});
  check.type("q", q, k.scalar_type(), "of the type of k");
  for (const Tensor* t : {&cos, &sin}) {
    check.shape("cos and sin", *t, {p.tokens, p.head_dim / 2});
    check.type("cos and sin", *t, ScalarType::Float, "float32");
  }
  const Tensor q_rows = as_rows(q), k_rows = as_rows(k), v_rows = as_rows(v);
  const Tensor cos_rows = as_contiguous(cos), sin_rows = as_contiguous(sin);
  Tensor q_out = torch::stable::new_empty(q, q.sizes()), k_out = torch::stable::new_empty(k, k.sizes());
  p.q = q_rows.const_data_ptr();
  p.k = k_rows.const_data_ptr();
  p.v = v_rows.const_data_ptr();
  p.cos = static_cast<const float*>(cos_rows.const_data_ptr());
  p.sin = static_cast<const float*>(sin_rows.const_data_ptr());
  p.q_out = q_out.mutable_data_ptr();
  p.k_out = k_out.mutable_data_ptr();
  p.q_stride = row_stride(q_rows);
  p.k_stride = row_stride(k_rows);
  p.v_stride = row_stride(v_rows);
  p.heads = static_cast<int32_t>(q.size(1));
  if (p.tokens > 0) done("rope_append", rope_append(p, place.stream()));
  return {q_out, k_out};
}

void append_kv_op(const Tensor& k, const Tensor& v, Tensor k_pages, Tensor v_pages, const Tensor& slots,
                  Optional k_scales, Optional v_scales) {
  const Check check = {"append_kv", k};
  const Place place(k);
  RopeAppendParams p = append_params(check, k, v, k_pages, v_pages, k_scales, v_scales, slots);
  const Tensor k_rows = as_rows(k), v_rows = as_rows(v);
  p.k = k_rows.const_data_ptr();
  p.v = v_rows.const_data_ptr();
  p.k_stride = row_stride(k_rows);
  p.v_stride = row_stride(v_rows);
  if (p.tokens > 0) done("append_kv", rope_append(p, place.stream()));
}

// ---- decode attention
// --------------------------------------------------------------------------------------

Tensor decode_attention_op(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                           const Tensor& block_table, const Tensor& context_lens, int64_t max_context,
                           double scale, std::optional<int64_t> window, Optional k_scales, Optional v_scales,
                           std::optional<int64_t> splits) {
  const Check check = {"decode_attention", q};
  const Place place(q);
  STD_TORCH_CHECK(q.dim() == 3, "decode_attention: q must be [B, H, D], and is ", text(q));
  DecodeParams p = {};
  p.data = data_of("decode_attention", "q", q);
  p.cache = check_pages(check, p.data, q.scalar_type(), k_pages, v_pages, k_scales, v_scales);
  const int64_t batch = q.size(0), heads = q.size(1), kv_heads = k_pages.size(2);
  check.shape("k_pages", k_pages, {k_pages.size(0), k_pages.size(1), kv_heads, q.size(2)});
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "decode_attention: ", heads,
                  " query heads cannot be shared evenly by ", kv_heads, " key/value heads");
  STD_TORCH_CHECK(block_table.dim() == 2, "decode_attention: block_table must be [B, pages], and is ",
                  text(block_table));
  check.shape("block_table", block_table, {batch, block_table.size(1)});
  check.type("block_table", block_table, ScalarType::Int, "int32");
  check.vector("context_lens", context_lens, batch, ScalarType::Int, "int32");
  STD_TORCH_CHECK(block_table.stride(1) == 1 || block_table.size(1) <= 1,
                  "decode_attention: block_table must be contiguous in its last axis");
  STD_TORCH_CHECK(max_context >= 0 && max_context <= block_table.size(1) * k_pages.size(1),
                  "decode_attention: max_context is ", max_context, ", and block_table has room for ",
                  block_table.size(1) * k_pages.size(1));
  STD_TORCH_CHECK(window.value_or(1) >= 1, "decode_attention: window must be at least 1, and is ", *window);
  STD_TORCH_CHECK(splits.value_or(1) >= 1 && splits.value_or(1) <= kMostSplits,
                  "decode_attention: splits must be 1 to ", kMostSplits, ", and is ", *splits);
  STD_TORCH_CHECK(batch <= 65535 && heads <= 65535, "decode_attention: at most 65,535 sequences and heads");
  const Tensor q_rows = as_rows(q);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (out.numel() == 0) return out;

  const int64_t group = heads / kv_heads;
  p.batch = static_cast<int32_t>(batch);
  p.heads = static_cast<int32_t>(heads);
  p.kv_heads = static_cast<int32_t>(kv_heads);
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.page_size = static_cast<int32_t>(k_pages.size(1));
  p.window = static_cast<int32_t>(window.value_or(0) > max_context ? 0 : window.value_or(0));
  p.scale = static_cast<float>(scale);
  if (splits.has_value()) {
    p.splits = static_cast<int32_t>(*splits);
  } else {
    int count = 0;
    done("decode_attention", multiprocessors(&count));
    const int64_t tiles = batch * (group == 1 ? heads : kv_heads * ceil_div(group, 16));
    const int64_t seen = p.window > 0 ? p.window : max_context;
    p.splits = decode_splits(tiles, static_cast<int>(seen), count);
  }
  Tensor partial = out, lse = out;  // not used with one split
  if (p.splits > 1) {
    partial = torch::stable::new_empty(q, {batch, heads, p.splits, p.head_dim}, ScalarType::Float);
    lse = torch::stable::new_empty(q, {batch, heads, p.splits}, ScalarType::Float);
    p.partial = static_cast<float*>(partial.mutable_data_ptr());
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
  }
  p.q = q_rows.const_data_ptr();
  p.k_pages = k_pages.const_data_ptr();
  p.v_pages = v_pages.const_data_ptr();
  if (p.cache == Data::kInt8) {
    p.k_scales = static_cast<const float*>(k_scales->const_data_ptr());
    p.v_scales = static_cast<const float*>(v_scales->const_data_ptr());
  }
  p.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.context_lens = static_cast<const int32_t*>(context_lens.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.q_stride = row_stride(q_rows);
  p.table_stride = row_stride(block_table);
  const auto kernel = group == 1 ? decode_attention : decode_attention_mma;
  done("decode_attention", kernel(p, place.stream()));
  if (p.splits > 1) done("decode_attention", decode_combine(p, place.stream()));
  return out;
}

// ---- linear
// ------------------------------------------------------------------------------------------------

Tensor pack_op(const Tensor& plane, int64_t columns) {
  const Check check = {"pack", plane};
  const Place place(plane);
  STD_TORCH_CHECK(plane.dim() == 2 && plane.size(0) > 0 && columns > 0,
                  "pack: a plane must be [out, ...], and is ", text(plane));
  PackParams p = {};
  p.out = static_cast<int32_t>(plane.size(0));
  p.in = static_cast<int32_t>(columns);
  Tensor packed = plane;
  switch (plane.scalar_type()) {
    case ScalarType::Char:
      p.what = PackParams::What::kInt8;
      check.shape("codes", plane, {p.out, columns});
      packed = torch::stable::new_empty(plane, {4 * packed_words(p.out, p.in, 8)});
      break;
    case ScalarType::Byte:
      p.what = PackParams::What::kInt4;
      STD_TORCH_CHECK(columns % kGroup == 0, "pack: 4-bit codes come in groups of 32, and there are ",
                      columns);
      check.shape("codes", plane, {p.out, columns / 2});
      packed = torch::stable::new_empty(plane, {4 * packed_words(p.out, p.in, 4)});
      break;
    case ScalarType::Half:
      p.what = PackParams::What::kScales;
      STD_TORCH_CHECK(columns % kGroup == 0, "pack: scales belong to groups of 32, and there are ", columns,
                      " columns");
      check.shape("scale", plane, {p.out, columns / kGroup});
      packed = torch::stable::new_empty(plane, {packed_scales(p.out, p.in)});
      break;
    default:
      STD_TORCH_CHECK(false, "pack: a plane must be int8, uint8 or float16");
  }
  const Tensor from = as_contiguous(plane);
  p.from = from.const_data_ptr();
  p.to = packed.mutable_data_ptr();
  done("pack", pack(p, place.stream()));
  return packed;
}

const void* optional_vector(const Check& check, const char* name, const Optional& t, int64_t size,
                            ScalarType type) {
  if (!t.has_value()) return nullptr;
  check.vector(name, *t, size, type, "of the type of x");
  STD_TORCH_CHECK(aligned(*t), check.op, ": ", name, " must be 16 bytes aligned");
  return t->const_data_ptr();
}

// weights: as the enumeration in params.h; packed for all but 16-bit ones. `out` is the number of their rows.
Tensor linear_op(const Tensor& x, const Tensor& weight, int64_t weights, int64_t out, Optional scale,
                 Optional minimum, Optional bias, int64_t norm, Optional norm_weight, Optional norm_bias,
                 double eps, int64_t activation, bool gated, Optional residual) {
  const Check check = {"linear", x};
  const Place place(x);
  LinearParams p = {};
  p.data = data_of("linear", "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= kMostRows, "linear: x must be [up to 8, in], and is ",
                  text(x));
  STD_TORCH_CHECK(
      weights >= 0 && weights <= 4 && norm >= 0 && norm <= 2 && activation >= 0 && activation <= 5,
      "linear: there is no such kind of weights, norm or activation: ", weights, ", ", norm, ", ",
      activation);
  const int64_t in = x.size(1), rows = x.size(0), width = gated ? out / 2 : out;
  STD_TORCH_CHECK(in > 0 && in % 8 == 0 && in < (1 << 24) && out > 0 && out < (1 << 24),
                  "linear: the sizes [", out, ", ", in,
                  "] of the weight must be above 0, below 2^24, and the second a multiple of 8");
  p.weights = static_cast<Weights>(weights);
  p.norm = static_cast<Norm>(norm);
  p.activation = static_cast<Activation>(activation);
  p.out = static_cast<int32_t>(out);
  p.in = static_cast<int32_t>(in);
  p.rows = static_cast<int32_t>(rows);
  p.gated = gated;
  p.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(!gated || out % 16 == 0, "linear: a gated weight must have a multiple of 16 rows, and has ",
                  out);
  if (p.weights == Weights::k16Bit) {
    check.shape("weight", weight, {out, in});
    check.type("weight", weight, x.scalar_type(), "of the type of x");
  } else {
    const bool eight = p.weights == Weights::kInt8 || p.weights == Weights::kQ8;
    check.vector("weight", weight, 4 * packed_words(p.out, p.in, eight ? 8 : 4),
                 eight ? ScalarType::Char : ScalarType::Byte, eight ? "int8" : "uint8");
    STD_TORCH_CHECK(scale.has_value(), "linear: a quantised weight needs its scale");
    const bool grouped = p.weights != Weights::kInt8;
    STD_TORCH_CHECK(!grouped || in % kGroup == 0, "linear: groups of 32 need a multiple of 32 inputs, not ",
                    in);
    check.vector("scale", *scale, grouped ? packed_scales(p.out, p.in) : out,
                 grouped ? ScalarType::Half : ScalarType::Float, grouped ? "float16" : "float32");
    p.scale = scale->const_data_ptr();
    STD_TORCH_CHECK(minimum.has_value() == (p.weights == Weights::kQ4WithMinimum),
                    "linear: a minimum belongs to one format, which needs it");
    if (minimum.has_value()) {
      check.vector("minimum", *minimum, packed_scales(p.out, p.in), ScalarType::Half, "float16");
      p.minimum = minimum->const_data_ptr();
    }
  }
  STD_TORCH_CHECK(weight.is_contiguous() && aligned(weight),
                  "linear: weight must be contiguous, 16 bytes aligned");
  p.bias = optional_vector(check, "bias", bias, out, x.scalar_type());
  p.norm_weight = optional_vector(check, "norm_weight", norm_weight, in, x.scalar_type());
  p.norm_bias = optional_vector(check, "norm_bias", norm_bias, in, x.scalar_type());
  STD_TORCH_CHECK((norm != 0) == norm_weight.has_value() && (norm == 2 || !norm_bias.has_value()),
                  "linear: a norm needs norm_weight, and only LayerNorm has norm_bias");
  const Tensor x_rows = as_rows(x);
  Tensor y = torch::stable::new_empty(x, {rows, width});
  Tensor residual_rows = y;
  if (residual.has_value()) {
    check.shape("residual", *residual, {rows, width});
    check.type("residual", *residual, x.scalar_type(), "of the type of x");
    residual_rows = as_rows(*residual);
    p.residual = residual_rows.const_data_ptr();
    p.residual_stride = row_stride(residual_rows);
  }
  p.x = x_rows.const_data_ptr();
  p.x_stride = row_stride(x_rows);
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  int count = 0;
  done("linear", multiprocessors(&count));
  done("linear", linear(p, count, place.stream()));
  return y;
}

// ---- sampling
// ----------------------------------------------------------------------------------------------

Tensor sample_op(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                 const Tensor& min_p, const Tensor& seed, const Tensor& sequence, const Tensor& step) {
  const Check check = {"sample", logits};
  const Place place(logits);
  SampleParams p = {};
  p.data = logits.scalar_type() == ScalarType::Float ? Data::kFloat32 : data_of("sample", "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) < (1 << 23),
                  "sample: logits must be [B, V] with V from 1 to 2^23, and is ", text(logits));
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) == 1,
                  "sample: logits must be contiguous in the last axis");
  const int64_t rows = logits.size(0);
  check.vector("temperature", temperature, rows, ScalarType::Float, "float32");
  check.vector("top_k", top_k, rows, ScalarType::Int, "int32");
  check.vector("top_p", top_p, rows, ScalarType::Float, "float32");
  check.vector("min_p", min_p, rows, ScalarType::Float, "float32");
  check.vector("seed", seed, rows, ScalarType::Long, "int64");
  check.vector("sequence", sequence, rows, ScalarType::Long, "int64");
  check.vector("step", step, rows, ScalarType::Long, "int64");
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  p.logits = logits.const_data_ptr();
  p.temperature = static_cast<const float*>(temperature.const_data_ptr());
  p.top_k = static_cast<const int32_t*>(top_k.const_data_ptr());
  p.top_p = static_cast<const float*>(top_p.const_data_ptr());
  p.min_p = static_cast<const float*>(min_p.const_data_ptr());
  p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  p.sequence = static_cast<const int64_t*>(sequence.const_data_ptr());
  p.step = static_cast<const int64_t*>(step.const_data_ptr());
  p.token = static_cast<int64_t*>(token.mutable_data_ptr());
  p.stride = row_stride(logits);
  p.rows = static_cast<int32_t>(rows);
  p.vocabulary = static_cast<int32_t>(logits.size(1));
  done("sample", sample(p, place.stream()));
  return token;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MINILM_CUDA_LIBRARY, m) {
  m.def(
      "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_pages, Tensor(b!) "
      "v_pages,"
      " Tensor slots, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> (Tensor q, Tensor k)");
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots,"
      " Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor context_lens,"
      " int max_context, float scale, int? window=None, Tensor? k_scales=None, Tensor? v_scales=None,"
      " int? splits=None) -> Tensor");
  m.def("pack(Tensor plane, int columns) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, int weights, int out, Tensor? scale=None, Tensor? minimum=None,"
      " Tensor? bias=None, int norm=0, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0,"
      " int activation=0, bool gated=False, Tensor? residual=None) -> Tensor");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,"
      " Tensor sequence, Tensor step) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MINILM_CUDA_LIBRARY, MINILM_CUDA_KEY, m) {
  m.impl("rope_append", TORCH_BOX(&rope_append_op));
  m.impl("append_kv", TORCH_BOX(&append_kv_op));
  m.impl("decode_attention", TORCH_BOX(&decode_attention_op));
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("sample", TORCH_BOX(&sample_op));
}
