// Candidates of a beam step as integers, and the selection of the best ones.
//
// Order. Candidates compare by their score rounded to float, descending, then by their place in code order,
// ascending. Both fit one 64-bit key, so every selection is a selection of integers and exact.
#pragma once

#include <algorithm>
#include <array>
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

// A float below x by more than one rounding; std::nextafter is a call.
inline float float_below(double x) { return static_cast<float>(x - 2e-7 * std::abs(x) - 1e-44); }

inline Key make_key(double score, std::uint32_t place) {
  return (static_cast<Key>(ordered(static_cast<float>(score) + 0.0f)) << 32) | static_cast<std::uint32_t>(~place);
}
inline std::uint32_t place_of(Key key) { return ~static_cast<std::uint32_t>(key); }
inline float score_of(Key key) { return unordered(static_cast<std::uint32_t>(key >> 32)); }

// Keeps the `capacity` largest keys, in the order in which they came; `floor` is the key a newcomer must beat.
class BestKeys {
 public:
  void reset(std::size_t capacity) {
    capacity_ = capacity;
    floor_ = 0;
    lowest_ = -std::numeric_limits<double>::infinity();
    keys_.clear();
  }
  void push(Key key) {
    if (key <= floor_) return;
    keys_.push_back(key);
    if (keys_.size() >= kSlack * capacity_) cut();
  }
  std::size_t capacity() const { return capacity_; }
  // Promises that as many candidates as there are places score at least this.
  void raise(double score) {
    lowest_ = std::max(lowest_, double{float_below(score)});
  }
  // Lowest double whose float rounding can still reach the floor.
  double lowest_score() const { return lowest_; }
  // True when no candidate that scores at most `score` can be among the best any more.
  bool beats(double score) {
    if (keys_.size() >= capacity_) cut();
    return floor_ != 0 && static_cast<float>(score) < score_of(floor_);
  }
  // The best keys in code order. Whoever pushes few ascending runs of places pays for few merges.
  const std::vector<Key>& finish() {
    if (keys_.size() > capacity_) cut();
    const auto before = [](Key a, Key b) { return place_of(a) < place_of(b); };
    for (auto end = std::is_sorted_until(keys_.begin(), keys_.end(), before); end != keys_.end();) {
      const auto next = std::is_sorted_until(end, keys_.end(), before);
      std::inplace_merge(keys_.begin(), end, next, before);
      end = next;
    }
    return keys_;
  }

 private:
  static constexpr std::size_t kSlack = 3;  // newcomers collected before the next cut
  static constexpr int kBucketBits = 9;

  void cut() {
    floor_ = capacity_th();
    raise(score_of(floor_));
    std::size_t kept = 0;
    for (const Key key : keys_) {  // without a branch that nobody can predict
      keys_[kept] = key;
      kept += key >= floor_;
    }
    keys_.resize(kept);
  }

  // The capacity-th largest key: counted into buckets of equal width, then selected within one of them.
  Key capacity_th() {
    const auto [lowest, highest] = std::minmax_element(keys_.begin(), keys_.end());
    const Key low = *lowest;
    const int shift = std::max(0, static_cast<int>(std::bit_width(*highest - low)) - kBucketBits);
    std::array<std::uint32_t, std::size_t{1} << kBucketBits> count{};
    for (const Key key : keys_) ++count[(key - low) >> shift];
    std::size_t bucket = count.size(), above = 0;
    while (above + count[bucket - 1] < capacity_) above += count[--bucket];
    --bucket;
    near_.resize(keys_.size() + 1);
    std::size_t found = 0;
    for (const Key key : keys_) {
      near_[found] = key;
      found += (key - low) >> shift == bucket;
    }
    const auto nth = near_.begin() + static_cast<std::ptrdiff_t>(capacity_ - above - 1);
    std::nth_element(near_.begin(), nth, near_.begin() + static_cast<std::ptrdiff_t>(found), std::greater<>());
    return *nth;
  }

  std::size_t capacity_ = 1;
  Key floor_ = 0;
  double lowest_ = -std::numeric_limits<double>::infinity();
  std::vector<Key> keys_, near_;
};

}  // namespace sid
