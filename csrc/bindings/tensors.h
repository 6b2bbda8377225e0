// PyTorch's tensors in C++ without its headers: by the C interface of DLPack 1.x, which torch.Tensor offers as
// __dlpack_c_exchange_api__ (torch 2.10 and later). https://dmlc.github.io/dlpack/latest/c_api.html
//
// For a small input the Python around a kernel takes several times as long as the kernel: attributes of tensors, checks,
// allocations. The functions built on this do all that in a microsecond or two. Each serves the common case of its op
// and returns None for every other, which then takes the way through Python, where errors are found and named.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>

namespace gpt2fast {
namespace tensors {

namespace py = pybind11;

// ---- DLPack's structures -----------------------------------------------------------------------------------

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ManagedTensor;
struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  int (*allocate)(DLTensor* prototype, ManagedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*from_object)(void* object, ManagedTensor** out);
  int (*to_object)(ManagedTensor* tensor, void** object);
  int (*view)(void* object, DLTensor* out);
  int (*stream)(int32_t type, int32_t id, void** out);
};
constexpr int32_t CPU = 1;
constexpr int32_t MOST_DIMENSIONS = 8;
enum : int { FP32, BF16, FP16, INT64, OTHER };  // the first three are the kernels' codes

// ---- what Python gives once --------------------------------------------------------------------------------

struct Torch {
  const ExchangeApi* api;
  PyObject *tensor, *parameter;  // types of which an instance is taken as it is
  PyObject *empty_like, *threads, *grad_enabled, *layer_norm;  // torch's functions
  PyObject *watchers[4];  // functions that are false where nobody watches or transforms what is done
  PyObject *forward_ad, *current_level;  // the module and the name of its attribute
  PyObject *requires_grad, *new_empty;  // names
};
inline Torch torch{};

inline PyObject* none() { return Py_NewRef(Py_None); }

inline long number_of(PyObject* function) {
  const py::object result = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
  if (!result) throw py::error_already_set();
  const long number = PyLong_AsLong(result.ptr());  // of a bool, too
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

// Whether nobody watches, traces or transforms what is done (gpt2fast.ops.registry.is_plain, without the types).
inline bool quiet() {
  for (PyObject* watcher : torch.watchers)
    if (number_of(watcher)) return false;
  const py::object level =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(torch.forward_ad, torch.current_level));
  if (!level) throw py::error_already_set();
  return PyLong_AsLong(level.ptr()) < 0;
}

inline int threads() { return int(number_of(torch.threads)); }

// ---- tensors -----------------------------------------------------------------------------------------------

struct Tensor {
  PyObject* object = nullptr;  // null: absent
  DLTensor t{};

  explicit operator bool() const { return object; }
  uintptr_t address() const { return object ? uintptr_t(t.data) + t.byte_offset : 0; }
  int64_t size(int axis) const { return t.shape[axis < 0 ? t.ndim + axis : axis]; }
  int64_t stride(int axis) const { return t.strides[axis < 0 ? t.ndim + axis : axis]; }
  int64_t count() const {
    int64_t product = 1;
    for (int i = 0; i < t.ndim; ++i) product *= t.shape[i];
    return product;
  }
  int dtype() const {
    if (t.dtype.lanes != 1) return OTHER;
    if (t.dtype.code == 2) return t.dtype.bits == 32 ? FP32 : t.dtype.bits == 16 ? FP16 : OTHER;
    if (t.dtype.code == 4) return t.dtype.bits == 16 ? BF16 : OTHER;
    return t.dtype.code == 0 && t.dtype.bits == 64 ? INT64 : OTHER;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = t.ndim; i-- > 0;) {
      if (t.shape[i] != 1 && t.strides[i] != expected) return false;
      expected *= t.shape[i];
    }
    return true;
  }
  bool same_shape(const Tensor& other) const {
    if (t.ndim != other.t.ndim) return false;
    for (int i = 0; i < t.ndim; ++i)
      if (t.shape[i] != other.t.shape[i]) return false;
    return true;
  }
  bool has_shape(int64_t n) const { return t.ndim == 1 && t.shape[0] == n; }
  bool wants_gradient() const {
    if (!object) return false;
    const py::object answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, torch.requires_grad));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }
};

