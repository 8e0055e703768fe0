// PyTorch bindings of attention on packed sequences and over a paged cache. Fake implementations are in
// minilm/ops/backends/native_attention.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>

#include "cpu/dispatch.h"
#include "parallel.h"
#include "tensors.h"

namespace {

using namespace minilm;

// int32 [B + 1], contiguous, growing from 0 to the number of tokens.
Tensor check_ends(const char* op, const char* name, const Tensor& ends, int64_t tokens) {
  check_tensor(op, name, ends, ScalarType::Int, {-1});
  const Tensor row = as_contiguous(ends);
  const int64_t count = row.size(0);
  const int32_t* at = data<int32_t>(row);
  STD_TORCH_CHECK(count >= 1 && at[0] == 0 && at[count - 1] == tokens && std::is_sorted(at, at + count), op,
                  ": ", name, " must grow from 0 to ", tokens, ", the number of tokens");
  return row;
}

int64_t check_window(const char* op, std::optional<int64_t> window) {
  STD_TORCH_CHECK(window.value_or(1) >= 1, op, ": window must be at least 1, and is ", window.value_or(1));
  return std::min(window.value_or(0), int64_t{1} << 31);  // no sequence is longer
}

// Sizes of the heads, from q, keys and values.
void set_heads(const char* op, AttentionParams& p, const Tensor& q, int64_t kv_heads) {
  p.heads = q.size(1);
  p.kv_heads = kv_heads;
  p.head_dim = q.size(2);
  STD_TORCH_CHECK(p.head_dim >= 1 && kv_heads >= 1 && p.heads % kv_heads == 0, op, ": ", p.heads,
                  " query heads of size ", p.head_dim, " cannot be shared evenly by ", kv_heads,
                  " key/value heads");
}

// Calls f(task) for all tasks, of unequal sizes, on all threads.
template <typename Make>
void share_out(int64_t tasks, Make make) {
  std::atomic<int64_t> next{0};
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  minilm::parallel(std::min(tasks, threads), 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    const auto task = make();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
  });
}

void run(const AttentionParams& p, int64_t sequences, int64_t max_keys) {
  const auto& kernels = cpu_kernels();
  const int64_t size = kernels.attention_scratch(p, max_keys);
  share_out(sequences * p.heads, [&] {
    std::shared_ptr<float[]> scratch(new float[size]);
    return [&, scratch](int64_t i) { kernels.attention(p, i / p.heads, i % p.heads, scratch.get()); };
  });
}

// The same over pages.
void run_paged(const AttentionParams& p, int64_t sequences, int64_t tokens, int64_t max_keys) {
  const auto& kernels = cpu_kernels();
  const int64_t chunks = kernels.paged_chunks(max_keys), size = kernels.paged_scratch(p);
  const int64_t floats = tokens * p.heads * chunks * kernels.paged_partial(p);
  const int64_t heads = sequences * p.kv_heads;
  if (floats > minilm::kMostPartials) {
    int64_t most = 0;
    for (int64_t b = 0; b < sequences; ++b) {
      most = std::max(most, kernels.paged_blocks(p, p.cu_q[b + 1] - p.cu_q[b]));
    }
    share_out(heads * most, [&] {
      std::shared_ptr<float[]> scratch(new float[size]);
      return [&, scratch](int64_t i) {
        const int64_t head = i / most;
        kernels.paged_block(p, head / p.kv_heads, head % p.kv_heads, i % most, scratch.get());
      };
    });
    return;
  }
  const std::unique_ptr<float[]> partials(new float[floats]);
  share_out(heads * chunks, [&] {
    std::shared_ptr<float[]> scratch(new float[size]);
    return [&, scratch](int64_t i) {
      const int64_t sequence = i / p.kv_heads / chunks;  // the heads of a chunk one after the other
      kernels.paged_chunk(p, sequence, i % p.kv_heads, i / p.kv_heads % chunks, chunks, partials.get(),
                          scratch.get());
    };
  });
  share_out(sequences * p.heads, [&] {
    return [&](int64_t i) {
      const int64_t sequence = i / p.heads;
      for (int64_t query = 0; query < p.cu_q[sequence + 1] - p.cu_q[sequence]; ++query) {
        kernels.paged_merge(p, sequence, query, i % p.heads, chunks, partials.get());
      }
    };
  });
}

