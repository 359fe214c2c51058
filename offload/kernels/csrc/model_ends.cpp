// Entry points for the two ends of a model: a row of its embedding, and its head.
#include "head.h"

namespace ep {

bool Head::begin(Library& lib, const ep_weight& w, const float* x) {
  lib.pool.finish();  // the memory may be in use
  lib_ = &lib;
  weight_ = w;
  act_.resize(static_cast<size_t>(lib.isa->act_bytes(w)) + 64);
  uint8_t* act = act_.data() + (64 - reinterpret_cast<uintptr_t>(act_.data()) % 64) % 64;
  act_row_ = act;
  out_.resize(static_cast<size_t>(w.rows));
  out_row_ = out_.data();
  if (!lib.isa->prepare(w, x, act)) return false;
  cut_ = Cut(lib.pool.threads(), 1);
  cut_.add(w.rows, row_bytes(w));
  cut_.finish();
  lib.pool.start(
      cut_.pieces(),
      [](void* self, int64_t piece) {
        const auto* head = static_cast<const Head*>(self);
        head->cut_.each(piece, [&](size_t, int64_t first, int64_t last) {
          head->lib_->isa->rows({&head->weight_, first, last, &head->act_row_, &head->out_row_, 0, 1});
        });
      },
      this);
  return true;
}

void Head::end(Library& lib, float* out) {
  lib.pool.finish();
  std::memcpy(out, out_.data(), out_.size() * 4);
}

namespace {

float rounded_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return x;  // NaN
  bits = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
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
  scratch.add(&decoded, (w.cols + 15) / 16 * 16);
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
