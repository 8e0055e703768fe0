// All blocks of a Transformer, on packed sequences, in one call and one parallel region. It computes what
// minilm/model/layers.py defines; performance layer, skip on first reading.
//
//   q, k, v = rope(read(x) Wqkv)
//   x = sum(x + added(attention(q, k, v) Wout))
//   x = sum'(x + added'(act(read'(x) Wup) Wdown))
//
// read, added and sum are norms, of which each family has some (`SubLayerNorms`): Llama and GPT-2 have read,
// BERT has sum, OLMo 2 added, Gemma 2 read and added. In parallel blocks (GPT-NeoX, Phi), both sub-layers
// read the same x: then the MLP's first half comes before attention's sum.
//
// There are three ways to split the work between threads, and all run the same code (`Steps`), on different
// Parts:
//
//   Many rows (encoders, prompts): everything except attention works on single rows. So a task is a block of
//   some hundred rows, for which one thread computes everything from the attention output of one layer
//   through output projection, norms and MLP to q, k and v of the next, in its second-level cache. Two phases
//   per layer:
//
//       [qkv of layer 0] -> [attention] -> [out, MLP, qkv of layer 1] -> [attention] -> ...
//
//   Many rows of short sequences: a task is a whole layer of some sequences, so q, k and v stay in the caches
//   of one thread. One phase per layer.
//
//   Few rows (decoding): reading the weights takes the time. A phase is one step of the layer, and its tasks
//   are stretches of a weight's panels, so that all threads together read each weight once. After the last
//   layer comes the head that computes logits, if there is one.
//
// Memory traffic, few rows: all weights once, the cache once. Many rows: all weights once per block of rows,
// from memory or the third-level cache: 4 bytes per about 2 x 96 operations, so memory is not the limit.

#include "cpu/transformer.h"

#include <type_traits>

#include "cpu/attention.h"
#include "cpu/keys.h"
#include "cpu/linear.h"
#include "cpu/norms.h"
#include "cpu/rows.h"
#include "cpu/team.h"

