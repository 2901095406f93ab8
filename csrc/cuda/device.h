// The dialect in which GPU kernels are written. It is CUDA when nvcc compiles them. When a C++ compiler
// does, it is the stand-in of tests/native/host_cuda, which runs the threads of a block one after another on
// the CPU, so that the kernels can be tested without a GPU.
//
// Kernels use only what both provide: barriers, shuffles, votes, atomics, shared memory, and `launch` in
// place of CUDA's triple angle brackets. Nothing here waits for the device, and all memory belongs to the
// caller.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// Declares shared memory whose size is given at launch, aligned to 16 bytes. Use it once per kernel.
#define SCALPEL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace scalpel::device {

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
           Arguments... arguments) {
  kernel<<<grid, block, shared, stream>>>(arguments...);
}

// d += a b, where a is (16, 16) and b is (16, 8), both bfloat16, and d is (16, 8), float32. The matrices are
// distributed over a warp as PTX ISA 9.7.14.5 (mma.m16n8k16) prescribes. With g = lane / 4 and t = lane % 4:
// a[0] holds row g, columns 2t and 2t + 1; a[1] the same of row g + 8; a[2] and a[3] those of columns 2t + 8
// and 2t + 9. b[0] holds rows 2t and 2t + 1 of column g, b[1] rows 2t + 8 and 2t + 9. d[0] and d[1] hold row
// g, columns 2t and 2t + 1; d[2] and d[3] those of row g + 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds two numbers to bfloat16, ties to even, and packs them into the halves of a word.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float float_of_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace scalpel::device
#elif __has_include("host_cuda.h")
#include "host_cuda.h"  // only the tests have it on their include path
#else
#include <cuda_runtime.h>  // for code that only calls the ops
#endif

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace scalpel {

// Where to run: a device and one of its streams (nullptr: the default stream).
struct CudaQueue {
  int device = 0;
  cudaStream_t stream = nullptr;
};

namespace device {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clears the error, or the next launch would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes the queue's device the current one, and restores the previous one at the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(const CudaQueue& queue) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == queue.device) return;
    check(cudaSetDevice(queue.device), "cudaSetDevice");
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The largest amount of dynamic shared memory that a block can have on the current device, once its kernel
// has requested it.
inline std::size_t most_shared() {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return static_cast<std::size_t>(most);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

#if defined(__CUDACC__) || __has_include("host_cuda.h")
// Lets a kernel use all of the shared memory. This is done once per kernel and device, and never for a
// smaller amount, because another thread may be about to launch the kernel with more.
inline void allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (!done.insert({kernel, device}).second) return;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most_shared() - attributes.sharedSizeBytes)),
        "cudaFuncSetAttribute");
}

// Starts a kernel and reports errors of the launch. Errors inside the kernel appear at a later call.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, const CudaQueue& queue,
            Arguments... arguments) {
  if (shared > 48 * 1024) allow_shared(reinterpret_cast<const void*>(kernel));
  start(kernel, grid, block, shared, queue.stream, static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), "a kernel's launch");
}
#endif

}  // namespace device
}  // namespace scalpel
