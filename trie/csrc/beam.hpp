// One beam search over a trie and, optionally, a small trie of additions. The model lives outside: `advance` takes the
// logits of the current rows and does the whole level in one call: finite check and log-softmax in one pass over
// them, candidate scan, selection, new rows. With `chunk` > 0 the last level takes several calls, best beams first, and ends as soon as no
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
    measure(logits);
    for (const std::uint32_t r : best_first()) scan(asked_[r], logits + r * row_size(), bounds_[r]);
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

  struct Beam {
    std::array<Code, kMaxLevels> codes;
    double score;
    Nodes nodes;
    std::uint32_t parent;  // row of the parent in its level
    bool settled;          // the score cannot change any more: no row
  };
  // A candidate's score is `base + (logit - shift)`.
  struct Softmax {
    double base;
    float shift;
  };

  bool last() const { return level_ + 1 == levels(); }

  // The level starts anew, so that nothing of these logits stays.
  [[noreturn]] void refuse(const float* logits) {
    std::size_t at = 0;
    while (std::isfinite(logits[at])) ++at;
    const std::string where = std::to_string(at / row_size()) + ", " + std::to_string(at % row_size());
    begin_level();
    throw std::invalid_argument("logits[" + where + "] is " + std::to_string(logits[at]) +
                                ", expected a finite number");
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

  // Softmax of every row and the most that a candidate of it can score. The sums of all rows come first, because a
  // logarithm at the end of each would make the next one wait.
  void measure(const float* logits) {
    sums_.resize(rows());
    bounds_.resize(rows());
    for (std::uint32_t r = 0; r < rows(); ++r) {
      const float* const row = logits + r * row_size();
      if (options_.legal)  // scan() adds up the legal children; here only to see what is not finite
        sums_[r].sum = double{kernels_.max_finite(row, row_size())};
      else
        sums_[r] = kernels_.exp_sum(row, row_size());
    }
    for (std::uint32_t r = 0; r < rows(); ++r) {
      const auto [max, shift, sum] = sums_[r];
      const std::uint32_t b = asked_[r];
      if (std::isnan(sum)) refuse(logits);
      if (!options_.legal) softmax_[b] = {beams_[b].score - std::log(sum), shift};
      bounds_[r] = options_.legal ? beams_[b].score : score(b, max);
    }
  }

  // All rows, the most promising eighth first: they raise the floor that spares the others most of the work. Both
  // parts are in memory order, which the processor fetches ahead.
  std::span<const std::uint32_t> best_first() {
    order_.clear();
    if (asked_.empty()) return order_;
    sorted_ = bounds_;
    const auto bar = sorted_.begin() + static_cast<std::ptrdiff_t>(sorted_.size() / 8);
    std::nth_element(sorted_.begin(), bar, sorted_.end(), std::greater<>());
    for (const bool good : {true, false})
      for (std::uint32_t r = 0; r < asked_.size(); ++r)
        if ((bounds_[r] > *bar) == good) order_.push_back(r);
    return order_;
  }

  void scan(std::uint32_t b, const float* row, double bound) {
    if (bound < best_.lowest_score()) return;
    collect(children_[b], row);
    if (options_.legal) {
      const float max = largest();
      softmax_[b] = {beams_[b].score - std::log(kernels_.sum_exp(values_.data(), values_.size(), max)), max};
    }
    if (values_.size() > 2 * best_.capacity()) best_.raise(score(b, high_value()));
    const bool numbered = renumber(children_[b]);
    for (const std::uint32_t hit : hits(b))
      best_.push(make_key(score(b, values_[hit]), first_place_[b] + (numbered ? places_[hit] : hit)));
  }

  // A value that at least as many others reach as there are places among the best, and not many more.
  float high_value() const {
    const auto good = [this](float bar) {
      return kernels_.count(values_.data(), values_.size(), bar) >= best_.capacity();
    };
    float above = largest(), step = 1.0f;
    while (!good(above - step)) step *= 2.0f;
    for (int halvings = 0; halvings < 6; ++halvings) {
      step /= 2.0f;
      if (!good(above - step)) above -= step;
    }
    return above - step;
  }

  // Whether the legal children are others than the base's, so that values_ is numbered by places_.
  bool renumber(const Children& children) const { return layers_.base().mask || !children.alone.empty(); }

  // Logits of a prefix's legal children, in code order, to values_ and, where renumber says so, their places to
  // places_.
  void collect(const Children& children, const float* row) {
    const Code* codes = layers_.level(level_).codes + children.begin;
    values_.resize(children.places());
    if (!renumber(children)) return gather(row, codes, children.size, values_.data());
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
  }

  static void gather(const float* row, const Code* codes, std::uint32_t n, float* out) {
#pragma GCC unroll 8
    for (std::uint32_t i = 0; i < n; ++i) out[i] = row[codes[i]];
  }

  // The largest of values_; most nodes of the lower levels have a child or two.
  float largest() const {
    if (values_.size() > kFew) return kernels_.max_finite(values_.data(), values_.size());
    return *std::max_element(values_.begin(), values_.end());
  }

  // Positions in values_ that may still reach the floor. Rounding the bar down by one float keeps the filter safe:
  // that step is far wider than the rounding of the double arithmetic behind it.
  std::span<const std::uint32_t> hits(std::uint32_t b) {
    const double lowest = best_.lowest_score() - softmax_[b].base + double{softmax_[b].shift};
    const float bar = std::nextafter(static_cast<float>(lowest), -std::numeric_limits<float>::infinity());
    hits_.resize(std::max(hits_.size(), values_.size()));
    const auto at_least = values_.size() > kFew ? kernels_.at_least : portable::at_least;
    return {hits_.data(), at_least(values_.data(), values_.size(), bar, hits_.data())};
  }

  double score(std::uint32_t b, float logit) const {
    return softmax_[b].base + (static_cast<double>(logit) - static_cast<double>(softmax_[b].shift));
  }

  // Make the chosen candidates the new beams. Beams and places are both in code order, so parents are found by a
  // merge.
  void follow(const float* logits) {
    const std::vector<Key>& keys = best_.finish();
    next_beams_.clear();
    next_beams_.reserve(keys.size());
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
  std::vector<Softmax> softmax_;            // of each beam
  std::vector<ExpSum> sums_;                // of each row
  std::vector<double> bounds_, sorted_;     // the most that a candidate of each row can score
  BestKeys best_;
  // Of one row.
  std::vector<std::uint32_t> order_, hits_, places_;
  std::vector<float> values_;
};

}  // namespace sid
