// The raw ops of the namespace fused_act_cuda, a line for each activation: its family, its struct,
// a `double` for each of its parameters, and its name.
#include "activations.cuh"
#include "elementwise_ops.cuh"
#include "mirrored_ops.cuh"
#include "weighted_ops.cuh"

namespace fused_act {
namespace {

STABLE_TORCH_LIBRARY_IMPL(fused_act_cuda, CUDA, library) {
  elementwise::implement<Mish>(library, "mish");
  elementwise::implement<Swish, double>(library, "swish");
  elementwise::implement<ReLU6>(library, "relu6");
  elementwise::implement<Sigmoid>(library, "sigmoid");
  elementwise::implement<Tanh>(library, "tanh");
  elementwise::implement<ReLU>(library, "relu");
  elementwise::implement<LeakyReLU, double>(library, "leaky_relu");
  elementwise::implement<SELU>(library, "selu");
  mirrored::implement<ReLU>(library, "crelu");
  weighted::implement<PReLU>(library, "prelu");
  weighted::implement<Swish>(library, "learnable_swish");
}

}  // namespace
}  // namespace fused_act
