// The opaque linear of a compiled graph, without Python in its path.
//
// torch.compile keeps (x, slot, num_outputs); which matmul runs is looked up here at run time, so one compiled
// artifact serves every level. Through a Python op the same lookup costs about 20 us per linear, 2 to 3 ms per
// step of a 30-layer model on CPU.
//
// Operators of vLLM's extension are called by name through the dispatcher: nothing of vLLM is linked.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace {

enum Kind : int64_t {
  kPython = 0,      // whatever Python put into the slot, through morphserve::python_linear
  kOnednn = 1,      // tensors: handler, [bias]
  kInt8Vnni = 2,    // tensors: weight, scale, [bias]
  kInt4Vnni = 3,    // tensors: weight, zero, scale, [bias]
  kInt8Onednn = 4,  // tensors: handler, azp_adj, [bias]; activations by token, without zero points
  kInt16W8 = 5,     // tensors: weight, scale, [bias]
  kInt16W4 = 6,     // tensors: weight, zero, scale, [bias]
};

struct Slot {
  int64_t kind = kPython;
  int64_t num_inputs = 0;
  std::vector<at::Tensor> tensors;
  std::optional<at::Tensor> bias;
};

std::vector<Slot> slots;  // written between two forward passes, read inside them, by one thread

c10::OperatorHandle op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

void set_slot(int64_t index, int64_t kind, int64_t num_inputs, const std::vector<at::Tensor>& tensors,
              const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(index >= 0, "slot ", index, ": must be 0 or more");
  if (static_cast<size_t>(index) >= slots.size()) {
    slots.resize(index + 1);
  }
  slots[index] = Slot{kind, num_inputs, tensors, bias};
}

using OnednnMm = void(at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&);

using W8Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&);
using W4Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const std::optional<at::Tensor>&);

// As vLLM's CPUInt8ScaledMMLinearKernel calls the two operators.
at::Tensor int8_onednn(const Slot& slot, const at::Tensor& rows, int64_t num_outputs, const c10::IValue& bias) {
  static const auto quantize = op("_C::dynamic_scaled_int8_quant");
  static const auto multiply = op("_C::onednn_scaled_mm");
  at::Tensor q = at::empty(rows.sizes(), rows.options().dtype(at::kChar));
  at::Tensor scale = at::empty({rows.size(0), 1}, rows.options().dtype(at::kFloat));
  at::Tensor out = at::empty({rows.size(0), num_outputs}, rows.options());
  std::vector<c10::IValue> stack{q, rows, scale, c10::IValue()};
  quantize.callBoxed(&stack);
  stack = {out, q, scale, c10::IValue(), slot.tensors[1], bias, slot.tensors[0]};
  multiply.callBoxed(&stack);
  return out;
}

at::Tensor run(const Slot& slot, const at::Tensor& rows, int64_t num_outputs) {
  if (slot.kind == kOnednn) {
    static const auto onednn = op("_C::onednn_mm").typed<OnednnMm>();
    at::Tensor out = at::empty({rows.size(0), num_outputs}, rows.options());
    onednn.call(out, rows, slot.bias, slot.tensors[0]);
    return out;
  }
  if (slot.kind == kInt16W8) {
    static const auto w8 = op("morphserve_int16::w8_linear").typed<W8Linear>();
    return w8.call(rows, slot.tensors[0], slot.tensors[1], slot.bias);
  }
  if (slot.kind == kInt16W4) {
    static const auto w4 = op("morphserve_int16::w4_linear").typed<W4Linear>();
    return w4.call(rows, slot.tensors[0], slot.tensors[1], slot.tensors[2], slot.bias);
  }
  const c10::IValue bias = slot.bias.has_value() ? c10::IValue(*slot.bias) : c10::IValue();
  if (slot.kind == kInt8Onednn) {
    return int8_onednn(slot, rows, num_outputs, bias);
  }
  std::vector<c10::IValue> stack;
  if (slot.kind == kInt8Vnni) {
    static const auto int8 = op("_C::int8_scaled_mm_with_quant");
    stack = {rows, slot.tensors[0], slot.tensors[1], bias, static_cast<int64_t>(rows.scalar_type()), true};
    int8.callBoxed(&stack);
  } else {
    static const auto int4 = op("_C::int4_scaled_mm_cpu");
    stack = {rows, slot.tensors[0], slot.tensors[1], slot.tensors[2], bias};
    int4.callBoxed(&stack);
  }
  return stack[0].toTensor();
}

at::Tensor linear(const at::Tensor& x, int64_t index, int64_t num_outputs) {
  TORCH_CHECK(index >= 0 && static_cast<size_t>(index) < slots.size(), "slot ", index, " was never set");
  const Slot& slot = slots[index];
  if (slot.kind == kPython || x.numel() == 0) {
    static const auto python = op("morphserve::python_linear");
    std::vector<c10::IValue> stack{x, index, num_outputs};
    python.callBoxed(&stack);
    return stack[0].toTensor();
  }
  if (x.dim() == 2 && x.is_contiguous()) {
    return run(slot, x, num_outputs);
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = num_outputs;
  return run(slot, x.reshape({-1, slot.num_inputs}).contiguous(), num_outputs).view(shape);
}

}  // namespace

TORCH_LIBRARY(morphserve, m) {
  m.def("linear(Tensor x, int slot, int num_outputs) -> Tensor");
  m.def("python_linear(Tensor x, int slot, int num_outputs) -> Tensor");  // implemented in opaque_linear.py
  m.def("set_slot(int index, int kind, int num_inputs, Tensor[] tensors, Tensor? bias) -> ()");
}

TORCH_LIBRARY_IMPL(morphserve, CPU, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(morphserve, CompositeExplicitAutograd, m) { m.impl("set_slot", set_slot); }
