// The hooks of `rematerialize` and their types in Python: those of fused_act/packing.py, whose
// place they take, because hooks meet every tensor that anybody saves.
#pragma once

#include <tuple>

#include "recomputing.h"

namespace fused_act::host {

// The same for all who save it, unless it was written since.
inline py::object recomputed(Rules& rules, const NodePointer& node, const Tensor& y) {
  static const py::handle key = PyUnicode_InternFromString("fused_act.rematerialize");
  const auto object = py::reinterpret_steal<py::object>(functionToPyObject(node));
  const py::object metadata = object.attr("metadata");
  const py::object reference = metadata.attr("get")(key);
  const py::object known = reference.is_none() ? reference : reference();
  if (!known.is_none()) {
    const bool same = static_cast<Recomputed&>(packed_of(known)).version == y._version();
    return same ? known : py::object();
  }
  auto how = recompute(rules, *node, object, y);
  if (!how) {
    return {};
  }
  add_user(how->source);
  const py::object found =
      new_object(recomputed_type,
                 std::make_unique<Recomputed>(std::move(how->compute), how->source, y._version()));
  const auto made = py::weakref(found);
  metadata[key] = made;
  return found;
}

// Whether size, stride and offset are enough to make `view` out of `base`: see packing.py.
inline bool is_layout_of(const Tensor& base, const Tensor& view) {
  return view.scalar_type() == base.scalar_type() && !view.is_neg() && !view.is_conj();
}

inline py::object pack(Rules& rules, py::handle object) {
  const Tensor& tensor = THPVariable_Unpack(object.ptr());
  const bool is_view = tensor.is_view();
  const Tensor base = is_view ? Tensor(tensor._base()) : tensor;
  const NodePointer node = base.grad_fn();
  if (!node || base.output_nr() != 0 || !rules.takes(node) || !is_layout_of(base, tensor)) {
    return keep(object);
  }
  const py::object base_object = is_view ? py::cast(base) : py::object();
  if (!THPVariable_CheckExact(object.ptr()) ||
      (is_view && !THPVariable_CheckExact(base_object.ptr()))) {
    return keep(object);
  }
  py::object found = recomputed(rules, node, base);
  if (!found) {
    return keep(object);
  }
  if (is_view) {
    found = new_object(view_type, std::make_unique<View>(std::move(found), tensor));
  }
  add_user(found);
  return found;
}

// Pack(may_recompute, recompute, check_bits, norm): the hook that packs. Its rules are never freed.
struct Pack {
  PyObject_HEAD vectorcallfunc call;
  Rules* rules;
};

inline PyObject* call_pack(PyObject* self, PyObject* const* args, size_t flagged_count, PyObject*) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyVectorcall_NARGS(flagged_count) == 1 && THPVariable_Check(args[0]),
                   "expected a tensor");
  return pack(*reinterpret_cast<Pack*>(self)->rules, args[0]).release().ptr();
  END_HANDLE_TH_ERRORS
}

inline PyObject* make_pack(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  auto [may_recompute, recompute, check_bits, norm] =
      py::handle(args).cast<std::tuple<py::object, py::object, py::object, bool>>();
  auto* pack = reinterpret_cast<Pack*>(type->tp_alloc(type, 0));
  if (pack == nullptr) {
    return nullptr;
  }
  pack->call = call_pack;
  pack->rules =
      new Rules(std::move(may_recompute), std::move(recompute), std::move(check_bits), norm);
  return reinterpret_cast<PyObject*>(pack);
  END_HANDLE_TH_ERRORS
}

inline PyObject* make_kept(PyTypeObject*, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const auto [object] = py::handle(args).cast<std::tuple<py::object>>();
  TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), "expected a tensor");
  return keep(object).release().ptr();
  END_HANDLE_TH_ERRORS
}

inline PyObject* get_tensor(PyObject* self, void*) {
  return THPVariable_Wrap(static_cast<Kept&>(packed_of(self)).tensor);
}

inline void free_object(PyObject* self) {
  auto* object = reinterpret_cast<PackedObject*>(self);
  PyObject_GC_UnTrack(self);
  if (object->weak_references != nullptr) {
    PyObject_ClearWeakRefs(self);
  }
  delete object->packed;
  PyObject_GC_Del(self);
}

// Adds the types and the hooks to the module; false if an error was set.
inline bool add_packing(PyObject* module) {
  static PyMethodDef get[] = {
      {"get", [](PyObject* self, PyObject*) { return unpack(nullptr, self); }, METH_NOARGS,
       nullptr},
      {nullptr}};
  static PyMethodDef unpack_method = {"unpack", unpack, METH_O, nullptr};
  static PyGetSetDef kept_properties[] = {{"tensor", get_tensor, nullptr, nullptr, nullptr},
                                          {nullptr}};
  static PyTypeObject pack_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  kept_type.tp_name = "fused_act.host.Kept";
  kept_type.tp_new = make_kept;
  kept_type.tp_getset = kept_properties;
  recomputed_type.tp_name = "fused_act.host.Recomputed";
  view_type.tp_name = "fused_act.host.View";
  for (PyTypeObject* type : {&kept_type, &recomputed_type, &view_type}) {
    type->tp_basicsize = sizeof(PackedObject);
    // Tracked, so that `gc.get_objects()` lists what is kept. Nothing in it leads back to it.
    type->tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject*, visitproc, void*) { return 0; };
    type->tp_dealloc = free_object;
    type->tp_weaklistoffset = offsetof(PackedObject, weak_references);
    type->tp_methods = get;
    if (PyModule_AddType(module, type) < 0) {
      return false;
    }
  }
  pack_type.tp_name = "fused_act.host.Pack";
  pack_type.tp_basicsize = sizeof(Pack);
  pack_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  pack_type.tp_vectorcall_offset = offsetof(Pack, call);
  pack_type.tp_call = PyVectorcall_Call;
  pack_type.tp_new = make_pack;
  unpack_function = PyCFunction_New(&unpack_method, nullptr);
  return unpack_function != nullptr && PyModule_AddType(module, &pack_type) == 0 &&
         PyModule_AddObjectRef(module, "unpack", unpack_function) == 0;
}

}  // namespace fused_act::host