namespace minilm::MINILM_ISA {
namespace {

constexpr std::int64_t kBlockRows = 96;
constexpr std::int64_t kFewRows = 48;     // a thread; below, its weights' panels are split and not the rows
constexpr std::int64_t kManyTasks = 8;    // a thread, of whole sequences: their lengths even out
constexpr std::int64_t kRowsForEach = 4;  // up to here threads do not share the work on rows
constexpr std::int64_t kPhasesALayer = 16;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The rows that a thread, or the whole team, is working on, and memory for their results.
struct Part {
  std::int64_t first, rows;
  float* h;           // [rows, C]: what the norm gives
  float* mid;         // [rows, F]
  float* added;       // [rows, C]: what a sub-layer adds, where it has a norm of that
  float* attended;    // [rows, H D], of a decode step
  char* prepared;     // rows as a linear layer wants them, if not as they are
  float* statistics;  // [2 rows]
};

// For steps without preparation.
struct Nothing {
  void operator()(std::int64_t, std::int64_t) const {}
};

// Runs a step of a part in this thread alone; shared_rows: on rows; over_panels: on panels, with `own` before
// it, which makes from rows what only this step reads (`any`: there is something to do) ...
struct Alone {
  template <typename F>
  void shared_rows(std::int64_t rows, F f) {
    f(0, rows);
  }
  template <typename Own, typename F>
  void over_panels(std::int64_t panels, std::int64_t rows, bool, Own own, F f) {
    own(0, rows);
    f(0, panels);
  }
};

// ... or with all threads, cut into tasks ...
struct Together {
  Team& team;
  std::int64_t threads;
  template <typename F>
  void shared_rows(std::int64_t rows, F f) {
    const std::int64_t step = ceil_div(rows, threads);
    team.run(ceil_div(rows, step),
             [&](std::int64_t i) { f(i * step, i * step + step < rows ? i * step + step : rows); });
  }
  template <typename Own, typename F>
  void over_panels(std::int64_t panels, std::int64_t rows, bool any, Own own, F f) {
    if (any) shared_rows(rows, own);
    over_panels(panels, [] {}, f);
  }
  template <typename First, typename F>
  void over_panels(std::int64_t panels, First first, F f) {
    const std::int64_t step = ceil_div(panels, 4 * threads);
    team.run(ceil_div(panels, step), first,
             [&](std::int64_t i) { f(i * step, i * step + step < panels ? i * step + step : panels); });
  }
};

// ... or, with few rows, every thread computes the row-wise work itself, in its own memory, which takes less
// time than waiting for another thread; all threads share the panels. `own` reads what all threads write (x,
// or the partial results of attention), so it runs once the thread has got a task of this step (`Team`):
// until that is done, no thread reaches the step that writes there. A late thread without a task does not
// read, and nothing needs its result: the step is over.
struct Each {
  Team& team;
  std::int64_t threads;
  template <typename F>
  void shared_rows(std::int64_t rows, F f) {
    Together{team, threads}.shared_rows(rows, f);
  }
  template <typename Own, typename F>
  void over_panels(std::int64_t panels, std::int64_t rows, bool, Own own, F f) {
    Together{team, threads}.over_panels(panels, [&] { own(0, rows); }, f);
  }
};

std::int64_t qkv_columns(const TransformerWeights& w) { return (w.heads + 2 * w.kv_heads) * w.head_dim; }

bool any_added_norm(const TransformerWeights& w) {
  for (std::int64_t layer = 0; layer < w.layers; ++layer) {
    const BlockWeights& block = w.blocks[layer];
    if (block.attention.added[0] != nullptr || block.mlp.added[0] != nullptr) return true;
  }
  return false;
}

std::int64_t part_floats(const TransformerWeights& w) {
  return w.channels + w.inner + 2 + w.heads * w.head_dim + (any_added_norm(w) ? w.channels : 0);
}

// Memory of one call.
struct Workspace {
  std::int64_t blocks, block_rows;                                // of rows; blocks == 0: few rows
  bool whole;                                                     // a block's sequences are a task
  bool many_queries;                                              // over pages: blocks of them are tasks
  std::int64_t counters, qkv, attended, part, scratch, partials;  // bytes of each
  std::int64_t parts;
};

std::int64_t prepared_bytes(const TransformerParams& p) {
  const TransformerWeights& w = *p.weights;
  std::int64_t most = 0;
  for (std::int64_t layer = 0; layer < w.layers; ++layer) {
    const BlockWeights& block = w.blocks[layer];
    const PackedWeight* const weights[] = {&block.qkv, &block.out, &block.up, &block.down};
    for (const PackedWeight* weight : weights) {
      const std::int64_t bytes = prepared_row_bytes(weight->format, weight->in);
      most = bytes > most ? bytes : most;
    }
  }
  if (p.head != nullptr) {
    const std::int64_t bytes = prepared_row_bytes(p.head->format, p.head->in);
    most = bytes > most ? bytes : most;
  }
  return most;
}

AttentionParams attention_params(const TransformerParams& p) {
  const TransformerWeights& w = *p.weights;
  AttentionParams a = {};
  a.cu_q = p.cu_seqlens;
  a.q_stride = qkv_columns(w);
  a.heads = w.heads;
  a.kv_heads = w.kv_heads;
  a.head_dim = w.head_dim;
  a.causal = w.causal;
  a.soft_cap = w.soft_cap;
  a.cache_dtype = p.cache_dtype;
  if (p.fresh) {
    a.cu_k = p.cu_seqlens;
    a.kv_stride = a.q_stride;
  } else {
    a.block_table = p.block_table;
    a.context = p.context_lens;
    a.table_width = p.table_width;
    a.page_size = p.page_size;
  }
  return a;
}

Workspace workspace_of(const TransformerParams& p) {
  const TransformerWeights& w = *p.weights;
  Workspace s = {};
  if (p.tokens >= kFewRows * p.threads && p.head == nullptr) {
    s.blocks = round_up(ceil_div(p.tokens, kBlockRows), p.threads);
    s.block_rows = ceil_div(p.tokens, s.blocks);
    s.blocks = ceil_div(p.tokens, s.block_rows);
    s.whole = p.fresh && p.tokens >= kManyTasks * p.threads * (s.block_rows + p.max_keys) / 2;
  } else {
    s.block_rows = p.tokens;
  }
  s.parts = s.blocks > 0 || p.tokens <= kRowsForEach ? p.threads : 1;
  s.counters = (w.layers * kPhasesALayer + 8) * Team::kBytesAPhase + 64;
  s.qkv = round_up(p.tokens * qkv_columns(w) * 4, 64);
  s.attended = round_up(p.tokens * w.heads * w.head_dim * 4, 64);
  s.part = round_up(s.block_rows * part_floats(w) * 4, 64) + round_up(s.block_rows * prepared_bytes(p), 64);
  const AttentionParams a = attention_params(p);
  std::int64_t scratch = attention_scratch(a, p.max_keys), partials = 0;
  if (p.one_each) {
    scratch = decode_scratch(a);
    partials = p.sequences * decode_partials(a, p.max_keys);
  } else if (!p.fresh) {
    scratch = paged_scratch(a);
    partials = p.tokens * w.heads * paged_chunks(p.max_keys) * paged_partial(a);
    s.many_queries = partials > kMostPartials;
    if (s.many_queries) partials = 0;
  }
  s.scratch = round_up(scratch * 4, 64);
  s.partials = round_up(partials * 4, 64);
  return s;
}

Part part_of(const TransformerParams& p, const Workspace& s, char* memory, std::int64_t first,
             std::int64_t rows) {
  const TransformerWeights& w = *p.weights;
  Part part = {};
  part.first = first;
  part.rows = rows;
  part.h = reinterpret_cast<float*>(memory);
  part.mid = part.h + s.block_rows * w.channels;
  part.statistics = part.mid + s.block_rows * w.inner;
  part.attended = part.statistics + s.block_rows * 2;
  part.added = part.attended + s.block_rows * w.heads * w.head_dim;
  part.prepared = memory + round_up(s.block_rows * part_floats(w) * 4, 64);
  return part;
}

// The steps of a layer, on the rows of a part.
template <typename Crew>
struct Steps {
  const TransformerParams& p;
  const TransformerWeights& w;
  Crew crew;
  Part part;
  float* qkv;       // [T, ...]
  float* attended;  // [T, H D]: what attention gave

