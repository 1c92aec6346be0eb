// One beam search over a trie and, optionally, a small trie of additions. The model lives outside: `advance` takes the
// logits of the current rows and does the whole level in one call: finite check, log-softmax, candidate scan,
// selection, new rows. With `chunk` > 0 the last level takes several calls, best beams first, and ends as soon as no
// beam that is left can reach the results. Scores are sums of log-probabilities in double; keys.hpp has the order.
#pragma once

#include <numeric>
#include <string>

#include "kernels.hpp"
#include "keys.hpp"
#include "layers.hpp"

namespace sid {

struct BeamOptions {
  std::uint32_t width;      // beams kept on every level but the last
  std::uint32_t top_n;      // beams kept on the last level
  bool legal;               // renormalise over legal children instead of the whole codebook
  std::uint32_t chunk = 0;  // rows asked at a time on the last level; 0: all
};

class BeamSearch {
 public:
  BeamSearch(Layers layers, BeamOptions options)
      : layers_(std::move(layers)), options_(options), kernels_(best_kernels()) {
    if (options_.width < 1 || options_.top_n < 1 || options_.top_n > options_.width)
      throw std::invalid_argument("expected 1 <= top_n <= width, got top_n " + std::to_string(options_.top_n) +
                                  " and width " + std::to_string(options_.width));
    if (const auto root = layers_.root()) {
      beams_.push_back({{}, 0.0, *root, 0, options_.legal && layers_.is_chain(0, *root)});
    }
    begin_level();
  }

  // Rows that need logits now. Row order is code order.
  std::uint32_t rows() const { return static_cast<std::uint32_t>(asked_.size()); }
  std::uint32_t level() const { return level_; }
  std::uint32_t levels() const { return layers_.levels(); }
  std::size_t row_size() const { return layers_.level(level_).size; }
  bool done() const { return level_ == levels(); }
  const std::vector<std::size_t>& kept() const { return kept_; }
  std::size_t num_beams() const { return beams_.size(); }

  // Prefixes of the rows: out is [rows, level].
  void write_rows(Code* out) const {
    for (const std::uint32_t b : asked_) out = std::copy_n(beams_[b].codes.begin(), level_, out);
  }

  // Row of each row's parent among those of the previous level: out is [rows].
  void write_parents(std::int64_t* out) const {
    for (const std::uint32_t b : asked_) *out++ = beams_[b].parent;
  }

  // Logits are [rows, row_size]. Throws std::invalid_argument naming a value that is not finite.
  void advance(const float* logits) {
    row_max_.resize(rows());
    for (std::uint32_t r = 0; r < rows(); ++r) {
      row_max_[r] = kernels_.max_finite(logits + r * row_size(), row_size());
      if (std::isnan(row_max_[r])) throw_not_finite(logits + r * row_size(), r);
    }
    for (const std::uint32_t row : best_first()) scan(row, logits);
    if (ask_more()) return;
    follow(logits);
    begin_level();
  }

  // After the last level, best first: codes [n, levels], scores [n], leaves [n].
  void write_results(Code* codes, float* scores, std::int64_t* leaves) const {
    std::vector<std::uint32_t> order(beams_.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(),
                     [this](std::uint32_t a, std::uint32_t b) { return beams_[a].score > beams_[b].score; });
    for (const std::uint32_t b : order) {
      codes = std::copy_n(beams_[b].codes.begin(), levels(), codes);
      *scores++ = static_cast<float>(beams_[b].score);
      *leaves++ = layers_.leaf(beams_[b].nodes);
    }
  }

 private:
  static constexpr std::size_t kFew = 8;          // values not worth a call of a vector kernel
  static constexpr double kLimitMargin = 1.00001;  // more than the rounding of the limit and of the sums

  struct Beam {
    std::array<Code, kMaxLevels> codes;
    double score;
    Nodes nodes;
    std::uint32_t parent;  // row of the parent in its level
    bool settled;          // the score cannot change any more: no row
  };
  // A candidate's score is `base + (logit - max)`.
  struct Softmax {
    double base;
    float max;
  };

  bool last() const { return level_ + 1 == levels(); }

  [[noreturn]] void throw_not_finite(const float* logits, std::size_t row) const {
    std::size_t code = 0;
    while (std::isfinite(logits[code])) ++code;
    throw std::invalid_argument("logits[" + std::to_string(row) + ", " + std::to_string(code) + "] is " +
                                std::to_string(logits[code]) + ", expected a finite number");
  }

