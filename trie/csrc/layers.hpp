// What a search walks: a base trie and, optionally, a small trie of added SIDs which the base does not hold, as if
// they were one, each under its own mask.
#pragma once

#include <optional>

#include "mask.hpp"

namespace sid {

constexpr std::uint32_t kNone = 0xFFFFFFFFu;

// A prefix as a node of each trie, kNone where no legal SID of that trie starts so. A masked base node is only
// entered by a legal edge, an added one likewise.
struct Nodes {
  std::uint32_t base = 0, added = kNone;
};

// A child that only the added trie has. Its position is its place among all children of its parent, in code order.
struct Alone {
  std::uint32_t position;
  Edge edge;
  Code code;
};
// A child of the base that the added trie has as well.
struct Shared {
  std::uint32_t child;  // which of the base's children
  Edge edge;            // in the added trie
};

// Children of one prefix: a range of base edges, known without looking at them, and what the added trie contributes.
struct Children {
  Edge begin = 0;
  std::uint32_t size = 0;  // base edges, legal or not
  std::span<const Alone> alone;
  std::span<const Shared> shared;

  std::uint32_t places() const { return size + static_cast<std::uint32_t>(alone.size()); }

  // Place of base child `i`: the children that stand alone and come before it push it back.
  std::uint32_t place(std::uint32_t i) const {
    if (alone.empty()) return i;
    const Alone* const first = alone.data();
    const auto before = std::partition_point(alone.begin(), alone.end(), [&](const Alone& each) {
      return each.position - static_cast<std::uint32_t>(&each - first) <= i;
    });
    return i + static_cast<std::uint32_t>(before - alone.begin());
  }

  // The child at a place.
  Nodes at(std::uint32_t place) const {
    if (alone.empty() && shared.empty()) return {begin + place, kNone};
    const auto here = std::partition_point(alone.begin(), alone.end(),
                                           [&](const Alone& each) { return each.position < place; });
    if (here != alone.end() && here->position == place) return {kNone, here->edge};
    const std::uint32_t i = place - static_cast<std::uint32_t>(here - alone.begin());
    const auto both = std::partition_point(shared.begin(), shared.end(),
                                           [&](const Shared& each) { return each.child < i; });
    return {begin + i, both != shared.end() && both->child == i ? both->edge : kNone};
  }
};

class Layers {
 public:
  struct Layer {
    std::shared_ptr<const Trie> trie;
    std::shared_ptr<const EdgeMask> mask;  // null: everything is legal

    bool legal(std::uint32_t t, Edge e) const { return !mask || mask->test(t, e); }
    std::uint32_t num_legal() const { return mask ? mask->num_legal() : trie->num_sids(); }
    EdgeRange children(std::uint32_t t, std::uint32_t node) const {
      return node == kNone ? EdgeRange{0, 0} : trie->level(t).children(node);
    }
  };

  // added.trie may be null. Throws std::invalid_argument when the parts do not fit together.
  Layers(Layer base, Layer added) : base_(std::move(base)), added_(std::move(added)) {
    for (const Layer& layer : {base_, added_})
      if (layer.mask && &layer.mask->trie() != layer.trie.get())
        throw std::invalid_argument("the mask belongs to another trie");
    if (!added_.trie) return;
    bool same = added_.trie->levels() == base_.trie->levels();
    for (std::uint32_t t = 0; same && t < levels(); ++t) same = added_.trie->level(t).size == level(t).size;
    if (!same) throw std::invalid_argument("the added trie has other codebook sizes than the base");
    if (std::uint64_t{base_.trie->num_sids()} + added_.trie->num_sids() >= kNone)
      throw std::invalid_argument("base and added trie together have more than 2^32 - 2 SIDs");
  }

  std::uint32_t levels() const { return base_.trie->levels(); }
  const Level& level(std::uint32_t t) const { return base_.trie->level(t); }
  const Layer& base() const { return base_; }

  // The node of all prefixes without codes, or nothing when no SID is legal.
  std::optional<Nodes> root() const {
    const bool some = base_.num_legal() > 0, more = added_.trie && added_.num_legal() > 0;
    if (!some && !more) return std::nullopt;
    return Nodes{some ? 0 : kNone, more ? 0 : kNone};
  }

  // The last code of a prefix of t + 1 codes.
  Code code(std::uint32_t t, Nodes nodes) const {
    return nodes.base != kNone ? level(t).codes[nodes.base] : added_.trie->level(t).codes[nodes.added];
  }

  std::int64_t leaf(Nodes nodes) const {
    return nodes.base != kNone ? std::int64_t{nodes.base} : std::int64_t{base_.trie->num_sids()} + nodes.added;
  }

  EdgeRange base_children(std::uint32_t t, Nodes nodes) const { return base_.children(t, nodes.base); }

  // What the added trie contributes to the children of a prefix of depth t, appended to `alone` and `shared`.
  void add_children(std::uint32_t t, Nodes nodes, std::vector<Alone>& alone, std::vector<Shared>& shared) const {
    const EdgeRange base = base_children(t, nodes), added = added_.children(t, nodes.added);
    const Code* const codes = level(t).codes;
    const std::size_t before = alone.size();
    Edge at = base.begin;
    for (Edge e = added.begin; e < added.end; ++e) {
      if (!added_.legal(t, e)) continue;
      const Code code = added_.trie->level(t).codes[e];
      at = static_cast<Edge>(std::lower_bound(codes + at, codes + base.end, code) - codes);
      const std::uint32_t child = at - base.begin;
      if (at != base.end && codes[at] == code && base_.legal(t, at))
        shared.push_back({child, e});
      else
        alone.push_back({child + static_cast<std::uint32_t>(alone.size() - before), e, code});
    }
  }

  // The only legal child of a prefix of depth t, or nothing when there are several.
  std::optional<Nodes> only_child(std::uint32_t t, Nodes nodes) const {
    const auto base = only_edge(base_, t, nodes.base), added = only_edge(added_, t, nodes.added);
    if (!base || !added) return std::nullopt;
    const bool both = *base != kNone && *added != kNone;
    if (both && level(t).codes[*base] != added_.trie->level(t).codes[*added]) return std::nullopt;
    return Nodes{*base, *added};
  }

  // True when exactly one legal SID lies below a prefix of depth t.
  bool is_chain(std::uint32_t t, Nodes nodes) const {
    for (; t < levels(); ++t) {
      const auto child = only_child(t, nodes);
      if (!child) return false;
      nodes = *child;
    }
    return true;
  }

 private:
  // The only legal edge of a node, kNone when there is none, nothing when there are several.
  static std::optional<Edge> only_edge(const Layer& layer, std::uint32_t t, std::uint32_t node) {
    const EdgeRange range = layer.children(t, node);
    Edge only = kNone;
    for (Edge e = range.begin; e < range.end; ++e) {
      if (!layer.legal(t, e)) continue;
      if (only != kNone) return std::nullopt;
      only = e;
    }
    return only;
  }

  Layer base_, added_;
};

}  // namespace sid
