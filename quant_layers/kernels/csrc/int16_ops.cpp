// The operators of int16_linear.cpp, as torch sees them. Compiled without the instructions of any tier.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "int16_linear.h"

namespace {

using morphserve::Float;
using morphserve::kPanel;
using morphserve::Linear;

Float float_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Float::kFloat32;
    case at::kBFloat16: return Float::kBFloat16;
    case at::kHalf: return Float::kFloat16;
    default: TORCH_CHECK(false, "activations are ", x.scalar_type(), ", must be float32, bfloat16 or float16");
  }
}

// Fills in activations, bias, scratch and output, and runs.
at::Tensor run(Linear& linear, const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  const int64_t n = linear.num_panels * kPanel, k = linear.num_inputs;
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == k, "activations are ", x.sizes(), ", the weight is [", n, ", ", k, "]");
  TORCH_CHECK(k > 0 && k % 16 == 0, "K = ", k, ", must be a multiple of 16");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  at::Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor rows = x.contiguous();
  linear.dtype = float_of(x);
  linear.num_rows = rows.numel() / k;
  linear.x = rows.const_data_ptr();
  linear.out = out.mutable_data_ptr();
  if (bias.has_value()) {
    TORCH_CHECK(bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == n, "bias must be fp32 [",
                n, "], is ", bias->scalar_type(), " ", bias->sizes());
    linear.bias = bias->const_data_ptr<float>();
  }
  const int64_t groups = linear.group_size ? k / linear.group_size : 0;
  const int64_t step_bytes = 2 * linear.num_rows * morphserve::step_stride(k);
  const int64_t extra = linear.num_rows * (1 + groups);
  // One allocation: steps, whose rows end on cache lines where K does, then scales and sums of 4 bytes each.
  const at::Tensor scratch = at::empty({step_bytes + 4 * extra}, at::kByte);
  auto* bytes = scratch.mutable_data_ptr<uint8_t>();
  linear.steps = reinterpret_cast<int16_t*>(bytes);
  linear.row_scale = reinterpret_cast<float*>(bytes + step_bytes);
  linear.group_sums = reinterpret_cast<int32_t*>(linear.row_scale + linear.num_rows);
  morphserve::run(linear);
  return out;
}

void check_packed(const at::Tensor& t, at::ScalarType type, int64_t dims, const char* name) {
  TORCH_CHECK(t.scalar_type() == type && t.dim() == dims && t.is_contiguous(), name, " must be ", type, " with ", dims,
              " dimensions, is ", t.scalar_type(), " ", t.sizes());
}

// weight: int8 [N / 16, K / 2, 16, 2]. scale: fp32 [N]. bias: fp32 [N].
at::Tensor w8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                     const std::optional<at::Tensor>& bias) {
  check_packed(weight, at::kChar, 4, "weight");
  check_packed(scale, at::kFloat, 1, "scale");
  TORCH_CHECK(scale.numel() == weight.size(0) * kPanel, "scale has ", scale.numel(), " channels");
  Linear linear{};
  linear.num_panels = weight.size(0);
  linear.num_inputs = 2 * weight.size(1);
  linear.weight = weight.const_data_ptr<int8_t>();
  linear.scale = scale.const_data_ptr<float>();
  return run(linear, x, bias);
}

// weight: uint8 [N / 16, K / 8, 16, 4]. zero: uint8, scale: fp32 [N / 16, G, 16]. bias: fp32 [N].
at::Tensor w4_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& zero, const at::Tensor& scale,
                     const std::optional<at::Tensor>& bias) {
  check_packed(weight, at::kByte, 4, "weight");
  check_packed(zero, at::kByte, 3, "zero");
  check_packed(scale, at::kFloat, 3, "scale");
  Linear linear{};
  linear.num_panels = weight.size(0);
  linear.num_inputs = 8 * weight.size(1);
  const int64_t groups = scale.size(1);
  TORCH_CHECK(groups > 0 && linear.num_inputs % (16 * groups) == 0 && zero.sizes() == scale.sizes() &&
                  scale.numel() == linear.num_panels * groups * kPanel,
              "weight ", weight.sizes(), ", zero ", zero.sizes(), " and scale ", scale.sizes(), " do not fit");
  linear.group_size = linear.num_inputs / groups;
  linear.weight = reinterpret_cast<const int8_t*>(weight.const_data_ptr<uint8_t>());
  linear.zero = zero.const_data_ptr<uint8_t>();
  linear.scale = scale.const_data_ptr<float>();
  return run(linear, x, bias);
}

}  // namespace

TORCH_LIBRARY(morphserve_int16, m) {
  m.def("w8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def("w4_linear(Tensor x, Tensor weight, Tensor zero, Tensor scale, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(morphserve_int16, CPU, m) {
  m.impl("w8_linear", w8_linear);
  m.impl("w4_linear", w4_linear);
}
