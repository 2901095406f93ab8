// Linear layers, norms and copies on lanes: checks the arguments, picks a target and hands it ranges of
// tokens.
#include "jvp/jvp.h"

#include "jvp/task.h"

namespace scalpel {
namespace jvp {

const JvpKernels* kernels_of(Target target) {
  switch (target) {
#if defined(SCALPEL_X86_TARGETS)
    case Target::kAvx512Vbmi2:  // these kernels never compress lanes, so VBMI2 does not help
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
  const DType dtype = check_linear_lanes(weight, in, in_index, scale, out, out_index, Contents::kChecked);
  const std::int64_t rows = weight.rows();
  const std::int64_t tokens = out.shape[0];
  const std::int64_t entries = out.shape[1];
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
  const DType dtype = check_norm_jvp(norm, in, out, out_index, Contents::kChecked);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(norm_task<Real>(norm, in, TensorView{.ndim = 0}, out, out_index), kernels<Real>().norm_jvp,
        out.shape[0], norm.gain.shape[0], threads);
  });
}

void norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index, const TensorView& out,
              int threads) {
  const DType dtype = check_norm_vjp(norm, in, in_index, out, Contents::kChecked);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(norm_task<Real>(norm, in, in_index, out, TensorView{.ndim = 0}), kernels<Real>().norm_vjp,
        out.shape[0], norm.gain.shape[0], threads);
  });
}

void gather_lanes(const TensorView& in, const TensorView& out, const TensorView& index, int threads) {
  const DType dtype = check_gather(in, out, index, Contents::kChecked);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(CopyTask<Real>{rows_of<const Real>(in, TensorView{.ndim = 0}), rows_of<Real>(out, index), 0, 0},
        kernels<Real>().gather, out.shape[0], out.shape[1], threads);
  });
}

void scatter_lanes(const TensorView& in, const TensorView& index, const TensorView& out, int threads) {
  const DType dtype = check_scatter(in, index, out, Contents::kChecked);
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    run(CopyTask<Real>{rows_of<const Real>(in, index), rows_of<Real>(out, TensorView{.ndim = 0}), 0, 0},
        kernels<Real>().scatter, out.shape[0], in.shape[1], threads);
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
