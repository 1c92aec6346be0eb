// The loops of kernels.hpp for x86-64 with AVX-512; see there for what they compute. Short rows take the AVX2 ones.
#pragma once

#include "kernels_avx2.hpp"

namespace sid {

namespace avx512 {

using namespace expf_constants;

#define SID_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,popcnt")))

// The lanes of a vector that x[i …] still fills.
inline __mmask16 lanes(std::size_t left) { return static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1u << left) - 1); }

SID_AVX512 inline float max_finite(const float* x, std::size_t n) {
  const __m512 zero = _mm512_setzero_ps(), lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 max[4] = {lowest, lowest, lowest, lowest};
  __m512 taint[4] = {zero, zero, zero, zero};
  std::size_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (std::size_t j = 0; j < 4; ++j) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      max[j] = _mm512_max_ps(max[j], v);
      taint[j] = _mm512_fmadd_ps(v, zero, taint[j]);
    }
  for (; i < n; i += 16) {
    const __mmask16 here = lanes(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(here, x + i);
    max[0] = _mm512_mask_max_ps(max[0], here, max[0], v);
    taint[0] = _mm512_fmadd_ps(v, zero, taint[0]);
  }
  for (std::size_t j = 1; j < 4; ++j) {
    max[0] = _mm512_max_ps(max[0], max[j]);
    taint[0] = _mm512_add_ps(taint[0], taint[j]);
  }
  if (_mm512_cmp_ps_mask(taint[0], taint[0], _CMP_UNORD_Q) != 0) return std::numeric_limits<float>::quiet_NaN();
  return _mm512_reduce_max_ps(max[0]);
}

// exp(x) in base 2: x log2(e) = i / 16 + f with |f| <= 1/32, and 2^f = kUnit ((f + kOffset)^2 + kRest) to 6.8e-7: every
// quadratic has this form, one multiplication cheaper, and kOffset is the multiple of 1/16 that suits this one best.
// 2^(i / 16) kUnit is a table's value times a power of two. log2(e) as a float adds |x| 1.3e-8.
constexpr float kGrid = kRound / 16;  // adding it leaves round(16 x) in the low mantissa bits
constexpr float kOffset = 23.0f / 16, kRest = 2.081034f;
constexpr double kUnit = 0.24111252;

// Of i modulo 16, less the power floor(i / 16 - kOffset).
alignas(64) inline const std::array<float, 16> kPowers = [] {
  std::array<float, 16> powers{};
  for (std::size_t i = 0; i < powers.size(); ++i) {
    const double exponent = static_cast<double>(i) / 16;
    powers[i] = static_cast<float>(kUnit * std::exp2(exponent - std::floor(exponent - double{kOffset})));
  }
  return powers;
}();

constexpr std::size_t kPage = 4096;  // processors do not fetch ahead across pages by themselves

// Adds exp(x) of four vectors: 0 and infinity where a float cannot hold it, NaN where x is not finite (and where it is
// below -1e19, or so).
SID_AVX512 inline void add_terms(const __m512 (&x)[4], __m512 (&sum)[4]) {
  const __m512 scale = _mm512_set1_ps(kLog2e), grid = _mm512_set1_ps(kGrid), rest = _mm512_set1_ps(kRest);
  const __m512 back = _mm512_set1_ps(kGrid + kOffset);
  const __m512 powers = _mm512_load_ps(kPowers.data());
  for (std::size_t j = 0; j < 4; ++j) {
    const __m512 on_grid = _mm512_fmadd_ps(x[j], scale, grid);
    const __m512 exponent = _mm512_sub_ps(on_grid, back);  // i / 16 - kOffset
    const __m512 f = _mm512_fmsub_ps(x[j], scale, exponent);
    const __m512 power = _mm512_permutexvar_ps(_mm512_castps_si512(on_grid), powers);
    sum[j] = _mm512_fmadd_ps(_mm512_fmadd_ps(f, f, rest), _mm512_scalef_ps(power, exponent), sum[j]);
  }
}

SID_AVX512 inline __m512d widened(__m512 v) {  // pairs of lanes, added in double
  return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}

enum class About { kZero, kMax };

