// Rope, the append to the cache, and attention of rows and pages.
#include "attended.h"
#include "checks.h"
#include "cpu/dispatch.h"

namespace minilm::tests {
namespace {

enum class Norms { kNone, kOfEach, kOfAll };

void check_rope(std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t size,
                std::int64_t rotated, Norms norms, DType cache) {
  const std::int64_t q_size = heads * size, kv_size = kv_heads * size, stride = q_size + 2 * kv_size + 5;
  Floats rows = random_floats(tokens * stride);
  const Floats before = rows, cos = random_floats(tokens * rotated / 2),
               sin = random_floats(tokens * rotated / 2);
  const Floats q_norm = random_floats(q_size), k_norm = random_floats(q_size);
  Array keys(cache, (tokens + 4) * kv_size), values(cache, (tokens + 4) * kv_size);
  Floats k_scales((tokens + 4) * kv_heads), v_scales((tokens + 4) * kv_heads);
  std::vector<std::int64_t> slots;
  for (std::int64_t t = 0; t < tokens; ++t) slots.push_back(tokens + 2 - t);
  RopeParams p = {};
  p.q = rows.data(), p.k = p.q + q_size, p.v = p.k + kv_size, p.cos = cos.data(), p.sin = sin.data();
  if (norms != Norms::kNone) p.q_norm = q_norm.data(), p.k_norm = k_norm.data();
  p.eps = 1e-6f, p.norm_of_all = norms == Norms::kOfAll, p.rotated = rotated;
  p.k_pages = keys.bytes.data(), p.v_pages = values.bytes.data(), p.slots = slots.data();
  p.k_scales = k_scales.data(), p.v_scales = v_scales.data();
  p.stride = stride, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = size, p.cache_dtype = cache;
  cpu_kernels().rope(p, 0, tokens);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* row = rows.data() + t * stride;
    Doubles all(before.begin() + t * stride, before.begin() + t * stride + q_size + kv_size);
    if (norms == Norms::kOfAll) {
      root_norm(all.data(), q_norm.data(), q_size, 1e-6);
      root_norm(all.data() + q_size, k_norm.data(), kv_size, 1e-6);
    }
    for (std::int64_t head = 0; head < heads + kv_heads; ++head) {
      double* x = all.data() + head * size;
      if (norms == Norms::kOfEach) {
        root_norm(x, head < heads ? q_norm.data() : k_norm.data(), size, 1e-6);
      }
      turn(x, cos.data() + t * rotated / 2, sin.data() + t * rotated / 2, rotated);
      for (std::int64_t i = 0; i < size; ++i) expect("rope", row[head * size + i], x[i], 1e-5);
    }
    for (std::int64_t i = 0; i < kv_size; ++i) {
      const std::int64_t at = slots[t] * kv_size + i;
      const float *key = row + q_size, *value = key + kv_size;
      if (cache != DType::kInt8) {
        expect("appended key", keys.at(at), rounded(cache, key[i]), 0);
        expect("appended value", values.at(at), rounded(cache, value[i]), 0);
        continue;
      }
      const auto scale_of = [&](const float* x) {
        float largest = 0;
        for (std::int64_t j = i / size * size; j < i / size * size + size; ++j) {
          largest = std::max(largest, std::abs(x[j]));
        }
        return largest / 127.0f;
      };
      const std::int64_t scale_at = slots[t] * kv_heads + i / size;
      expect("scale of a key", k_scales[scale_at], scale_of(key), 0);
      expect("scale of a value", v_scales[scale_at], scale_of(value), 0);
      expect("code of a key", keys.at(at), std::nearbyint(key[i] / scale_of(key)), 0);
      expect("code of a value", values.at(at), std::nearbyint(value[i] / scale_of(value)), 0);
    }
    expect("what lies beyond a row", row[stride - 1], before[t * stride + stride - 1], 0);
  }
}

// A batch, with its keys and values as rows and in the pages of a cache.
struct Batch {
  std::vector<std::int32_t> queries, keys;  // of each sequence
  std::int64_t heads, kv_heads, size;
};

// By chunks of keys, and by blocks of queries, which must give the same bits.
void over_pages(AttentionParams p, const Batch& b, std::int64_t longest) {
  const auto& kernels = cpu_kernels();
  const auto sequences = static_cast<std::int64_t>(b.queries.size());
  const std::int64_t chunks = kernels.paged_chunks(longest), tokens = p.cu_q[sequences];
  Floats scratch(kernels.paged_scratch(p)), by_blocks(tokens * b.heads * b.size);
  float* out = p.out;
  p.out = by_blocks.data();
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t head = 0; head < b.kv_heads; ++head) {
      for (std::int64_t block = 0; block < kernels.paged_blocks(p, b.queries[s]); ++block) {
        kernels.paged_block(p, s, head, block, scratch.data());
      }
    }
  }
  p.out = out;
  Floats partials(tokens * b.heads * chunks * kernels.paged_partial(p));
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t head = 0; head < b.kv_heads; ++head) {
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        kernels.paged_chunk(p, s, head, chunk, chunks, partials.data(), scratch.data());
      }
    }
    for (std::int64_t query = 0; query < b.queries[s]; ++query) {
      for (std::int64_t head = 0; head < b.heads; ++head) {
        kernels.paged_merge(p, s, query, head, chunks, partials.data());
      }
    }
  }
  for (std::size_t i = 0; i < by_blocks.size(); ++i)
    expect("the other order of work", by_blocks[i], out[i], 0);
}

