// The Python module minilm._C. Importing it registers the ops (bindings.cpp) and selects the instruction set
// of the CPU kernels: the best of this machine, or the one in MINILM_CPU_ISA. It uses only Python's limited
// API.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __linux__
#include <malloc.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "memory.h"
#include "threads.h"

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

PyObject* give_back(PyObject*, PyObject* arguments) {
  unsigned long long address = 0, bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
  minilm::give_back(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)), bytes);
  Py_RETURN_NONE;
}

PyObject* trim(PyObject*, PyObject*) {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
  Py_RETURN_NONE;
}

PyObject* unmap_code(PyObject*, PyObject*) {
  minilm::unmap_code();
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

// (owners, keys, things, dicts, sizes, modules, types): whether every thing is still the value of its key in
// its owner, a dict (None: no such key), every dict has its size and every module its type. This is checked
// once per call for everything in a model; in Python it would take ten times as long.
PyObject* same(PyObject*, PyObject* arguments) {
  PyObject *owners, *keys, *things, *dicts, *sizes, *modules, *types;
  PyTypeObject* kind = &PyTuple_Type;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O!O!O!O!", kind, &owners, kind, &keys, kind, &things, kind, &dicts,
                        kind, &sizes, kind, &modules, kind, &types)) {
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_Size(owners);
  if (PyTuple_Size(keys) != count || PyTuple_Size(things) != count ||
      PyTuple_Size(dicts) != PyTuple_Size(sizes) || PyTuple_Size(modules) != PyTuple_Size(types)) {
    PyErr_SetString(PyExc_ValueError, "same: the tuples have different lengths");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* now = PyDict_GetItemWithError(PyTuple_GetItem(owners, i), PyTuple_GetItem(keys, i));
    if (now == nullptr && PyErr_Occurred()) return nullptr;
    if ((now == nullptr ? Py_None : now) != PyTuple_GetItem(things, i)) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0, all = PyTuple_Size(dicts); i < all; ++i) {
    const Py_ssize_t wanted = PyLong_AsSsize_t(PyTuple_GetItem(sizes, i));
    if (wanted == -1 && PyErr_Occurred()) return nullptr;
    if (PyDict_Size(PyTuple_GetItem(dicts, i)) != wanted) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_FALSE;
    }
  }
  for (Py_ssize_t i = 0, all = PyTuple_Size(modules); i < all; ++i) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GetItem(modules, i)));
    if (type != PyTuple_GetItem(types, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* limit_threads(PyObject*, PyObject* arguments) {
  long long usual, limit;
  if (!PyArg_ParseTuple(arguments, "LL", &usual, &limit)) return nullptr;
  minilm::thread_limit().usual = usual;
  minilm::thread_limit().limit = limit;
  Py_RETURN_NONE;
}

PyObject* team_threads(PyObject*, PyObject* argument) {
  const long long threads = PyLong_AsLongLong(argument);
  if (threads == -1 && PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(minilm::team_threads(threads));
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels in use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "The instruction sets that this machine can run, the best last."},
    {"panel_width", panel_width, METH_NOARGS, "Outputs in a panel of a packed weight."},
    {"prefer_large_pages", prefer_large_pages, METH_VARARGS,
     "Asks for large pages: address and size of memory whose content may be lost."},
    {"give_back", give_back, METH_VARARGS,
     "Gives memory back before it is freed: address and size; what it holds is lost."},
    {"trim", trim, METH_NOARGS, "Gives memory that was freed back to the system."},
    {"unmap_code", unmap_code, METH_NOARGS,
     "Unmaps pages of code; those that are used come back from the system's file cache."},
    {"packed_bytes", packed_bytes, METH_VARARGS, "(format, in, places) -> bytes of a packed weight."},
    {"same", same, METH_VARARGS,
     "(owners, keys, things, dicts, sizes, modules, types) -> whether all are what they were."},
    {"limit_threads", limit_threads, METH_VARARGS,
     "(usual, limit): whole passes have `limit` threads where PyTorch has its usual number; 0: as many."},
    {"team_threads", team_threads, METH_O, "How many threads a whole pass has where PyTorch has so many."},
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