// The lanes of Σ exp(x[i]), or Σ exp(x[i] - max). Up to 34 terms are added as floats before they join the sum in double:
// ten roundings.
template <About about>
SID_AVX512 [[gnu::always_inline]] inline __m512d sum_lanes(const float* x, std::size_t n, float max = 0.0f) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 v[4], e[4] = {zero, zero, zero, zero};
  __m512d sum = _mm512_setzero_pd();
  const auto move = [&]() SID_AVX512 {
    for (auto& each : v) each = _mm512_max_ps(_mm512_sub_ps(each, _mm512_set1_ps(max)), _mm512_set1_ps(kFloor));
  };
  const auto join = [&]() SID_AVX512 {
    sum = _mm512_add_pd(sum, widened(_mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3]))));
  };
  std::size_t i = 0;
  for (std::size_t stop = 512; i + 64 <= n; stop += 512) {
    for (; i + 64 <= std::min(n, stop); i += 64) {
      for (std::size_t j = 0; j < 4; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(x + i + 16 * j) + kPage, _MM_HINT_T0);
        v[j] = _mm512_loadu_ps(x + i + 16 * j);
      }
      if constexpr (about == About::kMax) move();
      add_terms(v, e);
    }
    join();
    for (auto& each : e) each = zero;
  }
  if (i < n) {
    __mmask16 here[4];
    for (std::size_t j = 0; j < 4; ++j) {
      here[j] = i + 16 * j < n ? lanes(n - i - 16 * j) : 0;
      v[j] = _mm512_maskz_loadu_ps(here[j], x + i + 16 * j);
    }
    if constexpr (about == About::kMax) move();
    add_terms(v, e);
    for (std::size_t j = 0; j < 4; ++j) e[j] = _mm512_maskz_mov_ps(here[j], e[j]);
    join();
  }
  return sum;
}

// log(x) for x > 0, to 1e-10: the mantissa m in [0.75, 1.5) by 2 atanh((m - 1) / (m + 1)).
SID_AVX512 inline __m512d log_of(__m512d x) {
  const __m512d one = _mm512_set1_pd(1.0), m = _mm512_getmant_pd(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512d t = _mm512_div_pd(_mm512_sub_pd(m, one), _mm512_add_pd(m, one)), t2 = _mm512_mul_pd(t, t);
  __m512d p = _mm512_set1_pd(2.0 / 13);
  for (const int odd : {11, 9, 7, 5, 3, 1}) p = _mm512_fmadd_pd(p, t2, _mm512_set1_pd(2.0 / odd));
  const __m512d exponent = _mm512_getexp_pd(_mm512_div_pd(x, m));
  return _mm512_fmadd_pd(exponent, _mm512_set1_pd(0.69314718055994531), _mm512_mul_pd(p, t));
}

SID_AVX512 inline double sum_exp(const float* x, std::size_t n, float max) {
  return _mm512_reduce_add_pd(sum_lanes<About::kMax>(x, n, max));
}

// Without a shift where the sum allows it, which is the rule; else about the maximum. Lanes of all rows are added up at
// the end, so that no row waits for that of the one before.
SID_AVX512 inline void exp_sums(const float* const* rows, std::size_t count, std::size_t n, ExpSum* out) {
  constexpr double kLeast = 1e-20, kMost = 1e20;  // beyond them log2(e) is not exact enough
  constexpr std::size_t kShort = 16;  // not worth it; and a single value must have a sum of exactly 1
  if (n < kShort) return avx2::exp_sums(rows, count, n, out);
  __m512d sum[kRowsAtOnce];
  alignas(64) std::array<double, kRowsAtOnce> sums{}, logs;
  for (std::size_t r = 0; r < count; ++r) sum[r] = sum_lanes<About::kZero>(rows[r], n);
  for (std::size_t r = 0; r < count; ++r) sums[r] = _mm512_reduce_add_pd(sum[r]);
  _mm512_store_pd(logs.data(), log_of(_mm512_load_pd(sums.data())));
  for (std::size_t r = 0; r < count; ++r)
    out[r] = sums[r] >= kLeast && sums[r] <= kMost ? ExpSum{0.0, logs[r]}
                                                   : exp_sum_with(max_finite, sum_exp, rows[r], n);
}

SID_AVX512 inline std::size_t count(const float* x, std::size_t n, float bar) {
  const __m512 limit = _mm512_set1_ps(bar);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i found[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (std::size_t j = 0; j < 2; ++j) {
      const __mmask16 hits = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i + 16 * j), limit, _CMP_GE_OQ);
      found[j] = _mm512_mask_add_epi32(found[j], hits, found[j], one);
    }
  return static_cast<std::size_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(found[0], found[1]))) +
         portable::count(x + i, n - i, bar);
}

SID_AVX512 inline std::size_t at_least(const float* x, std::size_t n, float bar, std::uint32_t* out) {
  const __m512 limit = _mm512_set1_ps(bar);
  const __m512i sixteen = _mm512_set1_epi32(16);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 here = lanes(n - i);
    const __mmask16 hits = _mm512_mask_cmp_ps_mask(here, _mm512_maskz_loadu_ps(here, x + i), limit, _CMP_GE_OQ);
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(hits, at));
    found += static_cast<std::size_t>(std::popcount(static_cast<std::uint32_t>(hits)));
    at = _mm512_add_epi32(at, sixteen);
  }
  return found;
}

inline bool supported() {
  return avx2::supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#undef SID_AVX512

constexpr Kernels kernels{max_finite, exp_sums, count, at_least, avx2::lift};

}  // namespace avx512

}  // namespace sid
