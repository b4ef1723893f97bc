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
#include <torch/csrc/autograd/utils/wrap_outputs.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <type_traits>

#include "table.h"

namespace fused_act::host {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using SymInts = std::vector<c10::SymInt>;

// torch 2.13 counts references to a node in the node itself, older ones in a std::shared_ptr.
using NodePointer = decltype(std::declval<Node&>().getptr());

inline bool has_tangent(const Tensor& x) { return x._fw_grad(0).defined(); }

inline bool is_forward_mode_active() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// `differentiable_gradients` as a hook of the node `self`: hook(grads) before it, which makes them
// those of x, or with a weight hook(outputs, grads) after it.
PyObject* differentiable_backward(PyObject* self, PyObject* arguments);
inline PyMethodDef hook_method = {"differentiable_backward", differentiable_backward, METH_VARARGS};

struct Saved {
  Tensor value, weight;
};

struct ActivationNode final : Node {
  const Entry& entry;
  const bool inplace;
  const Parameters parameters;
  SavedVariable saved;
  // The weight. Or, beside a mask where there are hooks, an empty tensor: the Function of Python
  // saves one, and hooks must find as many tensors here, for a checkpoint counts them.
  SavedVariable beside;
  // Those of x, or of its dense copy, where a mask is saved: the mask is in that order.
  SymInts shape, stride;
  int64_t input_version = -1;  // of x before the call, where a mask is saved

  ActivationNode(const Entry& entry, bool inplace, const Parameters& parameters)
      : entry(entry), inplace(inplace), parameters(parameters) {}

  const Recording& recording() const { return entry.recording(inplace); }

  std::string name() const override { return recording().node; }

  bool has_weight() const { return num_outputs() == 2; }

  // What the node has saved: x, y or a mask, and the weight, if there is one.
  Saved unpack() {
    Saved found{saved.unpack(recording().saves == Saves::kY ? getptr() : nullptr),
                has_weight() ? beside.unpack() : Tensor()};
    TORCH_CHECK(found.value.defined() && found.weight.defined() == has_weight(), name(),
                " saved nothing, because a hook raised when it was made");
    return found;
  }

  // Safe against another thread that frees the graph. Not to be called where Python's lock is held:
  // a thread that holds the mutex may wait for that lock in a hook.
  Saved unpack_locked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return unpack();
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved.reset_data();
    beside.reset_data();
  }

  // What is saved as a second derivative wants it: in the graph, on the way to x.
  variable_list in_graph(const Saved& found) const {
    const Saves saves = recording().saves;
    Tensor value = found.value;
    if (has_weight()) {
      return {value, found.weight};
    }
    if (saves == Saves::kX && inplace) {  // a copy of x, in the place of x
      value = value.detach();
      torch::autograd::impl::set_gradient_edge(value, next_edge(0));
    }
    if (saves != Saves::kMask) {
      return {value};
    }
    // The gradient of x is 0 then, and not None: an empty tensor leads to x. It is narrowed inside
    // the graph, because gradients have the shape of x.
    const Tensor x = at::empty({}, input_metadata(0).options()).expand_symint(shape);
    torch::autograd::impl::set_gradient_edge(x, next_edge(0));
    const at::AutoGradMode with_grad(true);
    return {value, x.as_strided({0}, {1})};
  }

