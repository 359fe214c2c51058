// SwiGLU blocks: the routed experts of a call, a shared expert that is computed beside them, and what they are part of.
#pragma once
#include "context.h"
#include "cut.h"

namespace ep {

// One SwiGLU block and the tokens it computes.
struct Expert {
  ep_weight gate, up, down;
  const int64_t* positions;
  int64_t count;
  const uint8_t** x;  // [count] prepared token rows
  uint8_t** h;        // [count] prepared intermediate rows, filled by the first phase
  float** h_float;    // [count] intermediate rows before preparation
  float** out;        // [count]
};

// A shared expert under way. `begin` leaves gate and up to the workers and returns, so that they read weights
// while the caller decides which routed experts to read; down joins the down projections of the routed ones.
class SharedExpert {
 public:
  // Computes gate, up and down of `mlp` for x [tokens, hidden] from now on. Ends what was under way before.
  void begin(Library& lib, const ep_weight* mlp, const float* x, int64_t tokens);
  // Which `begin` is under way; 0 before the first.
  uint64_t generation() const { return generation_; }

  // Ends gate and up. True when the caller is to compute `down` in a job of its own making, exactly once.
  bool needs_down(Library& lib);
  const Expert& block() const { return block_; }
  // Ends everything and returns the results [tokens, hidden].
  const float* finish(Library& lib);
  // 1 + the first token with a bad intermediate row, or 0.
  int64_t bad() const { return bad_; }

 private:
  enum class Stage { kNothing, kUp, kDown };

  Stage stage_ = Stage::kNothing;
  uint64_t generation_ = 0;
  int64_t bad_ = 0, tokens_ = 0;
  Expert block_{};
  Cut cut_{1, 1};
  std::vector<uint8_t> memory_;
  float* out_ = nullptr;
  const Library* lib_ = nullptr;
};

// The first half of an MoE block, as ep_moe_begin.
int64_t begin_moe(Library& lib, const ep_moe_layer& layer, const float* hidden, int64_t tokens, float* x, int64_t* ids,
                  float* weights);
// The second half for one token whose experts are all there, ids[j] at bases[j]: they are computed, summed in ascending
// order of ids and added, out = hidden + (routed + shared expert). `layout` is that of ep_experts.
int64_t finish_moe(Library& lib, const ep_moe_layer& layer, const ep_weight* layout, const uint64_t* bases, const int64_t* ids,
                   const float* weights, const float* hidden, const float* x, uint64_t generation, float* out);
// The block of a dense layer for one token: x is the norm of hidden, out = hidden + its MLP.
int64_t dense_block(Library& lib, const ep_moe_layer& layer, const float* hidden, float* x, float* out);

}  // namespace ep
