// All blocks of a model in one call: prompts, pieces of them, steps of decoding, on several threads.
#include <thread>

#include "attended.h"
#include "checks.h"
#include "cpu/dispatch.h"
#include "weight.h"

namespace minilm::tests {
namespace {

// What a decoder has beyond Llama.
struct Traits {
  bool read = true, added = false;  // norms of what a sub-layer reads and adds
  bool parallel = false;
  bool local = false;        // the first layer has a rope of its own, the second none
  bool norm_of_all = false;  // of q and k
  std::int64_t rotated = 6;
  float soft_cap = 0, head_soft_cap = 0;
};

struct Model {
  bool decoder;  // before-norms, RMSNorm, rope, a gated MLP, causal; else as BERT
  Traits traits;
  std::int64_t channels = 24, heads = 4, kv_heads, size = 6, inner = 40, layers = 2;
  std::vector<Weight> linear;  // qkv, out, up, down of each layer
  Weight head;                 // logits of 37 tokens
  std::vector<Floats> norms;   // of each layer: weight and bias of four norms, then those of q and k
  Floats final_norm, head_bias;
  std::vector<BlockWeights> blocks;
  TransformerWeights weights = {};

  Model(bool decoder, Format format, Format head_format, Traits more = {})
      : decoder(decoder),
        traits(more),
        kv_heads(decoder ? 2 : 4),
        head(head_format, 37, channels, false, false) {
    const std::int64_t all = (heads + 2 * kv_heads) * size;
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      linear.emplace_back(format, all, channels, false, !decoder);
      linear.emplace_back(format, channels, heads * size, false, !decoder);
      linear.emplace_back(format, decoder ? 2 * inner : inner, channels, decoder, !decoder);
      linear.emplace_back(format, channels, inner, false, !decoder);
      for (int i = 0; i < 8; ++i) norms.push_back(random_floats(channels, 0.5f, i % 2 ? 0.0f : 1.0f));
      norms.push_back(random_floats(heads * size, 0.5f, 1));
      norms.push_back(random_floats(kv_heads * size, 0.5f, 1));
    }
    final_norm = random_floats(channels, 0.5f, 1);
    head_bias = random_floats(37);
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const auto packed = [&](std::int64_t i) {
        const Weight& w = linear[4 * layer + i];
        return PackedWeight{w.packed.data(), w.format, w.in, w.places, w.columns};
      };
      const auto vector = [&](std::int64_t i) { return norms[10 * layer + i].data(); };
      const auto set = [&](Norm& norm, std::int64_t i) {
        norm[0] = vector(2 * i), norm[1] = decoder ? nullptr : vector(2 * i + 1);
      };
      BlockWeights block = {};
      block.qkv = packed(0), block.out = packed(1), block.up = packed(2), block.down = packed(3);
      if (!decoder) set(block.attention.sum, 0), set(block.mlp.sum, 1);
      if (decoder && traits.read) set(block.attention.read, 0), set(block.mlp.read, 1);
      if (traits.added) set(block.attention.added, 2), set(block.mlp.added, 3);
      if (traits.norm_of_all) block.q_norm = vector(8), block.k_norm = vector(9);
      block.scale = 0.4f;
      block.turns = !traits.local ? Turns::kByRope : layer == 0 ? Turns::kByLocalRope : Turns::kNot;
      blocks.push_back(block);
    }
    weights.blocks = blocks.data(), weights.final_norm[0] = decoder ? final_norm.data() : nullptr;
    weights.layers = layers, weights.channels = channels, weights.heads = heads, weights.kv_heads = kv_heads;
    weights.head_dim = size, weights.inner = inner, weights.eps = 1e-5f;
    weights.activation = decoder ? Activation::kSilu : Activation::kGelu;
    weights.gated = weights.rms = weights.causal = decoder;
    weights.parallel = traits.parallel, weights.qk_norm_of_all = traits.norm_of_all;
    weights.rotated = traits.rotated, weights.soft_cap = traits.soft_cap;
  }

