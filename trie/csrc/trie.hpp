// A degree-exact CSR prefix trie of semantic IDs. The id of a child node is the index of the edge that leads to it,
// so there are no next-state arrays: level t holds its edges in code order, and node n of depth t owns the edges
// first(n) … first(n + 1) - 1 of level t. A leaf index is therefore the rank of its SID among all, sorted.
#pragma once

#include <algorithm>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "image.hpp"

namespace sid {

using Code = std::uint16_t;
using Edge = std::uint32_t;
using Bits = std::vector<std::uint64_t>;

struct EdgeRange {
  Edge begin, end;
  std::uint32_t size() const { return end - begin; }
};

struct Level {
  const std::uint32_t* base;
  const std::uint16_t* offset;
  const Code* codes;
  std::uint32_t size, nodes, edges, shift;

  Edge first(std::uint32_t node) const { return base[node >> shift] + offset[node]; }
  EdgeRange children(std::uint32_t node) const { return {first(node), first(node + 1)}; }

  // The node that an edge leads away from.
  std::uint32_t parent(Edge edge) const {
    std::uint32_t node = 0;
    for (std::uint32_t beyond = nodes; beyond - node > 1;) {
      const std::uint32_t middle = node + (beyond - node) / 2;
      (first(middle) <= edge ? node : beyond) = middle;
    }
    return node;
  }

  // Edge of `code` within a node's edges, or range.end when there is none.
  Edge find(EdgeRange range, Code code) const {
    const Code* end = codes + range.end;
    const Code* at = std::lower_bound(codes + range.begin, end, code);
    return at != end && *at == code ? static_cast<Edge>(at - codes) : range.end;
  }
};

class Trie {
 public:
  // A view of an image that is known to be good; `owner` keeps its bytes alive.
  Trie(const std::byte* image, std::shared_ptr<const void> owner) : image_(image), owner_(std::move(owner)) {
    std::memcpy(&header_, image_, sizeof(Header));
    const Layout layout = layout_of(header_);
    std::uint32_t nodes = 1;
    for (std::uint32_t t = 0; t < header_.levels; ++t) {
      const LevelRecord& record = header_.level[t];
      level_[t] = {reinterpret_cast<const std::uint32_t*>(image_ + layout.level[t].base),
                   reinterpret_cast<const std::uint16_t*>(image_ + layout.level[t].offset),
                   reinterpret_cast<const Code*>(image_ + layout.level[t].codes),
                   record.size, nodes, record.edges, record.shift};
      nodes = record.edges;
    }
  }

  // A view of bytes from outside: header, checksum and every bound are verified. Throws std::invalid_argument.
  static Trie open(std::span<const std::byte> bytes, std::shared_ptr<const void> owner) {
    check_header(bytes);
    if (checksum(bytes.data() + kChecksummedFrom, bytes.size() - kChecksummedFrom) !=
        reinterpret_cast<const Header*>(bytes.data())->checksum)
      throw std::invalid_argument("checksum mismatch: the file is damaged");
    Trie trie(bytes.data(), std::move(owner));
    for (std::uint32_t t = 0; t < trie.levels(); ++t) trie.check_level(t);
    return trie;
  }

  std::uint32_t levels() const { return header_.levels; }
  const Level& level(std::uint32_t t) const { return level_[t]; }
  std::uint32_t num_sids() const { return level_[header_.levels - 1].edges; }
  std::span<const std::byte> image() const { return {image_, header_.bytes}; }

  // Bit of every edge of level t that is the last of its node. Computed when first asked for: only masks need it.
  const Bits& ends(std::uint32_t t) const {
    std::call_once(ends_->once, [this] {
      for (std::uint32_t each = 0; each < levels(); ++each) {
        const Level& level = level_[each];
        Bits& bits = ends_->of_level[each];
        bits.assign(level.edges / 64 + 1, 0);
        for (std::uint32_t node = 0; level.edges > 0 && node < level.nodes; ++node) {
          const Edge end = level.first(node + 1) - 1;
          bits[end / 64] |= std::uint64_t{1} << (end % 64);
        }
      }
    });
    return ends_->of_level[t];
  }

