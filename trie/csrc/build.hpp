// Building a trie: pack every SID into one integer key, radix sort, drop duplicates, then write each level's part of the
// image in a single pass over the keys. Fresh memory costs more than the work done on it, so there is little: the keys,
// a byte for each, and the image.
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

// Bits of a digit: of all keys, as many places written to as the nearest cache and page table hold; within a bucket,
// which is in that cache, fewer passes pay.
constexpr std::uint32_t kDigit = 8, kInnerDigit = 10;
constexpr std::size_t kBuckets = std::size_t{1} << kDigit;

// Keys in buckets, in order of the highest bits of their first codes.
template <class Key>
struct Buckets {
  std::unique_ptr<Key[]> keys;
  std::array<std::size_t, kBuckets + 1> begin{};  // of each bucket
  std::uint32_t bits;                             // lowest bits that are in no order yet
};

template <class Key, std::size_t Depth>
Buckets<Key> pack(std::span<const Code> codes, std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  const std::size_t count = codes.size() / Depth;
  const std::uint32_t below = shape.bits[0] > kDigit ? shape.bits[0] - kDigit : 0;
  Buckets<Key> buckets{std::unique_ptr<Key[]>(new Key[count]), {}, shape.shift[0] + below};
  bool good = true;
  for (const Code* code = codes.data(); code != codes.data() + count * Depth; code += Depth) {
    for (std::size_t t = 0; t < Depth; ++t) good &= code[t] < sizes[t];
    ++buckets.begin[(code[0] >> below) % kBuckets + 1];
  }
  if (!good) throw_bad_code(codes, sizes);
  std::partial_sum(buckets.begin.begin(), buckets.begin.end(), buckets.begin.begin());
  auto next = buckets.begin;
  for (const Code* code = codes.data(); code != codes.data() + count * Depth; code += Depth) {
    Key key = 0;
    for (std::size_t t = 0; t < Depth; ++t) key |= static_cast<Key>(code[t]) << shape.shift[t];
    buckets.keys[next[code[0] >> below]++] = key;
  }
  return buckets;
}

// Least-significant-digit radix sort on the lowest bits; all digits are counted in one pass. `scratch` has as many keys.
template <class Key>
void radix_sort(std::span<Key> keys, Key* scratch, std::uint32_t bits) {
  if (keys.size() < kBuckets) return std::sort(keys.begin(), keys.end());
  constexpr std::size_t kPlaces = std::size_t{1} << kInnerDigit;
  const std::uint32_t passes = (bits + kInnerDigit - 1) / kInnerDigit;
  const auto digit = [](Key key, std::uint32_t pass) {
    return static_cast<std::size_t>(key >> (pass * kInnerDigit)) & (kPlaces - 1);
  };
  std::array<std::uint32_t, (128 / kInnerDigit + 1) * kPlaces> counts;
  std::fill_n(counts.begin(), passes * kPlaces, 0u);
  for (const Key key : keys)
    for (std::uint32_t pass = 0; pass < passes; ++pass) ++counts[pass * kPlaces + digit(key, pass)];
  Key* from = keys.data();
  Key* to = scratch;
  for (std::uint32_t pass = 0; pass < passes; ++pass) {
    std::uint32_t* const position = counts.data() + pass * kPlaces;
    std::exclusive_scan(position, position + kPlaces, position, 0u);
    for (std::size_t i = 0; i < keys.size(); ++i) to[position[digit(from[i], pass)]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys.data()) std::copy_n(from, keys.size(), keys.data());
}

// Sorts the buckets one by one, so that the work stays in the nearest caches and little memory is needed.
template <class Key>
void sort_buckets(Buckets<Key>& buckets) {
  std::size_t largest = 0;
  for (std::size_t b = 0; b < kBuckets; ++b) largest = std::max(largest, buckets.begin[b + 1] - buckets.begin[b]);
  const std::unique_ptr<Key[]> scratch(new Key[largest]);
  for (std::size_t b = 0; b < kBuckets; ++b)
    radix_sort(std::span{buckets.keys.get() + buckets.begin[b], buckets.keys.get() + buckets.begin[b + 1]},
               scratch.get(), buckets.bits);
}

// Drops duplicates from sorted keys; returns how many are left. tops[i] becomes the first level at which key i differs
// from its predecessor: the key opens a new edge on that level and on every one below.
template <class Key>
std::size_t drop_duplicates(Key* keys, std::size_t size, const KeyShape& shape, std::uint8_t* tops) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const Key key = keys[i];
    const Key change = kept == 0 ? 0 : key ^ keys[kept - 1];
    if (kept > 0 && change == 0) continue;
    tops[kept] = kept == 0 ? 0 : shape.level_of_bit[static_cast<std::size_t>(highest_bit(change))];
    keys[kept++] = key;
  }
  return kept;
}

