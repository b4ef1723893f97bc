// The node of the autograd graph: what the Python Function's node does, without Python and its
// lock.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <type_traits>

#include "table.h"

namespace fused_act::host {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Stride = std::vector<c10::SymInt>;

// torch 2.13 counts references to a node in the node itself, older ones in a std::shared_ptr.
using NodePointer = decltype(std::declval<Node&>().getptr());

inline bool has_tangent(const Tensor& x) { return x._fw_grad(0).defined(); }

inline bool is_forward_mode_active() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// hook(grads) -> (grad_input,): `differentiable_gradient` as a hook of the node `self`.
PyObject* differentiable_backward(PyObject* self, PyObject* grads);

inline PyMethodDef hook_method = {"differentiable_backward", differentiable_backward, METH_O,
                                  nullptr};

struct ActivationNode final : Node {
  const Entry& entry;
  const bool inplace;
  const Parameters parameters;
  SavedVariable saved;
  // Empty. The Function of Python saves one beside a mask, and where there are hooks they must find
  // as many tensors here: a checkpoint counts them.
  SavedVariable anchor;
  Stride stride;  // of x, or of its dense copy, where a mask is saved: the mask is in that order

  ActivationNode(const Entry& entry, bool inplace, const Parameters& parameters)
      : entry(entry), inplace(inplace), parameters(parameters) {}

  const Recording& recording() const { return entry.recording(inplace); }

  std::string name() const override { return recording().node; }

  Tensor unpack() {
    Tensor value = saved.unpack(recording().saves == Saves::kY ? getptr() : nullptr);
    TORCH_CHECK(value.defined(), name(), " saved nothing, because a hook raised when it was made");
    return value;
  }

  // Safe against another thread that frees the graph. Not to be called where Python's lock is held:
  // a thread that holds the mutex may wait for that lock in a hook.
  Tensor unpack_locked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return unpack();
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset_data();
    anchor.reset_data();
  }

  // The saved `value` as a second derivative wants it: in the graph, on the way to x.
  variable_list in_graph(Tensor value) const {
    const Saves saves = recording().saves;
    if (saves == Saves::kX && inplace) {  // a copy of x, in the place of x
      value = value.detach();
      torch::autograd::impl::set_gradient_edge(value, next_edge(0));
    }
    if (saves != Saves::kMask) {
      return {value};
    }
    // The gradient of x is 0 then, and not None: an empty tensor leads to x. It is narrowed inside
    // the graph, because gradients have the shape of x.
    const auto& metadata = input_metadata(0);
    const Tensor x =
        at::empty({}, metadata.options()).expand_symint(metadata.shape_as_dim_vector());
    torch::autograd::impl::set_gradient_edge(x, next_edge(0));
    const at::AutoGradMode with_grad(true);
    return {value, x.as_strided({0}, {1})};
  }

