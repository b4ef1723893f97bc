// The raw ops of activations with a weight: fused_act/families/weighted.py has the schemas.
#pragma once

#include "tensors.h"
#include "weighted.cuh"

namespace fused_act::weighted {

// The ops of one activation with a weight.
template <template <typename> class Activation>
struct Ops {
  static void check_weight(const Tensor& x, const Tensor& weight) {
    const int64_t channels = x.dim() > 1 ? x.size(1) : 1;
    STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == x.get_device_index() &&
                        weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                        weight.dim() == 1 && (weight.numel() == 1 || weight.numel() == channels),
                    "fused_act: expected a contiguous float32 weight of 1 or ", channels,
                    " elements, got ", weight.numel());
  }

  static int64_t stride_of_channels(const Tensor& x) { return x.dim() > 1 ? x.stride(1) : 0; }

  static Tensor forward(const Tensor& input, const Tensor& weight) {
    check_match(input, input);
    check_weight(input, weight);
    const DeviceGuard guard(input.get_device_index());
    Tensor y = allocate_like(input);
    if (input.numel() == 0) {
      return y;
    }
    const Tensor x = with_layout_of(y, input);
    const cudaStream_t stream = current_stream(x);
    with_element_type(x, [&](auto element) {
      using T = decltype(element);
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      T* y_ptr = static_cast<T*>(y.mutable_data_ptr());
      auto launch = [&](auto width, auto by_column, const Matrix& matrix) {
        launch_forward<decltype(width)::value, decltype(by_column)::value, Activation>(
            x_ptr, static_cast<const float*>(weight.const_data_ptr()), y_ptr, matrix, stream);
      };
      with_variant<T>(x.numel(), weight.numel(), stride_of_channels(x), launch, x_ptr, y_ptr);
    });
    check_launch();
    return y;
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                             const Tensor& weight) {
    check_match(grad_output, input);
    check_weight(input, weight);
    const DeviceGuard guard(input.get_device_index());
    Tensor grad_input = allocate_like(input);
    if (input.numel() == 0) {
      return {grad_input, torch::stable::new_zeros(weight, weight.sizes())};
    }
    const Tensor grad = with_layout_of(grad_input, grad_output);
    const Tensor x = with_layout_of(grad_input, input);
    const cudaStream_t stream = current_stream(x);
    Tensor sums;
    with_element_type(x, [&](auto element) {
      using T = decltype(element);
      const T* grad_ptr = static_cast<const T*>(grad.const_data_ptr());
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      T* result_ptr = static_cast<T*>(grad_input.mutable_data_ptr());
      auto launch = [&](auto width, auto by_column, const Matrix& matrix) {
        constexpr int kWidth = decltype(width)::value;
        constexpr bool kByColumn = decltype(by_column)::value;
        const auto shape = shape_of_sums<kByColumn, kWidth, T>(matrix);
        const std::array<int64_t, 3> stride{shape[1] * shape[2], shape[2], 1};
        sums = empty_strided({shape.data(), 3}, {stride.data(), 3}, dtype_of(weight), weight);
        launch_backward<kWidth, kByColumn, Activation>(
            grad_ptr, x_ptr, static_cast<const float*>(weight.const_data_ptr()), result_ptr,
            static_cast<float*>(sums.mutable_data_ptr()), matrix, stream);
      };
      with_variant<T>(x.numel(), weight.numel(), stride_of_channels(x), launch, grad_ptr, x_ptr,
                      result_ptr);
    });
    check_launch();
    const int64_t dimensions[] = {0, 2};
    return {grad_input,
            torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(dimensions, 2))};
  }
};

template <template <typename> class Activation>
void implement(StableLibrary& library, const std::string& name) {
  using O = Ops<Activation>;
  library.impl(name.c_str(), TORCH_BOX(&O::forward));
  library.impl((name + "_backward").c_str(), TORCH_BOX(&O::backward));
}

}  // namespace fused_act::weighted
