// Contexts and the entry points for single weights: instruction set, threads, linear. Owns how products are
// cut for the pool; the arithmetic is in kernels.h.
#include "context.h"
#include "cut.h"
#include "experts.h"
#include "head.h"

#include <system_error>

#if EP_X86
#include <cpuid.h>
#endif

namespace {

using ep::Isa;

#if EP_X86
bool has_avxvnni() {
  // Not known by name to every compiler this builds with: leaf 7, subleaf 1, EAX bit 4.
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

bool supported(const Isa* isa) {
#if EP_X86
  __builtin_cpu_init();
  if (isa == &ep::kPortable) return true;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return false;
  if (isa == &ep::kAvx2) return true;
  if (isa == &ep::kAvxVnni) return has_avxvnni();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return isa == &ep::kPortable;
#endif
}

#if EP_X86
const Isa* const kAll[] = {&ep::kAvx512, &ep::kAvxVnni, &ep::kAvx2, &ep::kPortable};
#else
const Isa* const kAll[] = {&ep::kPortable};
#endif

const Isa* best_isa() {
  for (const Isa* isa : kAll) {
    if (supported(isa)) return isa;
  }
  return &ep::kPortable;
}

const Isa* find_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) return best_isa();
  for (const Isa* isa : kAll) {
    if (std::strcmp(name, isa->name) == 0) return supported(isa) ? isa : nullptr;
  }
  return nullptr;
}

}  // namespace

namespace ep {

Library::Library(const Isa* which, int threads)
    : shared(std::make_shared<SharedExpert>()), head(std::make_shared<Head>()), isa(which) {
  pool.resize(threads);
}

int64_t row_bytes(const ep_weight& w) {
  constexpr int64_t kBits[] = {32, 16, 8, 4, 8, 4, 3, 2};  // by ep_kind
  return w.cols * kBits[w.kind] / 8;
}

void prepare_rows(Library& lib, const ep_weight& w, const float* x, const int64_t* from, int64_t tokens, uint8_t* act,
                  int64_t stride, FirstBad& bad) {
  const int64_t per_chunk = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, w.cols));
  lib.pool.each(ceil_div(tokens, per_chunk), [&](int64_t chunk) {
    for (int64_t i = chunk * per_chunk; i < std::min(tokens, (chunk + 1) * per_chunk); ++i) {
      const int64_t row = from == nullptr ? i : from[i];
      if (!lib.isa->prepare(w, x + row * w.cols, act + i * stride)) bad.note(row);
    }
  });
}

void multiply(Library& lib, const Product* products, size_t count, int64_t tokens) {
  Cut cut(lib.pool.threads(), tokens);
  for (size_t i = 0; i < count; ++i) cut.add(products[i].weight->rows, row_bytes(*products[i].weight));
  cut.finish();
  lib.pool.each(cut.pieces(), [&](int64_t piece) {
    cut.each(piece, [&](size_t i, int64_t first, int64_t last) {
      lib.isa->rows({products[i].weight, first, last, products[i].act, products[i].out, 0, tokens});
    });
  });
}

namespace {

// A product with one token, for which the workers come while its activations are still being prepared. What they need
// lies side by side: every line that another core wrote is a way to that core.
struct OneToken {
  OneToken(const Library& lib, const ep_weight& w, uint8_t* act, float* out)
      : weight(w), act(act), out(out), isa(lib.isa), cut(lib.pool.threads(), 1) {
    cut.add(w.rows, row_bytes(w));
    cut.finish();
  }
  static void compute(void* self, int64_t piece) {
    const auto& job = *static_cast<const OneToken*>(self);
    wait_until([&job] { return job.prepared.load(std::memory_order_acquire); });
    job.cut.each(piece, [&job](size_t, int64_t first, int64_t last) {
      job.isa->rows({&job.weight, first, last, &job.act, &job.out, 0, 1});
    });
  }

  std::atomic<bool> prepared{false};
  ep_weight weight;
  const uint8_t* act;
  float* out;
  const Isa* isa;
  Cut cut;
};

int64_t linear_one(Library& lib, const ep_weight& w, const float* x, float* out) {
  uint8_t* act = lib.reserve(lib.isa->act_bytes(w));
  OneToken job(lib, w, act, out);
  lib.pool.start(job.cut.pieces(), OneToken::compute, &job);
  const bool finite = lib.isa->prepare(w, x, act);
  job.prepared.store(true, std::memory_order_release);
  lib.pool.finish();
  return finite ? 0 : 1;
}

}  // namespace

int64_t linear(Library& lib, const ep_weight& w, const float* x, int64_t tokens, float* out) {
  if (tokens == 1) return linear_one(lib, w, x, out);
  const int64_t stride = lib.isa->act_bytes(w);
  uint8_t* act;
  const uint8_t** act_rows;
  float** out_rows;
  Scratch scratch;
  scratch.add(&act, tokens * stride);
  scratch.add(&act_rows, tokens);
  scratch.add(&out_rows, tokens);
  scratch.place(lib);
  for (int64_t t = 0; t < tokens; ++t) {
    act_rows[t] = act + t * stride;
    out_rows[t] = out + t * w.rows;
  }
  FirstBad bad;
  prepare_rows(lib, w, x, nullptr, tokens, act, stride, bad);
  const Product product{&w, act_rows, out_rows};
  multiply(lib, &product, 1, tokens);
  return bad.value();
}

}  // namespace ep

using ep::ceil_div;
using ep::Library;

EP_API int32_t ep_abi(void) { return 6; }

EP_API int32_t ep_supports(const char* isa) { return find_isa(isa) != nullptr ? 1 : 0; }

EP_API ep_context* ep_create(const char* isa, int32_t threads) {
  const Isa* which = find_isa(isa);
  if (which == nullptr || threads < 1) return nullptr;
  try {
    return new ep_context(which, threads);
  } catch (const std::system_error&) {  // a limit of processes
    return nullptr;
  }
}

EP_API void ep_destroy(ep_context* context) { delete context; }

EP_API const char* ep_isa(const ep_context* context) { return context->isa->name; }

EP_API int64_t ep_reserve(ep_context* context, int64_t bytes) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  lib.reserve(bytes);
  return lib.scratch_bytes;
}

EP_API int64_t ep_linear(ep_context* context, const ep_weight* weight, const float* x, int64_t tokens, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  return ep::linear(lib, *weight, x, tokens, out);
}

EP_API void ep_silu_mul(ep_context* context, const float* gate, const float* up, int64_t n, float* out) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  lib.isa->silu_mul(gate, up, out, n);
}

EP_API uint64_t ep_read(ep_context* context, const void* p, int64_t bytes) {
  Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  std::atomic<uint64_t> total{0};
  constexpr int64_t kPart = 1 << 20;
  lib.pool.each(ceil_div(bytes, kPart), [&](int64_t i) {
    total += lib.isa->read(static_cast<const uint8_t*>(p) + i * kPart, std::min(kPart, bytes - i * kPart));
  });
  return total;
}