  float* x() { return p.x + part.first * w.channels; }

  void norm_rows(const Norm& weights, const float* from, float* y, std::int64_t begin, std::int64_t end) {
    if (w.rms) {
      RmsNormParams n = {};
      n.x = from;
      n.weight = weights[0];
      n.y = y;
      n.channels = n.x_stride = n.y_stride = w.channels;
      n.eps = w.eps;
      rms_norm(n, begin, end);
    } else {
      LayerNormParams n = {};
      n.x = from;
      n.weight = weights[0];
      n.bias = weights[1];
      n.y = y;
      n.mean = part.statistics;
      n.rstd = part.statistics + part.rows;
      n.channels = n.x_stride = w.channels;
      n.eps = w.eps;
      layer_norm(n, begin, end);
    }
  }

  // x = norm(x), which all threads read.
  void norm_x(const Norm& weights) {
    crew.shared_rows(part.rows,
                     [&](std::int64_t begin, std::int64_t end) { norm_rows(weights, x(), x(), begin, end); });
  }

  // y (+)= activation(input W^T + bias); before(begin, end) makes rows of the input, if it is not there yet,
  // and after(begin, end) changes columns of y while they are in cache.
  template <typename Before, typename After = Nothing>
  void apply(const PackedWeight& weight, const float* input, float* y, Activation activation, bool gated,
             bool accumulate, Before before, After after = {}) {
    LinearParams l = {};
    l.format = weight.format;
    l.activation = activation;
    l.gated = gated;
    l.accumulate = accumulate;
    l.in = weight.in;
    l.places = weight.places;
    l.columns = weight.columns;
    l.packed = weight.packed;
    l.x = input;
    l.x_stride = weight.in * 4;
    l.rows = part.rows;
    l.y = y;
    l.y_stride = weight.columns;
    const std::int64_t bytes = prepared_row_bytes(weight.format, weight.in);
    if (bytes > 0) {
      l.x = part.prepared;
      l.x_stride = bytes;
    }
    crew.over_panels(
        ceil_div(weight.columns, kPanel), part.rows, bytes > 0 || !std::is_same_v<Before, Nothing>,
        [&](std::int64_t begin, std::int64_t end) {
          before(begin, end);
          if (bytes > 0) {
            prepare_rows(weight.format, input, weight.in, weight.in, begin, end, part.prepared);
          }
        },
        [&](std::int64_t begin, std::int64_t end) {
          linear(l, begin, end);
          after(begin * kPanel, least(end * kPanel, weight.columns));
        });
  }

