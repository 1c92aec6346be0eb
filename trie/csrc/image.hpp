// The byte image of a trie: the same bytes in memory, in the file, and under mmap. Little-endian, no pointers.
//
//   header    magic, checksum, byte order, version, level count, byte count, then one record per level
//   sections  per level, each 64-byte aligned and zero padded:
//             base   u32[(nodes >> shift) + 1]   first edge of every 2^shift-th node
//             offset u16[nodes + 1]              first edge of a node, relative to its base
//             codes  u16[edges]                  code of every edge, ascending within a node
//
// Section positions follow from the counts, so a file cannot contradict itself about them.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace sid {

static_assert(std::endian::native == std::endian::little, "the trie image is little-endian");

constexpr std::uint32_t kMaxLevels = 8;
constexpr std::uint32_t kMaxCodes = 1u << 16;
constexpr std::uint32_t kMaxShift = 6;
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kByteOrder = 0x01020304;
constexpr std::array<char, 8> kMagic = {'S', 'I', 'D', 'T', 'R', 'I', 'E', '\n'};

struct LevelRecord {
  std::uint32_t size;   // codes of the level's codebook
  std::uint32_t edges;  // distinct prefixes that end at this level
  std::uint32_t shift;  // log2 of the nodes that share one base
  std::uint32_t reserved;
};

struct Header {
  std::array<char, 8> magic;
  std::uint64_t checksum;  // of every byte after this field
  std::uint32_t byte_order;
  std::uint32_t version;
  std::uint32_t levels;
  std::uint32_t reserved;
  std::uint64_t bytes;
  std::array<LevelRecord, kMaxLevels> level;
};
static_assert(sizeof(Header) == 168);
constexpr std::size_t kChecksummedFrom = offsetof(Header, byte_order);

struct LevelLayout {
  std::uint64_t base, offset, codes;  // byte positions
};

struct Layout {
  std::array<LevelLayout, kMaxLevels> level;
  std::uint64_t bytes;
};

// Positions of all sections. 64-bit sums of 32-bit counts cannot overflow.
inline Layout layout_of(const Header& header) {
  const auto aligned = [](std::uint64_t position) { return (position + 63) & ~std::uint64_t{63}; };
  Layout layout{};
  std::uint64_t at = aligned(sizeof(Header));
  std::uint64_t nodes = 1;
  for (std::uint32_t t = 0; t < header.levels; ++t) {
    const LevelRecord& record = header.level[t];
    layout.level[t].base = at;
    at = aligned(at + 4 * ((nodes >> record.shift) + 1));
    layout.level[t].offset = at;
    at = aligned(at + 2 * (nodes + 1));
    layout.level[t].codes = at;
    at = aligned(at + 2 * std::uint64_t{record.edges});
    nodes = record.edges;
  }
  layout.bytes = at;
  return layout;
}

// 64-bit checksum over blocks of eight multiply-add lanes that compilers turn into vector code. Every step is a
// bijection of the lane that took the input, so a change inside one 8-byte word always changes the result.
// It detects accidents, not forgery; `Trie::verify` therefore checks every bound as well.
inline std::uint64_t checksum(const std::byte* data, std::size_t bytes) {
  constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15ull;
  constexpr std::size_t kLanes = 8;
  constexpr std::size_t kBlock = kLanes * sizeof(std::uint64_t);
  std::array<std::uint64_t, kLanes> sum{}, key{};
  for (std::size_t lane = 0; lane < kLanes; ++lane) key[lane] = (lane + 1) * 0xC2B2AE3D27D4EB4Full;

  const auto absorb = [&](const std::byte* block) {
    std::array<std::uint64_t, kLanes> word;
    std::memcpy(word.data(), block, kBlock);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::uint64_t mixed = word[lane] ^ key[lane];
      sum[lane] += (mixed & 0xFFFFFFFFu) * (mixed >> 32);
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) sum[lane] += word[lane ^ 1];
  };
  const auto scramble = [&] {
    for (std::size_t lane = 0; lane < kLanes; ++lane) sum[lane] = (sum[lane] ^ (sum[lane] >> 47)) * kOdd;
  };

  const std::size_t blocks = bytes / kBlock;
  for (std::size_t block = 0; block < blocks; ++block) {
    absorb(data + block * kBlock);
    if (block % 16 == 15) scramble();
  }
  std::array<std::byte, kBlock> tail{};
  std::memcpy(tail.data(), data + blocks * kBlock, bytes - blocks * kBlock);
  absorb(tail.data());
  scramble();

  std::uint64_t hash = bytes * kOdd;
  for (std::size_t lane = 0; lane < kLanes; ++lane) hash = std::rotl(hash ^ sum[lane], 29) * kOdd;
  return hash ^ (hash >> 32);
}

// Zeroed memory for an image under construction, aligned like its sections.
inline std::shared_ptr<std::byte[]> allocate_image(std::uint64_t bytes) {
  constexpr std::align_val_t kAlign{64};
  auto* memory = static_cast<std::byte*>(::operator new(bytes, kAlign));
  std::memset(memory, 0, bytes);
  return {memory, [](std::byte* p) { ::operator delete(p, kAlign); }};
}

}  // namespace sid
