#include "core/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace scalpel {
namespace {

// With fewer steps per thread, waking the other threads costs more than they contribute.
constexpr std::int64_t kMinWorkPerThread = 16384;

std::atomic<bool> forked{false};

// fork() copies only the calling thread, so the child has OpenMP's bookkeeping but none of its threads.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

int max_threads() { return forked.load() ? 1 : std::max(1, omp_get_max_threads()); }

int threads_for(std::int64_t work, int threads) {
  const int allowed = forked.load() ? 1 : (threads > 0 ? threads : max_threads());
  const std::int64_t useful = std::max<std::int64_t>(1, work / kMinWorkPerThread);
  return static_cast<int>(std::min<std::int64_t>(allowed, useful));
}

const char* parallel_backend() {
#if _OPENMP >= 202111
  return "OpenMP 5.2 or later";
#elif _OPENMP >= 201811
  return "OpenMP 5.0 or later";
#elif _OPENMP >= 201511
  return "OpenMP 4.5";
#else
  return "OpenMP";
#endif
}

void parallel_for(std::int64_t n, std::int64_t grain, int threads, LoopBody body, void* context) {
  if (n <= 0) return;
  grain = std::max<std::int64_t>(1, grain);
  const std::int64_t blocks = (n + grain - 1) / grain;
  if (threads <= 1 || blocks == 1) {
    body(context, 0, n, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * grain;
    body(context, begin, std::min(n, begin + grain), omp_get_thread_num());
  }
}

}  // namespace scalpel
