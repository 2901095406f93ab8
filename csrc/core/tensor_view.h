// A view of a tensor that the caller owns: address, dtype, device, shape and strides. It is plain data, so
// that the core depends on neither Python nor torch; the caller keeps the memory alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace scalpel {

enum class DType : std::uint8_t { kBool, kFloat16, kBFloat16, kFloat32, kFloat64, kInt32, kInt64 };
enum class Device : std::uint8_t { kCpu };

constexpr std::int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    default:
      return 8;
  }
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return "bool";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kInt32:
      return "int32";
    default:
      return "int64";
  }
}

// Thrown for a dtype that an op does not take. It becomes a TypeError in Python.
struct DTypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct TensorView {
  static constexpr int kMaxDims = 64;  // the limit of torch and numpy

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = Device::kCpu;
  int ndim = 0;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};  // in elements, not bytes

  // A contiguous row-major matrix, the usual case in C++.
  static TensorView matrix(void* data, DType dtype, std::int64_t rows, std::int64_t width) {
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.ndim = 2;
    view.shape[0] = rows;
    view.shape[1] = width;
    view.strides[0] = width;
    view.strides[1] = 1;
    return view;
  }

  std::int64_t width() const { return ndim == 0 ? 1 : shape[ndim - 1]; }

  // The number of rows along the last dimension, which is the product of the leading dimensions.
  std::int64_t rows() const {
    std::int64_t n = 1;
    for (int i = 0; i + 1 < ndim; ++i) n *= shape[i];
    return n;
  }

  // The offset of row r from `data`, in elements.
  std::int64_t row_offset(std::int64_t r) const {
    std::int64_t offset = 0;
    for (int i = ndim - 2; i >= 0; --i) {
      offset += (r % shape[i]) * strides[i];
      r /= shape[i];
    }
    return offset;
  }

  // True when row r starts at r * row_stride() for every r.
  bool uniform_rows() const {
    if (ndim < 3) return true;
    std::int64_t next = row_stride() * shape[ndim - 2];  // the stride that the next outer dimension needs
    for (int i = ndim - 3; i >= 0; --i) {
      // A dimension of size 1 is never stepped along, so its stride does not matter.
      if (shape[i] > 1 && strides[i] != next) return false;
      next *= shape[i];
    }
    return true;
  }
  std::int64_t row_stride() const { return ndim < 2 ? 0 : strides[ndim - 2]; }
};

}  // namespace scalpel
