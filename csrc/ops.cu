// The raw ops of the namespace fused_act_cuda: checks, allocation, launch. fused_act/ops.py has the
// schemas. Adding an activation takes one line, at the end.
//
// LibTorch's stable ABI only: one library for torch >= 2.10 and every Python.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "activations.cuh"
#include "elementwise.cuh"
#include "mirrored.cuh"
#include "weighted.cuh"

// Only libtorch_cuda has this one. Weak, or the library would not load in a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fused_act {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using torch::stable::detail::StableLibrary;

cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fused_act: this torch has no CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Call `run` with a value of the element type of x.
template <typename Run>
void with_element_type(const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "fused_act: expected float16, bfloat16 or float32, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

bool equal(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Python checks what users pass in and raises the better errors; this keeps memory safe below it.
void check_match(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_cuda() && other.is_cuda(), "fused_act: expected CUDA tensors");
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type() && equal(x.sizes(), other.sizes()) &&
                      x.get_device_index() == other.get_device_index(),
                  "fused_act: expected tensors of one dtype, shape and device");
}

// Whether a tensor of this shape, which has elements, fills its memory with this stride.
bool is_dense(torch::headeronly::IntHeaderOnlyArrayRef shape,
              torch::headeronly::IntHeaderOnlyArrayRef stride) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (size_t i = 0; i < stride.size(); i++) {
    if (shape[i] != 1) {
      dimensions.emplace_back(stride[i], shape[i]);
    }
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [step, size] : dimensions) {
    if (step != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Whether a and b, of one size, share memory but start at different places.
bool overlap_partially(const Tensor& a, const Tensor& b) {
  const auto distance =
      static_cast<const char*>(a.const_data_ptr()) - static_cast<const char*>(b.const_data_ptr());
  return distance != 0 && std::abs(distance) < b.numel() * static_cast<int64_t>(b.element_size());
}

// copy_ refuses an expanded `out` too, but through the stable ABI its message is lost.
void check_not_expanded(const Tensor& out) {
  for (int64_t i = 0; i < out.dim(); i++) {
    STD_TORCH_CHECK(out.numel() == 0 || out.size(i) < 2 || out.stride(i) != 0,
                    "unsupported operation: more than one element of the written-to tensor refers "
                    "to a single memory location. Please clone() the tensor before performing the "
                    "operation.");
  }
}

// A mask for x, whose elements lie in memory as `stride`, of a dense tensor, says.
void check_mask(const Tensor& x, const Tensor& mask, const std::vector<int64_t>& stride) {
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

Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype,
                     const Tensor& like) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &result));
  return Tensor(result);
}

Tensor empty_mask(const Tensor& x) {
  const int64_t size = (x.numel() + 7) / 8;
  const int64_t stride = 1;
  return empty_strided({&size, 1}, {&stride, 1}, aoti_torch_dtype_uint8(), x);
}

int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// Whether the elements of x lie in memory as `stride` says. The stride of a dimension of size 1 is
// of no account: channels_last 1 x 1 images are contiguous.
bool has_layout(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef stride) {
  for (int64_t i = 0; i < x.dim(); i++) {
    if (x.size(i) != 1 && x.stride(i) != stride[i]) {
      return false;
    }
  }
  return true;
}

// x in the strides of `like`: itself or a copy.
Tensor with_layout_of(const Tensor& like, const Tensor& x) {
  if (has_layout(x, like.strides())) {
    return x;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess,
                  "fused_act: the kernel did not launch: ", cudaGetErrorString(error));
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
    // empty_like keeps the strides of a dense tensor and of no other.
    Tensor y = out.is_contiguous() ? out : torch::stable::empty_like(out);
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
    Tensor y = torch::stable::empty_like(x);
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
    Tensor y = torch::stable::empty_like(x);
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
    Tensor grad_input = torch::stable::empty_like(saved);
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

// A dense x as a matrix, along `dim`, and y: as fused_act.mirrored.Layout has it.
struct Layout {
  MirroredMatrix matrix;
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

int64_t wrapped(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(-x.dim() <= dim && dim < x.dim(), "fused_act: expected dim of a tensor of ",
                  x.dim(), " dimensions, got ", dim);
  return dim < 0 ? dim + x.dim() : dim;
}

// The ops of y = cat([f(x), f(-x)], dim).
template <template <typename> class Activation>
struct MirroredOps {
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
        launch_mirrored_forward<kMasked>(Activation<T>{}, static_cast<const T*>(x.const_data_ptr()),
                                         static_cast<T*>(y.mutable_data_ptr()), bits, layout.matrix,
                                         stream);
      });
      check_launch();
    }
    return {y, mask};
  }

  static Tensor mirrored_forward(const Tensor& x, int64_t dim) {
    check_match(x, x);
    const DeviceGuard guard(x.get_device_index());
    return std::get<0>(run_forward<false>(x, dim));
  }

  static std::tuple<Tensor, Tensor> mirrored_forward_with_mask(const Tensor& x, int64_t dim) {
    check_match(x, x);
    const DeviceGuard guard(x.get_device_index());
    return run_forward<true>(x, dim);
  }

  static Tensor mirrored_backward(const Tensor& grad_output, const Tensor& mask, int64_t dim,
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
      launch_mirrored_backward(Activation<T>{}, static_cast<const T*>(grad.const_data_ptr()),
                               static_cast<const uint8_t*>(mask.const_data_ptr()),
                               static_cast<T*>(grad_input.mutable_data_ptr()), layout.matrix,
                               stream);
    });
    check_launch();
    return grad_input;
  }
};

