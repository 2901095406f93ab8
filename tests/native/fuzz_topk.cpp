// Draws inputs for TopK and compares every op, on every target that runs here, with a sort. It runs until it
// is stopped; fuzz_main.h describes the options.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "fuzz_main.h"
#include "fuzz_rows.h"
#include "fuzz_tensor.h"
#include "topk/topk.h"

namespace fuzz {
namespace {

using scalpel::DType, scalpel::RankBy, scalpel::TensorView;

enum class Op : std::uint8_t { kMask, kKept, kIndex };
constexpr Op kOps[] = {Op::kMask, Op::kKept, Op::kIndex};
constexpr const char* kOpNames[] = {"topk_mask", "keep_topk", "topk_indices"};
const char* name_of(Op op) { return kOpNames[static_cast<int>(op)]; }

// Outputs of at least this size are written past the caches.
constexpr std::int64_t kStreamBytes = std::int64_t{32} << 20;
constexpr std::int64_t kStreamEvery = 5000;

// The arguments of one call besides its tensors.
struct Call {
  Op op;
  std::int64_t k;
  RankBy by;
  int threads;
  bool in_place;
  std::string target;

  void make(const TensorView& x, const TensorView& out) const {
    switch (op) {
      case Op::kMask:
        return scalpel::topk_mask(x, k, by, out, threads);
      case Op::kKept:
        return scalpel::keep_topk(x, k, by, out, threads);
      case Op::kIndex:
        return scalpel::topk_indices(x, k, by, out, threads);
    }
  }

  std::string text(const Tensor& x, const Tensor& out) const {
    const TensorView& v = x.layout;
    return std::string(name_of(op)) + (in_place ? " in place" : "") + " of " + scalpel::name_of(v.dtype) +
           " " + list_text(v.shape, v.ndim) + " by " + (by == RankBy::kValue ? "value" : "magnitude") +
           ", k " + std::to_string(k) + ", target " + target + ", threads " + std::to_string(threads) +
           ", strides of x " + list_text(v.strides, v.ndim) + " and of out " +
           list_text(out.layout.strides, v.ndim) + ", elements before x " + std::to_string(x.begin) +
           " and before out " + std::to_string(out.begin);
  }

  [[noreturn]] void fail(const std::string& what, const Tensor& x, const Tensor& out) const {
    throw Mismatch(what + "\n  " + text(x, out));
  }
};

// The kept places of each row, ascending, k for each row. NaN ranks before every number, and all NaNs are
// equal.
std::vector<std::int64_t> kept_places(const Format& f, const Tensor& x, std::int64_t k, RankBy by) {
  std::vector<std::int64_t> kept;
  std::vector<double> rank(static_cast<std::size_t>(x.layout.width()));
  std::vector<std::int64_t> order(rank.size());
  for (std::int64_t r = 0; r < x.layout.rows(); ++r) {
    for (std::size_t i = 0; i < rank.size(); ++i) {
      const double value = decode(f, x.get(r, static_cast<std::int64_t>(i)));
      rank[i] = by == RankBy::kMagnitude ? std::fabs(value) : value;
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&rank](std::int64_t a, std::int64_t b) {
      return std::isnan(rank[a]) ? !std::isnan(rank[b]) : rank[a] > rank[b];
    });
    std::sort(order.begin(), order.begin() + k);
    kept.insert(kept.end(), order.begin(), order.begin() + k);
  }
  return kept;
}

// Writes the expected result of an op into the rows of `out`, and nothing outside them.
void write_expected(Op op, const Tensor& x, std::int64_t k, const std::vector<std::int64_t>& kept,
                    Tensor& out) {
  if (x.layout.width() == 0) return;  // there may be no memory
  for (std::int64_t r = 0; r < x.layout.rows(); ++r) {
    if (op != Op::kIndex) {
      std::fill_n(out.bytes.begin() + out.row_begin(r), x.layout.width() * out.item(), 0);
    }
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t i = kept[static_cast<std::size_t>(r * k + j)];
      if (op == Op::kMask) out.set(r, i, 1);
      if (op == Op::kKept) out.set(r, i, x.get(r, i));
      if (op == Op::kIndex) out.set(r, j, static_cast<std::uint64_t>(i));
    }
  }
}