  // Children of the beams, candidates of the settled ones, and the first rows to ask.
  void begin_level() {
    asked_.clear();
    waiting_.clear();
    if (done()) return;
    fetch_children();
    softmax_.resize(beams_.size());
    best_.reset(last() ? options_.top_n : options_.width);
    for (std::uint32_t b = 0; b < beams_.size(); ++b) {
      if (!beams_[b].settled)
        asked_.push_back(b);
      else
        best_.push(make_key(beams_[b].score, first_place_[b] + only_place(b)));
    }
    if (!last() || options_.chunk == 0 || asked_.size() <= options_.chunk) return;
    waiting_.swap(asked_);
    std::stable_sort(waiting_.begin(), waiting_.end(),
                     [this](std::uint32_t a, std::uint32_t b) { return beams_[a].score < beams_[b].score; });
    ask_more();
  }

  // The best waiting beams as the next rows; false when none could still change the result.
  bool ask_more() {
    if (waiting_.empty() || best_.beats(beams_[waiting_.back()].score)) return false;
    const std::size_t left = waiting_.size() - std::min<std::size_t>(options_.chunk, waiting_.size());
    asked_.assign(waiting_.begin() + static_cast<std::ptrdiff_t>(left), waiting_.end());
    std::sort(asked_.begin(), asked_.end());
    waiting_.resize(left);
    return true;
  }

  // Children of every beam in one tight loop, so that the cache misses overlap.
  void fetch_children() {
    const Level& level = layers_.level(level_);
    children_.resize(beams_.size());
    first_place_.resize(beams_.size() + 1);
    alone_.clear();
    shared_.clear();
    added_.clear();
    for (std::uint32_t b = 0; b < beams_.size(); ++b) {
      const EdgeRange range = layers_.base_children(level_, beams_[b].nodes);
      children_[b] = {range.begin, range.size(), {}, {}};
      __builtin_prefetch(level.codes + range.begin);
      if (beams_[b].nodes.added == kNone) continue;
      added_.push_back({b, alone_.size(), shared_.size()});
      layers_.add_children(level_, beams_[b].nodes, alone_, shared_);
    }
    added_.push_back({0, alone_.size(), shared_.size()});
    for (std::size_t i = 0; i + 1 < added_.size(); ++i) {
      children_[added_[i].beam].alone = {alone_.data() + added_[i].alone, alone_.data() + added_[i + 1].alone};
      children_[added_[i].beam].shared = {shared_.data() + added_[i].shared, shared_.data() + added_[i + 1].shared};
    }
    first_place_[0] = 0;
    for (std::size_t b = 0; b < beams_.size(); ++b) first_place_[b + 1] = first_place_[b] + children_[b].places();
  }

  // Place of a settled beam's only legal child.
  std::uint32_t only_place(std::uint32_t b) const {
    const Nodes child = *layers_.only_child(level_, beams_[b].nodes);
    return child.base == kNone ? children_[b].alone[0].position : children_[b].place(child.base - children_[b].begin);
  }

  // All rows, those of the best eighth of the beams first: they raise the floor that spares the others most of the
  // work. Both parts are in memory order, which the processor fetches ahead.
  const std::vector<std::uint32_t>& best_first() {
    order_.clear();
    if (asked_.empty()) return order_;
    scores_.clear();
    for (const std::uint32_t b : asked_) scores_.push_back(beams_[b].score);
    const auto bar = scores_.begin() + static_cast<std::ptrdiff_t>(scores_.size() / 8);
    std::nth_element(scores_.begin(), bar, scores_.end(), std::greater<>());
    for (const bool good : {true, false})
      for (std::uint32_t r = 0; r < asked_.size(); ++r)
        if ((beams_[asked_[r]].score > *bar) == good) order_.push_back(r);
    return order_;
  }

  void scan(std::uint32_t r, const float* logits) {
    const std::uint32_t b = asked_[r];
    const float* row = logits + r * row_size();
    const float row_max = row_max_[r];
    if (beams_[b].score < best_.lowest_score()) return;
    const float best = collect(children_[b], row);
    const float max = options_.legal ? best : row_max;
    // How large the logarithm of the sum may be; it is never negative.
    const double slack = beams_[b].score + (static_cast<double>(best) - static_cast<double>(max)) - best_.lowest_score();
    if (slack < 0) return;
    const double limit = static_cast<double>(std::exp(static_cast<float>(slack))) * kLimitMargin;
    const double sum = options_.legal ? kernels_.sum_exp(values_.data(), values_.size(), max, limit)
                                      : kernels_.sum_exp(row, row_size(), max, limit);
    if (sum > limit) return;
    softmax_[b] = {beams_[b].score - std::log(sum), max};
    const bool numbered = renumber(children_[b]);
    for (const std::uint32_t hit : hits(b))
      best_.push(make_key(score(b, values_[hit]), first_place_[b] + (numbered ? places_[hit] : hit)));
  }

