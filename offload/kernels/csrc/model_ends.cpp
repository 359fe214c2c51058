// Entry points for the two ends of a model: a row of its embedding, and its head.
#include "common.h"
#include "head.h"

namespace ep {

bool Head::begin(Library& lib, const ep_weight& w, const float* x) {
  lib.pool.finish();  // the memory may be in use
  lib_ = &lib;
  weight_ = w;
  Scratch scratch;
  scratch.add(&act_, lib.isa->act_bytes(w));
  scratch.add(&out_, w.rows);
  scratch.place(memory_);
  if (!lib.isa->prepare(w, x, act_)) return false;
  cut_ = Cut(lib.pool.threads(), 1);
  cut_.add(w.rows, row_bytes(w));
  cut_.finish();
  lib.pool.start(
      cut_.pieces(),
      [](void* self, int64_t piece) {
        const auto* head = static_cast<const Head*>(self);
        const uint8_t* act = head->act_;
        float* out = head->out_;
        head->cut_.each(piece, [&](size_t, int64_t first, int64_t last) {
          head->lib_->isa->rows({&head->weight_, first, last, &act, &out, 0, 1});
        });
      },
      this);
  return true;
}

void Head::end(Library& lib, float* out) {
  lib.pool.finish();
  std::memcpy(out, out_, static_cast<size_t>(weight_.rows) * 4);
}

namespace {

float rounded_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return x;  // NaN
  return bits_to_float((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
}

}  // namespace
}  // namespace ep

using ep::Library;

EP_API void ep_embed(ep_context* context, const ep_weight* weight, int64_t row, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  const ep_weight& w = *weight;
  float* decoded;
  ep::Scratch scratch;
  scratch.add(&decoded, ep::lanes_up(w.cols));
  scratch.place(lib);
  lib.isa->decode(w, row, 0, w.cols, decoded);
  for (int64_t c = 0; c < w.cols; ++c) out[c] = ep::rounded_to_bf16(decoded[c]);
}

EP_API int64_t ep_head_begin(ep_context* context, const ep_weight* weight, const float* norm, float eps, const float* hidden, float* x) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  lib.isa->rms_norm(hidden, norm, eps, weight->cols, x);
  return lib.head->begin(lib, *weight, x) ? 0 : 1;
}

EP_API void ep_head_end(ep_context* context, float* logits) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  lib.head->end(lib, logits);
}