  // A number near the middle between two of bfloat16 may be rounded to the other of them, which a norm of it
  // may enlarge.
  double tolerance() const { return !linear[0].rounds() ? 1e-4 : traits.added ? 4e-2 : 1e-2; }

  void angles(std::int64_t place, bool local, Floats& cos, Floats& sin) const {
    for (std::int64_t i = 0; i < traits.rotated / 2; ++i) {
      const float angle = static_cast<float>(place) / static_cast<float>(local ? i + 3 : i + 1);
      cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    }
  }

  void norm(Floats& x, const Norm& parameters) const {
    const float *weight = parameters[0], *bias = parameters[1];
    if (weight == nullptr) return;
    for (std::size_t first = 0; first < x.size(); first += channels) {
      double mean = 0, squares = 0;
      const double n = static_cast<double>(channels);
      for (std::int64_t c = 0; c < channels && !decoder; ++c) mean += x[first + c] / n;
      for (std::int64_t c = 0; c < channels; ++c)
        squares += (x[first + c] - mean) * (x[first + c] - mean) / n;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double y = (x[first + c] - mean) / std::sqrt(squares + 1e-5) * weight[c];
        x[first + c] = static_cast<float>(y + (bias != nullptr ? bias[c] : 0));
      }
    }
  }

  // One whole sequence, x [n, C]. In a step of decoding, which reads the token `alone`, attention is not
  // rounded.
  Floats forward(Floats x, std::int64_t alone) const {
    const std::int64_t n = static_cast<std::int64_t>(x.size()) / channels,
                       all = (heads + 2 * kv_heads) * size;
    const auto add = [&](Floats& to, const Doubles& y, const SubLayerNorms& norms) {
      Floats rows(y.begin(), y.end());
      norm(rows, norms.added);
      for (std::size_t i = 0; i < to.size(); ++i) to[i] += rows[i];
      norm(to, norms.sum);
    };
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const BlockWeights& block = blocks[layer];
      const Weight* w = &linear[4 * layer];
      Floats h = x;
      norm(h, block.attention.read);
      Doubles qkv = w[0].times(h, Activation::kNone);
      for (std::int64_t t = 0; t < n && decoder; ++t) {
        Floats cos, sin;
        angles(t, block.turns == Turns::kByLocalRope, cos, sin);
        if (block.q_norm != nullptr) {
          root_norm(&qkv[t * all], block.q_norm, heads * size, 1e-5);
          root_norm(&qkv[t * all + heads * size], block.k_norm, kv_heads * size, 1e-5);
        }
        for (std::int64_t head = 0; head < heads + kv_heads && block.turns != Turns::kNot; ++head) {
          turn(&qkv[t * all + head * size], cos.data(), sin.data(), traits.rotated);
        }
      }
      Floats mixed(n * heads * size);
      for (std::int64_t t = 0; t < n; ++t) {
        for (std::int64_t head = 0; head < heads; ++head) {
          const double* from = &qkv[t * all + head * size];
          const Floats q(from, from + size);
          const auto at = [&](bool value, std::int64_t key, std::int64_t i) {
            return qkv[key * all + (heads + (value ? kv_heads : 0) + head / (heads / kv_heads)) * size + i];
          };
          const auto seen = [&](std::int64_t key) { return !decoder || key <= t; };
          const Doubles out =
              attended(q.data(), n, size, 0.4f, traits.soft_cap, seen, at, w[0].rounds() && t != alone);
          for (std::int64_t i = 0; i < size; ++i) {
            mixed[(t * heads + head) * size + i] = static_cast<float>(out[i]);
          }
        }
      }
      if (traits.parallel) h = x;
      add(x, w[1].times(mixed, Activation::kNone), block.attention);
      if (!traits.parallel) h = x;
      norm(h, block.mlp.read);
      const Doubles mid = w[2].times(h, weights.activation);
      add(x, w[3].times(Floats(mid.begin(), mid.end()), Activation::kNone), block.mlp);
    }
    norm(x, weights.final_norm);
    return x;
  }
};

