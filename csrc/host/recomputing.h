// How `rematerialize` computes again what it does not keep, as in fused_act/rematerialization.py.
#pragma once

#include <map>
#include <typeinfo>
#include <unordered_map>

#include "entry.h"
#include "norm.h"
#include "packed.h"

namespace fused_act::host {

using torch::autograd::functionToPyObject;

// The rules of Python for what is computed again, see the class `Pack` in packing.py.
struct Rules {
  const py::object may_recompute, recompute, check_bits;
  const bool norm;

  Rules(py::object may_recompute, py::object recompute, py::object check_bits, bool norm)
      : may_recompute(std::move(may_recompute)),
        recompute(std::move(recompute)),
        check_bits(std::move(check_bits)),
        norm(norm) {}

  // Whether outputs of nodes of this type may be computed again; asked once. All Functions of
  // Python have one type in C++, and each has one of its own in Python, which is kept.
  bool takes(const NodePointer& node) {
    const auto object_of_node = [&] {
      return py::reinterpret_steal<py::object>(functionToPyObject(node));
    };
    const Answer answer = once(types_, &typeid(*node), [&] {
      const auto object = object_of_node();
      const bool is_of_python = PyType_HasFeature(Py_TYPE(object.ptr()), Py_TPFLAGS_HEAPTYPE);
      return is_of_python ? Answer::kByPythonType : ask(object);
    });
    if (answer != Answer::kByPythonType) {
      return answer == Answer::kYes;
    }
    const auto object = object_of_node();
    PyTypeObject* type = Py_TYPE(object.ptr());
    return once(python_types_, type, [&] {
             Py_INCREF(type);
             return ask(object);
           }) == Answer::kYes;
  }

  // Whether `y` has the same bits when it is computed again from `input`; tried once for all that
  // is alike. `dtypes` are those of the norm's weight and statistics. Without a weight it is tried
  // each time, since the node does not tell whether there was a bias.
  bool gives_same_bits(const Norm& norm, const py::object& input, const Tensor& y,
                       const ActivationNode* activation, const std::array<int64_t, 3>& dtypes,
                       const Compute& compute) {
    const auto device = y.device();
    Configuration configuration = {norm.training, static_cast<int64_t>(device.type()),
                                   device.index(), static_cast<int64_t>(y.scalar_type()),
                                   activation == nullptr ? -1 : activation->entry.index};
    configuration.insert(configuration.end(), dtypes.begin(), dtypes.end());
    for (const auto values : {y.sizes(), y.strides()}) {
      configuration.insert(configuration.end(), values.begin(), values.end());
    }
    const bool is_known_by_weight = dtypes[0] != kNone;
    const auto key = std::pair(&typeid(norm.node), std::move(configuration));
    if (is_known_by_weight) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto known = norms_.find(key);
      if (known != norms_.end()) {
        return known->second;
      }
    }
    const Tensor x = packed_of(input).get();
    const py::object same = check_bits(norm.node.name(), compute(x), y, x);
    if (same.is_none()) {
      return false;
    }
    const bool answer = same.cast<bool>();
    if (is_known_by_weight) {
      const std::lock_guard<std::mutex> lock(mutex_);
      norms_[key] = answer;
    }
    return answer;
  }

  static constexpr int64_t kNone = -1;  // the dtype of no tensor

 private:
  using Configuration = std::vector<int64_t>;
  enum class Answer { kNo, kYes, kByPythonType };

  std::mutex mutex_;
  std::unordered_map<const std::type_info*, Answer> types_;
  std::unordered_map<PyTypeObject*, Answer> python_types_;
  std::map<std::pair<const std::type_info*, Configuration>, bool> norms_;

  Answer ask(const py::object& node) {
    return may_recompute(node, norm).cast<bool>() ? Answer::kYes : Answer::kNo;
  }

  // The answer that is known, or that of `find`, without the lock.
  template <class Answers, class Find>
  typename Answers::mapped_type once(Answers& answers, typename Answers::key_type key,
                                     const Find& find) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto known = answers.find(key);
      if (known != answers.end()) {
        return known->second;
      }
    }
    const auto answer = find();
    const std::lock_guard<std::mutex> lock(mutex_);
    return answers[std::move(key)] = answer;
  }
};

// A tensor is `compute(source)`.
struct How {
  Compute compute;
  py::object source;
};

// f(x) of a node of ours.
inline Compute forward_of(const ActivationNode& node) {
  return [&entry = node.entry, parameters = node.parameters](const Tensor& x) {
    const py::gil_scoped_release no_gil;
    return call_forward(entry, x, Tensor(), false, parameters, nullptr);
  };
}

