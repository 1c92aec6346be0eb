// One beam search over a trie. The model lives outside: `advance` takes the logits of the current rows and does the
// whole level in one call: finite check, log-softmax, candidate scan, selection, new rows.
//
// Order. Scores are sums of log-probabilities in double. Candidates compare by their score rounded to float,
// descending, then by edge index, ascending, which is code order. Both fit one 64-bit key, so every selection is a
// selection of integers and exact.
#pragma once

#include <numeric>

#include "kernels.hpp"
#include "mask.hpp"

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

inline Key make_key(double score, Edge edge) {
  return (static_cast<Key>(ordered(static_cast<float>(score) + 0.0f)) << 32) | static_cast<std::uint32_t>(~edge);
}
inline Edge edge_of(Key key) { return ~static_cast<std::uint32_t>(key); }
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
  const std::vector<Key>& finish() {
    if (keys_.size() > capacity_) cut();
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

struct BeamOptions {
  std::uint32_t width;  // beams kept on every level but the last
  std::uint32_t top_n;  // beams kept on the last level
  bool legal;           // renormalise over legal children instead of the whole codebook
};

class BeamSearch {
 public:
  BeamSearch(std::shared_ptr<const Trie> trie, std::shared_ptr<const EdgeMask> mask, BeamOptions options)
      : trie_(std::move(trie)), mask_(std::move(mask)), options_(options), kernels_(best_kernels()) {
    if (options_.width < 1 || options_.top_n < 1 || options_.top_n > options_.width)
      throw std::invalid_argument("expected 1 <= top_n <= width, got top_n " + std::to_string(options_.top_n) +
                                  " and width " + std::to_string(options_.width));
    if (mask_ && &mask_->trie() != trie_.get()) throw std::invalid_argument("the mask belongs to another trie");
    if ((mask_ ? mask_->num_legal() : trie_->num_sids()) == 0) return;
    prefixes_.resize(trie_->levels());
    beams_.push_back({0.0, 0, kSettled});
    if (!options_.legal || !is_chain(0, 0)) beams_[0].row = rows_++;
    parents_.assign(rows_, 0);
  }

  // Rows that need logits now. Row order is code order.
  std::uint32_t rows() const { return rows_; }
  std::uint32_t level() const { return level_; }
  std::uint32_t levels() const { return trie_->levels(); }
  std::size_t row_size() const { return trie_->level(level_).size; }
  bool done() const { return level_ == trie_->levels(); }
  const std::vector<std::int64_t>& parents() const { return parents_; }
  const std::vector<std::size_t>& kept() const { return kept_; }
  std::size_t num_beams() const { return beams_.size(); }

  // Prefixes of the rows: out is [rows, level].
  void write_rows(Code* out) const {
    for (std::size_t b = 0; b < beams_.size(); ++b)
      if (beams_[b].row != kSettled) out = std::copy_n(prefix(b), level_, out);
  }

  // Logits are [rows, row_size]. Throws std::invalid_argument naming a value that is not finite.
  void advance(const float* logits) {
    fetch_children();
    best_.reset(level_ + 1 == trie_->levels() ? options_.top_n : options_.width);
    for (const std::uint32_t b : best_first()) scan(b, logits);
    edges_.clear();
    for (const Key key : best_.finish()) edges_.push_back(edge_of(key));
    std::sort(edges_.begin(), edges_.end());
    follow(logits);
  }

  // After the last level, best first: codes [n, levels], scores [n], leaves [n].
  void write_results(Code* codes, float* scores, std::int64_t* leaves) const {
    std::vector<std::uint32_t> order(beams_.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [this](std::uint32_t a, std::uint32_t b) {
      return static_cast<float>(beams_[a].score) > static_cast<float>(beams_[b].score);
    });
    for (const std::uint32_t b : order) {
      codes = std::copy_n(prefix(b), levels(), codes);
      *scores++ = static_cast<float>(beams_[b].score);
      *leaves++ = beams_[b].node;
    }
  }

 private:
  static constexpr std::uint32_t kSettled = 0xFFFFFFFFu;  // a beam whose score cannot change: it has no row

  struct Beam {
    double score;
    std::uint32_t node;
    std::uint32_t row;
  };
  // A candidate's score is `base + (logit - max)`.
  struct Softmax {
    double base;
    float max;
  };

  const Code* prefix(std::size_t b) const { return prefixes_.data() + b * trie_->levels(); }

  // The only legal edge of a node of depth t, or `end` of its edges when there are several.
  Edge only_edge(std::uint32_t t, EdgeRange range) const {
    if (!mask_) return range.size() == 1 ? range.begin : range.end;
    Edge only = range.end;
    for (Edge e = range.begin; e < range.end; ++e) {
      if (!mask_->test(t, e)) continue;
      if (only != range.end) return range.end;
      only = e;
    }
    return only;
  }

  // True when exactly one legal SID lies below a node of depth t.
  bool is_chain(std::uint32_t t, std::uint32_t node) const {
    for (; t < trie_->levels(); ++t) {
      const EdgeRange range = trie_->level(t).children(node);
      node = only_edge(t, range);
      if (node == range.end) return false;
    }
    return true;
  }

  [[noreturn]] void throw_not_finite(const float* logits, std::size_t row) const {
    std::size_t code = 0;
    while (std::isfinite(logits[code])) ++code;
    throw std::invalid_argument("logits[" + std::to_string(row) + ", " + std::to_string(code) + "] is " +
                                std::to_string(logits[code]) + ", expected a finite number");
  }

  // Children of every beam in one tight loop, so that the cache misses overlap.
  void fetch_children() {
    const Level& level = trie_->level(level_);
    ranges_.resize(beams_.size());
    for (std::size_t b = 0; b < beams_.size(); ++b) {
      ranges_[b] = level.children(beams_[b].node);
      __builtin_prefetch(level.codes + ranges_[b].begin);
    }
    softmax_.resize(beams_.size());
  }

  // All beams, the best eighth first: they raise the floor that spares the others most of the work.
  const std::vector<std::uint32_t>& best_first() {
    order_.resize(beams_.size());
    std::iota(order_.begin(), order_.end(), 0u);
    std::nth_element(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(beams_.size() / 8), order_.end(),
                     [this](std::uint32_t a, std::uint32_t b) { return beams_[a].score > beams_[b].score; });
    return order_;
  }

  void scan(std::uint32_t b, const float* logits) {
    const Beam& beam = beams_[b];
    if (beam.row == kSettled) {
      softmax_[b] = {beam.score, 0.0f};
      return best_.push(make_key(beam.score, only_edge(level_, ranges_[b])));
    }
    const float* row = logits + beam.row * row_size();
    const float row_max = kernels_.max_finite(row, row_size());
    if (std::isnan(row_max)) throw_not_finite(row, beam.row);
    collect(ranges_[b], row);
    const float best = kernels_.max_finite(values_.data(), values_.size());
    const float max = options_.legal ? best : row_max;
    // The logarithm below is never negative: most hopeless beams need no exponentials.
    if (beam.score + (static_cast<double>(best) - static_cast<double>(max)) < best_.lowest_score()) return;
    const double sum = options_.legal ? kernels_.sum_exp(values_.data(), values_.size(), max)
                                      : kernels_.sum_exp(row, row_size(), max);
    softmax_[b] = {beam.score - std::log(sum), max};
    for (const std::uint32_t i : hits(b))
      best_.push(make_key(score(b, values_[i]), mask_ ? candidates_[i] : ranges_[b].begin + i));
  }

  // Logits of a node's legal children to values_ and, where a mask thins the children out, their edges to
  // candidates_.
  void collect(EdgeRange range, const float* row) {
    const Code* codes = trie_->level(level_).codes;
    values_.resize(range.size());
    if (!mask_) {
      for (std::uint32_t i = 0; i < range.size(); ++i) values_[i] = row[codes[range.begin + i]];
      return;
    }
    candidates_.resize(range.size());
    std::size_t count = 0;
    for (Edge e = range.begin; e < range.end; ++e) {
      candidates_[count] = e;
      values_[count] = row[codes[e]];
      count += mask_->test(level_, e);
    }
    values_.resize(count);
  }

  // Positions in values_ that may still reach the floor. Rounding the bar down by one float keeps the filter safe:
  // that step is far wider than the rounding of the double arithmetic behind it.
  std::span<const std::uint32_t> hits(std::uint32_t b) {
    const double lowest = best_.lowest_score() - softmax_[b].base + static_cast<double>(softmax_[b].max);
    const float bar = std::nextafter(static_cast<float>(lowest), -std::numeric_limits<float>::infinity());
    hits_.resize(std::max(hits_.size(), values_.size()));
    return {hits_.data(), kernels_.at_least(values_.data(), values_.size(), bar, hits_.data())};
  }

  double score(std::uint32_t b, float logit) const {
    return softmax_[b].base + (static_cast<double>(logit) - static_cast<double>(softmax_[b].max));
  }

  // Make the chosen edges the new beams. Beams and edges are both in code order, so parents are found by a merge.
  void follow(const float* logits) {
    const Level& level = trie_->level(level_);
    const std::size_t depth = trie_->levels();
    next_beams_.clear();
    next_prefixes_.resize(edges_.size() * depth);
    parents_.clear();
    std::uint32_t b = 0;
    for (const Edge edge : edges_) {
      while (edge >= ranges_[b].end) ++b;
      const Beam& parent = beams_[b];
      const Code code = level.codes[edge];
      Code* out = next_prefixes_.data() + next_beams_.size() * depth;
      *std::copy_n(prefix(b), level_, out) = code;
      Beam child{parent.score, edge, kSettled};
      if (parent.row != kSettled) {
        child.score = score(b, logits[parent.row * row_size() + code]);
        if (level_ + 1 < depth && !(options_.legal && is_chain(level_ + 1, edge))) {
          child.row = static_cast<std::uint32_t>(parents_.size());
          parents_.push_back(parent.row);
        }
      }
      next_beams_.push_back(child);
    }
    beams_.swap(next_beams_);
    prefixes_.swap(next_prefixes_);
    rows_ = static_cast<std::uint32_t>(parents_.size());
    kept_.push_back(beams_.size());
    ++level_;
  }

  std::shared_ptr<const Trie> trie_;
  std::shared_ptr<const EdgeMask> mask_;
  BeamOptions options_;
  const Kernels& kernels_;
  std::uint32_t level_ = 0, rows_ = 0;
  std::vector<Beam> beams_, next_beams_;
  std::vector<Code> prefixes_, next_prefixes_;  // [beams, levels]
  std::vector<std::int64_t> parents_;           // [rows]
  std::vector<std::size_t> kept_;
  // Scratch of one level.
  BestKeys best_;
  std::vector<std::uint32_t> order_, hits_;
  std::vector<Edge> edges_, candidates_;
  std::vector<EdgeRange> ranges_;
  std::vector<float> values_;
  std::vector<Softmax> softmax_;
};

}  // namespace sid