// The sequences `lengths`, passed through the model in one piece, or in four: all but five tokens, two, one
// alone, and the last two; with so many threads.
void check_transformer(const Model& m, const std::vector<std::int64_t>& lengths, bool in_pieces,
                       int threads) {
  const std::int64_t sequences = static_cast<std::int64_t>(lengths.size()), page_size = 4;
  const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  const std::int64_t width = (longest + page_size - 1) / page_size;
  const std::int64_t layer_size = sequences * width * page_size * m.kv_heads * m.size;
  std::vector<Floats> x, want;
  for (const std::int64_t length : lengths) {
    x.push_back(random_floats(length * m.channels));
    want.push_back(m.forward(x.back(), in_pieces ? length - 3 : -1));
  }
  std::vector<std::int32_t> table;
  for (std::int64_t i = 0; i < sequences * width; ++i) table.push_back(static_cast<std::int32_t>(i ^ 1));
  if (sequences * width % 2) table.back() = static_cast<std::int32_t>(sequences * width - 1);
  Floats k_pages(layer_size * m.layers), v_pages(layer_size * m.layers);
  std::vector<std::int64_t> done(sequences, 0);
  for (int step = in_pieces ? 0 : 3; step < 4; ++step) {
    std::vector<std::int32_t> ends = {0}, context;
    std::vector<std::int64_t> slots;
    Floats rows, cos, sin, local_cos, local_sin;
    std::int64_t most = 0;
    bool fresh = true, one_each = true;
    for (std::int64_t s = 0; s < sequences; ++s) {
      const std::int64_t left = lengths[s] - done[s];
      const std::int64_t count = step == 3 ? left : step == 2 ? 1 : step == 1 ? 2 : left - 5;
      fresh = fresh && done[s] == 0;
      for (std::int64_t t = done[s]; t < done[s] + count; ++t) {
        rows.insert(rows.end(), x[s].begin() + t * m.channels, x[s].begin() + (t + 1) * m.channels);
        slots.push_back(table[s * width + t / page_size] * page_size + t % page_size);
        m.angles(t, false, cos, sin);
        m.angles(t, true, local_cos, local_sin);
      }
      one_each = one_each && count == 1;
      ends.push_back(ends.back() + static_cast<std::int32_t>(count));
      context.push_back(static_cast<std::int32_t>(done[s] + count));
      most = std::max<std::int64_t>(most, context.back());
    }
    TransformerParams p = {};
    p.weights = &m.weights, p.x = rows.data(), p.cu_seqlens = ends.data();
    p.tokens = ends.back(), p.sequences = sequences, p.max_keys = most, p.threads = threads;
    p.fresh = fresh, p.one_each = !fresh && one_each, p.cache_dtype = DType::kFloat32;
    if (m.decoder) p.cos = cos.data(), p.sin = sin.data();
    if (m.traits.local) p.local_cos = local_cos.data(), p.local_sin = local_sin.data();
    if (m.decoder) {
      p.k_pages = reinterpret_cast<char*>(k_pages.data()),
      p.v_pages = reinterpret_cast<char*>(v_pages.data());
      p.slots = slots.data(), p.block_table = table.data(), p.context_lens = context.data();
      p.layer_bytes = layer_size * 4, p.table_width = width, p.page_size = page_size;
    }
    const PackedWeight head = {m.head.packed.data(), m.head.format, m.head.in, m.head.places, m.head.columns};
    Floats logits(p.one_each ? p.tokens * m.head.columns : 0);
    std::vector<std::int64_t> best(p.one_each ? p.tokens : 0);
    if (p.one_each && sequences < 48) p.head = &head, p.logits = logits.data(), p.best = best.data();
    const float limit = m.traits.head_soft_cap;
    if (limit > 0) p.head_bias = m.head_bias.data(), p.head_soft_cap = limit;
    std::vector<char> workspace(cpu_kernels().transformer_workspace(p) + 64);
    p.workspace = workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 64) % 64;
    std::vector<std::thread> team;
    const int stay_away = random_below(threads);  // the others do their work
    for (int i = stay_away; i < threads; ++i) team.emplace_back([&] { cpu_kernels().transformer(p); });
    for (std::thread& thread : team) thread.join();
    if (p.head != nullptr) {
      const Doubles scores = m.head.times(rows, Activation::kNone);
      for (std::size_t i = 0; i < logits.size(); ++i) {
        const double score =
            limit > 0 ? limit * std::tanh((scores[i] + m.head_bias[i % 37]) / limit) : scores[i];
        expect("logits", logits[i], score, 1e-4);
      }
      for (std::size_t row = 0; row < best.size(); ++row) {
        const auto first = logits.begin() + row * m.head.columns;
        const auto highest = std::max_element(first, first + m.head.columns);  // the first of them
        expect("best", static_cast<double>(best[row]), static_cast<double>(highest - first), 0);
      }
    }
    for (std::int64_t s = 0; s < sequences; ++s) {
      for (std::int64_t i = 0; i < (ends[s + 1] - ends[s]) * m.channels; ++i) {
        const double expected = want[s][done[s] * m.channels + i];
        expect(m.decoder ? "decoder" : "encoder", rows[ends[s] * m.channels + i], expected, m.tolerance());
      }
      done[s] = context[s];
    }
  }
}

}  // namespace