  // The gradients of x and of the weight, if there is one, by the backend's op, below autograd.
  static variable_list gradients(const Entry& entry, bool inplace, const Parameters& parameters,
                                 c10::SymIntArrayRef stride, const Tensor& grad,
                                 const Saved& found) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Saves saves = entry.recording(inplace).saves;
    Stack stack = stack_of(entry, parameters, grad, found.value, as_vector(found.weight));
    if (saves == Saves::kMask) {
      stack.emplace_back(stride);
    }
    entry.ops[backward_field(saves)]->callBoxed(stack);
    variable_list result{std::move(stack.at(0)).toTensor()};
    if (found.weight.defined()) {
      // In fp32; autograd casts it to the dtype of the weight.
      result.push_back(std::move(stack.at(1)).toTensor().view(found.weight.sizes()));
    }
    return result;
  }

  pybind11::tuple parameters_for_python() const {
    pybind11::tuple found(parameters.size());
    for (size_t i = 0; i < parameters.size(); i++) {
      if (entry.is_dimension(i)) {
        found[i] = static_cast<int64_t>(parameters[i]);
      } else {
        found[i] = parameters[i];
      }
    }
    return found;
  }

  // The gradients by torch's own ops, for a backward that is itself differentiated: Python's
  // formula.
  variable_list differentiable_gradients(const Tensor& grad, const Saved& found) {
    using namespace pybind11::literals;
    const pybind11::gil_scoped_acquire gil;
    try {
      std::vector<bool> needed;
      for (size_t i = 0; i < num_outputs(); i++) {
        needed.push_back(task_should_compute_output(i));
      }
      const auto formula = pybind11::reinterpret_borrow<pybind11::object>(recording().formula);
      const pybind11::tuple result =
          formula(grad, "saved_tensors"_a = in_graph(found), "needs_input_grad"_a = needed,
                  "kernels"_a = pybind11::reinterpret_borrow<pybind11::object>(entry.kernels),
                  "parameters"_a = parameters_for_python(), "shape"_a = shape, "stride"_a = stride);
      variable_list gradients;
      for (const auto& each : result) {
        gradients.push_back(each.is_none() ? Tensor() : each.cast<Tensor>());
      }
      return gradients;
    } catch (pybind11::error_already_set& raised) {
      raised.restore();
      python_error error;  // as torch's own nodes raise it, on whatever thread
      error.persist();
      throw std::move(error);
    }
  }

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    const bool needs_x = task_should_compute_output(0);
    const bool needs_weight = has_weight() && task_should_compute_output(1);
    if (!grad.defined() || !(needs_x || needs_weight)) {
      return variable_list(num_outputs());
    }
    const Saved found = unpack_locked();
    // A tensor in a batch may have a tangent that cannot be seen from here.
    const bool differentiated = c10::GradMode::is_enabled() || has_tangent(grad) ||
                                has_tangent(found.value) ||
                                (has_weight() && has_tangent(found.weight)) ||
                                (!entry.has_keys(grad) && is_forward_mode_active());
    if (differentiated) {
      return differentiable_gradients(grad, found);
    }
    variable_list result = gradients(entry, inplace, parameters, stride, grad, found);
    if (!needs_x) {
      result[0] = Tensor();
    }
    if (has_weight() && !needs_weight) {
      result[1] = Tensor();
    }
    return result;
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
      c10::SafePyObject kept(hook.release().ptr(), getPyInterpreter());
      if (!has_weight()) {
        args.add_pre_hook(std::move(kept));
        return;
      }
      // It comes after those of users, and what they make of the gradients would be lost.
      TORCH_CHECK_NOT_IMPLEMENTED(post_hooks().empty(), name(),
                                  " has hooks, which compiled autograd with create_graph=True does "
                                  "not take");
      args.add_post_hook(std::move(kept));
      args.collect(beside, false);
      return;
    }
    args.collect(entry.index);
    args.collect(inplace);
    for (const double parameter : parameters) {
      args.collect(parameter);
    }
    args.collect(c10::ArrayRef<c10::SymInt>(stride));
    args.collect(saved, recording().saves == Saves::kY);
    args.collect(beside, false);
  }

  static variable_list apply_functional(const variable_list& grads,
                                        const std::vector<c10::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const Entry& entry = table().at(args.unpack<int64_t>());
    const bool inplace = args.unpack<int64_t>() != 0;
    const auto parameters = args.unpack<std::vector<double>>();
    const auto stride = args.unpack<std::vector<c10::SymInt>>();
    const auto value = args.unpack<Tensor>();
    const auto weight = args.unpack<Tensor>();
    if (!grads[0].defined()) {
      return variable_list(weight.defined() ? 2 : 1);
    }
    return gradients(entry, inplace, Parameters(parameters.begin(), parameters.end()), stride,
                     grads[0], {value, weight});
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    if (c10::GradMode::is_enabled()) {
      variable_list result = grads;  // the hook has made them those of x
      if (has_weight()) {            // or makes gradients of what is of their shape
        swap.before(beside);
        result.push_back(grads[0].defined() ? beside.unpack() : Tensor());
        swap.after(beside);
      }
      return result;
    }
    swap.before(stride);
    swap.before(saved);
    swap.before(beside);
    PackedArgs args;
    args.pack(entry.index);
    args.pack(static_cast<int64_t>(inplace));
    args.pack(std::vector<double>(parameters.begin(), parameters.end()));
    args.pack(std::vector<c10::SymInt>(stride.begin(), stride.end()));
    const Saved found = unpack();
    args.pack(found.value);
    args.pack(found.weight);
    const auto& compiler = getPyCompilerInterface();
    // A name may be bound once in a process.
    static const std::string function = compiler->bind_function(
        swap.get_py_compiler(), "FusedActBackward", apply_functional,
        {c10::IntType::get(), c10::IntType::get(), c10::ListType::ofFloats(),
         IValuePacker<std::vector<c10::SymInt>>::packed_type(), c10::TensorType::get(),
         c10::TensorType::get()});
    const auto metadata = IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
        get_input_metadata(next_edges()));
    auto results = compiler->call_function(swap.get_py_compiler(), "apply_functional", function,
                                           grads, args.vec(), metadata);
    swap.after(stride);
    swap.after(saved);
    swap.after(beside);
    return results;
  }
};

inline ActivationNode& node_of(PyObject* self) {
  auto* node = reinterpret_cast<torch::autograd::THPCppFunction*>(self)->cdata.get();
  return static_cast<ActivationNode&>(*node);
}

inline PyObject* differentiable_backward(PyObject* self, PyObject* arguments) {
  HANDLE_TH_ERRORS
  ActivationNode& node = node_of(self);
  const auto found = pybind11::reinterpret_borrow<pybind11::tuple>(arguments);
  const pybind11::object grad = found[found.size() - 1].cast<pybind11::sequence>()[0];
  if (grad.is_none()) {
    return pybind11::object(found[0]).release().ptr();
  }
  Saved saved;
  {
    const pybind11::gil_scoped_release no_gil;
    saved = node.unpack_locked();
  }
  THPObjectPtr list(
      torch::autograd::utils::wrap(node.differentiable_gradients(grad.cast<Tensor>(), saved)));
  return PySequence_Tuple(list.get());
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
