// The Python module minilm._C. Importing it registers the ops (bindings.cpp) and chooses the instruction set
// of the CPU kernels: the best that this machine runs, or the one that MINILM_CPU_ISA names. Only Python's
// limited API is used.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "memory.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(minilm::cpu_kernels().name); }

PyObject* cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (const std::string& isa : minilm::runnable_isas()) {
    PyObject* name = PyUnicode_FromString(isa.c_str());
    const bool failed = name == nullptr || PyList_Append(names, name) < 0;
    Py_XDECREF(name);
    if (failed) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* panel_width(PyObject*, PyObject*) { return PyLong_FromLong(minilm::cpu_kernels().panel); }

PyObject* prefer_large_pages(PyObject*, PyObject* arguments) {
  unsigned long long address = 0, bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
  minilm::prefer_large_pages(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)), bytes);
  Py_RETURN_NONE;
}

PyObject* packed_bytes(PyObject*, PyObject* arguments) {
  long long format, in, places;
  if (!PyArg_ParseTuple(arguments, "LLL", &format, &in, &places)) return nullptr;
  const auto& kernels = minilm::cpu_kernels();
  if (format < 0 || format > 5 || in < 1 || places < 0 || places % kernels.panel != 0) {
    PyErr_SetString(PyExc_ValueError, "packed_bytes: expected a format, inputs, and places in whole panels");
    return nullptr;
  }
  return PyLong_FromLongLong(kernels.packed_bytes(static_cast<minilm::Format>(format), in, places));
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels in use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "The instruction sets that this machine can run, the best last."},
    {"panel_width", panel_width, METH_NOARGS, "Outputs in a panel of a packed weight."},
    {"prefer_large_pages", prefer_large_pages, METH_VARARGS,
     "Asks for large pages: address and size of memory whose content may be lost."},
    {"packed_bytes", packed_bytes, METH_VARARGS, "(format, in, places) -> bytes of a packed weight."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Native ops of minilm.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  const char* wanted = std::getenv("MINILM_CPU_ISA");
  try {
    minilm::select_isa(wanted == nullptr ? "" : wanted);
  } catch (const std::runtime_error& error) {
    PyErr_Format(PyExc_RuntimeError, "MINILM_CPU_ISA=%s: %s", wanted == nullptr ? "" : wanted, error.what());
    return nullptr;
  }
  return PyModule_Create(&module);
}
