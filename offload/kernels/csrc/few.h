// A list that is short as a rule, and then lies inside of what owns it: nothing is allocated for it, and another core
// finds it beside the rest.
#pragma once
#include <cstddef>
#include <type_traits>
#include <vector>

namespace ep {

template <class T, size_t kInside>
class Few {
  static_assert(std::is_trivially_copyable<T>::value, "copied as bytes");

 public:
  void push_back(const T& item) {
    if (size_ < kInside) {
      inside_[size_] = item;
    } else {
      if (size_ == kInside) more_.assign(inside_, inside_ + kInside);
      more_.push_back(item);
    }
    ++size_;
  }
  size_t size() const { return size_; }
  const T& operator[](size_t i) const { return size_ <= kInside ? inside_[i] : more_[i]; }
  const T& back() const { return (*this)[size_ - 1]; }

 private:
  size_t size_ = 0;
  T inside_[kInside];
  std::vector<T> more_;
};

}  // namespace ep
