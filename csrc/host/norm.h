// A batch normalization of torch's own, as its node tells it, and how its output is computed again.
// rematerialization.py has the same in Python.
#pragma once

#include <ATen/ops/cudnn_batch_norm.h>
#include <ATen/ops/native_batch_norm.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <optional>
#include <typeinfo>

#include "node.h"

namespace fused_act::host {

// What may be undefined is so without weight and bias, and while training without mean and
// variance.
struct NormArguments {
  Tensor weight, bias, mean, variance;
  bool training;
  double epsilon;
};

struct Norm {
  const Node& node;
  const SavedVariable &input, &weight, &mean, &variance;
  bool training;
  double epsilon;
  Tensor (*op)(const Tensor& x, const NormArguments& arguments);

  // The bias, where it is a parameter that requires grad: of another the node knows nothing.
  Tensor bias() const {
    const auto* leaf =
        dynamic_cast<torch::autograd::AccumulateGrad*>(node.next_edge(2).function.get());
    return leaf == nullptr ? Tensor() : leaf->variable;
  }
};

inline std::optional<Norm> norm_of(const Node& node) {
  namespace nodes = torch::autograd::generated;
  if (typeid(node) == typeid(nodes::NativeBatchNormBackward0)) {
    const auto& norm = static_cast<const nodes::NativeBatchNormBackward0&>(node);
    const auto op = [](const Tensor& x, const NormArguments& arguments) {
      const auto& [weight, bias, mean, variance, training, epsilon] = arguments;
      return std::get<0>(
          at::native_batch_norm(x, weight, bias, mean, variance, training, 0.0, epsilon));
    };
    return Norm{
        norm,     norm.input_, norm.weight_, norm.running_mean_, norm.running_var_, norm.training,
        norm.eps, op};
  }
  if (typeid(node) == typeid(nodes::CudnnBatchNormBackward0)) {
    const auto& norm = static_cast<const nodes::CudnnBatchNormBackward0&>(node);
    const auto op = [](const Tensor& x, const NormArguments& arguments) {
      const auto& [weight, bias, mean, variance, training, epsilon] = arguments;
      return std::get<0>(
          at::cudnn_batch_norm(x, weight, bias, mean, variance, training, 0.0, epsilon));
    };
    return Norm{norm,
                norm.input_,
                norm.weight_,
                norm.running_mean_,
                norm.running_var_,
                norm.training,
                norm.epsilon,
                op};
  }
  return std::nullopt;
}

}  // namespace fused_act::host
