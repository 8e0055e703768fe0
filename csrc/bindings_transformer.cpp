// PyTorch bindings of two ops: all blocks of a Transformer, and whole decoding steps (cpu/transformer.cpp).

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
#include "threads.h"
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

// Memory that is kept for the next call of this thread, to avoid page faults.
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

// The arguments of one call: checked values are written to `p`, which points into this object.
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

  void set_rope(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const float*& to_cos,
                const float*& to_sin) {
    check(cos.has_value() == sin.has_value(), "cos and sin come together");
    if (!cos.has_value()) return;
    for (const Tensor* angles : {&*cos, &*sin}) {
      check(w.rotated % 2 == 0 && plain(*angles, ScalarType::Float, 2) && angles->size(0) == p.tokens &&
                angles->size(1) == w.rotated / 2,
            "cos and sin must be float32 [T, R / 2] for R channels that are turned");
    }
    to_cos = data<float>(*cos);
    to_sin = data<float>(*sin);
  }

  // `steps`: new tokens of each sequence. A call reads one; more than 1 means that the same call also feeds
  // the tokens after it.
  void set_cache(const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& block_table,
                 const Tensor& context_lens, bool fresh, std::optional<Tensor>& k_scales,
                 std::optional<Tensor>& v_scales, int64_t steps = 1) {
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
    check(plain(slots, ScalarType::Long, 1) && slots.size(0) == p.tokens * steps, "slots must be int64 [T]");
    p.slots = data<int64_t>(slots);
    check(std::all_of(p.slots, p.slots + p.tokens * steps,
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
      check(keys_here >= (p.cu_seqlens[b + 1] - p.cu_seqlens[b]) * steps &&
                keys_here <= p.table_width * p.page_size,
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
    p.threads = minilm::team_threads(static_cast<int64_t>(torch::stable::get_num_threads()));
    const auto& kernels = minilm::cpu_kernels();
    p.workspace = workspace(kernels.transformer_workspace(p));
    std::memset(p.workspace, 0, kernels.transformer_counters(p));
    const int64_t begun = minilm::nanoseconds(CLOCK_MONOTONIC);
    const int64_t threads = minilm::crowding().allowed(p.threads, begun);
    if (threads == 1) {  // a thread alone does all tasks, and they are the same
      kernels.transformer(p);
      return;
    }
    std::vector<minilm::Waited> waited(threads);
    std::vector<int64_t> had(threads);  // of the processor
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t before = minilm::nanoseconds(CLOCK_THREAD_CPUTIME_ID);
        waited[i] = kernels.transformer(p);
        had[i] = minilm::nanoseconds(CLOCK_THREAD_CPUTIME_ID) - before;
      }
    });
    const int64_t ended = minilm::nanoseconds(CLOCK_MONOTONIC), wall = ended - begun;
    std::vector<minilm::Crowding::Share> shares(threads);
    for (int64_t i = 0; i < threads; ++i) {
      shares[i] = {had[i] - waited[i].spun, wall - waited[i].slept - had[i]};
    }
    minilm::crowding().note(shares.data(), threads, wall, ended);
  }

 private:
  std::vector<minilm::BlockWeights> blocks_;
  bool all_single_ = false;
};

Tensor transformer(const Tensor& embedded, const Tensor& arena, const Tensor& layout,
                   const Tensor& cu_seqlens, std::optional<Tensor> cos, std::optional<Tensor> sin,
                   std::optional<Tensor> k_cache, std::optional<Tensor> v_cache, std::optional<Tensor> slots,
                   std::optional<Tensor> block_table, std::optional<Tensor> context_lens, bool fresh,
                   std::optional<Tensor> k_scales, std::optional<Tensor> v_scales,
                   std::optional<Tensor> local_cos, std::optional<Tensor> local_sin) {
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
  call.set_rope(cos, sin, call.p.cos, call.p.sin);
  call.set_rope(local_cos, local_sin, call.p.local_cos, call.p.local_sin);
  if (k_cache.has_value()) {
    check(v_cache.has_value() && slots.has_value() && block_table.has_value() && context_lens.has_value(),
          "the tensors of the cache come together");
    call.set_cache(*k_cache, *v_cache, *slots, *block_table, *context_lens, fresh, k_scales, v_scales);
  }
  Tensor x = torch::stable::clone(embedded);
  if (tokens > 0 && call.w.layers > 0) call.run(static_cast<float*>(x.mutable_data_ptr()));
  return x;
}

