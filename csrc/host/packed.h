// What the hooks of `rematerialize` make of a tensor that is saved, as in fused_act/packing.py.
#pragma once

#include <torch/csrc/autograd/utils/wrap_outputs.h>

#include <atomic>
#include <functional>
#include <memory>

#include "node.h"

namespace fused_act::host {

namespace py = pybind11;
using Compute = std::function<Tensor(const Tensor&)>;

struct Packed {
  virtual ~Packed() = default;
  virtual Tensor get() = 0;
};

// A Python object that owns what is packed.
struct PackedObject {
  PyObject_HEAD PyObject* weak_references;
  Packed* packed;
};

inline Packed& packed_of(py::handle object) {
  return *reinterpret_cast<PackedObject*>(object.ptr())->packed;
}

inline PyTypeObject kept_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
inline PyTypeObject recomputed_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
inline PyTypeObject view_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

inline bool is_packed(py::handle object) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  return type == &kept_type || type == &recomputed_type || type == &view_type;
}

inline py::object new_object(PyTypeObject& type, std::unique_ptr<Packed> packed) {
  auto* object = PyObject_GC_New(PackedObject, &type);
  if (object == nullptr) {
    throw py::error_already_set();
  }
  object->weak_references = nullptr;
  object->packed = packed.release();
  PyObject_GC_Track(object);
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(object));
}

// A tensor that is saved as ever, and must not have been changed when it is needed: with hooks,
// torch does not look for changes. Detached if it is in the graph, or an op that saves its own
// output would keep itself alive.
struct Kept final : Packed {
  const Tensor tensor;
  const int64_t version;

  Kept(Tensor tensor, int64_t version) : tensor(std::move(tensor)), version(version) {}

  Tensor get() override {
    TORCH_CHECK(tensor._version() == version,
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: [",
                tensor.toString(), " ", tensor.sizes(), "] is at version ", tensor._version(),
                "; expected version ", version, " instead");
    return tensor;
  }
};

inline py::object keep(py::handle object) {
  const Tensor& tensor = THPVariable_Unpack(object.ptr());
  const int64_t version = tensor._version();
  if (!tensor.grad_fn()) {
    return new_object(kept_type, std::make_unique<Kept>(tensor, version));
  }
  // The class of a user's subclass may say what it is to be detached.
  Tensor detached = THPVariable_CheckExact(object.ptr()) ? tensor.tensor_data()
                                                         : object.attr("detach")().cast<Tensor>();
  return new_object(kept_type, std::make_unique<Kept>(std::move(detached), version));
}

// A tensor that is computed from `source` when it is needed, once for all who need it.
struct Recomputed final : Packed {
  const Compute compute;
  const py::object source;
  const int64_t version;  // of the tensor, when it was saved
  std::atomic<int64_t> users = 0;

  Recomputed(Compute compute, py::object source, int64_t version)
      : compute(std::move(compute)), source(std::move(source)), version(version) {}

  // Nothing is locked while it computes: two threads at once may both do so, to the same bits.
  Tensor get() override {
    Tensor found = take(Tensor());
    if (found.defined()) {
      return found;
    }
    if (Py_EnterRecursiveCall(" while a tensor is computed again") != 0) {
      throw python_error();
    }
    try {
      found = compute(packed_of(source).get());
    } catch (...) {
      Py_LeaveRecursiveCall();
      throw;
    }
    Py_LeaveRecursiveCall();
    return take(found);
  }

 private:
  std::mutex mutex_;
  Tensor value_;
  int64_t waiting_ = 0;

  // The value, `computed` or there before, which the last of those who wait for it takes along.
  Tensor take(Tensor computed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (computed.defined()) {
      std::swap(value_, computed);
      waiting_ = users;
    }
    return --waiting_ <= 0 ? std::move(value_) : value_;
  }
};

// A view of a tensor that is computed again.
struct View final : Packed {
  const py::object base;
  const std::vector<int64_t> size, stride;
  const int64_t offset;

  View(py::object base, const Tensor& view)
      : base(std::move(base)),
        size(view.sizes().vec()),
        stride(view.strides().vec()),
        offset(view.storage_offset()) {}

  Tensor get() override { return packed_of(base).get().as_strided(size, stride, offset); }
};

// One more will need what is computed again.
inline void add_user(py::handle packed) {
  if (Py_TYPE(packed.ptr()) == &view_type) {
    packed = static_cast<View&>(packed_of(packed)).base;
  }
  if (Py_TYPE(packed.ptr()) == &recomputed_type) {
    static_cast<Recomputed&>(packed_of(packed)).users++;
  }
}

// unpack(packed) -> tensor: the hook that unpacks.
inline PyObject* unpack(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(is_packed(object), "expected what was packed");
  return THPVariable_Wrap(packed_of(object).get());
  END_HANDLE_TH_ERRORS
}

inline PyObject* unpack_function = nullptr;

// The mutex of any node, which guards what it saves.
struct LockOf : Node {
  static std::mutex& get(const Node& node) { return const_cast<Node&>(node).*(&LockOf::mutex_); }
};

// What was made of the tensor that `node` holds as `saved`: null if there is none, and nothing if
// the hooks of others hold it. Nothing too while another thread runs the node or frees what it
// saves: waiting for it would be a deadlock, since its hooks may wait for Python's lock.
inline std::optional<py::object> peek(const Node& node, const SavedVariable& saved) {
  const std::unique_lock<std::mutex> lock(LockOf::get(node), std::try_to_lock);
  if (!lock) {
    return std::nullopt;
  }
  if (const auto held = saved.retrieve_unpack_hook_data()) {
    if (held->first.ptr(getPyInterpreter()) != unpack_function) {
      return std::nullopt;
    }
    return py::reinterpret_borrow<py::object>(held->second.ptr(getPyInterpreter()));
  }
  const Tensor tensor = saved.unpack();  // raises if it was changed since, or freed
  return tensor.defined() ? keep(py::cast(tensor)) : py::object();
}

}  // namespace fused_act::host
