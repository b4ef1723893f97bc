// The raw ops of elementwise activations: fused_act/families/elementwise.py has the schemas.
#pragma once

#include "elementwise.cuh"
#include "tensors.h"

namespace fused_act::elementwise {

// Whether a and b, of one size, share memory but start at different places.
inline bool overlap_partially(const Tensor& a, const Tensor& b) {
  const auto distance =
      static_cast<const char*>(a.const_data_ptr()) - static_cast<const char*>(b.const_data_ptr());
  return distance != 0 && std::abs(distance) < b.numel() * static_cast<int64_t>(b.element_size());
}

// copy_ refuses an expanded `out` too, but through the stable ABI its message is lost.
inline void check_not_expanded(const Tensor& out) {
  for (int64_t i = 0; i < out.dim(); i++) {
    STD_TORCH_CHECK(out.numel() == 0 || out.size(i) < 2 || out.stride(i) != 0,
                    "unsupported operation: more than one element of the written-to tensor refers "
                    "to a single memory location. Please clone() the tensor before performing the "
                    "operation.");
  }
}

// A mask for x, whose elements lie in memory as `stride`, of a dense tensor, says.
inline void check_mask(const Tensor& x, const Tensor& mask, const std::vector<int64_t>& stride) {
  STD_TORCH_CHECK(x.is_cuda() && mask.is_cuda() &&
                      x.get_device_index() == mask.get_device_index() &&
                      mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == (x.numel() + 7) / 8,
                  "fused_act: expected a contiguous uint8 mask with one bit for each of ",
                  x.numel(), " elements, got ", mask.numel(), " bytes");
  STD_TORCH_CHECK(
      stride.size() == x.sizes().size() && (x.numel() == 0 || is_dense(x.sizes(), stride)),
      "fused_act: expected the stride of a dense tensor of the shape of grad_output");
}

inline Tensor empty_mask(const Tensor& x) {
  const int64_t size = (x.numel() + 7) / 8;
  const int64_t stride = 1;
  return empty_strided({&size, 1}, {&stride, 1}, aoti_torch_dtype_uint8(), x);
}

// The ops of one activation. Parameters are its floats, which follow the tensors.
template <template <typename> class Activation, typename... Parameters>
struct Ops {
  // y = f(x) for a dense y, with a mask or with none.
  template <bool kMasked>
  static void run_forward(const Tensor& input, Tensor& y, uint8_t* mask, Parameters... parameters) {
    const Tensor x = with_layout_of(y, input);
    if (x.numel() == 0) {
      return;
    }
    const cudaStream_t stream = current_stream(x);
    with_element_type(x, [&](auto element) {
      using T = decltype(element);
      const Activation<T> activation{static_cast<float>(parameters)...};
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      T* y_ptr = static_cast<T*>(y.mutable_data_ptr());
      launch_forward<kMasked>(activation, x_ptr, y_ptr, mask, x.numel(), stream);
    });
    check_launch();
  }

  template <bool kMasked>
  static void run_out(const Tensor& x, Tensor& out, uint8_t* mask, Parameters... parameters) {
    check_not_expanded(out);
    // allocate_like keeps the strides of a dense tensor and of no other.
    Tensor y = out.is_contiguous() ? out : allocate_like(out);
    const bool dense = equal(y.strides(), out.strides());
    // A block must not read what another has written.
    const Tensor source = overlap_partially(x, out) ? torch::stable::clone(x) : x;
    run_forward<kMasked>(source, dense ? out : y, mask, parameters...);
    if (!dense) {
      torch::stable::copy_(out, y);
    }
  }

  static Tensor forward(const Tensor& x, Parameters... parameters) {
    check_match(x, x);
    const DeviceGuard guard(x.get_device_index());
    Tensor y = allocate_like(x);
    run_forward<false>(x, y, nullptr, parameters...);
    return y;
  }

  static void forward_out(const Tensor& x, Parameters... parameters, Tensor out) {
    check_match(x, out);
    const DeviceGuard guard(x.get_device_index());
    run_out<false>(x, out, nullptr, parameters...);
  }

