// All blocks of a Transformer as one op, and the whole of a decoding step as another (cpu/transformer.cpp).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "arena.h"
#include "cpu/dispatch.h"
#include "memory.h"
#include "params.h"
#include "vector_table.h"

namespace {

using minilm::DType;
using minilm::Format;
using minilm::VectorTable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "transformer: ";

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, kOp, what); }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

bool plain(const Tensor& t, ScalarType type, int64_t dims) {
  return t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.dim() == dims;
}

// Memory that is kept for the next call of this thread, so that its pages need not be fetched anew.
char* workspace(size_t bytes) {
  constexpr size_t kKept = size_t{256} << 20;
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t held = 0;
  if (bytes + 64 > held || held > kKept) {
    memory.reset();
    memory.reset(new char[bytes + 64]);
    held = bytes + 64;
    minilm::prefer_large_pages(memory.get(), held);
  }
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
}

// One call on its way to the kernel: what was checked is written to `p`, which points into this object.
class Call {
 public:
  minilm::TransformerParams p = {};
  minilm::TransformerWeights w = {};

  Call(const Tensor& arena, const Tensor& layout) {
    check(plain(arena, ScalarType::Byte, 1) && plain(layout, ScalarType::Long, 1),
          "the arena must be uint8 and the layout int64, both of one dimension");
    minilm::Reader reader(layout, arena);
    minilm::read_layout(reader, w, blocks_);
    p.weights = &w;
    p.fresh = true;
  }

  void set_sequences(const int32_t* ends, int64_t count, int64_t tokens) {
    check(tokens < (int64_t{1} << 31), "there are too many tokens");
    p.tokens = tokens;
    p.cu_seqlens = ends;
    p.sequences = count;
    all_single_ = count > 0;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t length = ends[b + 1] - ends[b];
      p.max_keys = std::max(p.max_keys, length);
      all_single_ = all_single_ && length == 1;
    }
  }

  void set_rope(const Tensor& cos, const Tensor& sin) {
    for (const Tensor* angles : {&cos, &sin}) {
      check(w.head_dim % 2 == 0 && plain(*angles, ScalarType::Float, 2) && angles->size(0) == p.tokens &&
                angles->size(1) == w.head_dim / 2,
            "cos and sin must be float32 [T, D / 2]");
    }
    p.cos = data<float>(cos);
    p.sin = data<float>(sin);
  }

  void set_cache(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& block_table,
                 const Tensor& context_lens, bool fresh, std::optional<Tensor>& k_scales,
                 std::optional<Tensor>& v_scales) {
    const ScalarType type = keys.scalar_type();
    int64_t bytes = 2;
    switch (type) {
      case ScalarType::Float:
        p.cache_dtype = DType::kFloat32;
        bytes = 4;
        break;
      case ScalarType::BFloat16:
        p.cache_dtype = DType::kBFloat16;
        break;
      case ScalarType::Half:
        p.cache_dtype = DType::kFloat16;
        break;
      default:
        check(type == ScalarType::Char, "the cache must be float32, bfloat16, float16 or int8");
        p.cache_dtype = DType::kInt8;
        bytes = 1;
    }
    for (const Tensor* cache : {&keys, &values}) {
      check(plain(*cache, type, 5) && cache->size(0) == w.layers && cache->size(1) == keys.size(1) &&
                cache->size(2) == keys.size(2) && cache->size(3) == w.kv_heads &&
                cache->size(4) == w.head_dim,
            "the cache must be [layers, pages, page size, Hkv, D], keys and values alike");
    }
    const int64_t pages = keys.size(1);
    p.page_size = keys.size(2);
    p.layer_bytes = pages * p.page_size * w.kv_heads * w.head_dim * bytes;
    p.layer_scales = pages * p.page_size * w.kv_heads;
    for (auto* scales : {&k_scales, &v_scales}) {
      check(scales->has_value() == (type == ScalarType::Char),
            "an int8 cache comes with scales, and others without");
      if (!scales->has_value()) continue;
      check(plain(**scales, ScalarType::Float, 4) && (*scales)->size(0) == w.layers &&
                (*scales)->size(1) == pages && (*scales)->size(2) == p.page_size &&
                (*scales)->size(3) == w.kv_heads,
            "scales must be float32 [layers, pages, page size, Hkv]");
      (scales == &k_scales ? p.k_scales : p.v_scales) = static_cast<float*>((*scales)->mutable_data_ptr());
    }
    check(plain(slots, ScalarType::Long, 1) && slots.size(0) == p.tokens, "slots must be int64 [T]");
    p.slots = data<int64_t>(slots);
    check(std::all_of(p.slots, p.slots + p.tokens,
                      [&](int64_t s) { return s >= 0 && s < pages * p.page_size; }),
          "a slot lies outside of the cache");
    check(plain(block_table, ScalarType::Int, 2) && block_table.size(0) == p.sequences,
          "block_table must be int32 [B, pages]");
    p.block_table = data<int32_t>(block_table);
    p.table_width = block_table.size(1);
    check(std::all_of(p.block_table, p.block_table + block_table.numel(),
                      [&](int32_t page) { return page >= 0 && page < std::max<int64_t>(pages, 1); }),
          "block_table names a page that the cache does not have");
    check(plain(context_lens, ScalarType::Int, 1) && context_lens.size(0) == p.sequences,
          "context_lens must be int32 [B]");
    p.context_lens = data<int32_t>(context_lens);
    for (int64_t b = 0; b < p.sequences; ++b) {
      const int64_t keys_here = p.context_lens[b];
      check(keys_here >= p.cu_seqlens[b + 1] - p.cu_seqlens[b] && keys_here <= p.table_width * p.page_size,
            "a context is shorter than its new tokens, or longer than its pages");
      if (!fresh) p.max_keys = std::max(p.max_keys, keys_here);
    }
    p.k_pages = static_cast<char*>(keys.mutable_data_ptr());
    p.v_pages = static_cast<char*>(values.mutable_data_ptr());
    p.fresh = fresh;
    p.one_each = !fresh && all_single_;
  }

  // x: float32 [T, C], overwritten with the result.
  void run(float* x) {
    p.x = x;
    p.threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const auto& kernels = minilm::cpu_kernels();
    p.workspace = workspace(kernels.transformer_workspace(p));
    std::memset(p.workspace, 0, kernels.transformer_counters(p));
    torch::stable::parallel_for(0, p.threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.transformer(p);
    });
  }

 private:
  std::vector<minilm::BlockWeights> blocks_;
  bool all_single_ = false;
};