inline Tensor get_or_undefined(const py::object& packed) {
  return packed ? packed_of(packed).get() : Tensor();
}

inline int64_t dtype_of(const py::object& packed) {
  return packed ? static_cast<int64_t>(packed_of(packed).get().scalar_type()) : Rules::kNone;
}

// A copy, which a norm that trains meanwhile does not change: it writes its statistics unseen.
inline py::object keep_copy(const py::object& packed) {
  return keep(py::cast(packed_of(packed).get().clone()));
}

// The output `y` of a batch normalization, or of `activation` after it.
inline std::optional<How> of_norm(Rules& rules, const Norm& norm, const Tensor& y,
                                  const ActivationNode* activation) {
  const auto input = peek(norm.node, norm.input), weight = peek(norm.node, norm.weight);
  const auto running_mean = peek(norm.node, norm.mean);
  const auto running_variance = peek(norm.node, norm.variance);
  if (!input || !*input || !weight || !running_mean || !running_variance) {
    return std::nullopt;
  }
  const Tensor leaf = norm.bias();
  if (leaf.defined() != static_cast<bool>(*weight)) {
    return std::nullopt;
  }
  py::object bias, mean, variance;
  if (leaf.defined()) {
    bias = keep(py::cast(leaf));
  }
  if (!norm.training) {
    if (!*running_mean || !*running_variance) {
      return std::nullopt;
    }
    mean = keep_copy(*running_mean);
    variance = keep_copy(*running_variance);
  }
  Compute forward = activation == nullptr ? Compute() : forward_of(*activation);
  Compute compute = [op = norm.op, weight = *weight, bias, mean, variance, training = norm.training,
                     epsilon = norm.epsilon, forward = std::move(forward)](const Tensor& x) {
    const NormArguments arguments = {get_or_undefined(weight),
                                     get_or_undefined(bias),
                                     get_or_undefined(mean),
                                     get_or_undefined(variance),
                                     training,
                                     epsilon};
    Tensor found;
    {
      const py::gil_scoped_release no_gil;
      found = op(x, arguments);
    }
    return forward ? forward(found) : found;
  };
  const std::array<int64_t, 3> dtypes = {dtype_of(*weight), dtype_of(*running_mean),
                                         dtype_of(*running_variance)};
  if (!rules.gives_same_bits(norm, *input, y, activation, dtypes, compute)) {
    return std::nullopt;
  }
  return How{std::move(compute), *input};
}

// An activation of ours, from what its node saves, or a norm and an activation together.
inline std::optional<How> of_activation(Rules& rules, const ActivationNode& node, const Tensor& y) {
  if (!node.recording().recomputes || y._version() != node.inplace) {
    return std::nullopt;
  }
  if (node.recording().saves == Saves::kX) {
    const auto x = peek(node, node.saved);
    return x && *x ? std::make_optional(How{forward_of(node), *x}) : std::nullopt;
  }
  // The node saves a mask. Its input is not at hand, but may be the output of a norm, as it was.
  const auto& before = node.next_edge(0).function;
  if (!rules.norm || !before || node.input_version != 0) {
    return std::nullopt;
  }
  const auto norm = norm_of(*before);
  return norm ? of_norm(rules, *norm, y, &node) : std::nullopt;
}

// How the output `y` of `node`, which in Python is `object`, is computed again, if there is a way.
inline std::optional<How> recompute(Rules& rules, const Node& node, py::handle object,
                                    const Tensor& y) {
  try {
    if (typeid(node) == typeid(ActivationNode)) {
      return of_activation(rules, static_cast<const ActivationNode&>(node), y);
    }
    if (const auto norm = norm_of(node)) {
      return y._version() == 0 ? of_norm(rules, *norm, y, nullptr) : std::nullopt;
    }
  } catch (const c10::Error&) {  // what the node needs was changed since, or freed
    return std::nullopt;
  }
  const py::object how = rules.recompute(object, y, rules.norm);
  if (how.is_none()) {
    return std::nullopt;
  }
  auto [compute, source] = how.cast<std::pair<py::object, py::object>>();
  TORCH_CHECK_TYPE(is_packed(source), "expected what was packed");
  auto call = [compute = std::move(compute)](const Tensor& x) {
    return compute(x).template cast<Tensor>();
  };
  return How{std::move(call), std::move(source)};
}

}  // namespace fused_act::host
