// Plain structures between the engine, compiled once, and the kernels, compiled once per instruction set.
//
// A panel matrix holds the columns of a K x N matrix in groups of `Kernels::panel`: [N / panel][K][panel] for floats
// and [N / panel][K / 4][panel][4] for int8, so that a kernel reads it front to back. The last panel is zero-filled.
//
// Legend: K inner size of a product, N outputs, D model width, S prompt tokens, t level (0-based).
#pragma once

#include <cstdint>

namespace decoder {

// y[n] = scale[n] * Σ_k x[k] w[n, k] + bias[n] with w int8; x is quantised per row by the kernels.
struct Linear {
  int n, k;
  const std::int8_t* panels;
  const std::int32_t* offset;  // -zero * Σ_k w[n, k]: takes the zero point of the activations back out
  const float* scale;
  const float* bias;
};

struct Norm {
  const float* gain;
  const float* bias;
};

struct Layer {
  Linear own_q, own_k, own_v, own_out, cross_q, cross_out, up, down;
  Norm own_norm, cross_norm, norm;
};

struct Shape {
  int width, heads, ffn, layers, levels;
};

// One level for all beams. Rows [0, K) may be computed by several threads in disjoint ranges.
struct Step {
  Shape shape;
  const Layer* layers;
  const float* embeddings;  // [tokens, D]
  const float* position;    // [D], of this level
  Norm embedding_norm;
  int level;
  const std::int64_t* tokens;            // [K], rows of `embeddings`
  const std::int32_t* const* ancestors;  // [t + 1][K]: row of the beam's ancestor on each level, itself last
  float* const* keys;                    // [layers][levels] -> [K of that level, D], appended by this step at t
  float* const* values;
  int prompt;                          // S
  const float* prompt_bias;            // [S]
  const float* const* prompt_keys;     // [layers][heads] -> panels [d, S], scaled
  const float* const* prompt_values;   // [layers][heads] -> panels [S, d]
  int codes;                           // columns of this level's head
  const float* head;                   // panels [D, codes]
  const float* head_bias;              // [codes]
  float* logits;                       // [K, codes]
};

// Room of one thread for `rows` rows.
struct Scratch {
  float* x;             // [rows, D]
  float* wide;          // [rows, max(D, ffn)]
  float* attended;      // [rows, D]
  float* scores;        // [rows, S rounded up to a panel], and at least levels * heads rounded up to 16
  std::uint8_t* bytes;  // [rows, stride(max(D, ffn))]
  float* scale;         // [rows]
};

// Bytes between quantised rows: off the powers of two that would make rows collide in the cache.
constexpr int stride(int k) { return k + 64; }

struct Kernels {
  const char* name;
  int panel;
  int zero;  // zero point of quantised activations; their largest magnitude is zero - 1
  void (*step)(const Step&, int begin, int end, const Scratch&);
  // Raw integer product of quantised rows, for tests and for measuring the machine's peak: out[rows, n].
  void (*product)(const Linear&, const std::uint8_t* rows, int count, std::int32_t* out);
};

}  // namespace decoder
