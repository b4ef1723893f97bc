// torch's own CPU kernels under the schemas of raw ops, in the namespace fused_act_torch, where
// those of torch's ops differ. See cpu_ops.py.
#include <ATen/ops/_prelu_kernel.h>
#include <ATen/ops/_prelu_kernel_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/library.h>

namespace {

using at::Tensor;

TORCH_LIBRARY(fused_act_torch, library) {
  library.def("swish(Tensor x, float beta) -> Tensor",
              [](const Tensor& x, double) { return at::silu(x); });
  library.def("swish.out(Tensor x, float beta, *, Tensor(a!) out) -> ()",
              [](const Tensor& x, double, Tensor out) { at::silu_out(out, x); });
  library.def(
      "swish_backward(Tensor grad_output, Tensor x, float beta) -> Tensor",
      [](const Tensor& grad, const Tensor& x, double) { return at::silu_backward(grad, x); });
  library.def("relu6(Tensor x) -> Tensor", [](const Tensor& x) { return at::hardtanh(x, 0, 6); });
  library.def("relu6.out(Tensor x, *, Tensor(a!) out) -> ()",
              [](const Tensor& x, Tensor out) { at::hardtanh_out(out, x, 0, 6); });
  library.def(
      "relu6_backward(Tensor grad_output, Tensor x) -> Tensor",
      [](const Tensor& grad, const Tensor& x) { return at::hardtanh_backward(grad, x, 0, 6); });
  // For the one weight of nn.PReLU().
  library.def("prelu(Tensor x, Tensor weight) -> Tensor",
              [](const Tensor& x, const Tensor& weight) { return at::_prelu_kernel(x, weight); });
  library.def("prelu_backward(Tensor grad_output, Tensor x, Tensor weight) -> (Tensor, Tensor)",
              [](const Tensor& grad, const Tensor& x, const Tensor& weight) {
                auto gradients = at::_prelu_kernel_backward(grad, x, weight);
                std::get<1>(gradients) = std::get<1>(gradients).sum_to_size(weight.sizes());
                return gradients;
              });
}

}  // namespace
