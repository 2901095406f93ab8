// The rules of jvp.h on a GPU, for memory of one device. The contracts are the same with one exception: the
// contents of indices and matrices are not checked, because that would mean waiting for the device. Callers
// must ensure that channels are in range and in order. The calls return without waiting and allocate
// nothing. Results are reproducible, and differ from the CPU's in rounding only.
#pragma once

#include "core/tensor_view.h"
#include "cuda/device.h"
#include "jvp/jvp.h"

namespace scalpel::cuda {

void linear_lanes(const SparseMatrix& weight, const TensorView& in, const TensorView& in_index,
                  const TensorView& scale, const TensorView& out, const TensorView& out_index,
                  const CudaQueue& queue);
void linear_rows(const SparseMatrix& weight, const TensorView& x, const TensorView& bias,
                 const TensorView& out, const CudaQueue& queue);
void rows_to_lanes(const TensorView& rows, const TensorView& lanes, const CudaQueue& queue);
void lanes_to_rows(const TensorView& lanes, const TensorView& rows, const CudaQueue& queue);
void norm_jvp(const Norm& norm, const TensorView& in, const TensorView& out, const TensorView& out_index,
              const CudaQueue& queue);
void norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index, const TensorView& out,
              const CudaQueue& queue);
void gather_lanes(const TensorView& in, const TensorView& out, const TensorView& index,
                  const CudaQueue& queue);
void scatter_lanes(const TensorView& in, const TensorView& index, const TensorView& out,
                   const CudaQueue& queue);
void attention_jvp(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v,
                   const TensorView& y, const CudaQueue& queue);
void attention_vjp(const Attention& at, const TensorView& y, const LanesOf& q, const LanesOf& k,
                   const LanesOf& v, const CudaQueue& queue);

}  // namespace scalpel::cuda
