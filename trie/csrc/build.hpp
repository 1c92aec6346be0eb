// Building a trie: pack every SID into one integer key, radix sort, drop duplicates, then write each level's edges
// in a single pass over the keys.
#pragma once

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

template <class Key>
std::vector<Key> pack(std::span<const Code> codes, std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  const std::size_t depth = sizes.size();
  std::vector<Key> keys(codes.size() / depth);
  for (std::size_t row = 0; row < keys.size(); ++row) {
    Key key = 0;
    for (std::size_t t = 0; t < depth; ++t) {
      const Code code = codes[row * depth + t];
      if (code >= sizes[t])
        throw std::invalid_argument("codes[" + std::to_string(row) + ", " + std::to_string(t) + "] is " +
                                    std::to_string(code) + ", expected 0.." + std::to_string(sizes[t] - 1));
      key |= static_cast<Key>(code) << shape.shift[t];
    }
    keys[row] = key;
  }
  return keys;
}

// Least-significant-digit radix sort on the used bits, then removal of duplicates.
template <class Key>
void sort_unique(std::vector<Key>& keys, std::uint32_t bits) {
  constexpr std::uint32_t kDigit = 11;
  constexpr std::size_t kBuckets = std::size_t{1} << kDigit;
  std::vector<Key> other(keys.size());
  std::vector<std::size_t> start(kBuckets);
  for (std::uint32_t low = 0; low < bits; low += kDigit) {
    const auto digit = [low](Key key) { return static_cast<std::size_t>(key >> low) & (kBuckets - 1); };
    std::fill(start.begin(), start.end(), 0);
    for (const Key key : keys) ++start[digit(key)];
    std::size_t total = 0;
    for (std::size_t& count : start) total += std::exchange(count, total);
    for (const Key key : keys) other[start[digit(key)]++] = key;
    keys.swap(other);
  }
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
}

// First level at which a key differs from its predecessor; the very first key differs from the root on.
template <class Key>
std::uint32_t first_new_level(const std::vector<Key>& keys, std::size_t i, const KeyShape& shape) {
  return i == 0 ? 0 : shape.level_of_bit[static_cast<std::size_t>(highest_bit(static_cast<Key>(keys[i] ^ keys[i - 1])))];
}

// The widest block of nodes whose relative positions all fit in 16 bits; one node alone always fits.
inline std::uint32_t choose_shift(const std::vector<Edge>& first) {
  for (std::uint32_t shift = kMaxShift; shift > 0; --shift) {
    const std::size_t block = std::size_t{1} << shift;
    bool fits = true;
    for (std::size_t n = 0; n < first.size(); n += block)
      fits &= first[std::min(n + block, first.size()) - 1] - first[n] <= 0xFFFF;
    if (fits) return shift;
  }
  return 0;
}

template <class Key>
Trie assemble(const std::vector<Key>& keys, std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  const auto depth = static_cast<std::uint32_t>(sizes.size());
  // 1. Count the edges of every level.
  std::array<std::uint32_t, kMaxLevels> edges{};
  for (std::size_t i = 0; i < keys.size(); ++i) ++edges[first_new_level(keys, i, shape)];
  for (std::uint32_t t = 1; t < depth; ++t) edges[t] += edges[t - 1];

  // 2. Write codes and first edges; a key opens one edge on every level from its first difference down.
  std::array<std::vector<Code>, kMaxLevels> codes;
  std::array<std::vector<Edge>, kMaxLevels> first;
  for (std::uint32_t t = 0; t < depth; ++t) {
    codes[t].resize(edges[t]);
    first[t].resize(std::size_t{t == 0 ? 1 : edges[t - 1]} + 1);
  }
  std::array<std::uint32_t, kMaxLevels> used{};
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const std::uint32_t top = first_new_level(keys, i, shape);
    for (std::uint32_t t = top; t < depth; ++t) {
      if (t > top) first[t][used[t - 1] - 1] = used[t];
      codes[t][used[t]++] = static_cast<Code>((keys[i] >> shape.shift[t]) & ((Key{1} << shape.bits[t]) - 1));
    }
  }

  // 3. Lay out the image and compress the first edges.
  Header header{kMagic, 0, kByteOrder, kVersion, depth, 0, 0, {}};
  for (std::uint32_t t = 0; t < depth; ++t) {
    first[t].back() = edges[t];
    header.level[t] = {sizes[t], edges[t], choose_shift(first[t]), 0};
  }
  const Layout layout = layout_of(header);
  header.bytes = layout.bytes;
  const std::shared_ptr<std::byte[]> image = allocate_image(layout.bytes);
  for (std::uint32_t t = 0; t < depth; ++t) {
    auto* base = reinterpret_cast<std::uint32_t*>(image.get() + layout.level[t].base);
    auto* offset = reinterpret_cast<std::uint16_t*>(image.get() + layout.level[t].offset);
    const std::uint32_t shift = header.level[t].shift;
    for (std::size_t n = 0; n < first[t].size(); ++n) {
      if (n % (std::size_t{1} << shift) == 0) base[n >> shift] = first[t][n];
      offset[n] = static_cast<std::uint16_t>(first[t][n] - base[n >> shift]);
    }
    std::memcpy(image.get() + layout.level[t].codes, codes[t].data(), codes[t].size() * sizeof(Code));
  }

  // 4. Seal it.
  std::memcpy(image.get(), &header, sizeof(Header));
  header.checksum = checksum(image.get() + kChecksummedFrom, layout.bytes - kChecksummedFrom);
  std::memcpy(image.get(), &header, sizeof(Header));
  return Trie(image.get(), image);
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
  const auto built = [&]<class Key>(Key) {
    auto keys = pack<Key>(codes, sizes, shape);
    sort_unique(keys, shape.total);
    return assemble(keys, sizes, shape);
  };
  return shape.total <= 63 ? built(std::uint64_t{}) : built(Wide{});
}

}  // namespace sid
