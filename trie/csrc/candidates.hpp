// The children of all beams of one level: their places among all candidates, in code order, and the logits of those
// that are legal.
#pragma once

#include "layers.hpp"

namespace sid {

class Candidates {
 public:
  // Logits of one beam's legal children, in code order; valid until the next are collected.
  struct Collected {
    std::span<const float> logits;
    std::uint32_t first;          // place of the beam's first child
    const std::uint32_t* places;  // of the legal children among the beam's; null: 0, 1, 2, …

    std::uint32_t place(std::uint32_t i) const { return first + (places ? places[i] : i); }
  };

  // Keeps a reference to the layers.
  explicit Candidates(const Layers& layers) : layers_(layers) {}

  // Children of every beam (whatever has `nodes` of depth t) in one tight loop, so that the cache misses overlap.
  template <class Beam>
  void fetch(std::uint32_t t, const std::vector<Beam>& beams) {
    level_ = t;
    children_.resize(beams.size());
    first_place_.resize(beams.size() + 1);
    alone_.clear();
    shared_.clear();
    added_.clear();
    for (std::uint32_t b = 0; b < beams.size(); ++b) {
      const EdgeRange range = layers_.base_children(t, beams[b].nodes);
      children_[b] = {range.begin, range.size(), {}, {}};
      if (beams[b].nodes.added == kNone) continue;
      added_.push_back({b, alone_.size(), shared_.size()});
      layers_.add_children(t, beams[b].nodes, alone_, shared_);
    }
    added_.push_back({0, alone_.size(), shared_.size()});
    for (std::size_t i = 0; i + 1 < added_.size(); ++i) {
      children_[added_[i].beam].alone = {alone_.data() + added_[i].alone, alone_.data() + added_[i + 1].alone};
      children_[added_[i].beam].shared = {shared_.data() + added_[i].shared, shared_.data() + added_[i + 1].shared};
    }
    number();
  }

  // Candidates of all beams, legal or not.
  std::uint32_t size() const { return first_place_.back(); }
  // Children of the beam that has most of them, and one more.
  std::size_t most() const { return logits_.size(); }
  // Place beyond the beam's children.
  std::uint32_t end(std::uint32_t b) const { return first_place_[b + 1]; }
  // The beam's child at a place.
  Nodes at(std::uint32_t b, std::uint32_t place) const { return children_[b].at(place - first_place_[b]); }

  // Place of the only legal child of a beam with these nodes.
  std::uint32_t only_place(std::uint32_t b, Nodes nodes) const {
    const Nodes child = *layers_.only_child(level_, nodes);
    const Children& children = children_[b];
    return first_place_[b] +
           (child.base == kNone ? children.alone[0].position : children.place(child.base - children.begin));
  }

  // Makes ready to collect them soon.
  void prefetch(std::uint32_t b) const {
    const Code* const codes = layers_.level(level_).codes + children_[b].begin;
    for (std::uint32_t i = 0; i < children_[b].size; i += 64 / sizeof(Code)) __builtin_prefetch(codes + i);
  }

  // Legal children of a beam, given the logits of the whole codebook.
  [[gnu::always_inline]] Collected collect(std::uint32_t b, const float* row) {
    const Children& children = children_[b];
    const Code* const codes = layers_.level(level_).codes + children.begin;
    if (layers_.base().mask || !children.alone.empty())
      return {{logits_.data(), collect_legal(children, codes, row)}, first_place_[b], places_.data()};
    gather(row, codes, children.size, logits_.data());
    return {{logits_.data(), children.size}, first_place_[b], nullptr};
  }

 private:
  void number() {
    first_place_[0] = 0;
    std::uint32_t most = 0;
    for (std::size_t b = 0; b < children_.size(); ++b) {
      most = std::max(most, children_[b].places());
      first_place_[b + 1] = first_place_[b] + children_[b].places();
    }
    logits_.resize(std::max<std::size_t>(logits_.size(), most + 1));
    places_.resize(logits_.size());
  }

  static void gather(const float* row, const Code* codes, std::uint32_t n, float* out) {
#pragma GCC unroll 8
    for (std::uint32_t i = 0; i < n; ++i) out[i] = row[codes[i]];
  }

  std::uint32_t collect_legal(const Children& children, const Code* codes, const float* row) {
    std::uint32_t count = 0, k = 0;
    const auto add_alone_before = [&](std::uint32_t place) {
      for (; k < children.alone.size() && children.alone[k].position == place; ++k, ++place) {
        places_[count] = place;
        logits_[count++] = row[children.alone[k].code];
      }
    };
    for (std::uint32_t i = 0; i < children.size; ++i) {
      add_alone_before(i + k);
      places_[count] = i + k;
      logits_[count] = row[codes[i]];
      count += layers_.base().legal(level_, children.begin + i);
    }
    add_alone_before(children.size + k);
    return count;
  }

  struct Contribution {
    std::uint32_t beam;
    std::size_t alone, shared;  // where its children begin
  };

  const Layers& layers_;
  std::uint32_t level_ = 0;
  std::vector<Children> children_;          // of each beam
  std::vector<std::uint32_t> first_place_;  // of each beam's children among all candidates
  std::vector<Alone> alone_;
  std::vector<Shared> shared_;
  std::vector<Contribution> added_;
  std::vector<float> logits_;               // of one beam
  std::vector<std::uint32_t> places_;       // of one beam
};

}  // namespace sid
