// The noaux_tc router of DeepSeek-V3.
#pragma once
#include "context.h"

namespace ep {

// sigmoid(weight x) for x [tokens, hidden]: scores [tokens, experts]. 1 + the first bad row, or 0.
int64_t router_scores(Library& lib, const ep_weight& weight, const float* x, int64_t tokens, float* scores);

// Experts of one token by score plus bias, within the best groups; their weights by score alone.
void route(const ep_router& config, const float* scores, const float* bias, int64_t* ids, float* weights);

}  // namespace ep
