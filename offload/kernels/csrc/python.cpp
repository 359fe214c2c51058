// The product of one weight as a function of Python: ctypes takes a tenth of a microsecond for each argument, which a
// small product notices. Only where Python's headers were there when the library was built; else ctypes calls it, too.
#if defined(__has_include)
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "expertpager_kernels.h"

namespace {

// linear(context, weight, x, tokens, out): ep_linear, addresses as integers. Without the interpreter's lock meanwhile.
PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 5;
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "linear takes %zd integers, not %zd", kCount, count);
    return nullptr;
  }
  uint64_t values[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    values[i] = PyLong_AsUnsignedLongLong(arguments[i]);
    if (values[i] == UINT64_MAX && PyErr_Occurred() != nullptr) return nullptr;
  }
  int64_t bad = 0;
  Py_BEGIN_ALLOW_THREADS
  bad = ep_linear(reinterpret_cast<ep_context*>(values[0]), reinterpret_cast<const ep_weight*>(values[1]),
                  reinterpret_cast<const float*>(values[2]), static_cast<int64_t>(values[3]), reinterpret_cast<float*>(values[4]));
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(bad);
}

PyMethodDef methods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }

#endif
#endif