// The angles of every position, by one rope, and memory for those of the tokens of a step.
class Angles {
 public:
  Angles(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
         const minilm::TransformerWeights& w, int64_t batch)
      : half_(cos.has_value() ? w.rotated / 2 : 0), batch_(batch), here_(2 * batch * half_) {
    check(cos.has_value() == sin.has_value(), "cos and sin come together");
    if (!cos.has_value()) return;
    for (const Tensor* angles : {&*cos, &*sin}) {
      check(w.rotated % 2 == 0 && plain(*angles, ScalarType::Float, 2) && angles->size(1) == half_,
            "cos and sin must be float32 [positions, R / 2] for R channels that are turned");
    }
    cos_ = data<float>(*cos);
    sin_ = data<float>(*sin);
    count_ = std::min(cos->size(0), sin->size(0));
  }

  void check_place(int64_t place) const {
    check(half_ == 0 || (place >= 0 && place < count_), "a position is beyond the table of angles");
  }
  // Token `b` stands at a checked place.
  void put(int64_t b, int64_t place) {
    std::copy_n(cos_ + place * half_, half_, here_.data() + b * half_);
    std::copy_n(sin_ + place * half_, half_, here_.data() + (batch_ + b) * half_);
  }
  // [batch, R / 2], or null.
  const float* cos() const { return half_ > 0 ? here_.data() : nullptr; }
  const float* sin() const { return half_ > 0 ? here_.data() + batch_ * half_ : nullptr; }

 private:
  int64_t half_, batch_, count_ = 0;
  std::vector<float> here_;
  const float* cos_ = nullptr;
  const float* sin_ = nullptr;
};

// The input of the first block: a token's vector, times a factor, and that of its position if these are
// learned.
class Inputs {
 public:
  Inputs(const VectorTable& tokens, float factor, const std::optional<Tensor>& positions, int64_t offset,
         int64_t channels)
      : tokens_(tokens), factor_(factor), offset_(offset), channels_(channels) {
    if (positions.has_value()) positions_.emplace(*positions, std::nullopt, std::nullopt, channels);
    check(offset >= 0 && offset < (int64_t{1} << 31), "the positions have an impossible offset");
  }

  void check_token(int64_t token) const {
    check(token >= 0 && token < tokens_.rows(), "a token is not in the vocabulary");
  }
  void check_place(int64_t place) const {
    check(!positions_.has_value() || (place >= 0 && place + offset_ < positions_->rows()),
          "a position is beyond the table of positions");
  }

  // For a checked token and position. x: [C].
  void write(int64_t token, int64_t place, float* x) const {
    std::fill(x, x + channels_, 0.0f);
    tokens_.add(token, x);
    if (factor_ != 1.0f) std::transform(x, x + channels_, x, [&](float value) { return value * factor_; });
    if (positions_.has_value()) positions_->add(place + offset_, x);
  }

 private:
  const VectorTable& tokens_;
  float factor_;
  std::optional<VectorTable> positions_;
  int64_t offset_, channels_;
};

