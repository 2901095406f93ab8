// What the drivers of this folder share: the checks of views, and the conversion of views into tasks. The
// GPU uses the same checks, so that both refuse the same arguments with the same messages.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/parallel.h"
#include "jvp/jvp.h"
#include "jvp/kernel.h"

namespace scalpel::jvp {

const JvpKernels* kernels_of(Target target);

using Shape = std::initializer_list<std::int64_t>;

[[noreturn]] inline void refuse(const std::string& why) { throw std::invalid_argument(why); }

inline std::string text_of(const std::int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += std::to_string(shape[i]) + (i + 1 < ndim ? ", " : "");
  return text + (ndim == 1 ? ",)" : ")");
}

inline void expect(const TensorView& view, const char* name, DType dtype, Shape shape) {
  if (view.dtype != dtype) {
    throw DTypeError(std::string(name) + " is " + name_of(view.dtype) + "; it must be " + name_of(dtype));
  }
  if (view.ndim != static_cast<int>(shape.size()) || !std::equal(shape.begin(), shape.end(), view.shape)) {
    refuse(std::string(name) + " has shape " + text_of(view.shape, view.ndim) + "; it must be " +
           text_of(shape.begin(), static_cast<int>(shape.size())));
  }
  // An empty view has no memory, so its strides do not matter.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return;
  std::int64_t step = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] > 1 && view.strides[i] != step) refuse(std::string(name) + " must be contiguous");
    step *= view.shape[i];
  }
}

// Checks that every number is in [0, limit). The first loop has no branches, because it runs on every call.
template <class Int>
void expect_range(const Int* numbers, std::int64_t n, std::int64_t limit, const std::string& holds,
                  const char* what) {
  Int low = 0;
  Int high = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    low = std::min(low, numbers[i]);
    high = std::max(high, numbers[i]);
  }
  if (n == 0 || (low >= 0 && high < limit)) return;
  refuse(holds + std::to_string(low < 0 ? low : high) + "; " + what + " run from 0 to " +
         std::to_string(limit - 1));
}

// Whether a check reads what an index or a matrix contains. It does not when they are in a GPU's memory,
// because reading them would mean waiting for the device.
enum class Contents { kChecked, kTrusted };

// Checks a lanes array and its index, and returns the number of tokens.
inline std::int64_t expect_lanes(const TensorView& lanes, const TensorView& index, const char* name,
                                 DType dtype, std::int64_t channels, Contents contents = Contents::kChecked) {
  if (lanes.ndim != 3) {
    refuse(std::string(name) + " has shape " + text_of(lanes.shape, lanes.ndim) +
           "; it must be (tokens, entries, 16)");
  }
  const std::int64_t tokens = lanes.shape[0];
  const std::int64_t entries = index.data == nullptr && index.ndim == 0 ? channels : lanes.shape[1];
  expect(lanes, name, dtype, {tokens, entries, kTangentLanes});
  if (index.ndim == 0) return tokens;
  const std::string of = std::string("the index of ") + name;
  expect(index, of.c_str(), DType::kInt64, {tokens, entries});
  if (contents == Contents::kTrusted) return tokens;
  expect_range(static_cast<const std::int64_t*>(index.data), tokens * entries, channels, of + " holds ",
               "channels");
  return tokens;
}

inline void expect_tokens(std::int64_t found, std::int64_t wanted, const char* name) {
  if (found != wanted) {
    refuse(std::string(name) + " has " + std::to_string(found) + " tokens; it must have " +
           std::to_string(wanted));
  }
}

inline DType real_of(const TensorView& view, const char* name) {
  if (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64) {
    throw DTypeError(std::string(name) + " is " + name_of(view.dtype) + "; allowed: float32, float64");
  }
  return view.dtype;
}

template <class T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

// Checks that the starts ascend and that the columns are within the matrix.
inline void check_matrix(const SparseMatrix& weight, DType dtype, Contents contents) {
  const std::int64_t rows = weight.rows();
  const std::int64_t nonzeros = weight.columns.ndim == 1 ? weight.columns.shape[0] : -1;
  if (rows < 0) refuse("the matrix's starts are empty; they must be (rows + 1,)");
  expect(weight.starts, "the matrix's starts", DType::kInt64, {rows + 1});
  expect(weight.columns, "the matrix's columns", DType::kInt32, {nonzeros});
  expect(weight.weights, "the matrix's weights", dtype, {nonzeros});
  if (contents == Contents::kTrusted) return;
  const auto* const starts = data<const std::int64_t>(weight.starts);
  if (starts[0] != 0 || starts[rows] != nonzeros || !std::is_sorted(starts, starts + rows + 1)) {
    refuse("the matrix's starts must ascend from 0 to the number of non-zeros, " + std::to_string(nonzeros));
  }
  expect_range(data<const std::int32_t>(weight.columns), nonzeros, weight.cols, "the matrix holds column ",
               "columns");
}

inline bool absent(const TensorView& view) { return view.ndim == 0; }

// The checks of the ops in jvp.h. Each returns the dtype.

inline DType check_linear_lanes(const SparseMatrix& weight, const TensorView& in, const TensorView& in_index,
                                const TensorView& scale, const TensorView& out, const TensorView& out_index,
                                Contents contents) {
  const DType dtype = real_of(out, "out");
  check_matrix(weight, dtype, contents);
  const std::int64_t tokens = expect_lanes(out, out_index, "out", dtype, weight.rows(), contents);
  expect_tokens(expect_lanes(in, in_index, "in", dtype, weight.cols, contents), tokens, "in");
  if (!absent(scale)) expect(scale, "scale", dtype, {tokens, out.shape[1]});
  return dtype;
}

