#include "pool.h"

#include <chrono>

namespace ep {
namespace {

// Bridges the Python between two calls of a layer. Waking a sleeping thread costs tens of microseconds,
// more on virtual machines, and most jobs of a decoding step are not longer. A yielding thread lets
// every other process have the core.
constexpr std::chrono::microseconds kYields{1000};

thread_local int worker_number = 0;

}  // namespace

int Pool::worker() { return worker_number; }

// True when there was anything to claim.
bool Pool::claim_all() {
  int64_t done = 0;
  uint64_t s = state_.load(std::memory_order_acquire);
  while (next_of(s) < count_of(s)) {
    if (!state_.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    // The job cannot end before this chunk is counted, so its fields are stable from here on.
    body_(context_, static_cast<int64_t>(next_of(s)));
    ++done;
    s = state_.load(std::memory_order_acquire);
  }
  if (done > 0) finished_.fetch_add(done, std::memory_order_release);
  return done > 0;
}

void Pool::publish(int64_t chunks, Body body, void* context) {
  body_ = body;
  context_ = context;
  open_ = chunks;
  finished_.store(0, std::memory_order_relaxed);
  const uint64_t job = (state_.load(std::memory_order_relaxed) >> (2 * kCountBits)) + 1;
  // Sequentially consistent with the sleepers' counter: either they see the job or we see them.
  state_.store((job << (2 * kCountBits)) | (static_cast<uint64_t>(chunks) << kCountBits));
  if (sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
}

void Pool::start(int64_t chunks, Body body, void* context) {
  finish();
  if (chunks > 0) publish(chunks, body, context);
}

void Pool::finish() {
  if (open_ == 0) return;
  claim_all();
  wait_until([this] { return finished_.load(std::memory_order_acquire) == open_; });
  open_ = 0;
}

void Pool::run(int64_t chunks, Body body, void* context) {
  if (workers_.empty() || chunks <= 1) {
    for (int64_t i = 0; i < chunks; ++i) body(context, i);
    return;
  }
  constexpr auto kMost = static_cast<int64_t>(kCountMask);
  for (int64_t done = 0; done < chunks; done += kMost) {  // more chunks than the counter holds: several jobs
    struct Shifted {
      Body body;
      void* context;
      int64_t by;
    } shifted{body, context, done};
    const Body later = [](void* c, int64_t i) {
      auto* s = static_cast<Shifted*>(c);
      s->body(s->context, s->by + i);
    };
    start(chunks - done < kMost ? chunks - done : kMost, done == 0 ? body : later, done == 0 ? context : &shifted);
    finish();
  }
}

void Pool::work(int number) {
  worker_number = number;
  for (;;) {
    int idle = 0;
    while (idle < kSpins) {
      if (claim_all()) {
        idle = 0;
      } else {
        ++idle;
        pause_cpu();
      }
      if (stopping_.load(std::memory_order_relaxed)) return;
    }
    const auto until = std::chrono::steady_clock::now() + kYields;
    bool busy = false;
    while (!busy && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
      busy = claim_all();
      if (stopping_.load(std::memory_order_relaxed)) return;
    }
    if (busy) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [this] {
      const uint64_t s = state_.load();
      return stopping_.load() || next_of(s) < count_of(s);
    });
    sleeping_.fetch_sub(1);
    if (stopping_.load()) return;
  }
}

void Pool::resize(int threads) {
  if (threads == this->threads()) return;
  stop();
  stopping_.store(false);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

}  // namespace ep