  // y = activation(read(x) W^T + bias): a sub-layer's first half.
  void begin_from_x(const Norm& read, const PackedWeight& weight, float* y, Activation activation,
                    bool gated) {
    if (read[0] == nullptr) {
      apply(weight, x(), y, activation, gated, false, Nothing{});
      return;
    }
    apply(weight, part.h, y, activation, gated, false,
          [this, &read](std::int64_t begin, std::int64_t end) { norm_rows(read, x(), part.h, begin, end); });
  }

  // x = sum(x + added(input W^T + bias)): its end.
  template <typename Before>
  void add_to_x(const SubLayerNorms& norms, const PackedWeight& weight, const float* input, Before before) {
    if (norms.added[0] == nullptr) {
      apply(weight, input, x(), Activation::kNone, false, true, before);
    } else {
      apply(weight, input, part.added, Activation::kNone, false, false, before);
      crew.shared_rows(part.rows, [&](std::int64_t begin, std::int64_t end) {
        norm_rows(norms.added, part.added, part.added, begin, end);
        add_rows(part.added + begin * w.channels, x() + begin * w.channels, (end - begin) * w.channels);
      });
    }
    if (norms.sum[0] != nullptr) norm_x(norms.sum);
  }

  void project(std::int64_t layer) {
    const BlockWeights& block = w.blocks[layer];
    float* rows = qkv + part.first * qkv_columns(w);
    begin_from_x(block.attention.read, block.qkv, rows, Activation::kNone, false);
    const bool local = block.turns == Turns::kByLocalRope;
    const float* cos = block.turns == Turns::kNot ? nullptr : local ? p.local_cos : p.cos;
    const float* sin = local ? p.local_sin : p.sin;
    if (cos == nullptr && p.k_pages == nullptr && block.q_norm == nullptr && block.k_norm == nullptr) return;
    RopeParams r = {};
    r.q = rows;
    r.k = rows + w.heads * w.head_dim;
    r.v = r.k + w.kv_heads * w.head_dim;
    if (cos != nullptr) {
      r.cos = cos + part.first * (w.rotated / 2);
      r.sin = sin + part.first * (w.rotated / 2);
    }
    r.q_norm = block.q_norm;
    r.k_norm = block.k_norm;
    r.eps = w.eps;
    r.stride = qkv_columns(w);
    r.heads = w.heads;
    r.kv_heads = w.kv_heads;
    r.head_dim = w.head_dim;
    r.rotated = w.rotated;
    r.norm_of_all = w.qk_norm_of_all;
    r.cache_dtype = p.cache_dtype;
    if (p.k_pages != nullptr) {
      r.k_pages = p.k_pages + layer * p.layer_bytes;
      r.v_pages = p.v_pages + layer * p.layer_bytes;
      if (p.k_scales != nullptr) {
        r.k_scales = p.k_scales + layer * p.layer_scales;
        r.v_scales = p.v_scales + layer * p.layer_scales;
      }
      r.slots = p.slots + part.first;
    }
    crew.shared_rows(part.rows, [&](std::int64_t begin, std::int64_t end) { rope(r, begin, end); });
  }