  // Node that a prefix of t codes leads to, or -1 when no SID starts so.
  std::int64_t node(std::span<const Code> prefix) const {
    std::uint32_t at = 0;
    for (std::size_t t = 0; t < prefix.size(); ++t) {
      const EdgeRange range = level_[t].children(at);
      at = level_[t].find(range, prefix[t]);
      if (at == range.end) return -1;
    }
    return at;
  }

  // All SIDs in order: out is [num_sids, levels].
  void write_sids(Code* out) const {
    const std::uint32_t depth = levels();
    std::vector<std::uint32_t> at(depth, 0);  // edge of each level on the path to the current leaf
    for (std::uint32_t leaf = 0; leaf < num_sids(); ++leaf, out += depth) {
      at[depth - 1] = leaf;
      for (std::uint32_t t = depth - 1; t > 0 && at[t] == level_[t].first(at[t - 1] + 1); --t) ++at[t - 1];
      for (std::uint32_t t = 0; t < depth; ++t) out[t] = level_[t].codes[at[t]];
    }
  }

 private:
  static void check_header(std::span<const std::byte> bytes) {
    Header header;
    if (bytes.size() < sizeof(Header)) throw std::invalid_argument("the file is shorter than its header");
    std::memcpy(&header, bytes.data(), sizeof(Header));
    if (header.magic != kMagic) throw std::invalid_argument("not a trie file (magic differs)");
    if (header.byte_order != kByteOrder) throw std::invalid_argument("the file has another byte order");
    if (header.version != kVersion)
      throw std::invalid_argument("file version is " + std::to_string(header.version) + ", expected " +
                                  std::to_string(kVersion));
    if (header.levels < 1 || header.levels > kMaxLevels)
      throw std::invalid_argument("level count is " + std::to_string(header.levels) + ", expected 1..8");
    for (std::uint32_t t = 0; t < header.levels; ++t)
      if (header.level[t].size < 1 || header.level[t].size > kMaxCodes || header.level[t].shift > kMaxShift)
        throw std::invalid_argument("the record of level " + std::to_string(t) + " is damaged");
    if (header.bytes != bytes.size() || layout_of(header).bytes != bytes.size())
      throw std::invalid_argument("the file has " + std::to_string(bytes.size()) + " bytes, its header says otherwise");
  }

  // Every bound that a walk relies on: every node has a child, the nodes' edges are contiguous and end at the last
  // edge, codes are inside the codebook. The loops over 16-bit values compile to vector code.
  void check_level(std::uint32_t t) const {
    const Level& level = level_[t];
    bool good = level.first(level.nodes) == level.edges && level.first(0) == 0;
    if (level.edges == 0) {
      good &= num_sids() == 0 && level.nodes <= 1;  // only an empty trie has a node without children: its root
    } else {
      const std::size_t block = std::size_t{1} << level.shift;
      for (std::size_t begin = 0; begin <= level.nodes; begin += block) {
        const std::size_t end = std::min<std::size_t>(begin + block, level.nodes + std::size_t{1});
        good &= level.offset[begin] == 0;
        if (begin > 0) good &= level.base[begin >> level.shift] > level.first(static_cast<std::uint32_t>(begin - 1));
        std::uint16_t falls = 0;
        for (std::size_t n = begin + 1; n < end; ++n)
          falls = static_cast<std::uint16_t>(falls | (level.offset[n] <= level.offset[n - 1]));
        good &= falls == 0;
      }
    }
    Code highest = 0;
    for (Edge e = 0; e < level.edges; ++e) highest = std::max(highest, level.codes[e]);
    if (!good || highest >= level.size)
      throw std::invalid_argument("level " + std::to_string(t) + " is inconsistent");
  }

  struct Ends {
    std::once_flag once;
    std::array<Bits, kMaxLevels> of_level;
  };

  const std::byte* image_;
  std::shared_ptr<const void> owner_;
  Header header_;
  std::array<Level, kMaxLevels> level_{};
  std::shared_ptr<Ends> ends_ = std::make_shared<Ends>();
};

}  // namespace sid
