// All arithmetic of a decoder step, on plain arrays. This file is compiled once per instruction set and chosen at run
// time, so nothing here may have external linkage but the table at the end: an inline function shared with another
// file could be linked in the wrong instruction set.
//
// Floats use compiler vectors of the machine's width; only the int8 product needs instructions by name:
//   avx512   vpdpbusd on 8-bit activations
//   avx2     vpmaddubsw, whose 16-bit sums would overflow on 8-bit activations, so these have 7 bits
//   portable 8-bit activations, any machine
#include <utility>

#include "layout.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using namespace decoder;

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16, kTile = 14, kZero = 128;
#define KERNELS avx512_kernels
constexpr const char* kName = "avx512";
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTile = 4, kZero = 64;
#define KERNELS avx2_kernels
constexpr const char* kName = "avx2";
#else
constexpr int kLanes = 4, kTile = 4, kZero = 128;
#define KERNELS portable_kernels
constexpr const char* kName = "portable";
#endif
constexpr int kVectors = 2, kPanel = kVectors * kLanes;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));

template <class V, class T>
inline V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void save(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

inline Floats all(float x) { return x - Floats{}; }
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512VNNI__)
  return Floats(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
inline Floats magnitude(Floats x) { return Floats(Ints(x) & 0x7fffffff); }
inline int smaller(int a, int b) { return a < b ? a : b; }

template <int Half, int... Lane>
inline Floats swapped(Floats v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane ^ Half)...);
}

// Folds halves onto each other, in registers: sums and maxima in a fixed order.
template <int Half = kLanes / 2, class Join>
inline float fold(Floats v, Join join) {
  if constexpr (Half == 0)
    return v[0];
  else
    return fold<Half / 2>(join(v, swapped<Half>(v, std::make_integer_sequence<int, kLanes>())), join);
}