  // From what attention gave to the end of the block; before: what makes rows of it, if it is not there yet.
  template <typename Before>
  void finish(std::int64_t layer, Before before) {
    const BlockWeights& block = w.blocks[layer];
    const float* from = attended + part.first * w.heads * w.head_dim;
    if (w.parallel) begin_from_x(block.mlp.read, block.up, part.mid, w.activation, w.gated);
    add_to_x(block.attention, block.out, from, before);
    if (!w.parallel) begin_from_x(block.mlp.read, block.up, part.mid, w.activation, w.gated);
    add_to_x(block.mlp, block.down, part.mid, Nothing{});
    if (layer + 1 == w.layers && w.final_norm[0] != nullptr) norm_x(w.final_norm);
  }

  void score() {
    const std::int64_t vocabulary = p.head->columns;
    apply(*p.head, x(), p.logits, Activation::kNone, false, false, Nothing{},
          [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = 0; row < part.rows; ++row) {
              float* logits = p.logits + row * vocabulary;
              if (p.head_bias != nullptr) add_rows(p.head_bias + begin, logits + begin, end - begin);
              if (p.head_soft_cap > 0) cap(logits + begin, end - begin, p.head_soft_cap);
            }
          });
    crew.shared_rows(part.rows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        float* logits = p.logits + row * vocabulary;
        if (p.logits_dtype == DType::kBFloat16) round_to<BFloat16>(logits, vocabulary);
        if (p.logits_dtype == DType::kFloat16) round_to<Float16>(logits, vocabulary);
        p.best[row] = first_of_highest(logits, vocabulary);
      }
    });
  }
};

// Attention of one layer. A decoding step leaves partial results; `put_together` merges them.
struct Attention {
  const TransformerParams& p;
  const Workspace& s;
  Team& team;
  float* qkv;
  float* attended;
  float* scratch;
  float* partials;

  AttentionParams params(std::int64_t layer) const {
    const TransformerWeights& w = *p.weights;
    AttentionParams a = attention_params(p);
    a.q = qkv;
    a.out = attended;
    a.scale = w.blocks[layer].scale;
    a.window = w.blocks[layer].window;
    a.pairs = w.blocks[layer].qkv.format == Format::kBFloat16;
    if (p.fresh) {
      a.k = qkv + w.heads * w.head_dim;
      a.v = qkv + (w.heads + w.kv_heads) * w.head_dim;
    } else {
      a.k = p.k_pages + layer * p.layer_bytes;
      a.v = p.v_pages + layer * p.layer_bytes;
      if (p.k_scales != nullptr) {
        a.k_scales = p.k_scales + layer * p.layer_scales;
        a.v_scales = p.v_scales + layer * p.layer_scales;
      }
    }
    return a;
  }

  void run(std::int64_t layer) const {
    const TransformerWeights& w = *p.weights;
    const AttentionParams a = params(layer);
    if (p.fresh) {
      team.run(p.sequences * w.heads,
               [&](std::int64_t i) { attention(a, i / w.heads, i % w.heads, scratch); });
      return;
    }
    if (!p.one_each) return over_pages(a);
    const std::int64_t most = most_stretches(p.max_keys);
    team.run(p.sequences * most, [&](std::int64_t i) {
      const std::int64_t sequence = i / most, number = i % most;
      if (number >= stretches(p.context_lens[sequence])) return;
      decode(a, sequence, number, partials + sequence * of_one(), scratch);
    });
  }

