// A sparse layer on plain rows, and the conversion between rows and lanes: checks the arguments and divides
// the work into pieces.
#include "jvp/jvp.h"
#include "jvp/task.h"

namespace scalpel {
namespace jvp {
namespace {

template <class Real>
TurnTask<Real> turn_task(const TensorView& rows, const TensorView& lanes) {
  TurnTask<Real> task;
  task.rows = data<Real>(rows);
  task.lanes = data<Real>(lanes);
  task.count = rows.shape[0];
  task.tokens = rows.shape[1];
  task.channels = rows.shape[2];
  return task;
}

void turn(const TensorView& rows, const TensorView& lanes, int threads, bool in) {
  check_turn(rows, lanes);
  const std::int64_t tokens = rows.shape[1];
  if (tokens == 0 || rows.shape[2] == 0) return;
  for_dtype(rows.dtype, [&](auto real) {
    using Real = decltype(real);
    const TurnTask<Real> task = turn_task<Real>(rows, lanes);
    over(tokens, threads_of(tokens, rows.shape[2], threads), [&](std::int64_t begin, std::int64_t end, int) {
      TurnTask<Real> mine = task;
      mine.begin = begin;
      mine.end = end;
      (in ? kernels<Real>().rows_to_lanes : kernels<Real>().lanes_to_rows)(mine);
    });
  });
}

}  // namespace
}  // namespace jvp

using namespace jvp;

void linear_rows(const SparseMatrix& weight, const TensorView& x, const TensorView& bias,
                 const TensorView& out, int threads) {
  const DType dtype = check_linear_rows(weight, x, bias, out, Contents::kChecked);
  const std::int64_t rows = weight.rows();
  const std::int64_t tokens = out.shape[0];
  if (tokens == 0 || rows == 0) return;
  const std::int64_t blocks = (tokens + kTangentLanes - 1) / kTangentLanes;
  threads = threads_for(blocks * (weight.columns.shape[0] + rows) * kTangentLanes, threads);
  // With few tokens there are too few blocks for the threads, so the rows of the matrix are divided too, in
  // whole tiles of sixteen.
  const std::int64_t shares = std::min<std::int64_t>((2 * threads + blocks - 1) / blocks, (rows + 15) / 16);
  const std::int64_t share = ((rows + shares - 1) / shares + 15) / 16 * 16;
  for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const PerThread<Real> lines(threads, weight.cols * kTangentLanes);
    LinearRowsTask<Real> task;
    task.starts = data<const std::int64_t>(weight.starts);
    task.columns = data<const std::int32_t>(weight.columns);
    task.weights = data<const Real>(weight.weights);
    task.bias = absent(bias) ? nullptr : data<const Real>(bias);
    task.rows = rows;
    task.cols = weight.cols;
    task.tokens = tokens;
    task.x = data<const Real>(x);
    task.out = data<Real>(out);
    auto body = [&](std::int64_t begin, std::int64_t end, int thread) {
      for (std::int64_t piece = begin; piece < end; ++piece) {
        LinearRowsTask<Real> mine = task;
        mine.first = piece / shares * kTangentLanes;
        mine.begin = std::min(rows, piece % shares * share);
        mine.end = std::min(rows, mine.begin + share);
        mine.line = lines.of(thread);
        kernels<Real>().linear_rows(mine);
      }
    };
    parallel_for(blocks * shares, 1, threads, body);
  });
}

void rows_to_lanes(const TensorView& rows, const TensorView& lanes, int threads) {
  turn(rows, lanes, threads, true);
}

void lanes_to_rows(const TensorView& lanes, const TensorView& rows, int threads) {
  turn(rows, lanes, threads, false);
}

}  // namespace scalpel
