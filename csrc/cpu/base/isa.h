// The instruction sets a kernel file is compiled for.
//
// setup.py writes one translation unit for each kernel file and instruction set; it defines SEQACCEL_ISA_<NAME> and
// includes this header first. Everything a kernel file defines lies in the namespace seqaccel::SEQACCEL_ISA::<folder>,
// so the copies never meet. Kernel files use no std:: templates: their weak AVX-512 copies could be linked into
// portable code.
#pragma once

#include <omp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(SEQACCEL_ISA_AVX512_BF16)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,bmi,bmi2")
#define SEQACCEL_ISA avx512_bf16
#define SEQACCEL_VECTOR_BYTES 64
#define SEQACCEL_REGISTERS 32
#elif defined(SEQACCEL_ISA_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#define SEQACCEL_ISA avx512
#define SEQACCEL_VECTOR_BYTES 64
#define SEQACCEL_REGISTERS 32
#elif defined(SEQACCEL_ISA_AVX2)
#pragma GCC target("avx2,fma,bmi,bmi2")
#define SEQACCEL_ISA avx2
#define SEQACCEL_VECTOR_BYTES 32
#define SEQACCEL_REGISTERS 16
#elif defined(SEQACCEL_ISA_PORTABLE)
#define SEQACCEL_ISA portable
#define SEQACCEL_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SEQACCEL_REGISTERS 32
#else
#define SEQACCEL_REGISTERS 16
#endif
#else
#error "a kernel file is compiled through the translation units that setup.py writes"
#endif

#define SEQACCEL_INLINE inline __attribute__((always_inline))