// tokens [B], the newest of each sequence -> the logits [B, V] of the next token, and the most likely tokens,
// int64 [steps, B]: one step, or as many as `slots` [B * steps] and context_lens have room for, each feeding
// its most likely token to the next. A step that gives one of `ends` is the last. Logits are those of the
// last step; the tokens of steps that did not run are -1. Token vectors are multiplied by `factor`; logits
// get `head_bias` [V] and are then capped (`head_soft_cap`; 0: they are not).
std::tuple<Tensor, Tensor> decode_steps(
    const Tensor& tokens, const Tensor& table, std::optional<Tensor> scale, std::optional<Tensor> minimum,
    std::optional<Tensor> position_table, int64_t position_offset, std::optional<Tensor> cos,
    std::optional<Tensor> sin, const Tensor& arena, const Tensor& layout, const Tensor& head,
    int64_t head_format, int64_t vocabulary, int64_t logits_format, const Tensor& ends, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& slots, const Tensor& block_table, const Tensor& context_lens,
    std::optional<Tensor> k_scales, std::optional<Tensor> v_scales, std::optional<Tensor> local_cos,
    std::optional<Tensor> local_sin, double factor, std::optional<Tensor> head_bias, double head_soft_cap,
    int64_t packed_format, int64_t packed_rows) {
  Call call(arena, layout);
  const int64_t channels = call.w.channels;
  check(plain(tokens, ScalarType::Long, 1), "tokens must be int64 [B]");
  const int64_t batch = tokens.size(0);
  const int64_t steps = batch > 0 ? slots.numel() / batch : 1;
  check(steps >= 1 && steps < (int64_t{1} << 31), "there are no slots, or too many");
  std::vector<int32_t> borders(batch + 1);
  for (int64_t b = 0; b <= batch; ++b) borders[b] = static_cast<int32_t>(b);
  call.set_sequences(borders.data(), batch, batch);
  call.set_cache(k_cache, v_cache, slots, block_table, context_lens, false, k_scales, v_scales, steps);
  check(plain(ends, ScalarType::Long, 1), "ends must be int64, of one dimension");

  const VectorTable vectors = packed_format >= 0 ? VectorTable(table, packed_format, packed_rows, channels)
                                                 : VectorTable(table, scale, minimum, channels);
  const Inputs inputs(vectors, static_cast<float>(factor), position_table, position_offset, channels);
  Angles usual(cos, sin, call.w, batch), local(local_cos, local_sin, call.w, batch);
  std::vector<int64_t> current(data<int64_t>(tokens), data<int64_t>(tokens) + batch);
  std::vector<int32_t> contexts(call.p.context_lens, call.p.context_lens + batch);
  for (int64_t b = 0; b < batch; ++b) {
    inputs.check_token(current[b]);
    inputs.check_place(contexts[b] - 1);
    usual.check_place(contexts[b] - 1);
    local.check_place(contexts[b] - 1);
    contexts[b] -= static_cast<int32_t>(steps);  // what the sequence has before
  }
  check(steps == 1 || vocabulary <= vectors.rows(), "tokens may come that have no vector");

  const auto& kernels = minilm::cpu_kernels();
  check(head_format >= 0 && head_format <= 5, "the head has an unknown format");
  check(logits_format >= 0 && logits_format <= 2, "logits are float32, bfloat16 or float16");
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
  check(
      !head_bias.has_value() || (plain(*head_bias, ScalarType::Float, 1) && head_bias->size(0) == vocabulary),
      "the bias of the head must be float32 [V]");

  Tensor logits = torch::stable::new_empty(tokens, {batch, vocabulary}, ScalarType::Float);
  Tensor best = torch::stable::new_empty(tokens, {steps, batch});
  if (batch == 0) return {logits, best};
  auto* found = static_cast<int64_t*>(best.mutable_data_ptr());
  std::fill(found, found + steps * batch, -1);
  std::vector<float> x(batch * channels);
  std::vector<int64_t> places(batch);
  call.p.cos = usual.cos();
  call.p.sin = usual.sin();
  call.p.local_cos = local.cos();
  call.p.local_sin = local.sin();
  call.p.slots = places.data();
  call.p.context_lens = contexts.data();
  call.p.head = &last;
  call.p.head_bias = head_bias.has_value() ? data<float>(*head_bias) : nullptr;
  call.p.head_soft_cap = static_cast<float>(head_soft_cap);
  call.p.logits = static_cast<float*>(logits.mutable_data_ptr());
  constexpr DType kRounded[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  call.p.logits_dtype = kRounded[logits_format];
  const int64_t* last_tokens = data<int64_t>(ends);
  for (int64_t step = 0; step < steps; ++step, found += batch) {
    for (int64_t b = 0; b < batch; ++b) {
      inputs.write(current[b], contexts[b], x.data() + b * channels);
      usual.put(b, contexts[b]);
      local.put(b, contexts[b]);
      contexts[b] += 1;
      places[b] = data<int64_t>(slots)[b * steps + step];
    }
    call.p.best = found;
    call.run(x.data());
    std::copy_n(found, batch, current.begin());
    if (std::find_first_of(found, found + batch, last_tokens, last_tokens + ends.numel()) != found + batch)
      break;
  }
  return {logits, best};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "transformer(Tensor embedded, Tensor arena, Tensor layout, Tensor cu_seqlens, Tensor? cos, Tensor? sin,"
      " Tensor(a!)? k_cache, Tensor(b!)? v_cache, Tensor? slots, Tensor? block_table, Tensor? context_lens,"
      " bool fresh, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None, Tensor? local_cos=None,"
      " Tensor? local_sin=None) -> Tensor");
  m.def(
      "decode_steps(Tensor tokens, Tensor table, Tensor? scale, Tensor? minimum, Tensor? position_table,"
      " int position_offset, Tensor? cos, Tensor? sin, Tensor arena, Tensor layout, Tensor head,"
      " int head_format, int vocabulary, int logits_format, Tensor ends, Tensor(a!) k_cache,"
      " Tensor(b!) v_cache, Tensor slots, Tensor block_table, Tensor context_lens,"
      " Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None, Tensor? local_cos=None, Tensor? local_sin=None,"
      " float factor=1, Tensor? head_bias=None, float head_soft_cap=0, int packed_format=-1,"
      " int packed_rows=0) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) {
  m.impl("transformer", TORCH_BOX(&transformer));
  m.impl("decode_steps", TORCH_BOX(&decode_steps));
}