  void over_pages(const AttentionParams& a) const {
    const std::int64_t heads = p.sequences * a.kv_heads;
    if (s.many_queries) {
      std::int64_t most = 0;
      for (std::int64_t b = 0; b < p.sequences; ++b) {
        const std::int64_t blocks = paged_blocks(a, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
        most = blocks > most ? blocks : most;
      }
      team.run(heads * most, [&](std::int64_t i) {
        paged_block(a, i / most / a.kv_heads, i / most % a.kv_heads, i % most, scratch);
      });
      return;
    }
    const std::int64_t chunks = paged_chunks(p.max_keys);
    team.run(heads * chunks, [&](std::int64_t i) {  // the heads of a chunk one after the other
      const std::int64_t sequence = i / a.kv_heads / chunks;
      paged_chunk(a, sequence, i % a.kv_heads, i / a.kv_heads % chunks, chunks, partials, scratch);
    });
    team.run(p.sequences * a.heads, [&](std::int64_t i) {
      const std::int64_t sequence = i / a.heads,
                         queries = p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence];
      for (std::int64_t query = 0; query < queries; ++query) {
        paged_merge(a, sequence, query, i % a.heads, chunks, partials);
      }
    });
  }

  // The sequences [begin, end), in this thread alone.
  void run_alone(std::int64_t layer, std::int64_t begin, std::int64_t end) const {
    const AttentionParams a = params(layer);
    for (std::int64_t sequence = begin; sequence < end; ++sequence) {
      for (std::int64_t head = 0; head < a.heads; ++head) attention(a, sequence, head, scratch);
    }
  }

  void put_together(std::int64_t layer, float* to, std::int64_t begin, std::int64_t end) const {
    AttentionParams a = params(layer);
    a.out = to;
    for (std::int64_t sequence = begin; sequence < end; ++sequence) {
      for (std::int64_t head = 0; head < a.heads; ++head) {
        combine(a, sequence, head, partials + sequence * of_one());
      }
    }
  }

  std::int64_t of_one() const { return s.partials / 4 / (p.sequences > 0 ? p.sequences : 1); }
};

// The first sequence that begins at `row` or after it.
std::int64_t sequence_from(const TransformerParams& p, std::int64_t row) {
  std::int64_t begin = 0, end = p.sequences;
  while (begin < end) {
    const std::int64_t middle = (begin + end) / 2;
    p.cu_seqlens[middle] < row ? begin = middle + 1 : end = middle;
  }
  return begin;
}

// The address of row 0 for memory that starts at row `first`. Computed as an integer, since there may be no
// memory at row 0.
float* as_if_from_row_0(float* memory, std::int64_t first, std::int64_t columns) {
  return reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(memory) - first * columns * 4);
}

// A layer of the sequences that begin in block `number`, all in this thread. `attention`: with memory of this
// thread alone for q, k, v and what it gives, of s.block_rows + p.max_keys rows.
void whole_sequences(const TransformerParams& p, const Workspace& s, Attention attention, char* part_memory,
                     std::int64_t layer, std::int64_t number) {
  const std::int64_t begin = sequence_from(p, number * s.block_rows);
  const std::int64_t end = sequence_from(p, (number + 1) * s.block_rows);
  const std::int64_t first = p.cu_seqlens[begin], last = p.cu_seqlens[end];
  if (first == last) return;
  attention.qkv = as_if_from_row_0(attention.qkv, first, qkv_columns(*p.weights));
  attention.attended = as_if_from_row_0(attention.attended, first, p.weights->heads * p.weights->head_dim);
  const std::int64_t step = ceil_div(last - first, ceil_div(last - first, s.block_rows));
  const auto for_parts = [&](auto f) {
    for (std::int64_t row = first; row < last; row += step) {
      const Part part = part_of(p, s, part_memory, row, last - row < step ? last - row : step);
      f(Steps<Alone>{p, *p.weights, {}, part, attention.qkv, attention.attended});
    }
  };
  for_parts([&](Steps<Alone> steps) { steps.project(layer); });
  attention.run_alone(layer, begin, end);
  for_parts([&](Steps<Alone> steps) { steps.finish(layer, Nothing{}); });
}