// Rows of contiguous elements, at one distance.
struct Rows {
  int64_t count = 0, columns = 0, stride = 0;
  bool fits = false;
  Rows(const Tensor& x) {
    if (x.t.ndim < 1) return;
    columns = x.size(-1);
    if (columns > 1 && x.stride(-1) != 1) return;
    count = 1;
    stride = columns;
    int64_t expected = 0;  // of the next axis outwards, once an axis of more than one row is met
    for (int i = x.t.ndim - 1; i-- > 0;) {
      if (x.t.shape[i] != 1) {
        if (count == 1) stride = x.t.strides[i];
        else if (x.t.strides[i] != expected) return;
        expected = x.t.strides[i] * x.t.shape[i];
      }
      count *= x.t.shape[i];
    }
    fits = true;
  }
};

// The arguments of a call, one after the other.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : next_(values), end_(values + count) {}

  // A plain tensor on the CPU; `fine` turns false where it is something else.
  Tensor tensor() { return as_tensor(take(), false); }
  Tensor optional() { return as_tensor(take(), true); }
  double number() {
    PyObject* value = take();
    if (value && PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (value && PyLong_CheckExact(value)) return PyLong_AsDouble(value);
    fine = false;
    return 0;
  }
  // A number as it is, to hand on.
  PyObject* number_object() {
    number();
    return fine ? next_[-1] : nullptr;
  }
  int64_t integer() {
    PyObject* value = take();
    if (value && PyLong_CheckExact(value)) {
      const int64_t found = PyLong_AsLongLong(value);
      if (found != -1 || !PyErr_Occurred()) return found;
      PyErr_Clear();
    }
    fine = false;
    return 0;
  }
  bool flag() {
    PyObject* value = take();
    if (value != Py_True && value != Py_False) fine = false;
    return value == Py_True;
  }
  bool is_none() const { return next_ < end_ && *next_ == Py_None; }
  PyObject* any() { return take(); }
  // The name of a backend: whether it is this one.
  void backend() {
    PyObject* value = take();
    if (!value || !PyUnicode_Check(value) || PyUnicode_CompareWithASCIIString(value, "cpu")) fine = false;
  }

  bool fine = true;

 private:
  PyObject* take() { return next_ < end_ ? *next_++ : (fine = false, nullptr); }
  Tensor as_tensor(PyObject* value, bool may_lack) {
    Tensor found;
    if (!value || (may_lack && value == Py_None)) return found;
    const PyObject* type = (PyObject*)Py_TYPE(value);
    if (type != torch.tensor && type != torch.parameter) {
      fine = false;
    } else if (torch.api->view(value, &found.t)) {  // sparse, for example
      PyErr_Clear();
      fine = false;
    } else if (found.t.device.type != CPU || found.t.ndim > MOST_DIMENSIONS) {
      fine = false;
    } else {
      found.object = value;
    }
    return found;
  }
  PyObject *const *next_, *const *end_;
};

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// A new tensor in PyTorch's memory, and where it lies.
struct Made {
  py::object object;
  uintptr_t address = 0;
  explicit Made(py::object made) : object(std::move(made)) {
    DLTensor t;
    if (torch.api->view(object.ptr(), &t)) throw py::error_already_set();
    address = uintptr_t(t.data) + t.byte_offset;
  }
  Made() {}
  py::object or_none() const { return object ? object : py::none(); }
};

// Of dropout: an int64 tensor of one element, or none.
inline bool is_seed(const Tensor& seed) { return !seed || (seed.dtype() == INT64 && seed.count() == 1); }
inline int64_t seed_of(const Tensor& seed) { return seed ? *(const int64_t*)seed.address() : 0; }

// Contiguous, of the shape and dtype of another.
inline Made made_like(const Tensor& x) {
  if (x.contiguous()) return Made(checked(PyObject_CallOneArg(torch.empty_like, x.object)));
  py::tuple shape(x.t.ndim);
  for (int i = 0; i < x.t.ndim; ++i) shape[i] = py::int_(x.t.shape[i]);
  PyObject* arguments[] = {x.object, shape.ptr()};
  return Made(checked(PyObject_VectorcallMethod(torch.new_empty, arguments, 2, nullptr)));
}

inline void set_error(void*, const char* kind, const char* message) {
  PyErr_Format(PyExc_RuntimeError, "%s: %s", kind, message);
}