[[noreturn]] void fail_at_first_difference(const Call& call, const Tensor& x, const Tensor& out,
                                           const Tensor& expected) {
  for (std::int64_t r = 0; r < x.layout.rows(); ++r) {
    for (std::int64_t i = 0; i < out.layout.width(); ++i) {
      if (out.get(r, i) == expected.get(r, i)) continue;
      char text[160];
      std::snprintf(text, sizeof text, "first wrong place: row %lld, element %lld: 0x%llx instead of 0x%llx",
                    static_cast<long long>(r), static_cast<long long>(i),
                    static_cast<unsigned long long>(out.get(r, i)),
                    static_cast<unsigned long long>(expected.get(r, i)));
      call.fail(text, x, out);
    }
  }
  const auto at = std::mismatch(out.bytes.begin(), out.bytes.end(), expected.bytes.begin()).first;
  call.fail("written beside the rows: byte " + std::to_string(at - out.bytes.begin()) + " of " +
                std::to_string(out.bytes.size()),
            x, out);
}

class Fuzzer {
 public:
  explicit Fuzzer(std::uint64_t seed) : seed_(seed) {
    for (int t = 0; t < scalpel::kTargetCount; ++t) {
      if (scalpel::targets()[t].supported()) targets_.emplace_back(scalpel::targets()[t].name);
    }
  }

  std::string about() const {
    std::string text = "targets";
    for (const std::string& t : targets_) text += " " + t;
    return text;
  }
  std::int64_t calls() const { return calls_; }