inline float sum(Floats v) {
  return fold(v, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats v) { return fold(v, larger); }

// The low byte of every lane. Compilers take a plain conversion apart lane by lane.
inline void save_bytes(std::uint8_t* to, Ints v) {
#if defined(__AVX512VNNI__)
  save(to, _mm512_cvtepi32_epi8(__m512i(v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8(__m256i(v), _mm256_set1_epi32(0x0c080400));
  save(to, _mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1))));
#else
  save(to, __builtin_convertvector(v, Bytes));
#endif
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits

// exp(x) for x <= 0 within 2 ulp: x = k ln2 + r, then a degree-6 polynomial (Cephes coefficients).
inline Floats exp(Floats x) {
  x = larger(x, all(-86.0f));
  const Floats shifted = x * 1.44269504088896341f + kRound;
  const Floats k = shifted - kRound;
  const Floats r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return Floats(Ints(p) + (Ints(shifted) << 23));
}

// x Φ(x), with erf by Abramowitz & Stegun 7.1.26 (absolute error 1.5e-7).
inline Floats gelu(Floats x) {
  const Floats z = magnitude(x) * 0.70710678118654752f;
  const Floats t = 1.0f / (z * 0.3275911f + 1.0f);
  Floats p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = 0.5f * p * t * exp(-z * z);  // 1 - Φ(|x|)
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

template <int Rows>
struct Tile {};

// Calls f with Tile<min(rows, Max)>, so that the kernel knows its rows at compile time.
template <int Max, class F>
inline void with_tile(int rows, F f) {
  if constexpr (Max > 1)
    if (rows < Max) return with_tile<Max - 1>(rows, f);
  f(Tile<Max>{});
}

// acc += the products of four neighbouring bytes, in each lane.
inline Ints dot(Ints acc, std::int32_t quad, const std::int8_t* weights) {
#if defined(__AVX512VNNI__)
  return Ints(_mm512_dpbusd_epi32(__m512i(acc), _mm512_set1_epi32(quad), load<__m512i>(weights)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(quad), load<__m256i>(weights));
  return acc + Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) acc[lane] += int(std::uint8_t(quad >> 8 * i)) * weights[4 * lane + i];
  return acc;
#endif
}

// done(row, column of the matrix, columns that exist, sums) for every tile of rows x panel; sums are Ints[kVectors].
template <class Done>
void integer_product(const Linear& m, const std::uint8_t* rows, int count, Done done) {
  const int step = stride(m.k);
  for (int column = 0; column < m.n; column += kPanel) {
    const std::int8_t* panel = m.panels + std::int64_t(column) * m.k;
    for (int row = 0; row < count; row += kTile) {
      with_tile<kTile>(count - row, [&]<int Rows>(Tile<Rows>) {
        const std::uint8_t* a = rows + std::int64_t(row) * step;
        Ints acc[Rows][kVectors];
        for (int i = 0; i < Rows; ++i)
          for (int j = 0; j < kVectors; ++j) acc[i][j] = load<Ints>(m.offset + column + j * kLanes);
        for (int k = 0; k < m.k; k += 4)
#pragma GCC unroll 16
          for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j)
              acc[i][j] = dot(acc[i][j], load<std::int32_t>(a + i * step + k), panel + k * kPanel + 4 * j * kLanes);
        for (int i = 0; i < Rows; ++i) done(row + i, column, smaller(kPanel, m.n - column), acc[i]);
      });
    }
  }
}

enum class Then { kStore, kGelu, kAdd };

// out[row, n] (=, = gelu, +=) the affine map of quantised rows.
template <Then Last>
void linear(const Linear& m, const Scratch& s, int rows, float* out) {
  integer_product(m, s.bytes, rows, [&](int row, int column, int columns, const Ints* sums) {
    float* to = out + std::int64_t(row) * m.n + column;
    for (int j = 0; j < kVectors && j * kLanes < columns; ++j) {  // n is a multiple of the lanes
      const int at = column + j * kLanes;
      Floats y = __builtin_convertvector(sums[j], Floats) * (s.scale[row] * load<Floats>(m.scale + at));
      y += load<Floats>(m.bias + at);
      if constexpr (Last == Then::kGelu) y = gelu(y);
      if constexpr (Last == Then::kAdd) y += load<Floats>(to + j * kLanes);
      save(to + j * kLanes, y);
    }
  });
}

// out[row, n] = Σ_k a[row, k] b[k, n] (+ bias[n]); b in panels, n columns of them exist.
void product(const float* a, int a_stride, int rows, int k, const float* b, int n, float* out, int out_stride,
             const float* bias = nullptr) {
  for (int column = 0; column < n; column += kPanel) {
    const float* panel = b + std::int64_t(column) * k;
    for (int row = 0; row < rows; row += kTile) {
      with_tile<kTile>(rows - row, [&]<int Rows>(Tile<Rows>) {
        const float* from = a + std::int64_t(row) * a_stride;
        Floats acc[Rows][kVectors] = {};
        for (int i = 0; i < k; ++i)
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j)
              acc[r][j] += from[std::int64_t(r) * a_stride + i] * load<Floats>(panel + i * kPanel + j * kLanes);
        for (int r = 0; r < Rows; ++r)
          for (int j = 0; j < kVectors; ++j) {
            float* to = out + std::int64_t(row + r) * out_stride + column + j * kLanes;
            const int left = n - column - j * kLanes;
            if (left >= kLanes)
              save(to, bias ? acc[r][j] + load<Floats>(bias + column + j * kLanes) : acc[r][j]);
            else
              for (int c = 0; c < left; ++c) to[c] = acc[r][j][c] + (bias ? bias[column + j * kLanes + c] : 0.0f);
          }
      });
    }
  }
}

// One row to bytes around kZero with the row's own scale.
void quantise(const float* x, int n, std::uint8_t* bytes, float* scale) {
  Floats top = {};
  for (int i = 0; i < n; i += kLanes) top = larger(top, magnitude(load<Floats>(x + i)));
  const float peak = largest(top), step = peak > 0 ? (kZero - 1) / peak : 0.0f;
  *scale = peak / (kZero - 1);
  for (int i = 0; i < n; i += kLanes)  // the low byte of the rounded float is the integer
    save_bytes(bytes + i, Ints(load<Floats>(x + i) * step + (kRound + kZero)));
}

void quantise_rows(const float* x, int rows, int n, const Scratch& s) {
  for (int row = 0; row < rows; ++row)
    quantise(x + std::int64_t(row) * n, n, s.bytes + std::int64_t(row) * stride(n), s.scale + row);
}

void normalise(float* x, int n, const Norm& norm) {
  Floats total = {};
  for (int i = 0; i < n; i += kLanes) total += load<Floats>(x + i);
  const float mean = sum(total) / n;
  Floats squares = {};
  for (int i = 0; i < n; i += kLanes) {
    const Floats centred = load<Floats>(x + i) - mean;
    squares += centred * centred;
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / n + 1e-5f);
  for (int i = 0; i < n; i += kLanes)
    save(x + i, (load<Floats>(x + i) - mean) * factor * load<Floats>(norm.gain + i) + load<Floats>(norm.bias + i));
}

// Post-norm, then the bytes of the next product.
void normalise_rows(int rows, int n, const Norm& norm, const Scratch& s) {
  for (int row = 0; row < rows; ++row) normalise(s.x + std::int64_t(row) * n, n, norm);
  quantise_rows(s.x, rows, n, s);
}

// Each beam over its own past: at most `levels` keys, read where its ancestors left them.
void attend_own(const Step& g, int layer, int begin, int end, const Scratch& s) {
  const int width = g.shape.width, heads = g.shape.heads, size = width / heads;
  const int padded = (heads + kLanes - 1) / kLanes * kLanes;
  float *const *keys = g.keys + layer * g.shape.levels, *const *values = g.values + layer * g.shape.levels;
  for (int row = begin; row < end; ++row) {
    const float* query = s.wide + std::int64_t(row - begin) * width;
    float* out = s.attended + std::int64_t(row - begin) * width;
    for (int t = 0; t <= g.level; ++t) {
      const float* key = keys[t] + std::int64_t(g.ancestors[t][row]) * width;
      for (int head = 0; head < heads; ++head) {
        Floats total = {};
        for (int i = head * size; i < (head + 1) * size; i += kLanes)
          total += load<Floats>(query + i) * load<Floats>(key + i);
        s.scores[t * padded + head] = sum(total);
      }
    }
    for (int head = 0; head < padded; head += kLanes) {  // softmax over t, all heads at once
      Floats top = load<Floats>(s.scores + head), total = {};
      for (int t = 1; t <= g.level; ++t) top = larger(top, load<Floats>(s.scores + t * padded + head));
      for (int t = 0; t <= g.level; ++t) {
        const Floats weight = exp(load<Floats>(s.scores + t * padded + head) - top);
        total += weight;
        save(s.scores + t * padded + head, weight);
      }
      for (int t = 0; t <= g.level; ++t)
        save(s.scores + t * padded + head, load<Floats>(s.scores + t * padded + head) / total);
    }
    for (int head = 0; head < heads; ++head)
      for (int i = head * size; i < (head + 1) * size; i += kLanes) {
        Floats mixed = {};
        for (int t = 0; t <= g.level; ++t) {
          const float* value = values[t] + std::int64_t(g.ancestors[t][row]) * width;
          mixed += s.scores[t * padded + head] * load<Floats>(value + i);
        }
        save(out + i, mixed);
      }
  }
}

// All beams over the one prompt: per head a product, a softmax, a product.
void attend_prompt(const Step& g, int layer, int rows, const Scratch& s) {
  const int width = g.shape.width, heads = g.shape.heads, size = width / heads;
  const int padded = (g.prompt + kPanel - 1) / kPanel * kPanel;
  for (int head = 0; head < heads; ++head) {
    product(s.wide + head * size, width, rows, size, g.prompt_keys[layer * heads + head], padded, s.scores, padded);
    for (int row = 0; row < rows; ++row) {
      float* line = s.scores + std::int64_t(row) * padded;
      for (int i = g.prompt; i < padded; ++i) line[i] = -1e9f;
      Floats top = all(-1e9f), total = {};
      for (int i = 0; i < padded; i += kLanes) {
        const Floats score = load<Floats>(line + i) + load<Floats>(g.prompt_bias + i);
        top = larger(top, score);
        save(line + i, score);
      }
      const float peak = largest(top);
      for (int i = 0; i < padded; i += kLanes) {
        const Floats weight = exp(load<Floats>(line + i) - peak);
        total += weight;
        save(line + i, weight);
      }
      const float share = 1.0f / sum(total);
      for (int i = 0; i < padded; i += kLanes) save(line + i, load<Floats>(line + i) * share);
    }
    product(s.scores, padded, rows, g.prompt, g.prompt_values[layer * heads + head], size, s.attended + head * size,
            width);
  }
}

void step(const Step& g, int begin, int end, const Scratch& s) {
  const int rows = end - begin, width = g.shape.width;
  for (int row = 0; row < rows; ++row) {
    const float* embedding = g.embeddings + g.tokens[begin + row] * width;
    float* x = s.x + std::int64_t(row) * width;
    for (int i = 0; i < width; i += kLanes) save(x + i, load<Floats>(embedding + i) + load<Floats>(g.position + i));
  }
  normalise_rows(rows, width, g.embedding_norm, s);
  for (int i = 0; i < g.shape.layers; ++i) {
    const Layer& layer = g.layers[i];
    const int now = i * g.shape.levels + g.level;
    linear<Then::kStore>(layer.own_q, s, rows, s.wide);
    linear<Then::kStore>(layer.own_k, s, rows, g.keys[now] + std::int64_t(begin) * width);
    linear<Then::kStore>(layer.own_v, s, rows, g.values[now] + std::int64_t(begin) * width);
    attend_own(g, i, begin, end, s);
    quantise_rows(s.attended, rows, width, s);
    linear<Then::kAdd>(layer.own_out, s, rows, s.x);
    normalise_rows(rows, width, layer.own_norm, s);
    linear<Then::kStore>(layer.cross_q, s, rows, s.wide);
    attend_prompt(g, i, rows, s);
    quantise_rows(s.attended, rows, width, s);
    linear<Then::kAdd>(layer.cross_out, s, rows, s.x);
    normalise_rows(rows, width, layer.cross_norm, s);
    linear<Then::kGelu>(layer.up, s, rows, s.wide);
    quantise_rows(s.wide, rows, g.shape.ffn, s);
    linear<Then::kAdd>(layer.down, s, rows, s.x);
    normalise_rows(rows, width, layer.norm, s);
  }
  product(s.x, width, rows, width, g.head, g.codes, g.logits + std::int64_t(begin) * g.codes, g.codes, g.head_bias);
}

void raw_product(const Linear& m, const std::uint8_t* rows, int count, std::int32_t* out) {
  integer_product(m, rows, count, [&](int row, int column, int columns, const Ints* sums) {
    std::int32_t* to = out + std::int64_t(row) * m.n + column;
    for (int j = 0; j < kVectors && j * kLanes < columns; ++j) save(to + j * kLanes, sums[j]);
  });
}

}  // namespace

namespace decoder {
extern const Kernels KERNELS;
const Kernels KERNELS = {kName, kPanel, kZero, step, raw_product};
}  // namespace decoder
