// One beam search over a trie and, optionally, a small trie of additions. The model lives outside: `advance` takes the
// logits of the current rows and does the whole level in one call: finite check and log-softmax in one pass over
// them, candidate scan, selection, new rows. With `chunk` > 0 the last level takes several calls, best beams first, and
// ends as soon as no beam that is left can reach the results. Scores are sums of log-probabilities in double; keys.hpp
// has the order.
#pragma once

#include <numeric>
#include <string>

#include "candidates.hpp"
#include "kernels.hpp"
#include "keys.hpp"

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
  BeamSearch(const BeamSearch&) = delete;  // candidates_ refers to layers_
  BeamSearch& operator=(const BeamSearch&) = delete;

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
    std::size_t r = 0, at = 0;
    const std::size_t room = rows() * std::size_t{level_};
    for (; at + kMaxLevels <= room; ++r, at += level_)  // of a fixed length, so no call; the next row covers the rest
      std::memcpy(out + at, beams_[asked_[r]].codes.data(), kMaxLevels * sizeof(Code));
    for (; r < rows(); ++r, at += level_) std::copy_n(beams_[asked_[r]].codes.begin(), level_, out + at);
  }

  // Row of each row's parent among those of the previous level: out is [rows].
  void write_parents(std::int64_t* out) const {
    for (const std::uint32_t b : asked_) *out++ = beams_[b].parent;
  }

  // Logits are [rows, row_size]. Throws std::invalid_argument naming a value that is not finite.
  void advance(const float* logits) {
    expand(logits);
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
  // Candidates, per place among the best and of one row, from which on a filter pays.
  static constexpr std::size_t kMany = 3, kFew = 8;

  struct Beam {
    std::array<Code, kMaxLevels> codes;
    double score;
    Nodes nodes;
    std::uint32_t parent;  // row of the parent in its level
    bool settled;          // the score cannot change any more: no row
  };
  // A candidate's score is `base + (logit - shift)`.
  struct Softmax {
    double base, shift;
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
    candidates_.fetch(level_, beams_);
    hits_.resize(std::max(hits_.size(), candidates_.most() + 15));
    softmax_.resize(beams_.size());
    best_.reset(last() ? options_.top_n : options_.width);
    for (std::uint32_t b = 0; b < beams_.size(); ++b) {
      if (!beams_[b].settled)
        asked_.push_back(b);
      else
        best_.push(make_key(beams_[b].score, candidates_.only_place(b, beams_[b].nodes)));
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

  // Every row's softmax and candidates, a few rows at a time, so that they are scanned while they are still in the
  // nearest cache. With many candidates the most promising rows come first: they give a floor that spares the others
  // most of the work.
  void expand(const float* logits) {
    order_.resize(rows());
    std::iota(order_.begin(), order_.end(), 0u);
    const bool many = candidates_.size() > kMany * best_.capacity();
    std::size_t done = 0;
    if (many) {
      done = promising_first();
      const std::span<const std::uint32_t> promising{order_.data(), done};
      for (std::size_t i = 0; i < done; i += kRowsAtOnce) add_up(promising.subspan(i), logits);
      raise_floor(promising, logits);
      for (const std::uint32_t r : promising) scan(r, logits, many);
    }
    for (std::size_t i = done; i < rows(); i += kRowsAtOnce) {
      const std::span<const std::uint32_t> few{order_.data() + i, std::min(kRowsAtOnce, rows() - i)};
      add_up(few, logits);
      for (const std::uint32_t r : few) scan(r, logits, many);
    }
  }

  // Moves the rows of the best beams to the front; returns how many.
  std::size_t promising_first() {
    if (rows() == 0) return 0;
    scores_.resize(rows());
    for (std::uint32_t r = 0; r < rows(); ++r) scores_[r] = beams_[asked_[r]].score;
    const auto bar = scores_.begin() + static_cast<std::ptrdiff_t>(rows() / 16);
    std::nth_element(scores_.begin(), bar, scores_.end(), std::greater<>());
    const double least = *bar;
    const auto rest = std::stable_partition(order_.begin(), order_.end(),
                                            [&](std::uint32_t r) { return beams_[asked_[r]].score >= least; });
    return static_cast<std::size_t>(rest - order_.begin());
  }

  // Softmax of the first kRowsAtOnce of some rows.
  void add_up(std::span<const std::uint32_t> rows, const float* logits) {
    std::array<const float*, kRowsAtOnce> at;
    std::array<ExpSum, kRowsAtOnce> sums;
    const std::size_t count = std::min(kRowsAtOnce, rows.size());
    for (std::size_t i = 0; i < count; ++i) {
      at[i] = logits + rows[i] * row_size();
      candidates_.prefetch(asked_[rows[i]]);
    }
    if (options_.legal) {  // collect() adds up the legal children; here only to see what is not finite
      for (std::size_t i = 0; i < count; ++i) sums[i] = {0.0, double{kernels_.max_finite(at[i], row_size())}};
    } else {
      kernels_.exp_sums(at.data(), count, row_size(), sums.data());
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (std::isnan(sums[i].log_sum)) refuse(logits);
      const std::uint32_t b = asked_[rows[i]];
      if (!options_.legal) softmax_[b] = {beams_[b].score - sums[i].log_sum, sums[i].shift};
    }
  }

  // Finds a score that enough candidates of some rows reach, before any is chosen.
  void raise_floor(std::span<const std::uint32_t> rows, const float* logits) {
    sample_.clear();
    float largest = 0.0f;
    for (const std::uint32_t r : rows) {
      const std::uint32_t b = asked_[r];
      const std::span<const float> values = collect(b, logits + r * row_size()).logits;
      const auto offset = static_cast<float>(softmax_[b].base - softmax_[b].shift);
      largest = std::max(largest, std::abs(offset));
      const std::size_t before = sample_.size();
      sample_.resize(before + values.size());
      for (std::size_t i = 0; i < values.size(); ++i) sample_[before + i] = values[i] + offset;
    }
    if (sample_.size() < best_.capacity()) return;
    const float top = kernels_.max_finite(sample_.data(), sample_.size());
    if (std::isnan(top)) return;  // a score beyond the range of a float
    const float reached = high_value(top);
    best_.raise(double{reached} - 2e-7 * (1.0 + double{largest + std::abs(reached)}));  // the sample is rounded twice
  }

  // A value that at least as many of sample_ reach as there are places among the best, and not many more.
  // `above` is the largest of them, all finite.
  float high_value(float above) const {
    const auto good = [this](float bar) {
      return kernels_.count(sample_.data(), sample_.size(), bar) >= best_.capacity();
    };
    float step = 1.0f;
    while (!good(above - step)) step *= 2.0f;
    for (int halvings = 0; halvings < 8; ++halvings) {
      step /= 2.0f;
      if (!good(above - step)) above -= step;
    }
    return above - step;
  }

  void scan(std::uint32_t r, const float* logits, bool many) {
    const std::uint32_t b = asked_[r];
    if (beams_[b].score < best_.lowest_score()) return;
    const Candidates::Collected legal = collect(b, logits + r * row_size());
    const std::span<const float> values = legal.logits;
    const auto push = [&](std::uint32_t i) { best_.push(make_key(score(b, values[i]), legal.place(i))); };
    if (many && values.size() > kFew)
      for (const std::uint32_t i : hits(b, values)) push(i);
    else
      for (std::uint32_t i = 0; i < values.size(); ++i) push(i);
  }

  // A beam's legal children, in `legal` mode with their softmax.
  Candidates::Collected collect(std::uint32_t b, const float* row) {
    const Candidates::Collected legal = candidates_.collect(b, row);
    if (options_.legal) {
      ExpSum exp;
      const float* const logits = legal.logits.data();
      kernels_.exp_sums(&logits, 1, legal.logits.size(), &exp);
      softmax_[b] = {beams_[b].score - exp.log_sum, exp.shift};
    }
    return legal;
  }

  // Positions in `values` that may still reach the floor. The bar is a float lower than it need be, which is far more
  // than the double arithmetic behind it is off.
  std::span<const std::uint32_t> hits(std::uint32_t b, std::span<const float> values) {
    const double lowest = best_.lowest_score() - softmax_[b].base + softmax_[b].shift;
    return {hits_.data(), kernels_.at_least(values.data(), values.size(), float_below(lowest), hits_.data())};
  }

  // Never above the parent's, also where the sum is rounded: `ask_more` relies on it.
  double score(std::uint32_t b, float logit) const {
    return std::min(beams_[b].score, softmax_[b].base + (static_cast<double>(logit) - softmax_[b].shift));
  }

  // Make the chosen candidates the new beams. Beams and places are both in code order, so parents are found by a
  // merge. Children are written in place: to copy one would wait for the stores that have just made it.
  void follow(const float* logits) {
    const std::vector<Key>& keys = best_.finish();
    next_beams_.resize(keys.size());
    Beam* next = next_beams_.data();
    std::uint32_t b = 0, row = 0;
    for (const Key key : keys) {
      for (; place_of(key) >= candidates_.end(b); ++b) row += !beams_[b].settled;
      const Beam& parent = beams_[b];
      Beam& child = *next++;
      child.codes = parent.codes;
      child.score = parent.score;
      child.nodes = candidates_.at(b, place_of(key));
      child.parent = row;
      child.settled = parent.settled;
      const Code code = child.codes[level_] = layers_.code(level_, child.nodes);
      if (last()) {  // its logits may be gone, and nobody needs more than a float any more
        child.score = score_of(key);
      } else if (!parent.settled) {
        child.score = score(b, logits[row * row_size() + code]);
        child.settled = options_.legal && layers_.is_chain(level_ + 1, child.nodes);
      }
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
  Candidates candidates_{layers_};
  std::vector<Softmax> softmax_;            // of each beam
  std::vector<double> scores_;
  std::vector<std::uint32_t> order_;        // of the rows
  std::vector<float> sample_;               // scores of some candidates
  BestKeys best_;
  std::vector<std::uint32_t> hits_;         // of one row
};

}  // namespace sid
