// Candidates of a beam step as integers, and the selection of the best ones.
//
// Order. Candidates compare by their score rounded to float, descending, then by their place in code order,
// ascending. Both fit one 64-bit key, so every selection is a selection of integers and exact.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace sid {

using Key = std::uint64_t;

// Monotone map of floats to integers, and back.
inline std::uint32_t ordered(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float unordered(std::uint32_t x) {
  return std::bit_cast<float>(x & 0x80000000u ? x & 0x7FFFFFFFu : ~x);
}

inline Key make_key(double score, std::uint32_t place) {
  return (static_cast<Key>(ordered(static_cast<float>(score) + 0.0f)) << 32) | static_cast<std::uint32_t>(~place);
}
inline std::uint32_t place_of(Key key) { return ~static_cast<std::uint32_t>(key); }
inline float score_of(Key key) { return unordered(static_cast<std::uint32_t>(key >> 32)); }

// Keeps the `capacity` largest keys; `floor` is the key a newcomer must beat.
class BestKeys {
 public:
  void reset(std::size_t capacity) {
    capacity_ = capacity;
    floor_ = 0;
    keys_.clear();
  }
  void push(Key key) {
    if (key <= floor_) return;
    keys_.push_back(key);
    if (keys_.size() >= kSlack * capacity_) cut();
  }
  // Lowest double whose float rounding can still reach the floor.
  double lowest_score() const {
    if (floor_ == 0) return -std::numeric_limits<double>::infinity();
    return std::nextafter(score_of(floor_), -std::numeric_limits<float>::infinity());
  }
  // True when no candidate that scores at most `score` can be among the best any more.
  bool beats(double score) {
    if (keys_.size() >= capacity_) cut();
    return floor_ != 0 && static_cast<float>(score) < score_of(floor_);
  }
  // The best keys in code order.
  const std::vector<Key>& finish() {
    if (keys_.size() > capacity_) cut();
    std::sort(keys_.begin(), keys_.end(), [](Key a, Key b) { return place_of(a) < place_of(b); });
    return keys_;
  }

 private:
  static constexpr std::size_t kSlack = 4;  // newcomers collected before the next cut

  void cut() {
    const auto last = keys_.begin() + static_cast<std::ptrdiff_t>(capacity_ - 1);
    std::nth_element(keys_.begin(), last, keys_.end(), std::greater<>());
    keys_.resize(capacity_);
    floor_ = keys_.back();
  }

  std::size_t capacity_ = 1;
  Key floor_ = 0;
  std::vector<Key> keys_;
};

}  // namespace sid