// Codes of all levels, and the first edges of their nodes: the low 16 bits, where offsets will be. Every key writes to the
// next node and edge of every level, whether it opens them or not, so that no branch has to be guessed; there is room for
// one more of each.
template <class Key, std::size_t Depth>
void write_edges(std::span<const Key> keys, std::span<const std::uint8_t> tops, const KeyShape& shape,
                 const Layout& layout, std::byte* image) {
  std::array<Code*, Depth> codes;
  std::array<std::uint16_t*, Depth> first;
  for (std::size_t t = 0; t < Depth; ++t) {
    codes[t] = reinterpret_cast<Code*>(image + layout.level[t].codes);
    first[t] = reinterpret_cast<std::uint16_t*>(image + layout.level[t].offset);
  }
  std::array<Edge, Depth + 1> opened{};  // nodes of each level: the edges of the one before
  for (std::size_t i = 0; i < keys.size(); ++i) {
    for (std::size_t t = 0; t < Depth; ++t) {
      const auto rest = static_cast<std::uint32_t>(keys[i] >> shape.shift[t]);
      codes[t][opened[t + 1]] = static_cast<Code>(rest & ((1u << shape.bits[t]) - 1));
      first[t][opened[t]] = static_cast<std::uint16_t>(opened[t + 1]);
    }
    for (std::size_t t = 0; t < Depth; ++t) opened[t + 1] += tops[i] <= t;
  }
  first[0][0] = 0;  // the root, which no key opens
  opened[0] = 1;
  for (std::size_t t = 0; t < Depth; ++t) {
    codes[t][opened[t + 1]] = 0;
    first[t][opened[t]] = static_cast<std::uint16_t>(opened[t + 1]);
  }
}

// Makes the low bits of `nodes` + 1 first edges positions relative to a base; false where one does not fit.
inline bool write_bases(std::uint32_t nodes, std::uint32_t shift, std::uint32_t* base, std::uint16_t* offset) {
  const std::size_t block = std::size_t{1} << shift;
  Edge last = 0;           // of the nodes so far, in full
  std::uint16_t low = 0;   // and its low bits
  std::uint16_t falls = 0;
  for (std::size_t begin = 0; begin <= nodes; begin += block) {
    const std::size_t end = std::min<std::size_t>(begin + block, nodes + std::size_t{1});
    const std::uint16_t first = offset[begin];
    if (begin > 0) last += ((first - low - 1) & 0xFFFF) + 1;  // 1 to 2^16 edges later
    base[begin >> shift] = last;
    low = offset[end - 1];
    for (std::size_t n = begin; n < end; ++n) offset[n] = static_cast<std::uint16_t>(offset[n] - first);
    for (std::size_t n = begin + 1; n < end; ++n)
      falls = static_cast<std::uint16_t>(falls | (offset[n] <= offset[n - 1]));
    last += offset[end - 1];
  }
  return falls == 0;
}

template <class Key, std::size_t Depth>
Trie assemble(std::span<const Key> keys, std::span<const std::uint8_t> tops, std::span<const std::uint32_t> sizes,
              const KeyShape& shape) {
  Header header{kMagic, 0, kByteOrder, kVersion, Depth, 0, 0, {}};
  for (std::uint32_t t = 0; t < Depth; ++t) {
    std::uint32_t edges = 0;
    for (const std::uint8_t top : tops) edges += top <= t;
    header.level[t] = {sizes[t], edges, kMaxShift, 0};
  }
  for (;;) {
    const Layout layout = layout_of(header);
    const std::shared_ptr<std::byte[]> image = allocate_image(layout.bytes + sizeof(Code));
    std::byte* const bytes = image.get();
    write_edges<Key, Depth>(keys, tops, shape, layout, bytes);
    bool good = true;
    for (std::uint32_t t = 0; t < Depth; ++t) {
      const bool fits = keys.empty() || write_bases(t == 0 ? 1 : header.level[t - 1].edges, header.level[t].shift,
                                                    reinterpret_cast<std::uint32_t*>(bytes + layout.level[t].base),
                                                    reinterpret_cast<std::uint16_t*>(bytes + layout.level[t].offset));
      header.level[t].shift -= !fits;  // nodes with very many children: fewer of them share a base
      good &= fits;
    }
    if (!good) continue;
    header.bytes = layout.bytes;
    std::memcpy(bytes, &header, sizeof(Header));
    header.checksum = checksum(bytes + kChecksummedFrom, layout.bytes - kChecksummedFrom);
    std::memcpy(bytes, &header, sizeof(Header));
    return Trie(bytes, image);
  }
}

template <class Key, std::size_t Depth>
Trie build_with(std::span<const Code> codes, std::span<const std::uint32_t> sizes, const KeyShape& shape) {
  Buckets<Key> buckets = pack<Key, Depth>(codes, sizes, shape);
  sort_buckets(buckets);
  const std::size_t size = codes.size() / Depth;
  const std::unique_ptr<std::uint8_t[]> tops(new std::uint8_t[size]);
  const std::size_t kept = drop_duplicates(buckets.keys.get(), size, shape, tops.get());
  return assemble<Key, Depth>(std::span<const Key>(buckets.keys.get(), kept), {tops.get(), kept}, sizes, shape);
}

template <class Key, std::size_t... Depth>
Trie build_depth(std::span<const Code> codes, std::span<const std::uint32_t> sizes, const KeyShape& shape,
                 std::index_sequence<Depth...>) {
  using Build = Trie (*)(std::span<const Code>, std::span<const std::uint32_t>, const KeyShape&);
  constexpr std::array<Build, sizeof...(Depth)> builds = {build_with<Key, Depth + 1>...};
  return builds[sizes.size() - 1](codes, sizes, shape);
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
  constexpr std::make_index_sequence<kMaxLevels> depths;
  return shape.total < 64 ? build_depth<std::uint64_t>(codes, sizes, shape, depths)
                          : build_depth<Wide>(codes, sizes, shape, depths);
}

}  // namespace sid
