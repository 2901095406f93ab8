// Linear layers, norms and copies on lanes: checks, picks a target and hands it tokens.
#include "jvp/jvp.h"

#include "jvp/task.h"

namespace scalpel {
namespace jvp {

const JvpKernels* kernels_of(Target target) {
  switch (target) {
#if defined(SCALPEL_X86_TARGETS)
    case Target::kAvx512Vbmi2:  // compressing lanes is of no use here
    case Target::kAvx512:
      return &jvp_avx512();
    case Target::kAvx2:
      return &jvp_avx2();
#endif
    case Target::kPortable:
      return &jvp_portable();
    default:
      return nullptr;
  }
}

namespace {

// Tokens of a dense lanes array of `width` channels and of one with an index.
std::int64_t check_pair(const TensorView& dense, const char* dense_name, std::int64_t width,
                        const TensorView& lanes, const TensorView& index, const char* name, DType dtype) {
  const std::int64_t tokens = expect_lanes(dense, TensorView{.ndim = 0}, dense_name, dtype, width);
  expect_tokens(expect_lanes(lanes, index, name, dtype, width), tokens, name);
  return tokens;
}

void check_norm(const Norm& norm, DType dtype, std::int64_t tokens, std::int64_t width) {
  expect(norm.normed, "normed", dtype, {tokens, width});
  expect(norm.rate, "rate", dtype, {tokens});
  expect(norm.gain, "gain", dtype, {width});
  if (norm.over < 1 || norm.over > width) {
    refuse("the mean is over " + std::to_string(norm.over) + " channels; allowed: 1 to " +
           std::to_string(width));
  }
}

template <class Real>
NormTask<Real> norm_task(const Norm& norm, const TensorView& in, const TensorView& in_index,
                         const TensorView& out, const TensorView& out_index) {
  NormTask<Real> task;
  task.normed = data<const Real>(norm.normed);
  task.rate = data<const Real>(norm.rate);
  task.gain = data<const Real>(norm.gain);
  task.centred = norm.centred;
  task.over = norm.over;
  task.width = norm.gain.shape[0];
  task.in = rows_of<const Real>(in, in_index);
  task.out = rows_of<Real>(out, out_index);
  return task;
}

template <class Task>
void run(Task task, void (*kernel)(const Task&), std::int64_t tokens, std::int64_t steps, int threads) {
  over(tokens, threads_of(tokens, steps, threads), [&](std::int64_t begin, std::int64_t end, int) {
    Task mine = task;
    mine.begin = begin;
    mine.end = end;
    kernel(mine);
  });
}

}  // namespace
}  // namespace jvp

using namespace jvp;

void linear_lanes(const SparseMatrix& weight, const TensorView& in, const TensorView& in_index,
                  const TensorView& scale, const TensorView& out, const TensorView& out_index, int threads) {
  const DType dtype = real_of(out, "out");
  check_matrix(weight, dtype);
  const std::int64_t rows = weight.rows();
  const std::int64_t tokens = expect_lanes(out, out_index, "out", dtype, rows);
  expect_tokens(expect_lanes(in, in_index, "in", dtype, weight.cols), tokens, "in");
  const std::int64_t entries = out.shape[1];
  if (!absent(scale)) expect(scale, "scale", dtype, {tokens, entries});
  if (tokens == 0 || entries == 0) return;
  const std::int64_t steps = entries * (1 + weight.columns.shape[0] / rows);
  threads = threads_of(tokens, steps, threads);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const bool indexed = !absent(in_index);
    const PerThread<std::int32_t> offsets(threads, indexed ? weight.cols : 0);
    const PerThread<Real> lines(threads, indexed ? (in.shape[1] + 1) * kTangentLanes : 0);
    LinearTask<Real> task;
    task.starts = data<const std::int64_t>(weight.starts);
    task.columns = data<const std::int32_t>(weight.columns);
    task.weights = data<const Real>(weight.weights);
    task.cols = weight.cols;
    task.in = rows_of<const Real>(in, in_index);
    task.scale = absent(scale) ? nullptr : data<const Real>(scale);
    task.out = rows_of<Real>(out, out_index);
    over(tokens, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
      LinearTask<Real> mine = task;
      mine.begin = begin;
      mine.end = end;
      mine.offsets = offsets.of(thread);
      mine.line = lines.of(thread);
      kernels<Real>().linear(mine);
    });
  });
}

void norm_jvp(const Norm& norm, const TensorView& in, const TensorView& out, const TensorView& out_index,
              int threads) {
  const DType dtype = real_of(out, "out");
  const std::int64_t width = norm.gain.ndim == 1 ? norm.gain.shape[0] : -1;
  const std::int64_t tokens = check_pair(in, "in", width, out, out_index, "out", dtype);
  check_norm(norm, dtype, tokens, width);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(norm_task<Real>(norm, in, TensorView{.ndim = 0}, out, out_index), kernels<Real>().norm_jvp, tokens,
        width, threads);
  });
}

void norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index, const TensorView& out,
              int threads) {
  const DType dtype = real_of(out, "out");
  const std::int64_t width = norm.gain.ndim == 1 ? norm.gain.shape[0] : -1;
  const std::int64_t tokens = check_pair(out, "out", width, in, in_index, "in", dtype);
  check_norm(norm, dtype, tokens, width);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(norm_task<Real>(norm, in, in_index, out, TensorView{.ndim = 0}), kernels<Real>().norm_vjp, tokens,
        width, threads);
  });
}

void gather_lanes(const TensorView& in, const TensorView& out, const TensorView& index, int threads) {
  const DType dtype = real_of(out, "out");
  const std::int64_t tokens = check_pair(in, "in", in.ndim == 3 ? in.shape[1] : -1, out, index, "out", dtype);
  if (absent(index)) refuse("gather_lanes needs an index");
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(CopyTask<Real>{rows_of<const Real>(in, TensorView{.ndim = 0}), rows_of<Real>(out, index), 0, 0},
        kernels<Real>().gather, tokens, out.shape[1], threads);
  });
}

void scatter_lanes(const TensorView& in, const TensorView& index, const TensorView& out, int threads) {
  const DType dtype = real_of(out, "out");
  const std::int64_t tokens =
      check_pair(out, "out", out.ndim == 3 ? out.shape[1] : -1, in, index, "in", dtype);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(CopyTask<Real>{rows_of<const Real>(in, index), rows_of<Real>(out, TensorView{.ndim = 0}), 0, 0},
        kernels<Real>().scatter, tokens, in.shape[1], threads);
  });
}

const char* jvp_compiled_for(Target target) {
  const JvpKernels* found = kernels_of(target);
  return found == nullptr ? nullptr : found->compiled_for;
}

std::uint64_t jvp_calls(Target target) {
  const JvpKernels* found = kernels_of(target);
  return found == nullptr ? 0 : __atomic_load_n(found->calls, __ATOMIC_RELAXED);
}

}  // namespace scalpel
