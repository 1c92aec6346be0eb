// Building a trie: pack every SID into one integer key, radix sort, drop duplicates, then write each level's edges
// in a single pass over the keys.
#pragma once

#include <numeric>

#include "trie.hpp"

namespace sid {

using Wide = unsigned __int128;

// Where each level's code sits in a key, highest level first, so that keys order like SIDs.
struct KeyShape {
  std::array<std::uint32_t, kMaxLevels> shift{}, bits{};
  std::array<std::uint8_t, 128> level_of_bit{};
  std::uint32_t total = 0;

  explicit KeyShape(std::span<const std::uint32_t> sizes) {
    for (std::size_t t = sizes.size(); t-- > 0;) {
      shift[t] = total;
      bits[t] = static_cast<std::uint32_t>(std::bit_width(sizes[t] - 1));
      for (std::uint32_t b = 0; b < bits[t]; ++b) level_of_bit[total + b] = static_cast<std::uint8_t>(t);
      total += bits[t];
    }
  }
};

inline int highest_bit(std::uint64_t x) { return 63 - std::countl_zero(x); }
inline int highest_bit(Wide x) {
  const auto high = static_cast<std::uint64_t>(x >> 64);
  return high != 0 ? 64 + highest_bit(high) : highest_bit(static_cast<std::uint64_t>(x));
}

[[noreturn]] inline void throw_bad_code(std::span<const Code> codes, std::span<const std::uint32_t> sizes) {
  const std::size_t depth = sizes.size();
  std::size_t i = 0;
  while (codes[i] < sizes[i % depth]) ++i;
  throw std::invalid_argument("codes[" + std::to_string(i / depth) + ", " + std::to_string(i % depth) + "] is " +
                              std::to_string(codes[i]) + ", expected 0.." + std::to_string(sizes[i % depth] - 1));
}

template <class Key, std::size_t Depth>
std::vector<Key> pack(std::span<const Code> codes, std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  std::vector<Key> keys(codes.size() / Depth);
  const Code* code = codes.data();
  bool good = true;
  for (Key& key : keys) {
    for (std::size_t t = 0; t < Depth; ++t, ++code) {
      good &= *code < sizes[t];
      key |= static_cast<Key>(*code) << shape.shift[t];
    }
  }
  if (!good) throw_bad_code(codes, sizes);
  return keys;
}

// Least-significant-digit radix sort on the used bits; all digits are counted in one pass.
template <class Key>
void radix_sort(std::vector<Key>& keys, std::uint32_t bits) {
  constexpr std::uint32_t kDigit = 12;
  constexpr std::size_t kBuckets = std::size_t{1} << kDigit;
  if (keys.size() < kBuckets) return std::sort(keys.begin(), keys.end());
  const std::uint32_t passes = (bits + kDigit - 1) / kDigit;
  const auto digit = [](Key key, std::uint32_t pass) {
    return static_cast<std::size_t>(key >> (pass * kDigit)) & (kBuckets - 1);
  };
  std::vector<std::uint32_t> counts(passes * kBuckets);
  for (const Key key : keys)
    for (std::uint32_t pass = 0; pass < passes; ++pass) ++counts[pass * kBuckets + digit(key, pass)];
  const std::unique_ptr<Key[]> scratch(new Key[keys.size()]);
  Key* from = keys.data();
  Key* to = scratch.get();
  for (std::uint32_t pass = 0; pass < passes; ++pass) {
    std::uint32_t* position = counts.data() + pass * kBuckets;
    std::exclusive_scan(position, position + kBuckets, position, 0u);
    for (std::size_t i = 0; i < keys.size(); ++i) to[position[digit(from[i], pass)]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys.data()) std::copy_n(from, keys.size(), keys.data());
}

// Drops duplicates from sorted keys. tops[i] becomes the first level at which key i differs from its predecessor:
// the key opens a new edge on that level and on every one below.
template <class Key>
std::vector<std::uint8_t> drop_duplicates(std::vector<Key>& keys, const KeyShape& shape) {
  std::vector<std::uint8_t> tops(keys.size());
  std::size_t kept = 0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const Key key = keys[i];
    const Key change = kept == 0 ? 0 : key ^ keys[kept - 1];
    if (kept > 0 && change == 0) continue;
    tops[kept] = kept == 0 ? 0 : shape.level_of_bit[static_cast<std::size_t>(highest_bit(change))];
    keys[kept++] = key;
  }
  keys.resize(kept);
  tops.resize(kept);
  return tops;
}

// The widest block of nodes whose relative positions all fit in 16 bits; one node alone always fits.
inline std::uint32_t choose_shift(std::span<const Edge> first) {
  for (std::uint32_t shift = kMaxShift; shift > 0; --shift) {
    const std::size_t block = std::size_t{1} << shift;
    bool fits = true;
    for (std::size_t n = 0; n < first.size(); n += block)
      fits &= first[std::min(n + block, first.size()) - 1] - first[n] <= 0xFFFF;
    if (fits) return shift;
  }
  return 0;
}

// Edges of one level, in order, and the first edge of each of its nodes. One slot more than needed in each array
// lets both loops run without branches.
struct LevelArrays {
  std::unique_ptr<Code[]> codes;
  std::unique_ptr<Edge[]> first;
};

template <class Key>
LevelArrays level_arrays(const std::vector<Key>& keys, const std::vector<std::uint8_t>& tops, const KeyShape& shape,
                         std::uint32_t t, std::size_t nodes, std::size_t edges) {
  LevelArrays level{std::unique_ptr<Code[]>(new Code[edges + 1]), std::unique_ptr<Edge[]>(new Edge[nodes + 1])};
  const Key mask = (Key{1} << shape.bits[t]) - 1;
  std::size_t edge = 0, node = 0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    level.codes[edge] = static_cast<Code>((keys[i] >> shape.shift[t]) & mask);
    level.first[node] = static_cast<Edge>(edge);
    edge += tops[i] <= t;
    node += tops[i] < t;
  }
  level.first[0] = 0;  // the root is no key's node, so the loop kept overwriting it
  level.first[nodes] = static_cast<Edge>(edges);
  return level;
}

