// The loops over logits and bits that dominate a search, as portable code here and as AVX2 and AVX-512 code in files of
// their own. The choice is made at run time, so that one binary runs on every x86-64 (and, portably, elsewhere).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace sid {

// log_sum: log Σ exp(value - shift) of some values.
struct ExpSum {
  double shift, log_sum;
};

constexpr std::size_t kRowsAtOnce = 8;

struct Kernels {
  // Largest of x[0 … n), or NaN when any of them is not finite. n > 0.
  float (*max_finite)(const float* x, std::size_t n);
  // Of up to kRowsAtOnce rows of n > 0 values, with a shift that keeps the sum within the range of a double,
  // to 2e-6; log_sum is NaN when any value is not finite. A row's result depends on nothing but the row.
  void (*exp_sums)(const float* const* rows, std::size_t count, std::size_t n, ExpSum* out);
  // How many x[i] >= bar.
  std::size_t (*count)(const float* x, std::size_t n, float bar);
  // Positions with x[i] >= bar, ascending, written to out (room for n + 15); returns how many.
  std::size_t (*at_least)(const float* x, std::size_t n, float bar, std::uint32_t* out);
  // Bit k of out: whether any bit of the k-th segment of `bits` is set. Segments end where `ends` has a bit. Both have
  // `words` words; out is zeroed and has room.
  void (*lift)(const std::uint64_t* bits, const std::uint64_t* ends, std::size_t words, std::uint64_t* out);
};

// The loop of `lift` over a word at a time. pack(x, at): the bits of x at the set positions of `at`, side by side.
//
// `(x & ~e) + ~e` carries into the end of exactly those segments that have a bit below their end.
template <class Pack>
[[gnu::always_inline]] inline void lift_with(Pack pack, const std::uint64_t* bits, const std::uint64_t* ends,
                                             std::size_t words, std::uint64_t* out) {
  std::uint64_t open = 0, row = 0;  // whether the segment that runs into this word has a bit; packed, not yet stored
  int filled = 0;
  for (std::size_t w = 0; w < words; ++w) {
    const std::uint64_t x = bits[w] | open, e = ends[w];
    const std::uint64_t packed = pack((((x & ~e) + ~e) | x) & e, e);
    open = (e == 0 ? x : (x >> (63 - std::countl_zero(e))) >> 1) != 0;
    row |= packed << filled;
    const int total = filled + std::popcount(e);
    if (total >= 64) {
      *out++ = row;
      row = filled == 0 ? 0 : packed >> (64 - filled);
    }
    filled = total % 64;
  }
  if (filled > 0) *out = row;
}

// `exp_sums` of one row in two passes.
template <class Max, class Sum>
inline ExpSum exp_sum_with(Max max_finite, Sum sum_exp, const float* x, std::size_t n) {
  const float max = max_finite(x, n);
  return {double{max}, std::isnan(max) ? double{max} : std::log(sum_exp(x, n, max))};
}

// `exp_sums` row by row.
template <auto max_finite, auto sum_exp>
inline void exp_sums_with(const float* const* rows, std::size_t count, std::size_t n, ExpSum* out) {
  for (std::size_t r = 0; r < count; ++r) out[r] = exp_sum_with(max_finite, sum_exp, rows[r], n);
}

// exp(x) for x <= 0: x = k ln2 + r with |r| <= ln2 / 2, then a degree-6 polynomial (Cephes coefficients).
namespace expf_constants {
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kFloor = -86.0f;           // below this the term is lost beside the 1 that the maximum contributes
constexpr float kRound = 12582912.0f;      // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
constexpr std::array<float, 6> kPoly = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                        4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
}  // namespace expf_constants

namespace portable {

inline float max_finite(const float* x, std::size_t n) {
  float max = -std::numeric_limits<float>::infinity();
  float taint = 0.0f;  // stays 0 unless something is infinite or NaN
  for (std::size_t i = 0; i < n; ++i) {
    max = x[i] > max ? x[i] : max;
    taint += x[i] * 0.0f;
  }
  return max + taint;
}

inline float exp_term(float x) {
  using namespace expf_constants;
  x = std::max(x, kFloor);
  const float shifted = x * kLog2e + kRound;
  const float k = shifted - kRound;
  const float r = (x - k * kLn2High) - k * kLn2Low;
  float p = kPoly[0];
  for (std::size_t j = 1; j < kPoly.size(); ++j) p = p * r + kPoly[j];
  p = p * (r * r) + r + 1.0f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) + (std::bit_cast<std::uint32_t>(shifted) << 23));
}

// Σ exp(x[i] - max), each term a float within 2 ulp.
inline double sum_exp(const float* x, std::size_t n, float max) {
  std::array<double, 8> sum{};
  std::size_t i = 0;
  for (; i + sum.size() <= n; i += sum.size())
    for (std::size_t lane = 0; lane < sum.size(); ++lane) sum[lane] += double{exp_term(x[i + lane] - max)};
  for (; i < n; ++i) sum[0] += static_cast<double>(exp_term(x[i] - max));
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

inline std::size_t count(const float* x, std::size_t n, float bar) {
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; ++i) found += x[i] >= bar;
  return found;
}

inline std::size_t at_least(const float* x, std::size_t n, float bar, std::uint32_t* out) {
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; ++i) {
    out[found] = static_cast<std::uint32_t>(i);
    found += x[i] >= bar;
  }
  return found;
}

inline void lift(const std::uint64_t* bits, const std::uint64_t* ends, std::size_t words, std::uint64_t* out) {
  const auto pack = [](std::uint64_t x, std::uint64_t at) {
    std::uint64_t packed = 0;
    for (int i = 0; at != 0; at &= at - 1, ++i) packed |= ((x >> std::countr_zero(at)) & 1) << i;
    return packed;
  };
  lift_with(pack, bits, ends, words, out);
}

constexpr auto exp_sums = exp_sums_with<max_finite, sum_exp>;

constexpr Kernels kernels{max_finite, exp_sums, count, at_least, lift};

}  // namespace portable

}  // namespace sid

#if defined(__x86_64__)
#include "kernels_avx2.hpp"
#include "kernels_avx512.hpp"
#endif

namespace sid {

// All kernels that this machine can run, the fastest first.
inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (avx512::supported()) found.push_back(&avx512::kernels);
  if (avx2::supported()) found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

inline const Kernels& best_kernels() {
  static const Kernels& best = *all_kernels().front();
  return best;
}

}  // namespace sid
