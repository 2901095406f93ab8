// The checks of check.h. The common layouts are decided by arithmetic on strides; only unusual ones pay for
// a sorted list of rows.
#include "topk/check.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace scalpel {
namespace {

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

std::string shape_text(const TensorView& v) {
  std::string text = "(";
  for (int i = 0; i < v.ndim; ++i) text += std::to_string(v.shape[i]) + (i + 1 < v.ndim ? ", " : "");
  return text + (v.ndim == 1 ? ",)" : ")");
}

// The offsets of the rows of v, in elements, in ascending order.
std::vector<std::int64_t> row_starts(const TensorView& v) {
  std::vector<std::int64_t> starts(static_cast<std::size_t>(v.rows()));
  for (std::size_t r = 0; r < starts.size(); ++r) starts[r] = v.row_offset(static_cast<std::int64_t>(r));
  std::sort(starts.begin(), starts.end());
  return starts;
}

// The bytes from the first element to the last, as [begin, end). Strides may be negative.
void extent(const TensorView& v, std::uintptr_t& begin, std::uintptr_t& end) {
  std::int64_t low = 0;
  std::int64_t high = 0;
  for (int i = 0; i < v.ndim; ++i) (v.strides[i] < 0 ? low : high) += (v.shape[i] - 1) * v.strides[i];
  const auto base = reinterpret_cast<std::uintptr_t>(v.data);
  begin = base + low * item_size(v.dtype);
  end = base + (high + 1) * item_size(v.dtype);
}

// True when two elements of v share an address. Each row of v is contiguous.
bool overlaps_itself(const TensorView& v) {
  // Most layouts are nested: each stride steps over everything that the smaller strides reach.
  std::pair<std::int64_t, std::int64_t> dims[TensorView::kMaxDims];  // |stride|, shape
  int n = 0;
  for (int i = 0; i + 1 < v.ndim; ++i) {
    if (v.shape[i] > 1) dims[n++] = {std::abs(v.strides[i]), v.shape[i]};
  }
  std::sort(dims, dims + n);
  std::int64_t reach = v.width();
  bool nested = true;
  for (int i = 0; i < n; ++i) {
    nested = nested && dims[i].first >= reach;
    reach += dims[i].first * (dims[i].second - 1);
  }
  if (nested) return false;
  const std::vector<std::int64_t> starts = row_starts(v);
  for (std::size_t r = 1; r < starts.size(); ++r) {
    if (starts[r] - starts[r - 1] < v.width()) return true;
  }
  return false;
}

// True when a row of a and a row of b share a byte. The rows of both are contiguous.
bool overlap(const TensorView& a, const TensorView& b) {
  std::uintptr_t a_begin, a_end, b_begin, b_end;
  extent(a, a_begin, a_end);
  extent(b, b_begin, b_end);
  if (a_end <= b_begin || b_end <= a_begin) return false;
  // Two views may interleave without overlapping, as the left and right halves of one tensor's columns do.
  const std::vector<std::int64_t> of_a = row_starts(a);
  const std::vector<std::int64_t> of_b = row_starts(b);
  const auto at = [](const TensorView& v, std::int64_t start) {
    return reinterpret_cast<std::uintptr_t>(v.data) + static_cast<std::uintptr_t>(start * item_size(v.dtype));
  };
  const auto a_bytes = static_cast<std::uintptr_t>(a.width() * item_size(a.dtype));
  const auto b_bytes = static_cast<std::uintptr_t>(b.width() * item_size(b.dtype));
  for (std::size_t i = 0, j = 0; i < of_a.size() && j < of_b.size();) {
    const std::uintptr_t row_a = at(a, of_a[i]);
    const std::uintptr_t row_b = at(b, of_b[j]);
    if (row_a < row_b + b_bytes && row_b < row_a + a_bytes) return true;
    row_a < row_b ? ++i : ++j;
  }
  return false;
}

void check_memory(const TensorView& x, const TensorView& out, const char* name, bool in_place_allowed) {
  if (topk_empty(x) || topk_empty(out)) return;
  for (const auto& [view, label] : {std::pair(&x, "x"), std::pair(&out, name)}) {
    if (view->data == nullptr) refuse(std::string(label) + " has no memory");
    if (reinterpret_cast<std::uintptr_t>(view->data) % static_cast<std::uintptr_t>(item_size(view->dtype)) !=
        0) {
      refuse(std::string(label) + " does not begin at a multiple of its element's size; give a copy of it");
    }
  }
  if (overlaps_itself(out)) {
    refuse(std::string(name) + " has several elements in one place of memory (an expanded tensor?); give a " +
           "tensor with memory of its own");
  }
  bool same_strides = out.dtype == x.dtype;
  for (int i = 0; i < out.ndim; ++i) {
    same_strides = same_strides && (out.shape[i] == 1 || out.strides[i] == x.strides[i]);
  }
  if (in_place_allowed && same_strides && out.data == x.data) return;
  if (overlap(x, out)) {
    refuse(std::string(name) + " overlaps x in memory; give a separate tensor" +
           (in_place_allowed ? ", or x itself to work in place" : ""));
  }
}

}  // namespace

bool topk_empty(const TensorView& v) {
  for (int i = 0; i < v.ndim; ++i) {
    if (v.shape[i] == 0) return true;
  }
  return false;
}

void check_topk(const TensorView& x, std::int64_t k, const TensorView& out, TopKOutput output) {
  static constexpr const char* kNames[] = {"out (the mask)", "out (the kept values)", "out (the indices)"};
  const char* name = kNames[static_cast<int>(output)];
  if (x.dtype != DType::kFloat16 && x.dtype != DType::kBFloat16 && x.dtype != DType::kFloat32 &&
      x.dtype != DType::kFloat64) {
    throw DTypeError(std::string("x is ") + name_of(x.dtype) +
                     "; allowed: float16, bfloat16, float32, float64");
  }
  if (x.ndim < 1) refuse("x has no dimension; TopK needs at least one, of which the last is ranked");
  if (k < 0 || k > x.width()) {
    refuse("k is " + std::to_string(k) + ", but the last dimension of x has width " +
           std::to_string(x.width()) + "; allowed: 0 <= k <= width");
  }
  const DType wanted = output == TopKOutput::kMask   ? DType::kBool
                       : output == TopKOutput::kKept ? x.dtype
                                                     : DType::kInt64;
  if (out.dtype != wanted) {
    throw DTypeError(std::string(name) + " is " + name_of(out.dtype) + "; it must be " + name_of(wanted));
  }
  TensorView expected = x;
  if (output == TopKOutput::kIndex) expected.shape[x.ndim - 1] = k;
  bool same = out.ndim == expected.ndim;
  for (int i = 0; same && i < out.ndim; ++i) same = out.shape[i] == expected.shape[i];
  if (!same)
    refuse(std::string(name) + " has shape " + shape_text(out) + "; it must be " + shape_text(expected));
  for (const auto& [view, label] : {std::pair(&x, "x"), std::pair(&out, name)}) {
    if (view->width() > 1 && view->strides[view->ndim - 1] != 1) {
      refuse(std::string(label) + " has stride " + std::to_string(view->strides[view->ndim - 1]) +
             " in its last dimension; it must be 1 (make it contiguous)");
    }
  }
  check_memory(x, out, name, output == TopKOutput::kKept);
}

}  // namespace scalpel