inline Made made(DLTensor t) {
  ManagedTensor* managed = nullptr;
  if (torch.api->allocate(&t, &managed, nullptr, set_error)) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    throw py::error_already_set();
  }
  void* object = nullptr;
  if (torch.api->to_object(managed, &object)) throw py::error_already_set();
  return Made(py::reinterpret_steal<py::object>((PyObject*)object));
}
// fp32 or of another's dtype, contiguous.
inline Made made(std::initializer_list<int64_t> shape, const Tensor* like = nullptr) {
  DLTensor t{};
  t.device.type = CPU;
  t.ndim = int32_t(shape.size());
  t.dtype = {2, 32, 1};
  if (like) t.dtype = like->t.dtype;
  t.shape = const_cast<int64_t*>(shape.begin());
  return made(t);
}
// fp32, of the shape of another, or with another number of columns.
inline Made made_of_shape(const Tensor& x, int64_t columns = -1) {
  int64_t shape[MOST_DIMENSIONS] = {};
  for (int i = 0; i < x.t.ndim; ++i) shape[i] = x.t.shape[i];
  if (columns >= 0) shape[x.t.ndim - 1] = columns;
  DLTensor t{};
  t.device.type = CPU;
  t.ndim = x.t.ndim;
  t.dtype = {2, 32, 1};
  t.shape = shape;
  return made(t);
}

// Memory that a thread keeps for its kernels, one call at a time.
class Scratch {
 public:
  ~Scratch() { free(kept_); }
  // As much as a call needs; more than MOST is not kept.
  struct Piece {
    float* floats;
    bool kept;
    Piece(float* f, bool k) : floats(f), kept(k) {}
    Piece(const Piece&) = delete;
    ~Piece() {
      if (!kept) free(floats);
    }
    operator uintptr_t() const { return uintptr_t(floats); }
  };
  Piece take(int64_t floats) {
    if (floats <= size_) return {kept_, true};
    if (floats * 4 > MOST) return {allocate(floats), false};
    free(kept_);
    size_ = 0;
    kept_ = nullptr;
    kept_ = allocate(floats);
    size_ = floats;
    return {kept_, true};
  }

 private:
  static constexpr int64_t MOST = 64 << 20;
  static float* allocate(int64_t floats) {
    void* found = aligned_alloc(64, size_t(floats * 4 + 63) / 64 * 64);
    if (!found) {
      PyErr_NoMemory();
      throw py::error_already_set();
    }
    return (float*)found;
  }
  float* kept_ = nullptr;
  int64_t size_ = 0;
};
inline thread_local Scratch scratch;

// How a public function is to go on; 0: through Python.
enum : long { THROUGH_PYTHON, PYTORCH, WITHOUT_GRADIENT, WITH_GRADIENT };
inline bool is_small(const Tensor& x, double least) { return x.dtype() == FP32 && double(x.count()) < least; }
inline PyObject* way(const Tensor& x, double least, std::initializer_list<const Tensor*> inputs) {
  if (is_small(x, least)) return PyLong_FromLong(PYTORCH);  // right whoever watches or transforms
  if (!quiet()) return PyLong_FromLong(THROUGH_PYTHON);
  if (number_of(torch.grad_enabled))
    for (const Tensor* input : inputs)
      if (input->wants_gradient()) return PyLong_FromLong(WITH_GRADIENT);
  return PyLong_FromLong(WITHOUT_GRADIENT);
}
inline PyObject* through_python() { return PyLong_FromLong(THROUGH_PYTHON); }

// Python's end of a function: errors come as exceptions.
template <PyObject* (*FUNCTION)(Arguments&)>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
  try {
    Arguments arguments(values, count);
    return FUNCTION(arguments);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
template <PyObject* (*FUNCTION)(Arguments&)>
void define(py::module_& module, const char* name) {
  static PyMethodDef definition{name, (PyCFunction)(void (*)(void))entry<FUNCTION>, METH_FASTCALL, nullptr};
  module.add_object(name, checked(PyCFunction_New(&definition, module.ptr())));
}

// connect(capsule, types, functions, watchers, forward_ad): True where the interface is one that is known.
inline bool connect(py::capsule capsule, py::tuple types, py::tuple functions, py::tuple watchers,
                    py::object forward_ad) {
  const auto* api = (const ExchangeApi*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!api) throw py::error_already_set();
  if (api->version.major != 1 || !api->view) return false;
  const auto keep = [](py::handle object) { return object.inc_ref().ptr(); };
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  torch = Torch{api,
                keep(types[0]),
                keep(types[1]),
                keep(functions[0]),
                keep(functions[1]),
                keep(functions[2]),
                keep(functions[3]),
                {keep(watchers[0]), keep(watchers[1]), keep(watchers[2]), keep(watchers[3])},
                keep(forward_ad),
                name("_current_level"),
                name("requires_grad"),
                name("new_empty")};
  return true;
}

}  // namespace tensors
}  // namespace gpt2fast