  // The gradient by the backend's op, below autograd.
  static Tensor gradient(const Entry& entry, bool inplace, const Parameters& parameters,
                         c10::SymIntArrayRef stride, const Tensor& grad, const Tensor& value) {
    const Saves saves = entry.recording(inplace).saves;
    Stack stack = stack_of(parameters, grad, value);
    if (saves == Saves::kMask) {
      stack.emplace_back(stride);
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    entry.ops[backward_field(saves)]->callBoxed(stack);
    return std::move(stack.at(0)).toTensor();
  }

  // The gradient by torch's own ops, for a backward that is itself differentiated: Python's
  // formula.
  Tensor differentiable_gradient(const Tensor& grad, const Tensor& value) {
    using namespace pybind11::literals;
    const pybind11::gil_scoped_acquire gil;
    try {
      const auto formula = pybind11::reinterpret_borrow<pybind11::object>(recording().formula);
      const auto result =
          formula(grad, "saved_tensors"_a = in_graph(value),
                  "kernels"_a = pybind11::reinterpret_borrow<pybind11::object>(entry.kernels),
                  "parameters"_a = std::vector<double>(parameters.begin(), parameters.end()),
                  "shape"_a = input_metadata(0).shape_as_dim_vector().vec(), "stride"_a = stride);
      return result.cast<Tensor>();
    } catch (pybind11::error_already_set& raised) {
      raised.restore();
      python_error error;  // as torch's own nodes raise it, on whatever thread
      error.persist();
      throw std::move(error);
    }
  }

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined() || !task_should_compute_output(0)) {
      return {Tensor()};
    }
    const Tensor value = unpack_locked();
    // A tensor in a batch may have a tangent that cannot be seen from here.
    const bool differentiated = c10::GradMode::is_enabled() || has_tangent(grad) ||
                                has_tangent(value) ||
                                (!entry.has_keys(grad) && is_forward_mode_active());
    if (differentiated) {
      return {differentiable_gradient(grad, value)};
    }
    return {gradient(entry, inplace, parameters, stride, grad, value)};
  }

  // Compiled autograd, which puts a call of `apply_functional` into its graph. A backward that is
  // differentiated runs the formula instead, in a hook, which Dynamo leaves out of its graph.

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(c10::GradMode::is_enabled());
    if (c10::GradMode::is_enabled()) {
      const pybind11::gil_scoped_acquire gil;
      auto& self = const_cast<ActivationNode&>(*this);
      THPObjectPtr node(torch::autograd::functionToPyObject(self.getptr()));
      const auto method =
          pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&hook_method, node.get()));
      auto hook = pybind11::module_::import("torch.compiler").attr("disable")(method);
      args.add_pre_hook(c10::SafePyObject(hook.release().ptr(), getPyInterpreter()));
      return;
    }
    args.collect(entry.index);
    args.collect(inplace);
    for (const double parameter : parameters) {
      args.collect(parameter);
    }
    args.collect(c10::ArrayRef<c10::SymInt>(stride));
    args.collect(saved, recording().saves == Saves::kY);
  }

  static variable_list apply_functional(const variable_list& grads,
                                        const std::vector<c10::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const Entry& entry = table().at(args.unpack<int64_t>());
    const bool inplace = args.unpack<int64_t>() != 0;
    const auto parameters = args.unpack<std::vector<double>>();
    const auto stride = args.unpack<std::vector<c10::SymInt>>();
    const auto value = args.unpack<Tensor>();
    if (!grads[0].defined()) {
      return {Tensor()};
    }
    return {gradient(entry, inplace, Parameters(parameters.begin(), parameters.end()), stride,
                     grads[0], value)};
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    if (c10::GradMode::is_enabled()) {
      return grads;  // the hook has made them those of x
    }
    swap.before(stride);
    swap.before(saved);
    PackedArgs args;
    args.pack(entry.index);
    args.pack(static_cast<int64_t>(inplace));
    args.pack(std::vector<double>(parameters.begin(), parameters.end()));
    args.pack(std::vector<c10::SymInt>(stride.begin(), stride.end()));
    args.pack(unpack());
    const auto& compiler = getPyCompilerInterface();
    // A name may be bound once in a process.
    static const std::string function = compiler->bind_function(
        swap.get_py_compiler(), "FusedActBackward", apply_functional,
        {c10::IntType::get(), c10::IntType::get(), c10::ListType::ofFloats(),
         IValuePacker<std::vector<c10::SymInt>>::packed_type(), c10::TensorType::get()});
    const auto metadata = IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
        get_input_metadata(next_edges()));
    auto results = compiler->call_function(swap.get_py_compiler(), "apply_functional", function,
                                           grads, args.vec(), metadata);
    swap.after(stride);
    swap.after(saved);
    return results;
  }
};

inline ActivationNode& node_of(PyObject* self) {
  auto* node = reinterpret_cast<torch::autograd::THPCppFunction*>(self)->cdata.get();
  return static_cast<ActivationNode&>(*node);
}

inline PyObject* differentiable_backward(PyObject* self, PyObject* grads) {
  HANDLE_TH_ERRORS
  ActivationNode& node = node_of(self);
  const auto grad = pybind11::reinterpret_borrow<pybind11::sequence>(grads)[0];
  if (grad.is_none()) {
    return Py_NewRef(grads);
  }
  Tensor value;
  {
    const pybind11::gil_scoped_release no_gil;
    value = node.unpack_locked();
  }
  const Tensor result = node.differentiable_gradient(grad.cast<Tensor>(), value);
  return pybind11::make_tuple(result).release().ptr();
  END_HANDLE_TH_ERRORS
}

// A template, so that only the branch that this torch needs is compiled.
template <class Pointer = NodePointer>
auto make_node(const Entry& entry, bool inplace, const Parameters& parameters) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    // Found in the namespace of Node, if this torch has it.
    const auto free = [](auto* node) { deleteNode(node); };
    return std::shared_ptr<ActivationNode>(new ActivationNode(entry, inplace, parameters), free);
  } else {
    return c10::make_intrusive<ActivationNode>(entry, inplace, parameters);
  }
}

}  // namespace fused_act::host
