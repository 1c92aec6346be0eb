// Which edges of a trie are legal under a filter: one bit per edge and level. An edge is legal while any SID below
// it is.
#pragma once

#include "trie.hpp"

namespace sid {

class EdgeMask {
 public:
  // Every SID is legal.
  explicit EdgeMask(std::shared_ptr<const Trie> trie) : trie_(std::move(trie)) {
    for (std::uint32_t t = 0; t < trie_->levels(); ++t) {
      const Edge edges = trie_->level(t).edges;
      bits_[t].assign(edges / 64 + 1, ~std::uint64_t{0});
      bits_[t].back() = (std::uint64_t{1} << (edges % 64)) - 1;
    }
    num_legal_ = trie_->num_sids();
  }

  // legal has one byte per SID in sorted order; any value but zero means legal.
  EdgeMask(std::shared_ptr<const Trie> trie, std::span<const std::uint8_t> legal) : trie_(std::move(trie)) {
    if (legal.size() != trie_->num_sids())
      throw std::invalid_argument("mask has " + std::to_string(legal.size()) + " entries, the trie has " +
                                  std::to_string(trie_->num_sids()) + " SIDs");
    leaves().assign(legal.size() / 64 + 1, 0);
    for (std::size_t leaf = 0; leaf < legal.size(); ++leaf)
      leaves()[leaf / 64] |= std::uint64_t{legal[leaf] != 0} << (leaf % 64);
    lift();
  }

  // This mask less some leaves, given by index. Throws std::invalid_argument for an index out of range.
  EdgeMask without(std::span<const std::int64_t> leaves) const {
    EdgeMask less(trie_, bits_[trie_->levels() - 1]);
    for (const std::int64_t leaf : leaves) {
      if (leaf < 0 || leaf >= trie_->num_sids())
        throw std::invalid_argument("leaf index is " + std::to_string(leaf) + ", expected 0.." +
                                    std::to_string(std::int64_t{trie_->num_sids()} - 1));
      less.leaves()[static_cast<std::size_t>(leaf) / 64] &= ~(std::uint64_t{1} << (leaf % 64));
    }
    less.lift();
    return less;
  }

  bool test(std::uint32_t t, Edge e) const { return (bits_[t][e / 64] >> (e % 64)) & 1; }
  std::uint32_t num_legal() const { return num_legal_; }
  // One flag per SID in sorted order.
  void write_legal(bool* out) const {
    for (Edge leaf = 0; leaf < trie_->num_sids(); ++leaf) out[leaf] = test(trie_->levels() - 1, leaf);
  }
  const Trie& trie() const { return *trie_; }
  std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& words : bits_) total += words.size() * sizeof(std::uint64_t);
    return total;
  }

 private:
  using Bits = std::vector<std::uint64_t>;

  // Unfinished: the levels above the leaves are missing.
  EdgeMask(std::shared_ptr<const Trie> trie, Bits leaf_bits) : trie_(std::move(trie)) { leaves() = std::move(leaf_bits); }

  Bits& leaves() { return bits_[trie_->levels() - 1]; }

  // Bits of all levels from those of the leaves.
  void lift() {
    for (std::uint32_t t = trie_->levels() - 1; t > 0; --t) {
      bits_[t - 1].assign(trie_->level(t - 1).edges / 64 + 1, 0);
      lift(t);
    }
    for (const std::uint64_t word : leaves()) num_legal_ += static_cast<std::uint32_t>(std::popcount(word));
  }

  // A node of level t - 1 is legal when one of its edges on level t is.
  void lift(std::uint32_t t) {
    const Level& level = trie_->level(t);
    for (std::uint32_t node = 0; node < level.nodes; ++node) {
      const EdgeRange range = level.children(node);
      std::uint64_t any = 0;
      for (Edge e = range.begin; e < range.end && any == 0; ++e) any = test(t, e);
      bits_[t - 1][node / 64] |= any << (node % 64);
    }
  }

  std::shared_ptr<const Trie> trie_;
  std::array<Bits, kMaxLevels> bits_;
  std::uint32_t num_legal_ = 0;
};

}  // namespace sid