// The same if every sequence has one query: stretches of keys are tasks, so that threads share a long
// context.
void run_decode(const AttentionParams& p, int64_t sequences, int64_t max_keys) {
  const auto& kernels = cpu_kernels();
  const int64_t of_one = kernels.decode_partials(p, max_keys), size = kernels.decode_scratch(p);
  const int64_t most = kernels.most_stretches(max_keys);
  const std::unique_ptr<float[]> partials(new float[sequences * of_one]);
  share_out(sequences * most, [&] {
    std::shared_ptr<float[]> scratch(new float[size]);
    return [&, scratch](int64_t i) {
      const int64_t sequence = i / most, number = i % most;
      if (number >= kernels.stretches(p.context[sequence])) return;
      kernels.decode(p, sequence, number, partials.get() + sequence * of_one, scratch.get());
    };
  });
  share_out(sequences * p.heads, [&] {
    return [&](int64_t i) {
      kernels.combine(p, i / p.heads, i % p.heads, partials.get() + i / p.heads * of_one);
    };
  });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, double scale, bool causal, std::optional<int64_t> window,
                 bool pairs, double soft_cap) {
  const char* op = "attention";
  check_tensor(op, "q", q, ScalarType::Float, {-1, -1, -1});
  check_tensor(op, "k", k, ScalarType::Float, {-1, -1, q.size(2)});
  check_tensor(op, "v", v, ScalarType::Float, shape_of(k));
  AttentionParams p = {};
  set_heads(op, p, q, k.size(1));
  p.window = check_window(op, window);
  STD_TORCH_CHECK(soft_cap >= 0, op, ": soft_cap must be above 0, or 0 for none, and is ", soft_cap);
  p.causal = causal;
  p.pairs = pairs;
  p.soft_cap = static_cast<float>(soft_cap);
  p.scale = static_cast<float>(scale);
  const Tensor q_ends = check_ends(op, "cu_seqlens_q", cu_seqlens_q, q.size(0));
  const Tensor k_ends = check_ends(op, "cu_seqlens_k", cu_seqlens_k, k.size(0));
  const int64_t sequences = q_ends.size(0) - 1;
  STD_TORCH_CHECK(k_ends.size(0) == sequences + 1, op, ": ", sequences, " sequences of queries and ",
                  k_ends.size(0) - 1, " of keys");
  p.cu_q = data<int32_t>(q_ends);
  p.cu_k = data<int32_t>(k_ends);
  int64_t max_keys = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t queries = p.cu_q[b + 1] - p.cu_q[b], keys = p.cu_k[b + 1] - p.cu_k[b];
    STD_TORCH_CHECK(queries <= keys || !(causal || p.window > 0), op, ": sequence ", b, " has ", queries,
                    " queries and ", keys, " keys, so some stand at no key");
    max_keys = std::max(max_keys, keys);
  }

  // Kept alive until the kernel is done: copies, if the layout required them.
  const Tensor q_rows = as_heads(q);
  Tensor k_rows = as_heads(k), v_rows = as_heads(v);
  if (k_rows.stride(0) != v_rows.stride(0)) {
    k_rows = as_contiguous(k_rows);
    v_rows = as_contiguous(v_rows);
  }
  Tensor out = torch::stable::new_empty(q, shape_of(q));
  if (out.numel() == 0) return out;
  p.q = data<float>(q_rows);
  p.k = k_rows.const_data_ptr();
  p.v = v_rows.const_data_ptr();
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.q_stride = q_rows.stride(0);
  p.kv_stride = k_rows.stride(0);
  run(p, sequences, max_keys);
  return out;
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                       const Tensor& block_table, const Tensor& cu_seqlens_q, const Tensor& context_lens,
                       double scale, std::optional<int64_t> window, std::optional<Tensor> k_scales,
                       std::optional<Tensor> v_scales, bool pairs) {
  const char* op = "paged_attention";
  check_tensor(op, "q", q, ScalarType::Float, {-1, -1, -1});
  STD_TORCH_CHECK(k_pages.dim() == 4, op, ": k_pages must be [pages, page size, Hkv, D], and is ",
                  text(shape_of(k_pages)));
  AttentionParams p = {};
  p.cache_dtype = check_pages(op, k_pages, v_pages, k_pages.size(2), q.size(2));
  check_scales(op, k_pages, k_scales, v_scales);
  if (k_scales.has_value()) {
    p.k_scales = data<float>(*k_scales);
    p.v_scales = data<float>(*v_scales);
  }
  set_heads(op, p, q, k_pages.size(2));
  p.window = check_window(op, window);
  p.causal = true;
  p.pairs = pairs;
  p.scale = static_cast<float>(scale);
  const Tensor q_ends = check_ends(op, "cu_seqlens_q", cu_seqlens_q, q.size(0));
  const int64_t sequences = q_ends.size(0) - 1;
  check_tensor(op, "block_table", block_table, ScalarType::Int, {sequences, -1});
  check_tensor(op, "context_lens", context_lens, ScalarType::Int, {sequences});
  const Tensor table = as_contiguous(block_table), context = as_contiguous(context_lens);
  p.cu_q = data<int32_t>(q_ends);
  p.block_table = data<int32_t>(table);
  p.context = data<int32_t>(context);
  p.table_width = table.size(1);
  p.page_size = k_pages.size(1);
  const int64_t pages = k_pages.size(0);
  int64_t max_keys = 0;
  bool one_each = true;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t queries = p.cu_q[b + 1] - p.cu_q[b], keys = p.context[b];
    STD_TORCH_CHECK(keys >= queries, op, ": sequence ", b, " has ", queries, " new tokens and a context of ",
                    keys);
    const int64_t needed = (keys + p.page_size - 1) / p.page_size;
    STD_TORCH_CHECK(needed <= p.table_width, op, ": the ", keys, " tokens of sequence ", b, " take ", needed,
                    " pages, and block_table has room for ", p.table_width);
    for (int64_t i = 0; i < needed; ++i) {
      const int32_t page = p.block_table[b * p.table_width + i];
      STD_TORCH_CHECK(page >= 0 && page < pages, op, ": block_table names the page ", page,
                      ", and there are ", pages);
    }
    max_keys = std::max(max_keys, keys);
    one_each = one_each && queries == 1;
  }

  const Tensor q_rows = as_heads(q);
  Tensor out = torch::stable::new_empty(q, shape_of(q));
  if (out.numel() == 0) return out;
  p.q = data<float>(q_rows);
  p.q_stride = q_rows.stride(0);
  p.k = k_pages.const_data_ptr();
  p.v = v_pages.const_data_ptr();
  p.out = static_cast<float*>(out.mutable_data_ptr());
  one_each ? run_decode(p, sequences, max_keys) : run_paged(p, sequences, q.size(0), max_keys);
  return out;
}

}  // namespace

// pairs: factors are rounded to bfloat16, if the instruction set has such products (not in decoding steps).
STABLE_TORCH_LIBRARY_FRAGMENT(minilm, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale,"
      " bool causal, int? window, bool pairs=False, float soft_cap=0) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor cu_seqlens_q,"
      " Tensor context_lens, float scale, int? window, Tensor? k_scales=None, Tensor? v_scales=None,"
      " bool pairs=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minilm, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}