  static std::tuple<Tensor, Tensor> forward_with_mask(const Tensor& x, Parameters... parameters) {
    check_match(x, x);
    const DeviceGuard guard(x.get_device_index());
    Tensor y = allocate_like(x);
    Tensor mask = empty_mask(x);
    run_forward<true>(x, y, static_cast<uint8_t*>(mask.mutable_data_ptr()), parameters...);
    return {y, mask};
  }

  static Tensor forward_with_mask_out(const Tensor& x, Parameters... parameters, Tensor out) {
    check_match(x, out);
    const DeviceGuard guard(x.get_device_index());
    Tensor mask = empty_mask(x);
    run_out<true>(x, out, static_cast<uint8_t*>(mask.mutable_data_ptr()), parameters...);
    return mask;
  }

  // `saved` is x, or y if kFromOutput.
  template <bool kFromOutput>
  static Tensor backward(const Tensor& grad_output, const Tensor& saved, Parameters... parameters) {
    check_match(grad_output, saved);
    const DeviceGuard guard(saved.get_device_index());
    Tensor grad_input = allocate_like(saved);
    if (saved.numel() == 0) {
      return grad_input;
    }
    const Tensor grad = with_layout_of(grad_input, grad_output);
    const Tensor values = with_layout_of(grad_input, saved);
    const cudaStream_t stream = current_stream(values);
    with_element_type(values, [&](auto element) {
      using T = decltype(element);
      const Activation<T> activation{static_cast<float>(parameters)...};
      auto launch = [&](auto derivative_of) {
        launch_backward<false>(derivative_of, static_cast<const T*>(grad.const_data_ptr()),
                               static_cast<const T*>(values.const_data_ptr()),
                               static_cast<T*>(grad_input.mutable_data_ptr()), values.numel(),
                               stream);
      };
      if constexpr (kFromOutput) {
        launch(FromOutput<Activation<T>>{activation});
      } else {
        launch(activation);
      }
    });
    check_launch();
    return grad_input;
  }

  static Tensor masked_backward(const Tensor& grad_output, const Tensor& mask,
                                Parameters... parameters, std::vector<int64_t> stride) {
    check_mask(grad_output, mask, stride);
    const DeviceGuard guard(grad_output.get_device_index());
    Tensor grad_input =
        empty_strided(grad_output.sizes(), stride, dtype_of(grad_output), grad_output);
    if (grad_input.numel() == 0) {
      return grad_input;
    }
    const Tensor grad = with_layout_of(grad_input, grad_output);
    const cudaStream_t stream = current_stream(grad);
    with_element_type(grad, [&](auto element) {
      using T = decltype(element);
      launch_backward<true>(Activation<T>{static_cast<float>(parameters)...},
                            static_cast<const T*>(grad.const_data_ptr()),
                            static_cast<const uint8_t*>(mask.const_data_ptr()),
                            static_cast<T*>(grad_input.mutable_data_ptr()), grad.numel(), stream);
    });
    check_launch();
    return grad_input;
  }
};

template <template <typename> class Activation, typename... Parameters>
void implement(StableLibrary& library, const std::string& name) {
  using O = Ops<Activation, Parameters...>;
  library.impl(name.c_str(), TORCH_BOX(&O::forward));
  library.impl((name + ".out").c_str(), TORCH_BOX(&O::forward_out));
  if constexpr (kSavesMask<Activation<float>>) {
    library.impl((name + "_with_mask").c_str(), TORCH_BOX(&O::forward_with_mask));
    library.impl((name + "_with_mask.out").c_str(), TORCH_BOX(&O::forward_with_mask_out));
    library.impl((name + "_backward").c_str(), TORCH_BOX(&O::masked_backward));
  }
  if constexpr (kSavesInput<Activation<float>>) {
    library.impl((name + "_backward").c_str(), TORCH_BOX(&O::template backward<false>));
  }
  if constexpr (kSavesOutput<Activation<float>>) {
    library.impl((name + "_backward_from_output").c_str(), TORCH_BOX(&O::template backward<true>));
  }
}

}  // namespace fused_act::elementwise