template <template <typename> class Activation>
void implement_mirrored(StableLibrary& library, const std::string& name) {
  using O = MirroredOps<Activation>;
  library.impl(name.c_str(), TORCH_BOX(&O::mirrored_forward));
  library.impl((name + "_with_mask").c_str(), TORCH_BOX(&O::mirrored_forward_with_mask));
  library.impl((name + "_backward").c_str(), TORCH_BOX(&O::mirrored_backward));
}

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

// The ops of one activation with a weight.
template <template <typename> class Activation>
struct WeightedOps {
  static void check_weight(const Tensor& x, const Tensor& weight) {
    const int64_t channels = x.dim() > 1 ? x.size(1) : 1;
    STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == x.get_device_index() &&
                        weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                        weight.dim() == 1 && (weight.numel() == 1 || weight.numel() == channels),
                    "fused_act: expected a contiguous float32 weight of 1 or ", channels,
                    " elements, got ", weight.numel());
  }

  // Call `run` with the width of accesses and whether columns have the weights.
  template <typename T, typename Run, typename... Pointers>
  static void with_variant(const Tensor& x, const Tensor& weight, Run run, Pointers... pointers) {
    const int64_t inner = weight.numel() == 1 ? 0 : x.stride(1);
    auto with_width = [&](auto width) {
      using Chosen = Tile<T, decltype(width)::value>;
      if (inner == 1) {
        run(width, std::true_type{},
            Chosen::template matrix<true>(x.numel(), weight.numel(), inner));
      } else {
        run(width, std::false_type{},
            Chosen::template matrix<false>(x.numel(), weight.numel(), inner));
      }
    };
    with_widest_weighted_access<T>(with_width, weight.numel(), inner, pointers...);
  }

  static Tensor forward(const Tensor& input, const Tensor& weight) {
    check_match(input, input);
    check_weight(input, weight);
    const DeviceGuard guard(input.get_device_index());
    Tensor y = torch::stable::empty_like(input);
    if (input.numel() == 0) {
      return y;
    }
    const Tensor x = with_layout_of(y, input);
    const cudaStream_t stream = current_stream(x);
    with_element_type(x, [&](auto element) {
      using T = decltype(element);
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      T* y_ptr = static_cast<T*>(y.mutable_data_ptr());
      auto launch = [&](auto width, auto by_column, const WeightedMatrix& matrix) {
        constexpr int kWidth = decltype(width)::value;
        weighted_forward_kernel<kWidth, decltype(by_column)::value, Activation>
            <<<Tile<T, kWidth>::blocks(matrix), kThreads, 0, stream>>>(
                x_ptr, static_cast<const float*>(weight.const_data_ptr()), y_ptr, matrix);
      };
      with_variant<T>(x, weight, launch, x_ptr, y_ptr);
    });
    check_launch();
    return y;
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                             const Tensor& weight) {
    check_match(grad_output, input);
    check_weight(input, weight);
    const DeviceGuard guard(input.get_device_index());
    Tensor grad_input = torch::stable::empty_like(input);
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
      auto launch = [&](auto width, auto by_column, const WeightedMatrix& matrix) {
        constexpr int kWidth = decltype(width)::value;
        const int64_t outer = decltype(by_column)::value ? Tile<T, kWidth>::row_blocks(matrix)
                                                         : matrix.rows() / matrix.weights;
        const int64_t inner = decltype(by_column)::value ? 1 : matrix.column_blocks;
        sums = torch::stable::new_empty(weight, {outer, matrix.weights, inner});
        weighted_backward_kernel<kWidth, decltype(by_column)::value, Activation>
            <<<Tile<T, kWidth>::blocks(matrix), kThreads, 0, stream>>>(
                grad_ptr, x_ptr, static_cast<const float*>(weight.const_data_ptr()), result_ptr,
                static_cast<float*>(sums.mutable_data_ptr()), matrix);
      };
      with_variant<T>(x, weight, launch, grad_ptr, x_ptr, result_ptr);
    });
    check_launch();
    const int64_t dimensions[] = {0, 2};
    return {grad_input,
            torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(dimensions, 2))};
  }
};

template <template <typename> class Activation>
void implement_weighted(StableLibrary& library, const std::string& name) {
  using O = WeightedOps<Activation>;
  library.impl(name.c_str(), TORCH_BOX(&O::forward));
  library.impl((name + "_backward").c_str(), TORCH_BOX(&O::backward));
}

STABLE_TORCH_LIBRARY_IMPL(fused_act_cuda, CUDA, library) {
  implement<Mish>(library, "mish");
  implement<Swish, double>(library, "swish");
  implement<ReLU6>(library, "relu6");
  implement<Sigmoid>(library, "sigmoid");
  implement<Tanh>(library, "tanh");
  implement<ReLU>(library, "relu");
  implement<LeakyReLU, double>(library, "leaky_relu");
  implement<SELU>(library, "selu");
  implement_mirrored<ReLU>(library, "crelu");
  implement_weighted<PReLU>(library, "prelu");
  implement_weighted<Swish>(library, "learnable_swish");
}

}  // namespace
}  // namespace fused_act
