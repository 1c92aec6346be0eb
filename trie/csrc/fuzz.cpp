// Standalone fuzz driver for sanitizer builds: hostile images for the file reader, random arrays for the builder,
// random masks and searches, with and without additions, and every set of kernels that this machine can run. No
// Python, no dependencies; prints the seed of every thousandth round.
//
//   c++ -std=gnu++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all trie/csrc/fuzz.cpp -o fuzz
//   ./fuzz [rounds] [first seed]
#include <cstdio>
#include <cstdlib>
#include <random>

#include "beam.hpp"
#include "build.hpp"

namespace {

using Random = std::mt19937;

std::uint32_t below(Random& random, std::uint32_t n) { return static_cast<std::uint32_t>(random() % n); }

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

std::vector<std::uint32_t> random_sizes(Random& random) {
  constexpr std::array<std::uint32_t, 8> kSizes = {1, 2, 3, 7, 16, 33, 300, 65536};
  std::vector<std::uint32_t> sizes(1 + below(random, sid::kMaxLevels));
  for (auto& size : sizes) size = kSizes[below(random, kSizes.size())];
  return sizes;
}

using TriePtr = std::shared_ptr<const sid::Trie>;
using MaskPtr = std::shared_ptr<const sid::EdgeMask>;

TriePtr random_trie(Random& random, const std::vector<std::uint32_t>& sizes) {
  std::vector<sid::Code> codes(sizes.size() * below(random, 300));
  for (std::size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<sid::Code>(below(random, std::min(sizes[i % sizes.size()], 1 + below(random, 400))));
  return std::make_shared<const sid::Trie>(sid::build(codes, sizes));
}

// Codes and sizes that mostly break the rules: refused or built, never a crash.
void fuzz_build(Random& random) {
  std::vector<std::uint32_t> sizes(below(random, 10));
  for (auto& size : sizes) size = below(random, 4) ? 1 + below(random, 9) : random();
  std::vector<sid::Code> codes(sizes.size() * below(random, 20));
  for (auto& code : codes) code = static_cast<sid::Code>(below(random, 8));
  try {
    const sid::Trie trie = sid::build(codes, sizes);
    sid::Trie::open(trie.image(), nullptr);
  } catch (const std::invalid_argument&) {
  }
}

// A good image with some bytes changed and, half of the time, a right checksum: refused, or safe to walk.
void fuzz_open(Random& random) {
  const auto good = random_trie(random, random_sizes(random));
  const auto image = good->image();
  const std::size_t bytes = below(random, 8) ? image.size() : below(random, static_cast<std::uint32_t>(image.size()));
  const auto copy = sid::allocate_image(std::max<std::size_t>(bytes, 1));
  std::copy_n(image.begin(), bytes, copy.get());
  for (std::uint32_t change = below(random, 4); change > 0 && bytes > 0; --change) {
    const std::uint32_t limit = below(random, 2) ? 192 : static_cast<std::uint32_t>(bytes);
    copy[below(random, std::min(limit, static_cast<std::uint32_t>(bytes)))] = static_cast<std::byte>(random());
  }
  if (bytes >= sizeof(sid::Header) && below(random, 2)) {
    const std::uint64_t sum = sid::checksum(copy.get() + sid::kChecksummedFrom, bytes - sid::kChecksummedFrom);
    std::memcpy(copy.get() + offsetof(sid::Header, checksum), &sum, sizeof sum);
  }
  try {
    const sid::Trie trie = sid::Trie::open({copy.get(), bytes}, copy);
    std::vector<sid::Code> sids(std::size_t{trie.num_sids()} * trie.levels());
    trie.write_sids(sids.data());
    for (std::uint32_t i = 0; i < trie.num_sids(); ++i) trie.node({sids.data() + i * trie.levels(), trie.levels()});
  } catch (const std::invalid_argument&) {
  }
}

// A random mask, a few leaves taken away in two ways, or none.
MaskPtr random_mask(Random& random, const TriePtr& trie) {
  if (below(random, 2)) return nullptr;
  const std::uint32_t last = trie->levels() - 1;
  std::vector<std::uint8_t> legal(trie->num_sids());
  for (auto& each : legal) each = below(random, 3) == 0 ? static_cast<std::uint8_t>(1 + below(random, 255)) : 0;
  const sid::EdgeMask mask(trie, legal);
  std::vector<std::int64_t> gone;
  for (std::uint32_t i = below(random, 5); i > 0 && trie->num_sids() > 0; --i) gone.push_back(below(random, trie->num_sids()));
  for (const std::int64_t leaf : gone) legal[static_cast<std::size_t>(leaf)] = 0;
  const auto less = std::make_shared<const sid::EdgeMask>(mask.without(gone));
  const sid::EdgeMask again(trie, legal);
  for (std::uint32_t t = 0; t <= last; ++t)
    for (sid::Edge e = 0; e < trie->level(t).edges; ++e) {
      require(less->test(t, e) == again.test(t, e), "masks lose leaves");
      if (t == last) continue;
      bool any = false;
      const sid::EdgeRange below_e = trie->level(t + 1).children(e);
      for (sid::Edge child = below_e.begin; child < below_e.end; ++child) any |= less->test(t + 1, child);
      require(less->test(t, e) == any, "an edge is legal while one below it is");
    }
  const std::int64_t outside = below(random, 2) ? -1 : trie->num_sids();
  try {
    mask.without({&outside, 1});
    require(false, "leaves out of range are refused");
  } catch (const std::invalid_argument&) {
  }
  return less;
}

void fuzz_search(Random& random) {
  const auto sizes = random_sizes(random);
  const TriePtr base = random_trie(random, sizes), added = below(random, 2) ? random_trie(random, sizes) : nullptr;
  const MaskPtr base_mask = random_mask(random, base), added_mask = added ? random_mask(random, added) : nullptr;
  const std::uint32_t width = 1 + below(random, 40);
  // The two tries may share SIDs here, which `trie.Overlay` refuses: the search must stay sound all the same.
  sid::BeamSearch beam(sid::Layers({base, base_mask}, {added, added_mask}),
                       {width, 1 + below(random, width), below(random, 2) == 0, below(random, 2) * below(random, 9)});
  std::vector<float> logits;
  while (!beam.done()) {
    logits.resize(beam.rows() * beam.row_size());
    for (float& each : logits) each = static_cast<float>(below(random, 2000)) / 100.0f - 10.0f;
    if (!logits.empty() && below(random, 40) == 0)
      logits[below(random, static_cast<std::uint32_t>(logits.size()))] = NAN;
    try {
      beam.advance(logits.data());
    } catch (const std::invalid_argument&) {
      return;
    }
  }
  const std::size_t n = beam.num_beams();
  std::vector<sid::Code> codes(n * sizes.size());
  std::vector<float> scores(n);
  std::vector<std::int64_t> leaves(n);
  beam.write_results(codes.data(), scores.data(), leaves.data());
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t leaf = leaves[i] - base->num_sids();
    const sid::Trie& owner = leaf < 0 ? *base : *added;
    const MaskPtr& mask = leaf < 0 ? base_mask : added_mask;
    const auto edge = static_cast<sid::Edge>(leaf < 0 ? leaves[i] : leaf);
    require(owner.node({codes.data() + i * sizes.size(), sizes.size()}) == edge, "results are SIDs");
    require(!mask || mask->test(owner.levels() - 1, edge), "results are legal");
    require(i == 0 || scores[i] <= scores[i - 1], "scores descend");
  }
}

// The run-time choice of kernels must not be visible in the results: all that this machine can run agree.
void fuzz_kernels(Random& random, const sid::Kernels& kernels) {
  std::vector<float> x(1 + below(random, 700));
  const float lowest = below(random, 2) ? -80.0f : -40.0f;
  for (float& each : x) each = static_cast<float>(below(random, 80000)) / 1000.0f + lowest;
  const float max = kernels.max_finite(x.data(), x.size());
  require(max == *std::max_element(x.begin(), x.end()), "maxima are found");
  double exact = 0;
  for (const float each : x) exact += std::exp(static_cast<double>(each) - static_cast<double>(max));
  std::array<const float*, sid::kRowsAtOnce> rows;
  std::array<sid::ExpSum, sid::kRowsAtOnce> sums;
  rows.fill(x.data());
  const std::size_t many = 1 + below(random, sid::kRowsAtOnce);
  kernels.exp_sums(rows.data(), many, x.size(), sums.data());
  for (const sid::ExpSum& exp : std::span{sums}.first(many)) {
    const double scaled = std::exp(exp.log_sum + exp.shift - static_cast<double>(max));
    require(std::abs(scaled - exact) <= 2e-6 * exact, "sums are accurate");
  }
  const auto log_sum_of = [&] {
    kernels.exp_sums(rows.data(), 1, x.size(), sums.data());
    return sums[0].log_sum;
  };
  require(kernels.count(x.data(), x.size(), -30.0f) == sid::portable::count(x.data(), x.size(), -30.0f), "counts agree");
  std::vector<std::uint32_t> hits(x.size() + 15), expected(x.size());
  hits.resize(kernels.at_least(x.data(), x.size(), -30.0f, hits.data()));
  expected.resize(sid::portable::at_least(x.data(), x.size(), -30.0f, expected.data()));
  require(hits == expected, "hits agree");
  sid::Bits bits(1 + below(random, 5)), ends(bits.size()), one(bits.size() + 1), other(bits.size() + 1);
  for (auto& word : bits) word = below(random, 3) ? random() & random() & random() : 0;
  for (auto& word : ends) word = below(random, 3) ? (std::uint64_t{random()} << 32) | random() : below(random, 2) - 1ull;
  kernels.lift(bits.data(), ends.data(), bits.size(), one.data());
  std::size_t segment = 0;
  for (std::size_t i = 0, any = 0; i < 64 * bits.size(); ++i) {
    any |= (bits[i / 64] >> (i % 64)) & 1;
    if (((ends[i / 64] >> (i % 64)) & 1) == 0) continue;
    other[segment / 64] |= std::uint64_t{any} << (segment % 64);
    any = 0;
    ++segment;
  }
  require(one == other, "segments are lifted");
  float& one_of_them = x[below(random, static_cast<std::uint32_t>(x.size()))];
  one_of_them = std::array<float, 4>{-3e38f, -1e30f, -1e24f, -1e20f}[below(random, 4)];
  require(std::isfinite(log_sum_of()), "the range of floats is the range of logits");
  one_of_them = std::array<float, 3>{INFINITY, -INFINITY, NAN}[below(random, 3)];
  require(std::isnan(log_sum_of()), "sums see what is not finite");
  require(std::isnan(kernels.max_finite(x.data(), x.size())), "infinities are seen");
}

}  // namespace

int main(int count, char** arguments) {
  const long rounds = count > 1 ? std::atol(arguments[1]) : 2000;
  const long first = count > 2 ? std::atol(arguments[2]) : 0;
  for (long seed = first; seed < first + rounds; ++seed) {
    Random random(static_cast<std::uint32_t>(seed));
    fuzz_build(random);
    fuzz_open(random);
    fuzz_search(random);
    for (const sid::Kernels* kernels : sid::all_kernels()) fuzz_kernels(random, *kernels);
    if (seed % 1000 == 999) std::printf("seed %ld\n", seed);
  }
  std::puts("no fault found");
}
