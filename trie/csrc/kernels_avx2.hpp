// The loops of kernels.hpp for x86-64 with AVX2; see there for what they compute.
#pragma once

// GCC 12 calls the undefined lanes inside its own intrinsics uninitialised (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "kernels.hpp"

namespace sid {

namespace avx2 {

#define SID_AVX2 __attribute__((target("avx2,fma")))

SID_AVX2 inline float max_finite(const float* x, std::size_t n) {
  const __m256 zero = _mm256_setzero_ps();
  const __m256 lowest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  __m256 max[4] = {lowest, lowest, lowest, lowest};
  __m256 taint[4] = {zero, zero, zero, zero};
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (std::size_t j = 0; j < 4; ++j) {
      const __m256 v = _mm256_loadu_ps(x + i + 8 * j);
      max[j] = _mm256_max_ps(max[j], v);
      taint[j] = _mm256_fmadd_ps(v, zero, taint[j]);
    }
  for (std::size_t j = 1; j < 4; ++j) {
    max[0] = _mm256_max_ps(max[0], max[j]);
    taint[0] = _mm256_add_ps(taint[0], taint[j]);
  }
  alignas(32) std::array<float, 8> lane_max, lane_taint;
  _mm256_store_ps(lane_max.data(), max[0]);
  _mm256_store_ps(lane_taint.data(), taint[0]);
  float result = lane_max[0], tainted = lane_taint[0];
  for (std::size_t lane = 1; lane < 8; ++lane) {
    result = std::max(result, lane_max[lane]);
    tainted += lane_taint[lane];
  }
  for (; i < n; ++i) {
    result = std::max(result, x[i]);
    tainted += x[i] * 0.0f;
  }
  return result + tainted;
}

// exp(x[i] - max) of 8 * W floats, added to double accumulators. W vectors go in lockstep, because one polynomial
// alone waits for its own results.
template <int W>
SID_AVX2 inline void add_terms(const float* x, __m256 max, __m256d& low, __m256d& high) {
  using namespace expf_constants;
  const __m256 round = _mm256_set1_ps(kRound), one = _mm256_set1_ps(1.0f);
  __m256 r[W], shifted[W], p[W];
  for (int j = 0; j < W; ++j) {
    r[j] = _mm256_max_ps(_mm256_sub_ps(_mm256_loadu_ps(x + 8 * j), max), _mm256_set1_ps(kFloor));
    shifted[j] = _mm256_fmadd_ps(r[j], _mm256_set1_ps(kLog2e), round);
  }
  for (int j = 0; j < W; ++j) {
    const __m256 k = _mm256_sub_ps(shifted[j], round);
    r[j] = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2High), r[j]);
    r[j] = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2Low), r[j]);
    p[j] = _mm256_set1_ps(kPoly[0]);
  }
  for (std::size_t c = 1; c < kPoly.size(); ++c)
    for (int j = 0; j < W; ++j) p[j] = _mm256_fmadd_ps(p[j], r[j], _mm256_set1_ps(kPoly[c]));
  for (int j = 0; j < W; ++j) p[j] = _mm256_fmadd_ps(_mm256_fmadd_ps(p[j], r[j], one), r[j], one);
  for (int j = 0; j < W; ++j) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted[j]), 23);
    const __m256 e = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[j]), exponent));
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(e)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(e, 1)));
  }
}

SID_AVX2 inline double sum_exp(const float* x, std::size_t n, float max) {
  const __m256 shift = _mm256_set1_ps(max);
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) add_terms<4>(x + i, shift, low, high);
  for (; i + 8 <= n; i += 8) add_terms<1>(x + i, shift, low, high);
  if (i < n) {  // padding adds e^-86 per lane: nothing beside the maximum's 1
    alignas(32) std::array<float, 8> rest;
    rest.fill(-std::numeric_limits<float>::infinity());
    std::copy(x + i, x + n, rest.begin());
    add_terms<1>(rest.data(), shift, low, high);
  }
  alignas(32) std::array<double, 4> sum;
  _mm256_store_pd(sum.data(), _mm256_add_pd(low, high));
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

constexpr auto exp_sums = exp_sums_with<max_finite, sum_exp>;

SID_AVX2 inline std::size_t at_least(const float* x, std::size_t n, float bar, std::uint32_t* out) {
  const __m256 limit = _mm256_set1_ps(bar);
  std::size_t found = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    auto hits = static_cast<std::uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), limit, _CMP_GE_OQ)));
    for (; hits != 0; hits &= hits - 1) out[found++] = static_cast<std::uint32_t>(i + std::countr_zero(hits));
  }
  for (; i < n; ++i)
    if (x[i] >= bar) out[found++] = static_cast<std::uint32_t>(i);
  return found;
}

__attribute__((target("bmi,bmi2,popcnt,lzcnt"))) inline std::uint64_t pack_bits(std::uint64_t x, std::uint64_t at) {
  return _pext_u64(x, at);
}

__attribute__((target("bmi,bmi2,popcnt,lzcnt"))) inline void lift(const std::uint64_t* bits, const std::uint64_t* ends,
                                                                  std::size_t words, std::uint64_t* out) {
  lift_with(pack_bits, bits, ends, words, out);
}

inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

#undef SID_AVX2

constexpr Kernels kernels{max_finite, exp_sums, portable::count, at_least, lift};

}  // namespace avx2

}  // namespace sid