Tensor transformer(const Tensor& embedded, const Tensor& arena, const Tensor& layout,
                   const Tensor& cu_seqlens, std::optional<Tensor> cos, std::optional<Tensor> sin,
                   std::optional<Tensor> k_cache, std::optional<Tensor> v_cache, std::optional<Tensor> slots,
                   std::optional<Tensor> block_table, std::optional<Tensor> context_lens, bool fresh,
                   std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  Call call(arena, layout);
  check(plain(embedded, ScalarType::Float, 2) && embedded.size(1) == call.w.channels,
        "x must be float32 [T, C]");
  const int64_t tokens = embedded.size(0);
  check(plain(cu_seqlens, ScalarType::Int, 1) && cu_seqlens.size(0) >= 1, "cu_seqlens must be int32 [B + 1]");
  const int32_t* ends = data<int32_t>(cu_seqlens);
  const int64_t count = cu_seqlens.size(0);
  check(ends[0] == 0 && ends[count - 1] == tokens && std::is_sorted(ends, ends + count),
        "cu_seqlens must grow from 0 to the number of tokens");
  call.set_sequences(ends, count - 1, tokens);
  check(cos.has_value() == sin.has_value(), "cos and sin come together");
  if (cos.has_value()) call.set_rope(*cos, *sin);
  if (k_cache.has_value()) {
    check(v_cache.has_value() && slots.has_value() && block_table.has_value() && context_lens.has_value(),
          "the tensors of the cache come together");
    call.set_cache(*k_cache, *v_cache, *slots, *block_table, *context_lens, fresh, k_scales, v_scales);
  }
  Tensor x = torch::stable::clone(embedded);
  if (tokens > 0 && call.w.layers > 0) call.run(static_cast<float*>(x.mutable_data_ptr()));
  return x;
}