inline DType check_linear_rows(const SparseMatrix& weight, const TensorView& x, const TensorView& bias,
                               const TensorView& out, Contents contents) {
  const DType dtype = real_of(out, "out");
  check_matrix(weight, dtype, contents);
  const std::int64_t rows = weight.rows();
  const std::int64_t tokens = out.ndim == 2 ? out.shape[0] : -1;
  expect(out, "out", dtype, {tokens, rows});
  expect(x, "x", dtype, {tokens, weight.cols});
  if (!absent(bias)) expect(bias, "bias", dtype, {rows});
  return dtype;
}

inline DType check_turn(const TensorView& rows, const TensorView& lanes) {
  const DType dtype = real_of(rows, "rows");
  if (rows.ndim != 3 || rows.shape[0] > kTangentLanes) {
    refuse("rows have shape " + text_of(rows.shape, rows.ndim) + "; it must be (T <= 16, tokens, channels)");
  }
  expect(rows, "rows", dtype, {rows.shape[0], rows.shape[1], rows.shape[2]});
  expect(lanes, "lanes", dtype, {rows.shape[1], rows.shape[2], kTangentLanes});
  return dtype;
}

// Checks a lanes array without an index and one that may have an index, both of `width` channels. Returns
// the number of tokens.
inline std::int64_t check_pair(const TensorView& dense, const char* dense_name, std::int64_t width,
                               const TensorView& lanes, const TensorView& index, const char* name,
                               DType dtype, Contents contents) {
  const std::int64_t tokens = expect_lanes(dense, TensorView{.ndim = 0}, dense_name, dtype, width);
  expect_tokens(expect_lanes(lanes, index, name, dtype, width, contents), tokens, name);
  return tokens;
}

inline void check_norm(const Norm& norm, DType dtype, std::int64_t tokens, std::int64_t width) {
  expect(norm.normed, "normed", dtype, {tokens, width});
  expect(norm.rate, "rate", dtype, {tokens});
  expect(norm.gain, "gain", dtype, {width});
  if (norm.over < 1 || norm.over > width) {
    refuse("the mean is over " + std::to_string(norm.over) + " channels; allowed: 1 to " +
           std::to_string(width));
  }
}

inline std::int64_t width_of(const Norm& norm) { return norm.gain.ndim == 1 ? norm.gain.shape[0] : -1; }

inline DType check_norm_jvp(const Norm& norm, const TensorView& in, const TensorView& out,
                            const TensorView& out_index, Contents contents) {
  const DType dtype = real_of(out, "out");
  const std::int64_t width = width_of(norm);
  check_norm(norm, dtype, check_pair(in, "in", width, out, out_index, "out", dtype, contents), width);
  return dtype;
}

inline DType check_norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index,
                            const TensorView& out, Contents contents) {
  const DType dtype = real_of(out, "out");
  const std::int64_t width = width_of(norm);
  check_norm(norm, dtype, check_pair(out, "out", width, in, in_index, "in", dtype, contents), width);
  return dtype;
}

inline DType check_gather(const TensorView& in, const TensorView& out, const TensorView& index,
                          Contents contents) {
  const DType dtype = real_of(out, "out");
  check_pair(in, "in", in.ndim == 3 ? in.shape[1] : -1, out, index, "out", dtype, contents);
  if (absent(index)) refuse("gather_lanes needs an index");
  return dtype;
}

inline DType check_scatter(const TensorView& in, const TensorView& index, const TensorView& out,
                           Contents contents) {
  const DType dtype = real_of(out, "out");
  check_pair(out, "out", out.ndim == 3 ? out.shape[1] : -1, in, index, "in", dtype, contents);
  return dtype;
}

template <class Real>
LaneRows<Real> rows_of(const TensorView& lanes, const TensorView& index) {
  static constexpr std::int64_t kNoEntry = 0;  // an index without entries may have no memory
  const std::int64_t* channels = nullptr;
  if (!absent(index)) channels = index.data == nullptr ? &kNoEntry : data<const std::int64_t>(index);
  return {data<Real>(lanes), channels, lanes.shape[1]};
}

template <class Real>
const JvpKernelsOf<Real>& kernels() {
  const JvpKernels& all = *kernels_of(active_target().target);
  if constexpr (std::is_same_v<Real, float>) {
    return all.f32;
  } else {
    return all.f64;
  }
}

// Calls f(float{}) or f(double{}), according to the dtype.
template <class F>
void for_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else {
    f(double{});
  }
}

// threads_of: the number of threads for n pieces of work that cost `steps` vector operations each. over:
// calls f(begin, end, thread) on ranges of the pieces.
inline int threads_of(std::int64_t n, std::int64_t steps, int threads) {
  return threads_for(n * std::max<std::int64_t>(1, steps) * 4, threads);
}
template <class F>
void over(std::int64_t n, int threads, F f) {
  parallel_for(n, std::max<std::int64_t>(1, n / (8 * threads)), threads, f);
}

// One array per thread, on cache lines of its own. It is allocated before a parallel loop, because the loop
// must not throw.
template <class T>
class PerThread {
 public:
  PerThread(int threads, std::int64_t elements)
      : stride_((elements * static_cast<std::int64_t>(sizeof(T)) + 127) / 64 * 64),
        memory_(static_cast<char*>(::operator new(static_cast<std::size_t>(stride_ * threads), kAlignment))) {
  }
  PerThread(const PerThread&) = delete;
  PerThread& operator=(const PerThread&) = delete;
  ~PerThread() { ::operator delete(memory_, kAlignment); }
  T* of(int thread) const { return reinterpret_cast<T*>(memory_ + stride_ * thread); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  std::int64_t stride_;
  char* memory_;
};

}  // namespace scalpel::jvp
