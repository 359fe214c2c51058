// How the rows of one or several weights are cut into pieces for the pool: large ones first, small ones
// last, so that all threads finish together and few pieces break the stream of reads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "context.h"
#include "few.h"

namespace ep {

class Cut {
 public:
  // `tokens`: with many of them a piece is reread per tile of tokens, so it must stay in a core's cache.
  Cut(int threads, int64_t tokens) : threads_(threads), tokens_(tokens) {}

  // The rows of one item follow those of the items added before; each costs `row_bytes` to read.
  void add(int64_t rows, int64_t row_bytes) {
    items_.push_back({rows, std::max<int64_t>(1, row_bytes)});
    left_ += rows * items_.back().row_bytes;
  }

  // Places the cuts; to be called once, after the last item.
  void finish() {
    size_t item = 0;
    int64_t row = 0;
    while (item < items_.size()) {
      starts_.push_back({item, row});
      const int64_t most = tokens_ <= kFewTokens ? left_ : kManyTokensBytes;
      // Every piece begins with reads that no prefetcher foresaw, so what is short anyway is cut into few.
      const int64_t share = std::max(left_ / (2 * threads_), std::min(kShort, 7 * left_ / (8 * threads_)));
      int64_t budget = threads_ == 1 ? most : std::min(most, std::max(kSmallest, share));
      while (budget > 0 && item < items_.size()) {
        const Item& now = items_[item];
        const int64_t rows = std::min(now.rows - row, ceil_div(ceil_div(budget, now.row_bytes), kUnit) * kUnit);
        budget -= rows * now.row_bytes;
        left_ -= rows * now.row_bytes;
        row += rows;
        if (row >= now.rows) {
          ++item;
          row = 0;
        }
      }
    }
    starts_.push_back({items_.size(), 0});
  }

  int64_t pieces() const { return static_cast<int64_t>(starts_.size()) - 1; }

  // Calls visit(item, first row, last row) for every part of a piece.
  template <class Visit>
  void each(int64_t piece, Visit&& visit) const {
    const Start& from = starts_[static_cast<size_t>(piece)];
    const Start& to = starts_[static_cast<size_t>(piece) + 1];
    for (size_t item = from.item; item <= to.item && item < items_.size(); ++item) {
      const int64_t first = item == from.item ? from.row : 0;
      const int64_t last = item == to.item ? to.row : items_[item].rows;
      if (first < last) visit(item, first, last);
    }
  }

 private:
  static constexpr int64_t kUnit = 16;  // rows: whole panels and row blocks of every instruction set
  static constexpr int64_t kSmallest = 12 * 1024;
  static constexpr int64_t kShort = 640 * 1024;
  static constexpr int64_t kManyTokensBytes = 96 * 1024;
  static constexpr int64_t kFewTokens = 4;

  struct Item {
    int64_t rows, row_bytes;
  };
  struct Start {
    size_t item;
    int64_t row;
  };

  int threads_;
  int64_t tokens_;
  int64_t left_ = 0;
  Few<Item, 4> items_;  // of most jobs
  Few<Start, 12> starts_;
};

}  // namespace ep