void check_transformers() {
  const Model encoder(false, Format::kFloat32, Format::kFloat32),
      decoder(true, Format::kFloat32, Format::kFloat32),
      quantised_head(true, Format::kFloat32, Format::kInt8),
      half_encoder(false, Format::kBFloat16, Format::kBFloat16),
      half_decoder(true, Format::kBFloat16, Format::kBFloat16);
  Traits traits[3];
  traits[0].added = traits[0].local = true, traits[0].soft_cap = 1.5f, traits[0].head_soft_cap = 2;
  traits[1].added = traits[1].norm_of_all = true, traits[1].read = false, traits[1].rotated = 2;
  traits[2].parallel = true, traits[2].rotated = 4;
  std::vector<Model> others;
  others.reserve(4);
  for (const Traits& some : traits) others.emplace_back(true, Format::kFloat32, Format::kFloat32, some);
  others.emplace_back(true, Format::kBFloat16, Format::kInt8, traits[0]);
  std::vector<std::int64_t> short_ones(60);
  for (int i = 0; i < 60; ++i) short_ones[i] = 6 + 7 * i % 36;
  for (const int threads : {1, 2, 3, 4}) {
    check_transformer(encoder, short_ones, false, threads);
    check_transformer(decoder, short_ones, true, threads);
    check_transformer(encoder, {5, 1, 9}, false, threads);
    check_transformer(encoder, {60, 3, 90, 8}, false, threads);
    check_transformer(decoder, {9, 6, 20}, true, threads);
    check_transformer(decoder, {300, 7}, true, threads);
    check_transformer(quantised_head, {9, 6, 20, 11, 7}, true, threads);
    check_transformer(quantised_head, {9, 6}, true, threads);
    for (const Model& other : others) {
      check_transformer(other, {9, 6}, true, threads);
      check_transformer(other, {9, 6, 20, 11, 7}, true, threads);
      check_transformer(other, {60, 6, 90, 8}, true, threads);
      check_transformer(other, std::vector<std::int64_t>(50 * threads, 7), true, threads);
    }
    check_transformer(half_encoder, {60, 3, 90, 8}, false, threads);
    check_transformer(half_decoder, {9, 6, 20}, true, threads);
    check_transformer(decoder, std::vector<std::int64_t>(50 * threads, 7), true, threads);
  }
}

}  // namespace minilm::tests
