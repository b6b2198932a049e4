// The pyramid of keys and values alone: what hierarchical attention builds, and its backward pass.
#include "cpu/attention/hierarchical/backward.h"
#include "cpu/attention/hierarchical/forward.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

template <typename S>
void pool_forward(const Attention<S>& p) {
#pragma omp parallel if (p.B * p.G * p.pyramid.T > 256)
  {
    Current<Attention<S>> current(p);
    pool_levels(p, current, p.workspace + omp_get_thread_num() * pool_children(p.pyramid));
  }
}

template <typename S>
void pool_backward(const AttentionBackward<S>& p) {
  const Attention<S>& f = p.forward;
#pragma omp parallel if (f.B * f.G * f.pyramid.T > 256)
  {
    Current<AttentionBackward<S>> current(p);
    unpool_levels(p, current, f.workspace + omp_get_thread_num() * 2 * pool_children(f.pyramid));
  }
}

template <typename S>
constexpr Pool<S> kPool = {pool_forward<S>, pool_backward<S>};

extern const PoolKernels pool_kernels;
const PoolKernels pool_kernels = {kPool<float>, kPool<double>, kPool<BFloat16>, kPool<Float16>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
