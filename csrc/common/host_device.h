// Functions that run on a CPU and on a GPU.
#pragma once

#if defined(__CUDACC__)
#define SEQACCEL_HOST_DEVICE __host__ __device__
#else
#define SEQACCEL_HOST_DEVICE
#endif
