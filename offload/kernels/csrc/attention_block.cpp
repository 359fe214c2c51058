// One call for a whole attention block in the absorbed form: norm, projections, rotation, cache, attention
// over the latents, output projection and residual. Gives the bits of the single entry points in turn, with
// four jobs of the pool in place of ten and nothing in between.
#include "mla.h"

namespace {

using ep::FirstBad;
using ep::LatentAttention;
using ep::LatentShape;
using ep::Library;
using ep::Product;
using ep::Scratch;

// Rows of one kind in working memory, and their prepared copies for a weight.
struct Rows {
  float* x = nullptr;
  float** pointers = nullptr;
  uint8_t* act = nullptr;
  const uint8_t** act_pointers = nullptr;
  int64_t cols = 0, tokens = 0, act_stride = 0;

  void reserve(Scratch& scratch, int64_t count, int64_t width) {
    tokens = count;
    cols = width;
    scratch.add(&x, count * width);
    scratch.add(&pointers, count);
  }
  void reserve_act(const Library& lib, Scratch& scratch, int64_t count, const ep_weight& w) {
    tokens = count;
    act_stride = lib.isa->act_bytes(w);
    scratch.add(&act, count * act_stride);
    scratch.add(&act_pointers, count);
  }
  void point() {
    for (int64_t t = 0; t < tokens; ++t) {
      if (pointers != nullptr) pointers[t] = x + t * cols;
      if (act_pointers != nullptr) act_pointers[t] = act + t * act_stride;
    }
  }
  void prepare(Library& lib, const ep_weight& w, const float* from, FirstBad& bad) {
    ep::prepare_rows(lib, w, from, nullptr, tokens, act, act_stride, bad);
  }
};

bool same_activations(const ep_weight& a, const ep_weight& b) {
  return a.kind == b.kind && a.group == b.group && a.cols == b.cols;
}

void norm(const Library& lib, const Rows& rows, const float* from, int64_t stride, uint64_t weight, float eps) {
  for (int64_t t = 0; t < rows.tokens; ++t) {
    lib.isa->rms_norm(from + t * stride, reinterpret_cast<const float*>(weight), eps, rows.cols, rows.pointers[t]);
  }
}

}  // namespace

