// All blocks of a Transformer as one op (cpu/transformer.cpp).
//
// The weights are one uint8 tensor, the arena, and an int64 tensor says what lies where in it (see Reader and
// minilm/fused.py, which writes it). Whatever the numbers say is checked against the sizes of the tensors
// before a pointer is made.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "memory.h"
#include "params.h"

namespace {

using minilm::Activation;
using minilm::DType;
using minilm::Format;
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

// Reads the numbers in order, and the places in the arena that they name.
class Reader {
 public:
  Reader(const Tensor& layout, const Tensor& arena)
      : at_(data<int64_t>(layout)),
        end_(at_ + layout.size(0)),
        arena_(data<char>(arena)),
        bytes_(arena.size(0)) {}

  int64_t number(int64_t low, int64_t high) {
    check(at_ < end_, "the layout is too short");
    const int64_t value = *at_++;
    check(value >= low && value <= high, "a number of the layout is out of range");
    return value;
  }
  int64_t size() { return number(1, int64_t{1} << 28); }  // so that products of two do not overflow
  bool flag() { return number(0, 1) != 0; }
  float real() {
    const auto bits = static_cast<uint32_t>(number(0, 0xFFFFFFFF));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // `count` float32 numbers, or null for the place -1.
  const float* floats(int64_t count, bool required) {
    const int64_t place = number(required ? 0 : -1, bytes_);
    if (place < 0) return nullptr;
    check(place % 64 == 0 && place + count * 4 <= bytes_, "a vector lies outside of the arena");
    return reinterpret_cast<const float*>(arena_ + place);
  }
  minilm::PackedWeight weight(int64_t in, int64_t columns, bool gated) {
    minilm::PackedWeight w = {};
    w.format = static_cast<Format>(number(0, 5));
    w.in = in;
    w.columns = columns;
    w.places = size();
    const auto& kernels = minilm::cpu_kernels();
    const int64_t width = kernels.panel * (gated ? 2 : 1);
    check(w.places == (columns + kernels.panel - 1) / kernels.panel * width,
          "a weight has other panels than it needs");
    const bool grouped = w.format == Format::kQ8 || w.format == Format::kQ4;
    check(!grouped || in % minilm::kGroup == 0, "a grouped format needs a multiple of 32 inputs");
    const int64_t place = number(0, bytes_);
    check(place % 64 == 0 && place + kernels.packed_bytes(w.format, in, w.places) <= bytes_,
          "a weight lies outside of the arena");
    w.packed = arena_ + place;
    return w;
  }
  int64_t left() const { return end_ - at_; }
  bool done() const { return at_ == end_; }

 private:
  const int64_t* at_;
  const int64_t* end_;
  const char* arena_;
  int64_t bytes_;
};

void read(Reader& r, minilm::TransformerWeights& w, std::vector<minilm::BlockWeights>& blocks) {
  w.layers = r.number(0, r.left());  // each takes more than one number
  w.channels = r.size();
  w.heads = r.size();
  w.kv_heads = r.size();
  w.head_dim = r.size();
  w.inner = r.size();
  check(w.heads % w.kv_heads == 0, "the query heads cannot be shared evenly by the key heads");
  check((w.heads + 2 * w.kv_heads) * w.head_dim <= int64_t{1} << 28, "the heads are too many");
  w.activation = static_cast<Activation>(r.number(0, 5));
  w.gated = r.flag();
  w.pre_norm = r.flag();
  w.rms = r.flag();
  w.causal = r.flag();
  w.eps = r.real();
  w.final_norm[0] = r.floats(w.channels, false);
  w.final_norm[1] = r.floats(w.channels, false);
  blocks.resize(w.layers);
  for (auto& block : blocks) {
    block.qkv = r.weight(w.channels, (w.heads + 2 * w.kv_heads) * w.head_dim, false);
    block.out = r.weight(w.heads * w.head_dim, w.channels, false);
    block.up = r.weight(w.channels, w.inner, w.gated);
    block.down = r.weight(w.inner, w.channels, false);
    for (auto* norm : {block.attention_norm, block.mlp_norm}) {
      norm[0] = r.floats(w.channels, true);
      norm[1] = r.floats(w.channels, false);
    }
    block.q_norm = r.floats(w.head_dim, false);
    block.k_norm = r.floats(w.head_dim, false);
    block.window = r.number(0, int64_t{1} << 31);
    block.scale = r.real();
  }
  check(r.done(), "the layout is too long");
  w.blocks = blocks.data();
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

void check_ends(const Tensor& cu_seqlens, int64_t tokens) {
  check(plain(cu_seqlens, ScalarType::Int, 1) && cu_seqlens.size(0) >= 1, "cu_seqlens must be int32 [B + 1]");
  const int32_t* ends = data<int32_t>(cu_seqlens);
  const int64_t count = cu_seqlens.size(0);
  check(ends[0] == 0 && ends[count - 1] == tokens && std::is_sorted(ends, ends + count),
        "cu_seqlens must grow from 0 to the number of tokens");
}

Tensor transformer(const Tensor& embedded, const Tensor& arena, const Tensor& layout,
                   const Tensor& cu_seqlens, std::optional<Tensor> cos, std::optional<Tensor> sin,
                   std::optional<Tensor> k_cache, std::optional<Tensor> v_cache, std::optional<Tensor> slots,
                   std::optional<Tensor> block_table, std::optional<Tensor> context_lens, bool fresh) {
  check(plain(arena, ScalarType::Byte, 1) && plain(layout, ScalarType::Long, 1),
        "the arena must be uint8 and the layout int64, both of one dimension");
  minilm::TransformerWeights w = {};
  std::vector<minilm::BlockWeights> blocks;
  Reader reader(layout, arena);
  read(reader, w, blocks);

  check(plain(embedded, ScalarType::Float, 2) && embedded.size(1) == w.channels, "x must be float32 [T, C]");
  minilm::TransformerParams p = {};
  p.weights = &w;
  p.tokens = embedded.size(0);
  check(p.tokens < (int64_t{1} << 31), "there are too many tokens");
  check_ends(cu_seqlens, p.tokens);
  p.cu_seqlens = data<int32_t>(cu_seqlens);
  p.sequences = cu_seqlens.size(0) - 1;
  check(cos.has_value() == sin.has_value(), "cos and sin come together");
  if (cos.has_value()) {
    for (const Tensor* angles : {&*cos, &*sin}) {
      check(w.head_dim % 2 == 0 && plain(*angles, ScalarType::Float, 2) && angles->size(0) == p.tokens &&
                angles->size(1) == w.head_dim / 2,
            "cos and sin must be float32 [T, D / 2]");
    }
    p.cos = data<float>(*cos);
    p.sin = data<float>(*sin);
  }
  p.fresh = true;
  int64_t longest_new = 0;
  bool all_single = p.sequences > 0;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t count = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    longest_new = std::max(longest_new, count);
    all_single = all_single && count == 1;
  }
  p.max_keys = longest_new;
  if (k_cache.has_value()) {
    check(v_cache.has_value() && slots.has_value() && block_table.has_value() && context_lens.has_value(),
          "the tensors of the cache come together");
    const ScalarType type = k_cache->scalar_type();
    check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
          "the cache must be float32, bfloat16 or float16");
    p.cache_dtype = type == ScalarType::Float      ? DType::kFloat32
                    : type == ScalarType::BFloat16 ? DType::kBFloat16
                                                   : DType::kFloat16;
    for (const Tensor* cache : {&*k_cache, &*v_cache}) {
      check(plain(*cache, type, 5) && cache->size(0) == w.layers && cache->size(1) == k_cache->size(1) &&
                cache->size(2) == k_cache->size(2) && cache->size(3) == w.kv_heads &&
                cache->size(4) == w.head_dim,
            "the cache must be [layers, pages, page size, Hkv, D], keys and values alike");
    }
    const int64_t pages = k_cache->size(1);
    p.page_size = k_cache->size(2);
    p.layer_bytes = pages * p.page_size * w.kv_heads * w.head_dim * (type == ScalarType::Float ? 4 : 2);
    check(plain(*slots, ScalarType::Long, 1) && slots->size(0) == p.tokens, "slots must be int64 [T]");
    p.slots = data<int64_t>(*slots);
    check(std::all_of(p.slots, p.slots + p.tokens,
                      [&](int64_t s) { return s >= 0 && s < pages * p.page_size; }),
          "a slot lies outside of the cache");
    check(plain(*block_table, ScalarType::Int, 2) && block_table->size(0) == p.sequences,
          "block_table must be int32 [B, pages]");
    p.block_table = data<int32_t>(*block_table);
    p.table_width = block_table->size(1);
    check(std::all_of(p.block_table, p.block_table + block_table->numel(),
                      [&](int32_t page) { return page >= 0 && page < std::max<int64_t>(pages, 1); }),
          "block_table names a page that the cache does not have");
    check(plain(*context_lens, ScalarType::Int, 1) && context_lens->size(0) == p.sequences,
          "context_lens must be int32 [B]");
    p.context_lens = data<int32_t>(*context_lens);
    for (int64_t b = 0; b < p.sequences; ++b) {
      const int64_t keys = p.context_lens[b];
      check(keys >= p.cu_seqlens[b + 1] - p.cu_seqlens[b] && keys <= p.table_width * p.page_size,
            "a context is shorter than its new tokens, or longer than its pages");
      if (!fresh) p.max_keys = std::max(p.max_keys, keys);
    }
    p.k_pages = static_cast<char*>(k_cache->mutable_data_ptr());
    p.v_pages = static_cast<char*>(v_cache->mutable_data_ptr());
    p.fresh = fresh;
    p.one_each = !fresh && all_single;
  }

  Tensor x = torch::stable::clone(embedded);
  if (p.tokens == 0 || w.layers == 0) return x;
  p.x = static_cast<float*>(x.mutable_data_ptr());
  p.threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const auto& kernels = minilm::cpu_kernels();
  p.workspace = workspace(kernels.transformer_workspace(p));
  std::memset(p.workspace, 0, kernels.transformer_counters(p));
  torch::stable::parallel_for(0, p.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.transformer(p);
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "transformer(Tensor embedded, Tensor arena, Tensor layout, Tensor cu_seqlens, Tensor? cos, Tensor? sin,"
      " Tensor(a!)? k_cache, Tensor(b!)? v_cache, Tensor? slots, Tensor? block_table, Tensor? context_lens,"
      " bool fresh) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) { m.impl("transformer", TORCH_BOX(&transformer)); }