// Relative positions of 2^shift nodes at a time; see image.hpp.
inline void compress(std::span<const Edge> first, std::uint32_t shift, std::byte* base_out, std::byte* offset_out) {
  auto* base = reinterpret_cast<std::uint32_t*>(base_out);
  auto* offset = reinterpret_cast<std::uint16_t*>(offset_out);
  const std::size_t block = std::size_t{1} << shift;
  for (std::size_t begin = 0; begin < first.size(); begin += block) {
    base[begin >> shift] = first[begin];
    for (std::size_t n = begin; n < std::min(begin + block, first.size()); ++n)
      offset[n] = static_cast<std::uint16_t>(first[n] - first[begin]);
  }
}

template <class Key>
Trie assemble(const std::vector<Key>& keys, const std::vector<std::uint8_t>& tops,
              std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  Header header{kMagic, 0, kByteOrder, kVersion, static_cast<std::uint32_t>(sizes.size()), 0, 0, {}};
  std::array<std::uint32_t, kMaxLevels> edges{};
  for (const std::uint8_t top : tops) ++edges[top];
  std::array<LevelArrays, kMaxLevels> levels;
  std::array<std::span<const Edge>, kMaxLevels> first;
  for (std::uint32_t t = 0, nodes = 1; t < header.levels; nodes = edges[t++]) {
    if (t > 0) edges[t] += edges[t - 1];
    levels[t] = level_arrays(keys, tops, shape, t, nodes, edges[t]);
    first[t] = {levels[t].first.get(), std::size_t{nodes} + 1};
    header.level[t] = {sizes[t], edges[t], choose_shift(first[t]), 0};
  }
  const Layout layout = layout_of(header);
  header.bytes = layout.bytes;
  const std::shared_ptr<std::byte[]> image = allocate_image(layout.bytes);
  std::byte* bytes = image.get();
  for (std::uint32_t t = 0; t < header.levels; ++t) {
    compress(first[t], header.level[t].shift, bytes + layout.level[t].base, bytes + layout.level[t].offset);
    std::memcpy(bytes + layout.level[t].codes, levels[t].codes.get(), edges[t] * sizeof(Code));
  }
  std::memcpy(bytes, &header, sizeof(Header));
  header.checksum = checksum(bytes + kChecksummedFrom, layout.bytes - kChecksummedFrom);
  std::memcpy(bytes, &header, sizeof(Header));
  return Trie(bytes, image);
}

template <class Key>
Trie build_with(std::span<const Code> codes, std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  using Pack = std::vector<Key> (*)(std::span<const Code>, std::span<const std::uint32_t>, const KeyShape&);
  constexpr std::array<Pack, kMaxLevels> packs = {pack<Key, 1>, pack<Key, 2>, pack<Key, 3>, pack<Key, 4>,
                                                  pack<Key, 5>, pack<Key, 6>, pack<Key, 7>, pack<Key, 8>};
  std::vector<Key> keys = packs[sizes.size() - 1](codes, sizes, shape);
  radix_sort(keys, shape.total);
  const std::vector<std::uint8_t> tops = drop_duplicates(keys, shape);
  return assemble(keys, tops, sizes, shape);
}

// codes is [N, sizes.size()], row after row. Throws std::invalid_argument for a bad size or code.
inline Trie build(std::span<const Code> codes, std::span<const std::uint32_t> sizes) {
  if (sizes.empty() || sizes.size() > kMaxLevels)
    throw std::invalid_argument("sizes has " + std::to_string(sizes.size()) + " levels, expected 1..8");
  for (std::size_t t = 0; t < sizes.size(); ++t)
    if (sizes[t] < 1 || sizes[t] > kMaxCodes)
      throw std::invalid_argument("sizes[" + std::to_string(t) + "] is " + std::to_string(sizes[t]) +
                                  ", expected 1..65536");
  if (codes.size() / sizes.size() >= 0xFFFFFFFFu) throw std::invalid_argument("more than 2^32 - 2 SIDs");
  const KeyShape shape(sizes);
  return shape.total < 64 ? build_with<std::uint64_t>(codes, sizes, shape) : build_with<Wide>(codes, sizes, shape);
}

}  // namespace sid
