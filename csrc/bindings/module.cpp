// scalpel._core: the module itself, which calls one init_ function per op.
#include "bindings/arrays.h"

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The native core of scalpel. Internal: arrays are (address, dtype, shape, strides) and "
      "lifetimes are not checked.";
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const scalpel::DTypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
  scalpel::bindings::init_core(m);
  scalpel::bindings::init_topk(m);
  scalpel::bindings::init_covariance(m);
  scalpel::bindings::init_jvp(m);
}
