// What int16_ops.cpp, which knows torch, asks of int16_linear.cpp, which knows the instructions.

#pragma once

#include <cstdint>

namespace morphserve {

enum class Float : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kPanel = 16;  // output channels whose weights lie side by side

// One linear over one batch. N = num_panels * kPanel; rows of `x` and `out` are contiguous, K is a multiple of 16.
struct Linear {
  Float dtype;               // of x and out
  const void* x;             // [M, K]
  void* out;                 // [M, N]
  int64_t num_rows;          // M, at least 1
  int64_t num_inputs;        // K
  int64_t num_panels;
  int64_t group_size;        // input channels that share a scale; 0: 8-bit weights, one scale a channel
  const int8_t* weight;      // W8 [panel, K / 2, 16, 2]; W4 [panel, K / 8, 16, 4], see packing.py
  const float* scale;        // W8 [N]; W4 [panel, G, 16]
  const uint8_t* zero;       // W4 [panel, G, 16]
  const float* bias;         // [N], or null
  // Scratch of the caller's:
  int16_t* steps;            // [M, step_stride(K)]
  float* row_scale;          // [M]
  int32_t* group_sums;       // W4 [M, G]
};

// Rows of activations lie one cache line further apart than they are long, so that rows of 2^n channels do not all
// fall into the same sets of the first-level cache.
constexpr int64_t step_stride(int64_t num_inputs) { return num_inputs + 32; }

void run(const Linear& linear);

}  // namespace morphserve
