// The head of a model for one token: a product that the workers begin with while the caller does something else.
#pragma once
#include "context.h"
#include "cut.h"

namespace ep {

// Owns the activations and the logits, so that a product which nobody waits for touches no memory but the weight's.
class Head {
 public:
  // w x for x [w.cols], from now on. Ends what was under way before. False when x holds NaN or infinity.
  bool begin(Library& lib, const ep_weight& w, const float* x);
  // Waits for it and copies the result [w.rows].
  void end(Library& lib, float* out);

 private:
  ep_weight weight_{};
  Cut cut_{1, 1};
  std::vector<uint8_t> memory_;
  uint8_t* act_ = nullptr;
  float* out_ = nullptr;
  const Library* lib_ = nullptr;
};

}  // namespace ep
