// Which edges of a trie are legal under a filter: one bit per edge and level. An edge is legal while any SID below
// it is.
#pragma once

#include "trie.hpp"

namespace sid {

class EdgeMask {
 public:
  // legal has one byte per SID in sorted order; any value but zero means legal.
  EdgeMask(std::shared_ptr<const Trie> trie, std::span<const std::uint8_t> legal) : trie_(std::move(trie)) {
    const std::uint32_t last = trie_->levels() - 1;
    if (legal.size() != trie_->num_sids())
      throw std::invalid_argument("mask has " + std::to_string(legal.size()) + " entries, the trie has " +
                                  std::to_string(trie_->num_sids()) + " SIDs");
    for (std::uint32_t t = 0; t <= last; ++t) bits_[t].assign(trie_->level(t).edges / 64 + 1, 0);
    for (std::size_t leaf = 0; leaf < legal.size(); ++leaf)
      bits_[last][leaf / 64] |= std::uint64_t{legal[leaf] != 0} << (leaf % 64);
    for (std::uint32_t t = last; t > 0; --t) lift(t);
    for (const std::uint64_t word : bits_[last]) num_legal_ += static_cast<std::uint32_t>(std::popcount(word));
  }

  bool test(std::uint32_t t, Edge e) const { return (bits_[t][e / 64] >> (e % 64)) & 1; }
  std::uint32_t num_legal() const { return num_legal_; }
  const Trie& trie() const { return *trie_; }
  std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& words : bits_) total += words.size() * sizeof(std::uint64_t);
    return total;
  }

 private:
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
  std::array<std::vector<std::uint64_t>, kMaxLevels> bits_;
  std::uint32_t num_legal_ = 0;
};

}  // namespace sid
