// Which edges of a trie are legal under a filter: one bit per edge and level. An edge is legal while any SID below
// it is.
#pragma once

#include <bit>
#include <cstring>

#include "kernels.hpp"
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
    pack(legal, bits_[last()]);
    for (std::uint32_t t = last(); t > 0; --t) lift(t);
    for (const std::uint64_t word : bits_[last()]) num_legal_ += static_cast<std::uint32_t>(std::popcount(word));
  }

  // This mask less some leaves, given by index; beyond the copy it costs a walk up from each of them. Throws
  // std::invalid_argument for an index out of range.
  EdgeMask without(std::span<const std::int64_t> leaves) const {
    EdgeMask less(*this);
    for (const std::int64_t leaf : leaves) {
      if (leaf < 0 || leaf >= trie_->num_sids())
        throw std::invalid_argument("leaf index is " + std::to_string(leaf) + ", expected 0.." +
                                    std::to_string(std::int64_t{trie_->num_sids()} - 1));
      less.clear(static_cast<Edge>(leaf));
    }
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
  std::uint32_t last() const { return trie_->levels() - 1; }

  // One bit for each byte that is not zero, eight bytes at a time.
  static void pack(std::span<const std::uint8_t> bytes, Bits& bits) {
    bits.assign(bytes.size() / 64 + 1, 0);
    for (std::size_t begin = 0; begin < bytes.size(); begin += 8) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, bytes.data() + begin, std::min<std::size_t>(8, bytes.size() - begin));
      constexpr std::uint64_t low = 0x7F7F7F7F7F7F7F7Fu, gather = 0x0102040810204080u;
      const std::uint64_t ones = ((((eight & low) + low) | eight) & ~low) >> 7;
      bits[begin / 64] |= (ones * gather >> 56) << (begin % 64);
    }
  }

  // A node of level t - 1 is legal when one of its edges on level t is.
  void lift(std::uint32_t t) {
    bits_[t - 1].assign(trie_->level(t - 1).edges / 64 + 1, 0);
    best_kernels().lift(bits_[t].data(), trie_->ends(t).data(), bits_[t].size(), bits_[t - 1].data());
  }

  // Whether any edge of a range is legal. Ranges are short: no branch that depends on the mask.
  bool any(std::uint32_t t, EdgeRange range) const {
    const std::uint64_t* const words = bits_[t].data();
    std::uint64_t found = 0;
    for (Edge begin = range.begin; begin < range.end; begin += 64) {
      const std::uint32_t count = std::min<std::uint32_t>(64, range.end - begin), skip = begin % 64;
      std::uint64_t bits = words[begin / 64] >> skip;
      if (skip + count > 64) bits |= words[begin / 64 + 1] << (64 - skip);
      found |= bits & (~std::uint64_t{0} >> (64 - count));
    }
    return found != 0;
  }

  // A leaf is no longer legal, nor is any node above it that has no other legal edge.
  void clear(Edge edge) {
    if (!test(last(), edge)) return;
    --num_legal_;
    for (std::uint32_t t = last();; --t) {
      bits_[t][edge / 64] &= ~(std::uint64_t{1} << (edge % 64));
      if (t == 0) return;
      edge = trie_->level(t).parent(edge);
      if (any(t, trie_->level(t).children(edge))) return;
    }
  }

  std::shared_ptr<const Trie> trie_;
  std::array<Bits, kMaxLevels> bits_;
  std::uint32_t num_legal_ = 0;
};

}  // namespace sid
