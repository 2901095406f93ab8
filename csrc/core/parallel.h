// Parallel loops, built on OpenMP because torch uses it too: a process that runs both then has one pool of
// threads instead of two.
#pragma once

#include <cstdint>

namespace scalpel {

// The number of threads that a loop of `work` elementary steps should use when the caller allows at most
// `threads` (0: as many as OpenMP would use). Always 1 in a forked child, where OpenMP's pool is gone and a
// parallel region would hang.
int threads_for(std::int64_t work, int threads);

// The largest number of threads that OpenMP would use here.
int max_threads();

// The OpenMP version as text, for example "OpenMP 4.5".
const char* parallel_backend();

using LoopBody = void (*)(void* context, std::int64_t begin, std::int64_t end, int thread);

// Calls `body` on disjoint ranges that cover [0, n), each at most `grain` long, from `threads` threads. The
// argument `thread`, in [0, threads), identifies the calling thread. The body must not throw.
void parallel_for(std::int64_t n, std::int64_t grain, int threads, LoopBody body, void* context);

// The same for any callable f(begin, end, thread).
template <class F>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, F& f) {
  parallel_for(
      n, grain, threads,
      [](void* context, std::int64_t begin, std::int64_t end, int thread) {
        (*static_cast<F*>(context))(begin, end, thread);
      },
      &f);
}

}  // namespace scalpel
