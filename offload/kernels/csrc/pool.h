// A persistent pool of worker threads. Owns waiting and the hand-out of chunks; knows no kernels.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace ep {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 50 us: two jobs of one call follow each other within that time.
constexpr int kSpins = 1500;

// Waits for what another thread is about to do. If that takes long it may not be scheduled, and gets this core.
template <class Done>
void wait_until(Done&& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

// Chunks of a job are claimed one by one, so a worker that is not scheduled claims none and nobody
// waits for it. Workers spin briefly after a job, then sleep.
class Pool {
 public:
  using Body = void (*)(void* context, int64_t chunk);

  Pool() = default;
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void resize(int threads);
  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Number of the calling thread inside a body: 0 for the caller of run, then 1, 2, ...
  static int worker();
  // Runs body(context, i) for i in [0, chunks) on all threads. Not reentrant; one caller at a time.
  void run(int64_t chunks, Body body, void* context);

  // Lets the workers begin with body(context, i) for i in [0, chunks) and returns; the caller takes part in
  // `finish`, which every later start or run begins with. `context` must stay valid until then.
  void start(int64_t chunks, Body body, void* context);
  void finish();

  template <class Function>
  void each(int64_t chunks, Function&& function) {
    using Plain = std::remove_reference_t<Function>;
    run(chunks, [](void* c, int64_t i) { (*static_cast<Plain*>(c))(i); }, const_cast<void*>(static_cast<const void*>(&function)));
  }

 private:
  void stop();
  void work(int number);
  bool claim_all();
  void publish(int64_t chunks, Body body, void* context);

  // Job number, chunk count and next chunk in one word, so that a claim is valid or fails as a whole.
  static constexpr int kCountBits = 24;
  static constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
  static uint64_t next_of(uint64_t s) { return s & kCountMask; }
  static uint64_t count_of(uint64_t s) { return (s >> kCountBits) & kCountMask; }

  // What a claim needs lies in one cache line, which it fetches from another core.
  alignas(64) std::atomic<uint64_t> state_{0};
  Body body_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
  int64_t open_ = 0;  // chunks of a job that was published and not yet waited for
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace ep