template <typename Crew>
void few_rows(const TransformerParams& p, const Attention& attention, Steps<Crew> steps) {
  for (std::int64_t layer = 0; layer < p.weights->layers; ++layer) {
    steps.project(layer);
    attention.run(layer);
    if (p.one_each) {  // each sequence is one row
      steps.finish(layer, [&](std::int64_t begin, std::int64_t end) {
        attention.put_together(layer, steps.attended, begin, end);
      });
    } else {
      steps.finish(layer, Nothing{});
    }
  }
  if (p.head != nullptr) steps.score();
}

}  // namespace

std::int64_t transformer_counters(const TransformerParams& p) { return workspace_of(p).counters; }

std::int64_t transformer_workspace(const TransformerParams& p) {
  const Workspace s = workspace_of(p);
  return s.counters + s.qkv + s.attended + s.part * s.parts + s.scratch * p.threads + s.partials;
}

Waited transformer(const TransformerParams& p) {
  const TransformerWeights& w = *p.weights;
  const Workspace s = workspace_of(p);
  // The workspace: counters (the last of them numbers the threads), q k v, attended, a part and scratch for
  // each thread, partial results of decoding.
  char* at = p.workspace;
  auto* arrivals = reinterpret_cast<std::int64_t*>(at + s.counters - 64);
  Team team(at);
  const std::int64_t thread = __atomic_fetch_add(arrivals, 1, __ATOMIC_RELAXED);
  if (thread >= p.threads) return {};  // cannot be: there are no more calls than threads
  at += s.counters;
  float* qkv = reinterpret_cast<float*>(at);
  float* attended = reinterpret_cast<float*>(at + s.qkv);
  at += s.qkv + s.attended;
  char* part_memory = at + (s.parts > 1 ? thread * s.part : 0);
  at += s.part * s.parts;
  float* scratch = reinterpret_cast<float*>(at + thread * s.scratch);
  float* partials = reinterpret_cast<float*>(at + p.threads * s.scratch);

  const Attention attention = {p, s, team, qkv, attended, scratch, partials};
  if (s.blocks == 0 && s.parts > 1) {
    // The threads' parts have all but `mid` and `added` for themselves: their columns come from all of them.
    Part part = part_of(p, s, part_memory, 0, p.tokens);
    const Part first = part_of(p, s, part_memory - thread * s.part, 0, p.tokens);
    part.mid = first.mid;
    part.added = first.added;
    few_rows(p, attention,
             Steps<Each>{p, w, {team, p.threads}, part, qkv, p.one_each ? part.attended : attended});
    return team.waited();
  }
  if (s.blocks == 0) {
    const Part part = part_of(p, s, part_memory, 0, p.tokens);
    few_rows(p, attention, Steps<Together>{p, w, {team, p.threads}, part, qkv, attended});
    return team.waited();
  }
  if (s.whole) {
    const std::int64_t rows = s.block_rows + p.max_keys;
    Attention own = attention;
    own.qkv += thread * rows * qkv_columns(w);
    own.attended += thread * rows * w.heads * w.head_dim;
    for (std::int64_t layer = 0; layer < w.layers; ++layer) {
      team.run(s.blocks, [&](std::int64_t i) { whole_sequences(p, s, own, part_memory, layer, i); });
    }
    return team.waited();
  }
  auto block = [&](std::int64_t number) {
    const std::int64_t first = number * s.block_rows;
    const std::int64_t rows = p.tokens - first < s.block_rows ? p.tokens - first : s.block_rows;
    return Steps<Alone>{p, w, {}, part_of(p, s, part_memory, first, rows), qkv, attended};
  };
  team.run(s.blocks, [&](std::int64_t i) { block(i).project(0); });
  for (std::int64_t layer = 0; layer < w.layers; ++layer) {
    attention.run(layer);
    team.run(s.blocks, [&](std::int64_t i) {
      Steps<Alone> steps = block(i);
      const Part& part = steps.part;
      if (p.one_each) attention.put_together(layer, attended, part.first, part.first + part.rows);
      steps.finish(layer, Nothing{});
      if (layer + 1 < w.layers) steps.project(layer + 1);
    });
  }
  return team.waited();
}

}  // namespace minilm::MINILM_ISA
