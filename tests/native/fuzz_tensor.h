// Tensors in every layout that a caller may use, of shapes that are hard for a kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "core/tensor_view.h"
#include "fuzz_rows.h"

namespace fuzz {

// Memory and a view into it. The memory may have elements before, between and after the rows of the view.
struct Tensor {
  scalpel::TensorView layout;  // its data pointer is not set
  std::int64_t begin = 0;      // the offset of its first element, in elements
  std::vector<unsigned char> bytes;

  scalpel::TensorView view() {
    scalpel::TensorView v = layout;
    v.data = bytes.data() + begin * item();
    return v;
  }
  std::int64_t item() const { return scalpel::item_size(layout.dtype); }
  std::int64_t row_begin(std::int64_t r) const { return (begin + layout.row_offset(r)) * item(); }
  std::uint64_t get(std::int64_t r, std::int64_t i) const {
    std::uint64_t bits = 0;  // assumes a little-endian CPU, as x86 and Arm are
    std::memcpy(&bits, bytes.data() + row_begin(r) + i * item(), static_cast<std::size_t>(item()));
    return bits;
  }
  void set(std::int64_t r, std::int64_t i, std::uint64_t bits) {
    std::memcpy(bytes.data() + row_begin(r) + i * item(), &bits, static_cast<std::size_t>(item()));
  }
};

inline std::string list_text(const std::int64_t* values, int n) {
  std::string text = "(";
  for (int i = 0; i < n; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

// Lays the rows out with gaps, with the dimensions in any order and forwards or backwards.
inline Tensor draw_layout(Rng& rng, scalpel::DType dtype, const std::vector<std::int64_t>& shape,
                          bool may_overlap) {
  Tensor t;
  t.layout.dtype = dtype;
  t.layout.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), t.layout.shape);
  const int last = t.layout.ndim - 1;
  const std::int64_t width = shape.back();
  // The stride along a dimension of size 1 does not matter.
  t.layout.strides[last] = width > 1 ? 1 : rng.between(-3, 3);
  const auto gap = [&rng] { return rng.one_in(2) ? 0 : rng.one_in(2) ? 1 : rng.between(2, 70); };

  std::vector<int> inner_first(static_cast<std::size_t>(last));
  std::iota(inner_first.rbegin(), inner_first.rend(), 0);
  if (rng.one_in(3)) std::reverse(inner_first.begin(), inner_first.end());
  std::int64_t reach = width;
  for (const int d : inner_first) {
    const std::int64_t stride = reach + gap();
    // If the gap after its last row is included, an outer dimension can continue where this one ends.
    reach = rng.one_in(2) ? stride * shape[d] : stride * std::max<std::int64_t>(shape[d] - 1, 0) + reach;
    t.layout.strides[d] = rng.one_in(4) ? -stride : stride;
  }
  if (may_overlap && rng.one_in(12)) {
    for (int d = 0; d < last; ++d) t.layout.strides[d] = rng.pick<std::int64_t>({0, 1, -1, width / 2});
  }

  std::int64_t low = 0;
  std::int64_t high = -1;
  if (std::find(shape.begin(), shape.end(), 0) == shape.end()) {
    high = width - 1;
    for (int d = 0; d < last; ++d)
      (t.layout.strides[d] < 0 ? low : high) += (shape[d] - 1) * t.layout.strides[d];
  }
  // Where nothing surrounds the rows, AddressSanitizer detects any access outside them.
  t.begin = gap() - low;
  t.bytes.resize(static_cast<std::size_t>((t.begin + high + 1 + gap()) * t.item()));
  return t;
}

inline std::vector<std::int64_t> draw_shape(Rng& rng) {
  std::int64_t width = rng.between(0, 300);
  if (rng.one_in(4)) width = rng.between(0, 20);
  if (rng.one_in(8)) width = rng.pick({16, 32, 64, 128, 384, 512}) + rng.between(-3, 3);
  if (rng.one_in(12)) width = rng.between(350, 600);
  if (rng.one_in(40)) width = rng.between(4090, 4100);
  if (rng.one_in(60)) width = rng.between(600, 20000);
  // Wide inputs have fewer rows, because the oracle sorts them; now and then there are enough rows for
  // several threads.
  std::int64_t rows = std::min<std::int64_t>(rng.between(1, 40), 40000 / (width + 1) + 1);
  if (width > 20 && rng.one_in(30)) rows = rng.between(33000, 66000) / width + 1;
  // Enough rows for a guess to become as narrow as it can.
  if (width <= 100 && rng.one_in(6)) rows = rng.between(40, 300);
  if (rng.one_in(200)) rows = 0;
  if (rng.one_in(10)) return {width};
  if (rng.one_in(2)) return {rows, width};
  const std::int64_t inner = rng.between(1, 6);
  if (rng.one_in(3)) return {rows / inner / 2, inner, 2, width};
  return rng.one_in(2) ? std::vector<std::int64_t>{rows / inner, inner, width}
                       : std::vector<std::int64_t>{inner, rows / inner, width};
}

inline std::int64_t draw_k(Rng& rng, std::int64_t width) {
  const std::int64_t k = rng.one_in(2) ? rng.between(0, width)
                                       : rng.pick<std::int64_t>({0, 1, 2, 3, width / 16, width / 4, width / 2,
                                                                 width - 2, width - 1, width});
  return std::clamp<std::int64_t>(k, 0, width);
}

}  // namespace fuzz
