// The loops of kernels.hpp for x86-64 with AVX-512; see there for what they compute. Short rows take the AVX2 ones.
#pragma once

#include "kernels_avx2.hpp"

namespace sid {

namespace avx512 {

using namespace expf_constants;

#define SID_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

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

// exp(x) in base 2: x log2(e) = shift + i / 32 + f with |f| <= 1/64. 2^(i / 32) is put together from a table and the
// exponent, 2^f is a quadratic (minimax with a constant term of exactly 1, relative error 5e-8). log2(e) as a float adds
// |x - shift| 1.4e-8.
constexpr float kGrid = kRound / 32;  // adding it leaves round(32 x) in the low mantissa bits
constexpr float kMiddle = kGrid + 64;  // i = 0; while |i| < 2048, only the low 12 bits differ from kGrid's
constexpr float kLinear = 0.693157331f, kSquare = 0.240226507f;

// Such that adding (i + 2048) << 18 gives the bits of 2^(i / 32), also when i >= 32.
alignas(64) inline const std::array<std::uint32_t, 32> kPowers = [] {
  std::array<std::uint32_t, 32> powers{};
  for (std::uint32_t i = 0; i < 32; ++i)
    powers[i] = std::bit_cast<std::uint32_t>(static_cast<float>(std::exp2(i / 32.0))) - ((i + 2048) << 18);
  return powers;
}();

constexpr std::size_t kPage = 4096;  // processors do not fetch ahead across pages by themselves

// Where x may be: anywhere near 0 with a shift of 0, which is the rule and the fastest, or far below a shift.
enum class Range { kNear, kFar };

// Adds 2^(x log2(e) - shift), to a float, of four vectors. kNear: bits of `far` beyond the low 12 tell of any x that is
// not within ±44. kFar: what is not finite, or below -1e38, gives NaN.
template <Range range>
SID_AVX512 inline void add_terms(const __m512 (&x)[4], __m512 to_grid, __m512 (&sum)[4], __m512i& far) {
  const __m512 scale = _mm512_set1_ps(kLog2e), one = _mm512_set1_ps(1.0f);
  const __m512 linear = _mm512_set1_ps(kLinear), square = _mm512_set1_ps(kSquare);
  const __m512i grid = _mm512_castps_si512(_mm512_set1_ps(kGrid));
  const __m512i zero = _mm512_castps_si512(_mm512_set1_ps(kMiddle - 127));  // the power is exactly zero there
  const __m512i low = _mm512_load_si512(kPowers.data()), high = _mm512_load_si512(kPowers.data() + 16);
  for (std::size_t j = 0; j < 4; ++j) {
    const __m512 shifted = _mm512_fmadd_ps(x[j], scale, to_grid);
    const __m512 f = _mm512_fmsub_ps(x[j], scale, _mm512_sub_ps(shifted, to_grid));
    const __m512 p = _mm512_fmadd_ps(_mm512_fmadd_ps(f, square, linear), f, one);
    __m512i i = _mm512_castps_si512(shifted);
    if constexpr (range == Range::kNear)
      far = _mm512_ternarylogic_epi32(far, i, grid, 0xF6);  // far | (i ^ grid)
    else
      i = _mm512_max_epi32(i, zero);
    const __m512i power = _mm512_add_epi32(_mm512_permutex2var_epi32(low, i, high), _mm512_slli_epi32(i, 18));
    sum[j] = _mm512_fmadd_ps(p, _mm512_castsi512_ps(power), sum[j]);
  }
}

SID_AVX512 inline __m512d widened(__m512 v) {  // pairs of lanes, added in double
  return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}

// The lanes of a row's sum; NaN for kNear when an x is not. Up to 34 terms are added as floats before they join the sum
// in double: ten roundings.
template <Range range>
SID_AVX512 [[gnu::always_inline]] inline __m512d sum_lanes(const float* x, std::size_t n, float shift) {
  const __m512 zero = _mm512_setzero_ps(), to_grid = _mm512_set1_ps(kMiddle - shift);
  __m512 v[4], e[4] = {zero, zero, zero, zero};
  __m512i far = _mm512_setzero_si512();
  __m512d sum = _mm512_setzero_pd();
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
      add_terms<range>(v, to_grid, e, far);
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
    add_terms<range>(v, to_grid, e, far);
    for (std::size_t j = 0; j < 4; ++j) e[j] = _mm512_maskz_mov_ps(here[j], e[j]);
    join();
  }
  const __mmask16 beyond = range == Range::kNear ? _mm512_test_epi32_mask(far, _mm512_set1_epi32(~0xFFF)) : 0;
  return beyond == 0 ? sum : _mm512_set1_pd(std::numeric_limits<double>::quiet_NaN());
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

// Lanes of all rows are added up at the end, so that no row waits for that of the one before.
template <Range range>
SID_AVX512 inline void sum_rows(const float* const* rows, std::size_t count, std::size_t n, float near, ExpSum* out) {
  const float shift = std::nearbyint(near * kLog2e * 32) / 32;
  __m512d sum[kRowsAtOnce];
  alignas(64) std::array<double, kRowsAtOnce> sums{};
  for (std::size_t r = 0; r < count; ++r) sum[r] = sum_lanes<range>(rows[r], n, shift);
  for (std::size_t r = 0; r < count; ++r) sums[r] = _mm512_reduce_add_pd(sum[r]);
  _mm512_store_pd(sums.data(), log_of(_mm512_load_pd(sums.data())));
  for (std::size_t r = 0; r < count; ++r) out[r] = {double{shift} / double{kLog2e}, sums[r]};
}

// Without a shift where all values allow it, which is the rule; else about the maximum; what is beyond kGrid's range,
// another way.
SID_AVX512 inline void exp_sums(const float* const* rows, std::size_t count, std::size_t n, ExpSum* out) {
  constexpr float kBeyond = 5e4f;
  constexpr std::size_t kShort = 16;  // not worth it; and a single value must have a sum of exactly 1
  if (n < kShort) return avx2::exp_sums(rows, count, n, out);
  sum_rows<Range::kNear>(rows, count, n, 0.0f, out);
  for (std::size_t r = 0; r < count; ++r) {
    if (std::isfinite(out[r].log_sum)) continue;
    const float max = max_finite(rows[r], n);
    if (std::abs(max) < kBeyond) sum_rows<Range::kFar>(rows + r, 1, n, max, out + r);
    if (!std::isfinite(out[r].log_sum)) out[r] = exp_sum_with(max_finite, avx2::sum_exp, rows[r], n);
  }
}

SID_AVX512 inline std::size_t count(const float* x, std::size_t n, float bar) {
  const __m512 limit = _mm512_set1_ps(bar);
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 here = lanes(n - i);
    const std::uint32_t hits = _mm512_mask_cmp_ps_mask(here, _mm512_maskz_loadu_ps(here, x + i), limit, _CMP_GE_OQ);
    found += static_cast<std::size_t>(std::popcount(hits));
  }
  return found;
}

SID_AVX512 inline std::size_t at_least(const float* x, std::size_t n, float bar, std::uint32_t* out) {
  const __m512 limit = _mm512_set1_ps(bar);
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 here = lanes(n - i);
    std::uint32_t hits = _mm512_mask_cmp_ps_mask(here, _mm512_maskz_loadu_ps(here, x + i), limit, _CMP_GE_OQ);
    for (; hits != 0; hits &= hits - 1) out[found++] = static_cast<std::uint32_t>(i + std::countr_zero(hits));
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