  void run(std::int64_t number) {
    Rng rng(seed_, number);
    if (number % kStreamEvery == 0) {
      const bool both = number == 0;
      const bool mask = number / kStreamEvery % 2 == 0;
      if (both || mask) check_streamed(rng, Op::kMask);
      if (both || !mask) check_streamed(rng, Op::kKept);
    }
    const Format& f = kFormats[rng.between(0, 3)];
    const std::vector<std::int64_t> shape = draw_shape(rng);
    Tensor x = draw_layout(rng, f.dtype, shape, true);
    std::fill(x.bytes.begin(), x.bytes.end(), static_cast<unsigned char>(rng.bits()));
    const auto rows = draw_rows(rng, f, x.layout.rows(), x.layout.width());
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (std::size_t i = 0; i < rows[r].size(); ++i) x.set(r, i, rows[r][i]);
    }
    const RankBy by = rng.one_in(2) ? RankBy::kMagnitude : RankBy::kValue;
    const std::int64_t k = draw_k(rng, shape.back());
    const auto kept = kept_places(f, x, k, by);
    for (const Op op : kOps) {
      Call call = {op, k, by, static_cast<int>(rng.between(1, 3)), false, ""};
      std::vector<std::int64_t> out_shape = shape;
      if (op == Op::kIndex) out_shape.back() = k;
      Tensor out = draw_layout(rng, dtype_of(op, f), out_shape, false);
      std::fill(out.bytes.begin(), out.bytes.end(), rng.pick<unsigned char>({0x5a, 0xa5, 0xff}));
      check(call, x, kept, out);
      if (op == Op::kKept && rng.one_in(2)) {
        // The layout of x is not used, because its rows may overlap.
        Tensor both = draw_layout(rng, f.dtype, shape, false);
        for (std::int64_t r = 0; r < x.layout.rows(); ++r) {
          for (std::int64_t i = 0; i < x.layout.width(); ++i) both.set(r, i, x.get(r, i));
        }
        call.in_place = true;
        check(call, x, kept, both);
      }
      if (rng.one_in(50)) check_refused(rng, call, x, out);
    }
  }

 private:
  static DType dtype_of(Op op, const Format& f) {
    return op == Op::kMask ? DType::kBool : op == Op::kKept ? f.dtype : DType::kInt64;
  }

  // `out` is the output before the call; for a call in place it holds the values of x.
  void check(Call& call, Tensor& x, const std::vector<std::int64_t>& kept, const Tensor& out) {
    Tensor expected = out;
    write_expected(call.op, x, call.k, kept, expected);
    for (const std::string& target : targets_) {
      call.target = target;
      scalpel::force_target(target);
      Tensor written = out;
      Tensor read = x;
      say_call(call.text(call.in_place ? written : read, written));
      call.make(call.in_place ? written.view() : read.view(), written.view());
      ++calls_;
      if (written.bytes != expected.bytes) {
        fail_at_first_difference(call, call.in_place ? out : x, written, expected);
      }
      if (read.bytes != x.bytes) call.fail("x was written", x, out);
    }
  }

  // Arguments that violate the contract must be refused, and all memory must remain unchanged.
  void check_refused(Rng& rng, Call call, const Tensor& given_x, const Tensor& given_out) {
    Tensor x = given_x;
    Tensor out = given_out;
    TensorView x_view = x.view();
    TensorView out_view = out.view();
    const int last = x_view.ndim - 1;
    std::string what;
    switch (rng.between(0, 5)) {
      case 0:
        what = "k below 0";
        call.k = -rng.between(1, 5);
        break;
      case 1:
        what = "k above the width";
        call.k = x_view.width() + rng.between(1, 5);
        break;
      case 2:
        what = "an out of another dtype";
        out_view.dtype = rng.pick({DType::kBool, DType::kFloat32, DType::kFloat16, DType::kInt64});
        if (out_view.dtype == out.layout.dtype) out_view.dtype = DType::kBFloat16;
        if (out_view.dtype == out.layout.dtype) return;
        break;
      case 3:
        what = "an x that isn't of floats";
        x_view.dtype = rng.pick({DType::kBool, DType::kInt64});
        break;
      case 4:
        what = "an out of another width";
        ++out_view.shape[last];
        break;
      default:
        what = "an out with all its rows in one place";
        if (last < 1 || out_view.width() == 0 || out_view.rows() < 2) return;
        for (int d = 0; d < last; ++d) out_view.strides[d] = 0;
    }
    bool refused = false;
    say_call(what + ": " + call.text(x, out));
    try {
      call.make(x_view, out_view);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    ++calls_;
    if (!refused) call.fail("not refused: " + what, x, out);
    if (x.bytes != given_x.bytes || out.bytes != given_out.bytes) {
      call.fail("refused, but something was written: " + what, x, out);
    }
  }

  // Checks a large output. It repeats a few distinct rows, so that only those have to be sorted. Their width
  // is odd, so that every copy has another alignment relative to vectors and cache lines.
  void check_streamed(Rng& rng, Op op) {
    // A mask has one byte per element, so wide formats would only add memory to read: it uses 16-bit formats.
    const Format& f = kFormats[rng.between(0, op == Op::kMask ? 1 : 3)];
    const std::int64_t width = 2 * rng.between(20, 200) + 1;
    const std::int64_t distinct = 151;
    const std::int64_t gap = rng.between(0, 1);
    Tensor few;
    few.layout = TensorView::matrix(nullptr, f.dtype, distinct, width);
    few.bytes.resize(static_cast<std::size_t>(distinct * width * few.item()));
    const auto rows = draw_rows(rng, f, distinct, width);
    for (std::int64_t r = 0; r < distinct; ++r) {
      for (std::int64_t i = 0; i < width; ++i) few.set(r, i, rows[r][i]);
    }
    const RankBy by = rng.one_in(2) ? RankBy::kMagnitude : RankBy::kValue;
    Call call = {op, rng.between(1, width - 1), by, static_cast<int>(rng.between(1, 3)), false, ""};
    const auto kept = kept_places(f, few, call.k, by);

    const std::int64_t item = scalpel::item_size(dtype_of(op, f));
    const std::int64_t repeats = kStreamBytes / (distinct * width * item) + 1;
    const auto repeat = [repeats](const Tensor& t, std::int64_t period, std::int64_t lead) {
      Tensor all;
      all.layout = t.layout;
      all.layout.shape[0] *= repeats;
      all.begin = lead;
      const auto head = static_cast<std::size_t>(lead * t.item());
      const auto part = static_cast<std::size_t>(period * t.item());
      all.bytes.assign(head + repeats * part, 0x5a);
      for (std::int64_t c = 0; c < repeats; ++c) {
        std::memcpy(all.bytes.data() + head + c * part, t.bytes.data(), part);
      }
      return all;
    };
    Tensor answers;
    answers.layout = TensorView::matrix(nullptr, dtype_of(op, f), distinct, width);
    answers.layout.strides[0] = width + gap;
    answers.bytes.assign(static_cast<std::size_t>(distinct * (width + gap) * item), 0x5a);
    write_expected(op, few, call.k, kept, answers);
    const Tensor expected = repeat(answers, distinct * (width + gap), rng.between(0, 1));
    Tensor x = repeat(few, distinct * width, rng.between(0, 1));
    Tensor out = expected;
    for (const std::string& target : targets_) {
      call.target = target;
      scalpel::force_target(target);
      std::fill(out.bytes.begin(), out.bytes.end(), 0x5a);
      say_call(call.text(x, out));
      call.make(x.view(), out.view());
      ++calls_;
      if (out.bytes != expected.bytes) fail_at_first_difference(call, x, out, expected);
    }
  }

  std::uint64_t seed_;
  std::vector<std::string> targets_;
  std::int64_t calls_ = 0;
};

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) { return fuzz::run<fuzz::Fuzzer>(argc, argv); }
