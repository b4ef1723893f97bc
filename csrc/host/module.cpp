// The Python module: `Path`, an activation in one backend, which can be called; and the type of its
// nodes, which tell of themselves what the node of the Python Function tells.
#include <torch/csrc/utils/pybind.h>

#include "packing.h"

#define FUSED_ACT_STRING_OF(name) #name
#define FUSED_ACT_STRING(name) FUSED_ACT_STRING_OF(name)
#define FUSED_ACT_JOIN_OF(a, b) a##b
#define FUSED_ACT_JOIN(a, b) FUSED_ACT_JOIN_OF(a, b)

namespace fused_act::host {
namespace {

namespace autograd = torch::autograd;
namespace py = pybind11;

struct Path {
  PyObject_HEAD vectorcallfunc call;
  const Entry* entry;
};

// What follows x in a call: a weight, or numbers. False where Python is to decide about them.
bool parse_arguments(const Entry& entry, const Tensor& x, PyObject* arguments, Tensor& weight,
                     Parameters& parameters) {
  for (size_t i = 0; i < entry.arguments.size(); i++) {
    PyObject* argument = PyTuple_GET_ITEM(arguments, static_cast<Py_ssize_t>(i));
    switch (entry.arguments[i]) {
      case Argument::kFloat:
        if (!PyFloat_CheckExact(argument)) {
          return false;
        }
        parameters.push_back(PyFloat_AS_DOUBLE(argument));
        break;
      case Argument::kDimension: {
        if (!PyLong_CheckExact(argument)) {
          return false;
        }
        int overflow = 0;
        const int64_t dimension = PyLong_AsLongLongAndOverflow(argument, &overflow);
        if (overflow != 0 || dimension < -x.dim() || dimension >= x.dim()) {
          return false;
        }
        parameters.push_back(static_cast<double>(dimension));
        break;
      }
      case Argument::kWeight:
        if (!THPVariable_CheckExact(argument)) {
          return false;
        }
        weight = THPVariable_Unpack(argument);
    }
  }
  return true;
}

// path(x, inplace, arguments) -> y, or NotImplemented where Python is to decide. The arguments are
// a tuple of what follows x.
PyObject* call_path(PyObject* self, PyObject* const* args, size_t flagged_count, PyObject* names) {
  HANDLE_TH_ERRORS
  const Entry& entry = *reinterpret_cast<Path*>(self)->entry;
  if (names != nullptr || PyVectorcall_NARGS(flagged_count) != 3 ||
      !THPVariable_CheckExact(args[0]) || !PyBool_Check(args[1]) || !PyTuple_CheckExact(args[2]) ||
      PyTuple_GET_SIZE(args[2]) != static_cast<Py_ssize_t>(entry.arguments.size())) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor x = THPVariable_Unpack(args[0]), weight;
  const bool inplace = args[1] == Py_True;
  bool needs_grad = false;
  Parameters parameters;
  if ((inplace && !entry.in_place) || !parse_arguments(entry, x, args[2], weight, parameters) ||
      !takes(entry, x, weight, inplace, needs_grad)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    if (weight.defined()) {
      autocast(entry, x, weight);
    }
    if (!weight.defined() || fits(entry, x, weight)) {
      y = needs_grad ? record(entry, x, weight, inplace, parameters)
                     : compute(entry, x, weight, inplace, parameters);
    }
  }
  if (!y.defined()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  return inplace ? Py_NewRef(args[0]) : THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

Saves saves_of(const std::string& name) {
  return name == "x" ? Saves::kX : name == "y" ? Saves::kY : Saves::kMask;
}

// Kept for good: see `Recording`.
PyObject* kept(py::handle object) { return object.inc_ref().ptr(); }

Recording recording_of(const py::tuple& fields) {
  return {fields[0].cast<std::string>(), saves_of(fields[1].cast<std::string>()), kept(fields[2]),
          kept(fields[3]), !fields[2].attr("recompute").is_none()};
}

void check_ops(const Entry& entry) {
  for (const bool inplace : {false, true}) {
    if (inplace && !entry.in_place) {
      continue;
    }
    const Recording& recording = entry.recording(inplace);
    bool complete = entry.ops[inplace ? kForwardOut : kForward].has_value() &&
                    entry.ops[backward_field(recording.saves)].has_value();
    if (recording.saves == Saves::kMask) {
      complete &= entry.ops[inplace ? kForwardWithMaskOut : kForwardWithMask].has_value();
    }
    TORCH_CHECK(complete, recording.node, ": an op is missing");
  }
}

// The keys of a plain tensor of a device, and of one that was made in inference mode.
void add_keys(std::vector<c10::DispatchKeySet>& keys, const std::string& device_type) {
  const auto key =
      c10::computeDispatchKey(std::nullopt, std::nullopt, c10::Device(device_type).type());
  const auto component = c10::toBackendComponent(key);
  const auto inference =
      c10::DispatchKeySet(key) | c10::getAutocastRelatedKeySetFromBackend(component);
  keys.push_back(inference | c10::getAutogradRelatedKeySetFromBackend(component));
  keys.push_back(inference);
}

// What an op takes after x.
std::vector<Argument> arguments_of(const c10::OperatorHandle& op) {
  std::vector<Argument> found;
  for (const auto& argument : op.schema().arguments()) {
    const auto kind = argument.type()->kind();
    found.push_back(kind == c10::TypeKind::FloatType ? Argument::kFloat
                    : kind == c10::TypeKind::IntType ? Argument::kDimension
                                                     : Argument::kWeight);
  }
  found.erase(found.begin());
  return found;
}

// Path(kernels, ops, device_types, out_of_place, in_place, takes_fp32, autocasts), where `ops` has
// the name and the overload of each op by its field, and the others are those of `Recordings`.
PyObject* make_path(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const auto arguments = py::reinterpret_borrow<py::tuple>(args);
  Entry entry{};
  for (const auto& [field, found] : arguments[1].cast<py::dict>()) {
    const auto place =
        std::find(std::begin(kFieldNames), std::end(kFieldNames), field.cast<std::string>());
    const auto name = found.cast<std::pair<std::string, std::string>>();
    entry.ops.at(place - std::begin(kFieldNames)) =
        c10::Dispatcher::singleton().findSchemaOrThrow(name.first.c_str(), name.second.c_str());
  }
  for (const auto device_type : arguments[2]) {
    add_keys(entry.keys, device_type.cast<std::string>());
  }
  entry.out_of_place = recording_of(arguments[3]);
  if (!arguments[4].is_none()) {
    entry.in_place = recording_of(arguments[4]);
  }
  entry.takes_fp32 = arguments[5].cast<bool>();
  entry.autocasts = arguments[6].cast<bool>();
  check_ops(entry);
  entry.arguments = arguments_of(*entry.ops[kForward]);
  entry.kernels = kept(arguments[0]);
  auto* path = reinterpret_cast<Path*>(type->tp_alloc(type, 0));
  if (path == nullptr) {
    return nullptr;
  }
  path->call = call_path;
  path->entry = &table().add(std::move(entry));
  return reinterpret_cast<PyObject*>(path);
  END_HANDLE_TH_ERRORS
}

// What a node tells. The names are those of the context of a Function.

PyObject* get_function(PyObject* self, void*) {
  return Py_NewRef(node_of(self).recording().function);
}

PyObject* get_kernels(PyObject* self, void*) { return Py_NewRef(node_of(self).entry.kernels); }

PyObject* get_parameters(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return node_of(self).parameters_for_python().release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* tuple_of(c10::SymIntArrayRef values) {
  py::tuple found(values.size());
  for (size_t i = 0; i < values.size(); i++) {
    found[i] = py::cast(values[i]);
  }
  return found.release().ptr();
}

PyObject* get_shape(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return tuple_of(node_of(self).shape);
  END_HANDLE_TH_ERRORS
}

PyObject* get_stride(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return tuple_of(node_of(self).stride);
  END_HANDLE_TH_ERRORS
}

PyObject* get_input_version(PyObject* self, void*) {
  return PyLong_FromLongLong(node_of(self).input_version);
}

PyObject* get_saved_tensors(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  ActivationNode& node = node_of(self);
  THPObjectPtr list(autograd::utils::wrap(node.in_graph(node.unpack())));
  return PySequence_Tuple(list.get());
  END_HANDLE_TH_ERRORS
}

PyObject* get_raw_saved_tensors(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  const auto policy = py::return_value_policy::reference_internal;
  ActivationNode& node = node_of(self);
  py::list found;
  found.append(py::cast(node.saved, policy, self));
  if (node.has_weight()) {
    found.append(py::cast(node.beside, policy, self));
  }
  return py::tuple(found).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* represent(PyObject* self) {
  return PyUnicode_FromFormat("<%s object at %p>", node_of(self).name().c_str(), self);
}

using namespace torch::autograd;  // which the macro of torch expects

PyGetSetDef node_properties[] = {
    THP_FUNCTION_DEFAULT_PROPERTIES,
    {"_forward_cls", get_function, nullptr, nullptr, nullptr},
    {"kernels", get_kernels, nullptr, nullptr, nullptr},
    {"parameters", get_parameters, nullptr, nullptr, nullptr},
    {"shape", get_shape, nullptr, nullptr, nullptr},
    {"stride", get_stride, nullptr, nullptr, nullptr},
    {"input_version", get_input_version, nullptr, nullptr, nullptr},
    {"saved_tensors", get_saved_tensors, nullptr, nullptr, nullptr},
    {"_raw_saved_tensors", get_raw_saved_tensors, nullptr, nullptr, nullptr},
    {nullptr},
};

PyTypeObject path_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyTypeObject node_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyModuleDef module = {PyModuleDef_HEAD_INIT, FUSED_ACT_STRING(FUSED_ACT_HOST), nullptr, -1};

PyObject* make_module() {
  path_type.tp_name = "fused_act.host.Path";
  path_type.tp_basicsize = sizeof(Path);
  path_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  path_type.tp_vectorcall_offset = offsetof(Path, call);
  path_type.tp_call = PyVectorcall_Call;
  path_type.tp_new = make_path;
  node_type.tp_repr = represent;
  // For a type of this name torch prints the name that the node itself has.
  autograd::_initFunctionPyTypeObject(node_type, "fused_act.CppFunction", node_properties, nullptr);
  autograd::registerCppFunction(typeid(ActivationNode), &node_type);
  THPObjectPtr contexts(PyImport_ImportModule("torch.utils._device"));
  if (!contexts) {
    return nullptr;
  }
  device_context =
      reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(contexts.get(), "DeviceContext"));
  THPObjectPtr made(PyModule_Create(&module));
  if (device_context == nullptr || !made || PyModule_AddType(made.get(), &path_type) < 0 ||
      PyModule_AddObjectRef(made.get(), "Node", reinterpret_cast<PyObject*>(&node_type)) < 0 ||
      !add_packing(made.get())) {
    return nullptr;
  }
#ifdef Py_GIL_DISABLED
  PyUnstable_Module_SetGIL(made.get(), Py_MOD_GIL_NOT_USED);
#endif
  return made.release();
}

}  // namespace
}  // namespace fused_act::host

// FUSED_ACT_HOST is the module's name, which carries the torch that it is built for.
PyMODINIT_FUNC FUSED_ACT_JOIN(PyInit_, FUSED_ACT_HOST)() { return fused_act::host::make_module(); }