  // Whether the legal children are others than the base's, so that values_ is numbered by places_.
  bool renumber(const Children& children) const { return layers_.base().mask || !children.alone.empty(); }

  // Logits of a prefix's legal children, in code order, to values_ and, where renumber says so, their places to
  // places_. Returns the largest.
  float collect(const Children& children, const float* row) {
    const Code* codes = layers_.level(level_).codes + children.begin;
    values_.resize(children.places());
    if (!renumber(children)) {
      for (std::uint32_t i = 0; i < children.size; ++i) values_[i] = row[codes[i]];
      return largest();
    }
    places_.resize(children.places());
    std::uint32_t count = 0, k = 0;
    const auto add_alone_before = [&](std::uint32_t place) {
      for (; k < children.alone.size() && children.alone[k].position == place; ++k, ++place) {
        places_[count] = place;
        values_[count++] = row[children.alone[k].code];
      }
    };
    for (std::uint32_t i = 0; i < children.size; ++i) {
      add_alone_before(i + k);
      places_[count] = i + k;
      values_[count] = row[codes[i]];
      count += layers_.base().legal(level_, children.begin + i);
    }
    add_alone_before(children.size + k);
    values_.resize(count);
    return largest();
  }

  // The largest of values_; most nodes of the lower levels have a child or two.
  float largest() const {
    if (values_.size() > kFew) return kernels_.max_finite(values_.data(), values_.size());
    return *std::max_element(values_.begin(), values_.end());
  }

  // Positions in values_ that may still reach the floor. Rounding the bar down by one float keeps the filter safe:
  // that step is far wider than the rounding of the double arithmetic behind it.
  std::span<const std::uint32_t> hits(std::uint32_t b) {
    const double lowest = best_.lowest_score() - softmax_[b].base + static_cast<double>(softmax_[b].max);
    const float bar = std::nextafter(static_cast<float>(lowest), -std::numeric_limits<float>::infinity());
    hits_.resize(std::max(hits_.size(), values_.size()));
    if (values_.size() <= kFew) return {hits_.data(), portable::at_least(values_.data(), values_.size(), bar, hits_.data())};
    return {hits_.data(), kernels_.at_least(values_.data(), values_.size(), bar, hits_.data())};
  }

  double score(std::uint32_t b, float logit) const {
    return softmax_[b].base + (static_cast<double>(logit) - static_cast<double>(softmax_[b].max));
  }

  // Make the chosen candidates the new beams. Beams and places are both in code order, so parents are found by a
  // merge.
  void follow(const float* logits) {
    const std::vector<Key>& keys = best_.finish();
    next_beams_.clear();
    std::uint32_t b = 0, row = 0;
    for (const Key key : keys) {
      for (; place_of(key) >= first_place_[b + 1]; ++b) row += !beams_[b].settled;
      const Beam& parent = beams_[b];
      Beam child{parent.codes, parent.score, children_[b].at(place_of(key) - first_place_[b]), row, parent.settled};
      const Code code = child.codes[level_] = layers_.code(level_, child.nodes);
      if (last()) {  // its logits may be gone, and nobody needs more than a float any more
        child.score = score_of(key);
      } else if (!parent.settled) {
        child.score = score(b, logits[row * row_size() + code]);
        child.settled = options_.legal && layers_.is_chain(level_ + 1, child.nodes);
      }
      next_beams_.push_back(child);
    }
    beams_.swap(next_beams_);
    kept_.push_back(beams_.size());
    ++level_;
  }

  Layers layers_;
  BeamOptions options_;
  const Kernels& kernels_;
  std::uint32_t level_ = 0;
  std::vector<Beam> beams_, next_beams_;
  std::vector<std::uint32_t> asked_;            // beam of each row, in code order
  std::vector<std::uint32_t> waiting_;          // beams without a row yet, the best last
  std::vector<std::size_t> kept_;
  // Of one level.
  std::vector<Children> children_;          // of each beam
  std::vector<std::uint32_t> first_place_;  // of each beam's children among all candidates, in code order
  std::vector<Alone> alone_;
  std::vector<Shared> shared_;
  struct Contribution {
    std::uint32_t beam;
    std::size_t alone, shared;  // where its children begin
  };
  std::vector<Contribution> added_;
  std::vector<Softmax> softmax_;
  std::vector<double> scores_;
  BestKeys best_;
  // Of one row.
  std::vector<std::uint32_t> order_, hits_, places_;
  std::vector<float> values_, row_max_;
};

}  // namespace sid
