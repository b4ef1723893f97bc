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

// The numbers that an activation takes after its tensors. A dimension is exact, too.
using Parameters = c10::SmallVector<double, 2>;

// What an activation takes after x.
enum class Argument { kFloat, kDimension, kWeight };

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
  PyObject* formula;   // formula(grad_output, **context) -> a gradient an input, differentiable
  bool recomputes;     // whether `rematerialize` may compute y again as f(x)
};

struct Entry {
  int64_t index;
  PyObject* kernels;  // the Python `Kernels`
  std::array<std::optional<c10::OperatorHandle>, kFieldCount> ops;
  std::vector<c10::DispatchKeySet> keys;  // of the tensors that it takes
  std::vector<Argument> arguments;
  bool takes_fp32;  // whether the weight of a 16-bit x may be in fp32
  bool autocasts;   // whether autocast has x and the weight in the lower precision
  Recording out_of_place;
  std::optional<Recording> in_place;

  bool has_keys(const Tensor& x) const {
    return std::find(keys.begin(), keys.end(), x.key_set()) != keys.end();
  }

  const Recording& recording(bool inplace) const { return inplace ? *in_place : out_of_place; }

  bool is_dimension(size_t parameter) const { return arguments[parameter] == Argument::kDimension; }
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

// The arguments of an op: tensors, of which those that are not defined are left out, then numbers.
template <class... Tensors>
Stack stack_of(const Entry& entry, const Parameters& parameters, const Tensors&... tensors) {
  Stack stack;
  stack.reserve(sizeof...(tensors) + parameters.size() + 1);  // `out` or a stride may follow
  const auto add = [&](const Tensor& tensor) {
    if (tensor.defined()) {
      stack.emplace_back(tensor);
    }
  };
  (add(tensors), ...);
  for (size_t i = 0; i < parameters.size(); i++) {
    if (entry.is_dimension(i)) {
      stack.emplace_back(static_cast<int64_t>(parameters[i]));
    } else {
      stack.emplace_back(parameters[i]);
    }
  }
  return stack;
}

// A weight as the kernels take it, below autograd; one that is not defined stays so.
inline Tensor as_vector(const Tensor& weight) {
  const bool is_vector = !weight.defined() || (weight.scalar_type() == at::kFloat &&
                                               weight.dim() == 1 && weight.is_contiguous());
  return is_vector ? weight : weight.to(at::kFloat).reshape({-1}).contiguous();
}

}  // namespace fused_act::host
