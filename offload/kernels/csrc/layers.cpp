// A token's way through the layers of a model, with nothing of the caller in between as long as all its experts are there.
#include "experts.h"
#include "mla.h"

namespace ep {
namespace {

// Where the experts of layer `index` begin that the token needs; false if one of them is missing.
bool find(const ep_residents& residents, const ep_moe_layer& block, int64_t index, const int64_t* ids, uint64_t* bases) {
  const int32_t* slots = residents.slots + (index - residents.first) * block.router.rows;
  for (int64_t j = 0; j < block.config.top_k; ++j) {
    const int32_t slot = slots[ids[j]];
    if (slot < 0) return false;
    bases[j] = residents.addresses[slot];
  }
  return true;
}

int64_t run_layers(Library& lib, ep_token& t, const ep_residents* residents, int64_t first, int64_t last, bool routed,
                   int64_t* stopped) {
  std::vector<uint64_t> bases;
  for (int64_t index = first; index < last; ++index) {
    const ep_layer& layer = t.layers[index];
    const ep_moe_layer& block = *layer.block;
    int64_t* ids = t.ids + index * block.config.top_k;
    if (!routed || index > first) {
      int64_t bad = attention_block(lib, *layer.attention, t.hidden, t.cos, t.sin, 1, t.start, layer.cache, t.attended);
      if (bad != 0) return bad;
      const bool dense = block.router.rows == 0;
      bad = dense ? dense_block(lib, block, t.attended, t.x, t.hidden) : begin_moe(lib, block, t.attended, 1, t.x, ids, t.weights);
      if (bad != 0) return bad;
      if (dense) continue;
      t.mark = lib.shared->generation();
    }
    bases.resize(static_cast<size_t>(block.config.top_k));
    if (residents == nullptr || !find(*residents, block, index, ids, bases.data())) {
      *stopped = index;
      return 0;
    }
    const int64_t bad =
        finish_moe(lib, block, residents->layout, bases.data(), ids, t.weights, t.attended, t.x, t.mark, t.hidden);
    if (bad != 0) return bad;
  }
  *stopped = last;
  return 0;
}

}  // namespace
}  // namespace ep

EP_API int64_t ep_layers(ep_context* context, ep_token* token, const ep_residents* residents, int64_t first, int64_t last,
                         int32_t routed, int64_t* stopped) {
  ep::Library& lib = *context;
  std::lock_guard<std::mutex> lock(lib.mutex);
  return ep::run_layers(lib, *token, residents, first, last, routed != 0, stopped);
}
