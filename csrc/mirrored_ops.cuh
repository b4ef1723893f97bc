// The raw ops of mirrored activations: fused_act/families/mirrored.py has the schemas.
#pragma once

#include "mirrored.cuh"
#include "tensors.h"

namespace fused_act::mirrored {

// A dense x as a matrix, along `dim`, and y: as fused_act.families.mirrored.Layout has it.
struct Layout {
  Matrix matrix;
  std::vector<int64_t> shape, stride;

  Layout(torch::headeronly::IntHeaderOnlyArrayRef x_shape,
         torch::headeronly::IntHeaderOnlyArrayRef x_stride, int64_t dim)
      : matrix{1, x_shape[dim]},
        shape(x_shape.begin(), x_shape.end()),
        stride(x_stride.begin(), x_stride.end()) {
    stride[dim] = 1;
    for (int64_t i = 0; i < static_cast<int64_t>(shape.size()); i++) {
      if (x_stride[i] < x_stride[dim]) {
        stride[dim] *= shape[i];
      } else if (i != dim) {
        matrix.rows *= shape[i];
        stride[i] *= 2;
      }
    }
    matrix.columns *= stride[dim];
    shape[dim] *= 2;
  }
};

inline int64_t wrapped(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(-x.dim() <= dim && dim < x.dim(), "fused_act: expected dim of a tensor of ",
                  x.dim(), " dimensions, got ", dim);
  return dim < 0 ? dim + x.dim() : dim;
}

// The ops of y = cat([f(x), f(-x)], dim).
template <template <typename> class Activation>
struct Ops {
  template <bool kMasked>
  static std::tuple<Tensor, Tensor> run_forward(const Tensor& input, int64_t dim) {
    // empty_like keeps the strides of a dense tensor; a contiguous one may have others of no
    // account.
    const bool dense =
        input.is_contiguous() || (input.numel() > 0 && is_dense(input.sizes(), input.strides()));
    const Tensor x = dense ? input : with_layout_of(torch::stable::empty_like(input), input);
    const Layout layout(x.sizes(), x.strides(), wrapped(x, dim));
    Tensor y = empty_strided(layout.shape, layout.stride, dtype_of(x), x);
    Tensor mask;
    if constexpr (kMasked) {
      const int64_t bytes = layout.matrix.bytes_of_mask_row(), step = std::max<int64_t>(bytes, 1);
      const std::vector<int64_t> shape{layout.matrix.rows, 2, bytes}, stride{2 * step, step, 1};
      mask = empty_strided(shape, stride, aoti_torch_dtype_uint8(), x);
    }
    if (x.numel() > 0) {
      const cudaStream_t stream = current_stream(x);
      auto* bits = kMasked ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
      with_element_type(x, [&](auto element) {
        using T = decltype(element);
        launch_forward<kMasked>(Activation<T>{}, static_cast<const T*>(x.const_data_ptr()),
                                static_cast<T*>(y.mutable_data_ptr()), bits, layout.matrix, stream);
      });
      check_launch();
    }
    return {y, mask};
  }

  static Tensor forward(const Tensor& x, int64_t dim) {
    check_match(x, x);
    const DeviceGuard guard(x.get_device_index());
    return std::get<0>(run_forward<false>(x, dim));
  }

  static std::tuple<Tensor, Tensor> forward_with_mask(const Tensor& x, int64_t dim) {
    check_match(x, x);
    const DeviceGuard guard(x.get_device_index());
    return run_forward<true>(x, dim);
  }

  static Tensor backward(const Tensor& grad_output, const Tensor& mask, int64_t dim,
                         std::vector<int64_t> stride) {
    check_match(grad_output, grad_output);
    const DeviceGuard guard(grad_output.get_device_index());
    dim = wrapped(grad_output, dim);
    std::vector<int64_t> shape(grad_output.sizes().begin(), grad_output.sizes().end());
    STD_TORCH_CHECK(shape[dim] % 2 == 0, "fused_act: expected grad_output of even size, got ",
                    shape[dim]);
    shape[dim] /= 2;
    STD_TORCH_CHECK(
        stride.size() == shape.size() && (grad_output.numel() == 0 || is_dense(shape, stride)),
        "fused_act: expected the stride of a dense tensor of the shape of x");
    const Layout layout(shape, stride, dim);
    STD_TORCH_CHECK(mask.is_cuda() && grad_output.get_device_index() == mask.get_device_index() &&
                        mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                        mask.numel() == 2 * layout.matrix.rows * layout.matrix.bytes_of_mask_row(),
                    "fused_act: expected a contiguous uint8 mask with a bit for each element of ",
                    2 * layout.matrix.rows, " rows of ", layout.matrix.columns, ", got ",
                    mask.numel(), " bytes");
    Tensor grad_input = empty_strided(shape, stride, dtype_of(grad_output), grad_output);
    if (grad_input.numel() == 0) {
      return grad_input;
    }
    Tensor grad = grad_output;
    if (!has_layout(grad, layout.stride)) {
      grad = empty_strided(layout.shape, layout.stride, dtype_of(grad_output), grad_output);
      torch::stable::copy_(grad, grad_output);
    }
    const cudaStream_t stream = current_stream(grad);
    with_element_type(grad, [&](auto element) {
      using T = decltype(element);
      launch_backward(Activation<T>{}, static_cast<const T*>(grad.const_data_ptr()),
                      static_cast<const uint8_t*>(mask.const_data_ptr()),
                      static_cast<T*>(grad_input.mutable_data_ptr()), layout.matrix, stream);
    });
    check_launch();
    return grad_input;
  }
};

template <template <typename> class Activation>
void implement(StableLibrary& library, const std::string& name) {
  using O = Ops<Activation>;
  library.impl(name.c_str(), TORCH_BOX(&O::forward));
  library.impl((name + "_with_mask").c_str(), TORCH_BOX(&O::forward_with_mask));
  library.impl((name + "_backward").c_str(), TORCH_BOX(&O::backward));
}

}  // namespace fused_act::mirrored