void check_attention(const Batch& b, bool causal, std::int64_t window, float soft_cap, bool paged,
                     DType cache, bool pairs) {
  const std::int64_t sequences = static_cast<std::int64_t>(b.queries.size()), page_size = 4;
  std::vector<std::int32_t> cu_q = {0}, cu_k = {0};
  std::int32_t longest = 0;
  for (std::int64_t s = 0; s < sequences; ++s) {
    cu_q.push_back(cu_q.back() + b.queries[s]);
    cu_k.push_back(cu_k.back() + b.keys[s]);
    longest = std::max(longest, b.keys[s]);
  }
  const std::int64_t kv_size = b.kv_heads * b.size, width = (longest + page_size - 1) / page_size;
  const std::int64_t pages = width * sequences;
  const Floats q = random_floats(cu_q.back() * b.heads * b.size, 2);
  const DType type = paged ? cache : DType::kFloat32;
  const std::int64_t slots = paged ? pages * page_size : cu_k.back();
  const float most = type == DType::kInt8 ? 50.0f : 1.0f;
  const Array k = random_array(type, slots * kv_size, 2 * most),
              v = random_array(type, slots * kv_size, most);
  Floats k_scales = random_floats(slots * b.kv_heads, 0.02f),
         v_scales = random_floats(slots * b.kv_heads, 0.02f);
  std::vector<std::int32_t> table;  // pages in no order
  for (std::int64_t i = 0; i < pages; ++i) table.push_back(static_cast<std::int32_t>((pages - 1 - i)));
  Floats out(q.size());
  AttentionParams p = {};
  p.q = q.data(), p.k = k.bytes.data(), p.v = v.bytes.data(), p.out = out.data(), p.cu_q = cu_q.data();
  p.q_stride = b.heads * b.size, p.kv_stride = kv_size, p.heads = b.heads, p.kv_heads = b.kv_heads;
  p.head_dim = b.size, p.window = window, p.scale = 0.3f, p.causal = causal, p.cache_dtype = cache;
  p.pairs = pairs, p.soft_cap = soft_cap;
  if (type == DType::kInt8) p.k_scales = k_scales.data(), p.v_scales = v_scales.data();
  if (paged) {
    p.block_table = table.data(), p.context = b.keys.data(), p.table_width = width, p.page_size = page_size;
  } else {
    p.cu_k = cu_k.data();
  }
  if (paged) {
    over_pages(p, b, longest);
  } else {
    Floats scratch(cpu_kernels().attention_scratch(p, longest));
    for (std::int64_t s = 0; s < sequences; ++s) {
      for (std::int64_t head = 0; head < b.heads; ++head) cpu_kernels().attention(p, s, head, scratch.data());
    }
  }
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t query = 0; query < b.queries[s]; ++query) {
      const std::int64_t place = query + b.keys[s] - b.queries[s];
      for (std::int64_t head = 0; head < b.heads; ++head) {
        const std::int64_t from = ((cu_q[s] + query) * b.heads + head) * b.size;
        const auto seen = [&](std::int64_t key) {
          return (!causal || key <= place) && (window == 0 || std::abs(key - place) < window);
        };
        const auto at = [&](bool value, std::int64_t key, std::int64_t i) {
          const std::int64_t slot =
              paged ? table[s * width + key / page_size] * page_size + key % page_size : cu_k[s] + key;
          const std::int64_t kv_head = head / (b.heads / b.kv_heads);
          const float scale =
              type == DType::kInt8 ? (value ? v_scales : k_scales)[slot * b.kv_heads + kv_head] : 1.0f;
          return scale * (value ? v : k).values[slot * kv_size + kv_head * b.size + i];
        };
        const bool rounds = pairs && has_pairs();
        const Doubles want = attended(q.data() + from, b.keys[s], b.size, 0.3f, soft_cap, seen, at, rounds);
        // A probability near the middle between two of bfloat16 may be rounded to the other of them.
        const double allowed = rounds ? 1.0 / 256 : 2e-6;
        for (std::int64_t i = 0; i < b.size; ++i) {
          expect(paged ? "attention in pages" : "attention", out[from + i], want[i],
                 allowed * (1 + std::abs(want[i])));
        }
      }
    }
  }
}

}  // namespace

void check_rope_and_attention() {
  for (const DType cache : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8}) {
    check_rope(5, 3, 1, 8, 8, Norms::kNone, cache);
    check_rope(4, 4, 2, 22, 22, Norms::kOfEach, cache);
    check_rope(3, 4, 2, 22, 10, Norms::kOfAll, cache);
    check_rope(3, 3, 3, 9, 4, Norms::kNone, cache);
    for (const Batch& b : {Batch{{3, 1, 7}, {3, 1, 7}, 4, 2, 8}, Batch{{1, 2, 15}, {33, 2, 40}, 6, 2, 20},
                           Batch{{1, 1}, {1, 300}, 3, 3, 32}, Batch{{14}, {14}, 2, 1, 64}}) {
      for (const bool causal : {false, true}) {
        for (const std::int64_t window : {0, 3}) {
          for (const bool pairs : {false, true}) {
            for (const float soft_cap : {0.0f, 1.5f}) {
              check_attention(b, causal, window, soft_cap, true, cache, pairs);
              if (cache == DType::kFloat32) {
                check_attention(b, causal, window, soft_cap, false, cache, pairs);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace minilm::tests
