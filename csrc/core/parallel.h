// Parallel loops over OpenMP, so that a process that also runs torch has one pool of threads and not two.
#pragma once

#include <cstdint>

namespace scalpel {

// How many threads a loop of `work` elementary steps should use when the caller allows at most `threads`
// (0: as many as OpenMP would). Always 1 in a forked child, where OpenMP's pool is gone and a parallel
// region would hang.
int threads_for(std::int64_t work, int threads);

// The most threads that OpenMP would use here.
int max_threads();

// For example "OpenMP 4.5 (201511)".
const char* parallel_backend();

using LoopBody = void (*)(void* context, std::int64_t begin, std::int64_t end, int thread);

// Calls body on disjoint ranges that cover [0, n), each at most `grain` long, from `threads` threads.
// `thread` in [0, threads) tells the threads apart. The body must not throw.
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
