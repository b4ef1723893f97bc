// One eager call: whether the kernels take it, the op, and the node of the autograd graph.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "node.h"

namespace fused_act::host {

// The type of `torch.device(...)` as a context, and so of `torch.set_default_device`: a mode that
// changes only where new tensors are made.
inline PyTypeObject* device_context = nullptr;

inline bool is_other_function_mode_active() {
  using at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) {
    return false;
  }
  for (int64_t i = 0; i < PythonTorchFunctionTLS::stack_len(); i++) {
    const auto& mode = PythonTorchFunctionTLS::get_stack_at(i);
    if (Py_TYPE(mode->ptr(getPyInterpreter())) != device_context) {
      return true;
    }
  }
  return false;
}

// Whether the kernels take `x` here and now, and a `weight` as plain as that, which is undefined
// where there is none; sets `needs_grad`. All else is Python's to decide.
inline bool takes(const Entry& entry, const Tensor& x, const Tensor& weight, bool inplace,
                  bool& needs_grad) {
  // The keys of x tell that it is on the right device and strided, and neither nested, negated nor
  // conjugated, nor wrapped by a transform or dispatched to Python.
  const bool has_weight = weight.defined();
  if (!entry.has_keys(x) || (has_weight && !entry.has_keys(weight))) {
    return false;
  }
  const auto dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) {
    return false;
  }
  // Transforms, dispatch modes, functionalization and tracing are keys that a thread includes.
  const auto local = c10::impl::tls_local_dispatch_key_set();
  if (!(local.included_ - c10::default_included_set).empty() || is_other_function_mode_active() ||
      has_tangent(x) || (has_weight && has_tangent(weight))) {
    return false;
  }
  needs_grad =
      c10::GradMode::is_enabled() && (x.requires_grad() || (has_weight && weight.requires_grad()));
  if (needs_grad && local.excluded_.has_any(c10::autograd_dispatch_keyset)) {
    return false;
  }
  // torch knows which leaf, view or inference tensor must not be written, and raises.
  return !inplace || (!(needs_grad && (x.is_leaf() || x.is_view())) &&
                      (!x.is_inference() || c10::InferenceMode::is_enabled()));
}

// Whether the kernels take `weight` with `x`: the rule of `fits` in Python.
inline bool fits(const Entry& entry, const Tensor& x, const Tensor& weight) {
  const auto dtype = weight.scalar_type();
  return weight.device() == x.device() &&
         (dtype == x.scalar_type() || (entry.takes_fp32 && dtype == at::kFloat)) &&
         weight.dim() <= 1 &&
         (weight.numel() == 1 || weight.numel() == (x.dim() > 1 ? x.size(1) : 1));
}

// Has `x` and `weight` in the dtype of autocast, where that casts what this activation takes.
inline void autocast(const Entry& entry, Tensor& x, Tensor& weight) {
  const auto device = x.device().type();
  if (entry.autocasts && at::autocast::is_autocast_enabled(device)) {
    const auto dtype = at::autocast::get_autocast_dtype(device);
    x = x.to(dtype);
    weight = weight.to(dtype);
  }
}

// The op's result, below autograd: y, and in `mask` what it returns beside y.
inline Tensor call_forward(const Entry& entry, const Tensor& x, const Tensor& weight, bool inplace,
                           const Parameters& parameters, Tensor* mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Stack stack = stack_of(entry, parameters, x, as_vector(weight));
  if (inplace) {
    stack.emplace_back(x);
    entry.ops[mask == nullptr ? kForwardOut : kForwardWithMaskOut]->callBoxed(stack);
  } else {
    entry.ops[mask == nullptr ? kForward : kForwardWithMask]->callBoxed(stack);
  }
  if (mask != nullptr) {
    *mask = std::move(stack.back()).toTensor();
  }
  return inplace ? x : std::move(stack.front()).toTensor();
}

// y = f(x), where y is x if `inplace`, without a node.
inline Tensor compute(const Entry& entry, const Tensor& x, const Tensor& weight, bool inplace,
                      const Parameters& parameters) {
  Tensor y = call_forward(entry, x, weight, inplace, parameters, nullptr);
  if (inplace && !x.is_inference()) {
    torch::autograd::impl::bump_version(x);
  }
  return y;
}

// The stride in which kernels write what belongs to x: its own, or that of its dense copy.
inline SymInts dense_stride(const Tensor& x) {
  const auto stride = x.is_non_overlapping_and_dense()
                          ? x.strides().vec()
                          : at::infer_dense_strides(x.sizes(), x.strides());
  return SymInts(stride.begin(), stride.end());
}

// y = f(x), where y is x if `inplace`, with a node in the graph. Each SavedVariable is made outside
// the guards that skip autograd, because hooks may run there.
inline Tensor record(const Entry& entry, const Tensor& x, const Tensor& weight, bool inplace,
                     const Parameters& parameters) {
  namespace autograd = torch::autograd;
  const Saves saves = entry.recording(inplace).saves;
  auto node = make_node(entry, inplace, parameters);
  node->add_next_edge(autograd::impl::gradient_edge(x));
  if (saves == Saves::kX) {
    Tensor source = x;
    if (inplace) {  // a copy outside the graph; the node gives it the edge of x on demand
      const at::AutoDispatchBelowADInplaceOrView guard;
      source = x.clone();
    }
    node->saved = SavedVariable(source, false);
  }
  if (weight.defined()) {
    node->add_next_edge(autograd::impl::gradient_edge(weight));
    node->beside = SavedVariable(weight, false);
  }
  if (saves == Saves::kMask && !x.is_inference()) {
    node->input_version = x._version();
  }
  Tensor mask;
  Tensor y =
      call_forward(entry, x, weight, inplace, parameters, saves == Saves::kMask ? &mask : nullptr);
  if (inplace) {
    autograd::impl::bump_version(x);
    node->add_input_metadata(x);
    autograd::impl::rebase_history(x, {node, 0});
  } else {
    autograd::set_history(y, node);
  }
  if (saves == Saves::kMask) {
    node->shape = SymInts(x.sizes().begin(), x.sizes().end());
    node->stride = dense_stride(x);
    node->saved = SavedVariable(mask, false);
    if (node->saved.has_hooks()) {
      node->beside = SavedVariable(at::empty({0}, y.options()), false);
    }
  } else if (saves == Saves::kY) {
    node->saved = SavedVariable(y, true);
  }
  return y;
}

}  // namespace fused_act::host
