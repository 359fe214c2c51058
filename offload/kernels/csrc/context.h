// State shared by the entry points: chosen instruction set, thread pool, scratch memory. Every entry
// point holds the mutex for its whole call, so calls from several Python threads take turns.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace ep {

class Head;
class SharedExpert;

// What an ep_context is.
struct Library {
  Library(const Isa* which, int threads);
  ~Library() { std::free(scratch); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  std::mutex mutex;
  std::shared_ptr<SharedExpert> shared;  // they outlive the workers
  std::shared_ptr<Head> head;
  Pool pool;
  const Isa* isa;
  uint8_t* scratch = nullptr;
  int64_t scratch_bytes = 0;
  std::vector<float> partial;  // the experts' results of one token, and their sum

  uint8_t* reserve(int64_t bytes) {
    if (bytes > scratch_bytes) {
      std::free(scratch);
      scratch_bytes = (bytes + (1 << 20)) / 4096 * 4096;
      scratch = static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(scratch_bytes)));
      if (scratch == nullptr) std::abort();  // out of memory inside a kernel: nothing can be returned
    }
    return scratch;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts scratch memory into 64-byte aligned pieces: first pass to measure, second to place.
class Scratch {
 public:
  template <class T>
  void add(T** where, int64_t count) {
    pieces_.push_back({reinterpret_cast<void**>(where), total_});
    total_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }
  int64_t bytes() const { return total_; }
  void place(Library& lib) { place(lib.reserve(total_)); }
  // In memory that the caller keeps.
  void place(std::vector<uint8_t>& memory) {
    memory.resize(static_cast<size_t>(total_) + 64);
    uint8_t* base = memory.data();
    place(base + (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64);
  }
  void place(uint8_t* base) {
    for (const Piece& piece : pieces_) *piece.where = base + piece.offset;
  }

 private:
  struct Piece {
    void** where;
    int64_t offset;
  };
  std::vector<Piece> pieces_;
  int64_t total_ = 0;
};

// First bad row found by any thread, smallest index wins.
class FirstBad {
 public:
  void note(int64_t row) {
    int64_t seen = bad_.load(std::memory_order_relaxed);
    while (row + 1 < seen && !bad_.compare_exchange_weak(seen, row + 1)) {
    }
  }
  int64_t value() const {
    const int64_t v = bad_.load();
    return v == INT64_MAX ? 0 : v;
  }

 private:
  std::atomic<int64_t> bad_{INT64_MAX};
};

// Prepares `tokens` rows of x (row i is x + from[i] * cols when `from` is given) for weights like w.
void prepare_rows(Library& lib, const ep_weight& w, const float* x, const int64_t* from, int64_t tokens, uint8_t* act,
                  int64_t stride, FirstBad& bad);

// One weight to multiply with prepared tokens; row n of token t goes to out[t][n].
struct Product {
  const ep_weight* weight;
  const uint8_t* const* act;
  float* const* out;
};

// All rows of several weights in one job of the pool.
void multiply(Library& lib, const Product* products, size_t count, int64_t tokens);

// w x for x [tokens, w.cols]: out [tokens, w.rows]. 1 + the first bad row, or 0.
int64_t linear(Library& lib, const ep_weight& w, const float* x, int64_t tokens, float* out);

// Bytes of a row's codes.
int64_t row_bytes(const ep_weight& w);

}  // namespace ep

struct ep_context : ep::Library {
  using ep::Library::Library;
};
