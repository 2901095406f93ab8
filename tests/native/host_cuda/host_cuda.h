// A stand-in for the parts of CUDA that the kernels use, so that a C++ compiler can build them and they can
// run without a GPU.
//
// The threads of a block are fibers on one CPU thread. They run in an order that is drawn anew in each
// round, so that a missing barrier changes the results reliably; blocks run one after another, in random
// order too. Shared memory is filled with 0xFF (NaN) before every block. If not all threads reach a barrier,
// the program aborts with a message. The stand-in cannot reveal races within the instructions of a warp,
// memory ordering between blocks, misalignment, or running times.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define SCALPEL_DYNAMIC_SHARED(name) unsigned char* name = ::host_cuda::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrMultiProcessorCount = 16 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDeviceToHost = 2, cudaMemcpyHostToDevice = 1 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? "an error of the stand-in" : "no error";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  return found->sharedSizeBytes = 0, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
// The values of an H100 (but only 4 multiprocessors), unless the environment sets the shared memory.
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  const char* shared = std::getenv("HOST_CUDA_SHARED");
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4
           : shared != nullptr                         ? std::atoi(shared)
                                                       : 227 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, int, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace host_cuda {

struct Place {
  dim3 thread, block, block_size, grid_size;
};
const Place& here();
unsigned char* dynamic_shared();
void block_barrier();
// Waits until all lanes of `mask` have arrived. A vote or shuffle of a warp consists of two of these
// barriers around one slot per lane.
void warp_barrier(unsigned mask);
unsigned lane();
std::uint64_t* warp_slots();  // the 32 words of the current warp
void run(const std::function<void()>& kernel, dim3 grid, dim3 block, std::size_t shared);

template <class T, class Pick>
T exchange(unsigned mask, T value, Pick pick) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t* slots = warp_slots();
  slots[lane()] = 0;
  std::memcpy(&slots[lane()], &value, sizeof(T));
  warp_barrier(mask);
  T found = pick(slots);
  warp_barrier(mask);
  return found;
}

template <class T>
T slot(const std::uint64_t* slots, unsigned from) {
  T value;
  std::memcpy(&value, &slots[from & 31], sizeof(T));
  return value;
}

}  // namespace host_cuda

#define threadIdx (::host_cuda::here().thread)
#define blockIdx (::host_cuda::here().block)
#define blockDim (::host_cuda::here().block_size)
#define gridDim (::host_cuda::here().grid_size)

inline void __syncthreads() { host_cuda::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { host_cuda::warp_barrier(mask); }
inline void __threadfence() {}
inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  if (predicate != 0) any = 1;
  __syncthreads();
  return any;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const unsigned base = host_cuda::lane() & ~(width - 1u);
  return host_cuda::exchange(mask, value,
                             [=](auto* s) { return host_cuda::slot<T>(s, base + (from & (width - 1))); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned me = host_cuda::lane(), other = me ^ static_cast<unsigned>(bits);
  const unsigned from = other / width == me / width ? other : me;
  return host_cuda::exchange(mask, value, [=](auto* s) { return host_cuda::slot<T>(s, from); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned me = host_cuda::lane(), from = (me % width) >= by ? me - by : me;
  return host_cuda::exchange(mask, value, [=](auto* s) { return host_cuda::slot<T>(s, from); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned me = host_cuda::lane(),
                 from = (me % width) + by < static_cast<unsigned>(width) ? me + by : me;
  return host_cuda::exchange(mask, value, [=](auto* s) { return host_cuda::slot<T>(s, from); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return host_cuda::exchange<unsigned>(mask, predicate != 0, [=](auto* s) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= ((mask >> i & 1u) && s[i] ? 1u : 0u) << i;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T, class Combine>
T host_cuda_reduce(unsigned mask, T value, Combine combine) {
  return host_cuda::exchange(mask, value, [=](auto* s) {
    T found{};
    bool first = true;
    for (unsigned i = 0; i < 32; ++i) {
      if (!(mask >> i & 1u)) continue;
      found = first ? host_cuda::slot<T>(s, i) : combine(found, host_cuda::slot<T>(s, i));
      first = false;
    }
    return found;
  });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return host_cuda_reduce(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return host_cuda_reduce(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return host_cuda_reduce(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  return std::memcpy(&bits, &x, 4), bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  return std::memcpy(&x, &bits, 4), x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  return std::memcpy(&bits, &x, 8), bits;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <class T, class U>
T atomicAdd(T* at, U by) {
  T old = *at;
  *at = static_cast<T>(old + by);
  return old;
}
template <class T, class U>
T atomicMax(T* at, U with) {
  T old = *at;
  if (old < static_cast<T>(with)) *at = static_cast<T>(with);
  return old;
}
template <class T, class U>
T atomicMin(T* at, U with) {
  T old = *at;
  if (static_cast<T>(with) < old) *at = static_cast<T>(with);
  return old;
}
template <class T, class U>
T atomicOr(T* at, U with) {
  T old = *at;
  *at = old | static_cast<T>(with);
  return old;
}
template <class T>
T atomicExch(T* at, T with) {
  T old = *at;
  *at = with;
  return old;
}
template <class T>
T atomicCAS(T* at, T expected, T with) {
  T old = *at;
  if (old == expected) *at = with;
  return old;
}

namespace scalpel::device {

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t,
           Arguments... arguments) {
  host_cuda::run([=] { kernel(arguments...); }, grid, block, shared);
}

void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

inline unsigned pack_bf16(float low, float high) {
  const auto rounded = [](float x) {
    const unsigned bits = __float_as_uint(x);
    return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;  // valid for finite x
  };
  return rounded(low) | rounded(high) << 16;
}

inline float float_of_half(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

}  // namespace scalpel::device