namespace ep {

int64_t attention_block(Library& lib, const ep_attention_layer& l, const float* hidden, const float* cos, const float* sin,
                        int64_t tokens, int64_t start, float* cache, float* out) {
  const bool has_q_a = l.q_a.rows > 0;
  const LatentShape shape{l.heads, l.nope, l.rope, l.value, l.kv_b.cols};
  const int64_t heads = shape.heads, latent = shape.latent, width = latent + shape.rope, half = shape.rope / 2;
  const int64_t query = shape.nope + shape.rope, hidden_size = l.kv_a.cols;

  Rows x, x_q, x_kv, q_low, q_act, q, kv, q_latent, q_rope, mixed, latent_act, values, values_act;
  const ep_weight& first_q = has_q_a ? l.q_a : l.q_b;
  const bool shared = same_activations(first_q, l.kv_a);
  LatentAttention attention(lib, shape, tokens, start, l.scale);
  Scratch scratch;
  x.reserve(scratch, tokens, hidden_size);
  x_q.reserve_act(lib, scratch, tokens, first_q);
  if (!shared) x_kv.reserve_act(lib, scratch, tokens, l.kv_a);
  if (has_q_a) {
    q_low.reserve(scratch, tokens, l.q_a.rows);
    q_act.reserve_act(lib, scratch, tokens, l.q_b);
  }
  q.reserve(scratch, tokens, heads * query);
  kv.reserve(scratch, tokens, width);
  q_latent.reserve(scratch, tokens, heads * latent);
  q_rope.reserve(scratch, tokens, heads * shape.rope);
  mixed.reserve(scratch, tokens, heads * latent);
  latent_act.reserve_act(lib, scratch, tokens * heads, l.kv_b);
  values.reserve(scratch, tokens, heads * shape.value);
  values_act.reserve_act(lib, scratch, tokens, l.o);
  attention.reserve(scratch);
  scratch.place(lib);
  for (Rows* rows : {&x, &x_q, &x_kv, &q_low, &q_act, &q, &kv, &q_latent, &q_rope, &mixed, &latent_act, &values, &values_act}) {
    rows->point();
  }

  FirstBad bad;
  norm(lib, x, hidden, hidden_size, l.input_norm, l.eps);
  x_q.prepare(lib, first_q, x.x, bad);
  if (!shared) x_kv.prepare(lib, l.kv_a, x.x, bad);
  if (bad.value() != 0) return bad.value();
  const Product down[2] = {{&first_q, x_q.act_pointers, has_q_a ? q_low.pointers : q.pointers},
                           {&l.kv_a, shared ? x_q.act_pointers : x_kv.act_pointers, kv.pointers}};
  ep::multiply(lib, down, 2, tokens);

  for (int64_t t = 0; t < tokens; ++t) {
    float* row = cache + (start + t) * width;
    lib.isa->rms_norm(kv.pointers[t], reinterpret_cast<const float*>(l.kv_a_norm), l.latent_eps, latent, row);
    ep::rotate(kv.pointers[t] + latent, cos + t * half, sin + t * half, half, row + latent);
  }
  if (has_q_a) {
    norm(lib, q_low, q_low.x, q_low.cols, l.q_a_norm, l.latent_eps);
    q_act.prepare(lib, l.q_b, q_low.x, bad);
    const Product up{&l.q_b, q_act.act_pointers, q.pointers};
    ep::multiply(lib, &up, 1, tokens);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      ep::rotate(q.pointers[t] + h * query + shape.nope, cos + t * half, sin + t * half, half, q_rope.pointers[t] + h * shape.rope);
    }
  }
  int64_t broken = bad.value();
  if (broken == 0) broken = ep::first_bad_row(q.x, tokens, heads * query);
  if (broken == 0) broken = ep::first_bad_row(cache + start * width, tokens, width);
  if (broken != 0) return broken;

  const auto absorb = [&](int64_t h) {
    ep::absorb_head(lib, l.kv_b, shape, h, q.x + h * query, heads * query, tokens, q_latent.x + h * latent, heads * latent);
  };
  // Row `t * heads + h` of the mixed latents through the value rows of head h.
  const auto expand = [&](int64_t h) {
    const int64_t row = h * (shape.nope + shape.value) + shape.nope;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t item = t * heads + h;
      if (!lib.isa->prepare(l.kv_b, mixed.x + item * latent, latent_act.act + item * latent_act.act_stride)) bad.note(t);
      const uint8_t* act = latent_act.act_pointers[item];
      float* to = values.pointers[t] + h * shape.value;
      lib.isa->rows({&l.kv_b, row, row + shape.value, &act, &to, row, 1});
    }
  };
  if (attention.one_part()) {
    const int64_t tile = attention.tile();
    lib.pool.each(ep::ceil_div(heads, tile), [&](int64_t item) {
      const int64_t head = item * tile, count = std::min(tile, heads - head);
      for (int64_t h = head; h < head + count; ++h) absorb(h);
      attention.run_heads(lib, q_latent.x, q_rope.x, cache, false, head, count, mixed.x);
      for (int64_t h = head; h < head + count; ++h) expand(h);
    });
  } else {
    lib.pool.each(heads, absorb);
    attention.run(lib, q_latent.x, q_rope.x, cache, false, mixed.x);
    lib.pool.each(heads, expand);
  }

  values_act.prepare(lib, l.o, values.x, bad);
  float** rows = x.pointers;  // the normed input is not needed any more
  const Product output{&l.o, values_act.act_pointers, rows};
  ep::multiply(lib, &output, 1, tokens);
  for (int64_t i = 0; i < tokens * hidden_size; ++i) out[i] = hidden[i] + x.x[i];
  return bad.value();
}

}  // namespace ep

EP_API int64_t ep_attention(ep_context* context, const ep_attention_layer* layer, const float* hidden, const float* cos,
                            const float* sin, int64_t tokens, int64_t start, float* cache, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  return ep::attention_block(lib, *layer, hidden, cos, sin, tokens, start, cache, out);
}
