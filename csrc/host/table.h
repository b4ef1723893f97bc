// The table of the host path: for each activation in each backend, which ops compute it and what
// its nodes save. Python fills the table, see fused_act/host.py; no activation is named here.
//
// Built with the full C++ API of the torch that is installed, which has no stable ABI: another
// torch does not load it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fused_act::host {

using at::Tensor;
using torch::jit::Stack;

// The float parameters of an activation.
using Parameters = c10::SmallVector<double, 2>;

// What a node saves: the input, the output, or one bit an element.
enum class Saves { kX, kY, kMask };

// The ops of an activation, by the fields of the Python class `Kernels`.
enum Field {
  kForward,
  kForwardOut,
  kBackward,
  kBackwardFromOutput,
  kForwardWithMask,
  kForwardWithMaskOut,
  kFieldCount,
};
constexpr const char* kFieldNames[kFieldCount] = {
    "forward",           "forward_out",           "backward", "backward_from_output",
    "forward_with_mask", "forward_with_mask_out",
};

inline Field backward_field(Saves saves) {
  return saves == Saves::kY ? kBackwardFromOutput : kBackward;
}

// How a call is recorded for autograd. The Python objects are never freed, as the table is not.
struct Recording {
  std::string node;  // the name of its nodes
  Saves saves;
  PyObject* function;  // the autograd Function of Python whose place its nodes take
  PyObject* formula;   // formula(grad_output, **context) -> grad_input, differentiable
};

struct Entry {
  int64_t index;
  PyObject* kernels;  // the Python `Kernels`
  std::array<std::optional<c10::OperatorHandle>, kFieldCount> ops;
  std::vector<c10::DispatchKeySet> keys;  // of the tensors that it takes
  Py_ssize_t parameter_count;
  Recording out_of_place, in_place;

  bool has_keys(const Tensor& x) const {
    return std::find(keys.begin(), keys.end(), x.key_set()) != keys.end();
  }

  const Recording& recording(bool inplace) const { return inplace ? in_place : out_of_place; }
};

// Nodes and compiled graphs refer to entries, so entries stay where they are.
class Table {
 public:
  const Entry& add(Entry entry) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entry.index = static_cast<int64_t>(entries_.size());
    return entries_.emplace_back(std::move(entry));
  }

  // For compiled graphs, which run on threads of their own while Python may add an entry.
  const Entry& at(int64_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.at(static_cast<size_t>(index));
  }

 private:
  std::mutex mutex_;
  std::deque<Entry> entries_;
};

inline Table& table() {
  static Table* const found = new Table;  // nodes may outlive what is destroyed at exit
  return *found;
}

// The arguments of an op: tensors, then parameters.
template <class... Tensors>
Stack stack_of(const Parameters& parameters, const Tensors&... tensors) {
  Stack stack;
  stack.reserve(sizeof...(tensors) + parameters.size() + 1);  // `out` or a stride may follow
  (stack.emplace_back(tensors), ...);
  for (const double parameter : parameters) {
    stack.emplace_back(parameter);
  }
  return stack;
}

}  // namespace fused_act::host