// The newest token of each sequence, from its number to the logits [B, V] of the next one and the best of
// these, int64 [B].
std::tuple<Tensor, Tensor> decode_step(const Tensor& tokens, const Tensor& table, std::optional<Tensor> scale,
                                       std::optional<Tensor> minimum, std::optional<Tensor> position_table,
                                       int64_t position_offset, std::optional<Tensor> cos,
                                       std::optional<Tensor> sin, const Tensor& arena, const Tensor& layout,
                                       const Tensor& head, int64_t head_format, int64_t vocabulary,
                                       const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                                       const Tensor& block_table, const Tensor& context_lens,
                                       std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  Call call(arena, layout);
  const int64_t channels = call.w.channels;
  check(plain(tokens, ScalarType::Long, 1), "tokens must be int64 [B]");
  const int64_t batch = tokens.size(0);
  std::vector<int32_t> ends(batch + 1);
  for (int64_t b = 0; b <= batch; ++b) ends[b] = static_cast<int32_t>(b);
  call.set_sequences(ends.data(), batch, batch);
  call.set_cache(k_cache, v_cache, slots, block_table, context_lens, false, k_scales, v_scales);

  const VectorTable vectors(table, scale, minimum, channels);
  std::optional<VectorTable> places;
  if (position_table.has_value()) places.emplace(*position_table, std::nullopt, std::nullopt, channels);
  check(position_offset >= 0 && position_offset < (int64_t{1} << 31),
        "the positions have an impossible offset");
  std::vector<float> x(batch * channels, 0.0f);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t token = data<int64_t>(tokens)[b];
    check(token >= 0 && token < vectors.rows(), "a token is not in the vocabulary");
    vectors.add(token, x.data() + b * channels);
    if (!places.has_value()) continue;
    const int64_t place = call.p.context_lens[b] - 1 + position_offset;
    check(place >= 0 && place < places->rows(), "a position is beyond the table of positions");
    places->add(place, x.data() + b * channels);
  }

  check(cos.has_value() == sin.has_value(), "cos and sin come together");
  std::vector<float> angles;
  if (cos.has_value()) {
    const int64_t half = call.w.head_dim / 2;
    for (const Tensor* table_of : {&*cos, &*sin}) {
      check(call.w.head_dim % 2 == 0 && plain(*table_of, ScalarType::Float, 2) && table_of->size(1) == half,
            "cos and sin must be float32 [positions, D / 2]");
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t place = call.p.context_lens[b] - 1;
        check(place >= 0 && place < table_of->size(0), "a position is beyond the table of angles");
        const float* row = data<float>(*table_of) + place * half;
        angles.insert(angles.end(), row, row + half);
      }
    }
    call.p.cos = angles.data();
    call.p.sin = angles.data() + batch * half;
  }

  const auto& kernels = minilm::cpu_kernels();
  check(head_format >= 0 && head_format <= 5, "the head has an unknown format");
  check(vocabulary >= 1 && vocabulary < (int64_t{1} << 31), "the vocabulary has an impossible size");
  minilm::PackedWeight last = {};
  last.format = static_cast<Format>(head_format);
  last.in = channels;
  last.columns = vocabulary;
  last.places = (vocabulary + kernels.panel - 1) / kernels.panel * kernels.panel;
  check(!(last.format == Format::kQ8 || last.format == Format::kQ4) || channels % minilm::kGroup == 0,
        "a grouped format needs a multiple of 32 inputs");
  check(plain(head, ScalarType::Byte, 1) &&
            head.size(0) == kernels.packed_bytes(last.format, channels, last.places),
        "the head was not packed for this format and these sizes");
  last.packed = head.const_data_ptr();

  Tensor logits = torch::stable::new_empty(tokens, {batch, vocabulary}, ScalarType::Float);
  Tensor best = torch::stable::new_empty(tokens, {batch});
  if (batch == 0) return {logits, best};
  call.p.head = &last;
  call.p.logits = static_cast<float*>(logits.mutable_data_ptr());
  call.p.best = static_cast<int64_t*>(best.mutable_data_ptr());
  call.run(x.data());
  return {logits, best};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "transformer(Tensor embedded, Tensor arena, Tensor layout, Tensor cu_seqlens, Tensor? cos, Tensor? sin,"
      " Tensor(a!)? k_cache, Tensor(b!)? v_cache, Tensor? slots, Tensor? block_table, Tensor? context_lens,"
      " bool fresh, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> Tensor");
  m.def(
      "decode_step(Tensor tokens, Tensor table, Tensor? scale, Tensor? minimum, Tensor? position_table,"
      " int position_offset, Tensor? cos, Tensor? sin, Tensor arena, Tensor layout, Tensor head,"
      " int head_format, int vocabulary, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots,"
      " Tensor block_table, Tensor context_lens, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) {
  m.impl("transformer", TORCH_BOX(&transformer));
  m.impl("decode_step", TORCH_BOX(&decode_step));
}
