// Products of few rows with a packed matrix held as float32, bfloat16 or int8. Everything is 32-bit words. A word of
// the matrix holds 1, 2 or 4 values along k of one row. In every precision packing is one transposition, and a step of
// the product is one broadcast and one multiply-accumulate.
//
// At one row all three read a matrix from L3 at the cache's bandwidth (two Zen 4 cores, 185 GB/s: 8 MB in 45 us, 4 MB
// in 23, 2 MB in 11.4); software prefetch made it slower, 54 to 65 us for the 8 MB.
#pragma once

#include "cpu/base/intrinsics.h"
#include "cpu/base/narrow.h"
#include "cpu/base/workspace.h"
#include "cpu/packed/session.h"
#include "cpu/rnn/products.h"

namespace seqaccel::SEQACCEL_ISA::packed {

constexpr int kWordLanes = Lanes<float>;
typedef uint8_t Bytes __attribute__((vector_size(kWordLanes)));

SEQACCEL_INLINE Words load_words(const uint32_t* p) { return (Words)load(reinterpret_cast<const float*>(p)); }
SEQACCEL_INLINE void store_words(uint32_t* p, Words v) { store(reinterpret_cast<float*>(p), (Vec<float>)v); }
SEQACCEL_INLINE Words broadcast_word(uint32_t word) { return word - Words{}; }

// ---------------------------------------------------------------- precisions
//
// Sum is the vector type of the accumulator. kChain is the largest number of words that one accumulator adds up:
// rounding errors grow with it (they stay far below bfloat16's own). multiply adds to a sum the product of a word of
// the input, broadcast to every lane, with a word of each lane's row.

struct Float32 {
  typedef Vec<float> Sum;
  static constexpr ptrdiff_t kChain = kPartial;
  static constexpr ptrdiff_t kPerWord = 1;
  SEQACCEL_INLINE static void multiply(Sum& sum, uint32_t x, Words w) {
    sum += (Vec<float>)broadcast_word(x) * (Vec<float>)w;
  }
};

struct Bfloat16 {
  typedef Vec<float> Sum;
  static constexpr ptrdiff_t kChain = 1024;
  static constexpr ptrdiff_t kPerWord = 2;
  SEQACCEL_INLINE static void multiply(Sum& sum, uint32_t x, Words w) {
#if defined(SEQACCEL_ISA_AVX512_BF16)
    sum = (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)broadcast_word(x));
#else
    sum += (Vec<float>)broadcast_word(x << 16) * (Vec<float>)(w << 16);
    sum += (Vec<float>)broadcast_word(x & 0xFFFF0000u) * (Vec<float>)(w & 0xFFFF0000u);
#endif
  }
};

struct Int8 {
  typedef Ints Sum;
  static constexpr ptrdiff_t kChain = ptrdiff_t(1) << 30;
  static constexpr ptrdiff_t kPerWord = 4;
  SEQACCEL_INLINE static void multiply(Sum& sum, uint32_t x, Words w) {
#if defined(SEQACCEL_ISA_AVX512_BF16)
    sum = (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)broadcast_word(x), (__m512i)w);
#elif defined(__x86_64__)
    // 16-bit halves: the even and the odd bytes of a word.
    typedef int16_t Shorts __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
    const Shorts even = (Shorts)(((Shorts)w) << 8) >> 8, odd = ((Shorts)w) >> 8;
    sum += add_pairs((Words)even, broadcast_word(x & 0x00FF00FFu));
    sum += add_pairs((Words)odd, broadcast_word((x >> 8) & 0x00FF00FFu));
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum += ((Ints)(w << (24 - 8 * i)) >> 24) * int32_t((x >> (8 * i)) & 0xFF);
#endif
  }
#if defined(__x86_64__)
  SEQACCEL_INLINE static Sum add_pairs(Words a, Words b) {
#if SEQACCEL_VECTOR_BYTES == 64
    return (Sum)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif SEQACCEL_VECTOR_BYTES == 32
    return (Sum)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return (Sum)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  }
#endif
};

inline int64_t words_of(Precision precision, int64_t K) {
  const int64_t per_word = precision == Precision::float32 ? 1 : precision == Precision::bfloat16 ? 2 : 4;
  return (K + per_word - 1) / per_word;
}

// ---------------------------------------------------------------- inputs

// The rows of an input as words, `stride` apart.
struct WordRows {
  const uint32_t* words;
  ptrdiff_t stride;
  const float* scales;  // int8: one per row
};

// Converts K values to words of uint8, round(x / scale) + 128, and returns the scale. Zeros fill up the last word. NaN
// or infinity in x makes the scale NaN.
inline float quantise_row(const float* x, ptrdiff_t K, uint32_t* words) {
  constexpr int L = kWordLanes;
  Vec<float> highest = {}, poison = {};
  for (ptrdiff_t k = 0; k < K; k += L) {
    const Vec<float> v = load_some(x + k, int(min_of(L, K - k)));
    const Vec<float> magnitude = (Vec<float>)((Words)v & 0x7FFFFFFFu);
    highest = magnitude > highest ? magnitude : highest;
    poison += v * 0.0f;
  }
  const float peak = horizontal_max<float>(highest), invalid = horizontal_sum<float>(poison);
  const float factor = peak > 1e-30f ? 127.0f / peak : 0.0f;
  alignas(64) uint32_t bytes[L];
  uint8_t* const out = reinterpret_cast<uint8_t*>(words);
  for (ptrdiff_t k = 0; k < K; k += L) {
    const int count = int(min_of(L, K - k));
    // The low bits of value + 1.5 * 2^23 are the rounded value; within a word the first value comes lowest.
    const Vec<float> shifted = load_some(x + k, count) * factor + (ExpTraits<float>::kRound + 128.0f);
    if (count == L) {
      const Bytes narrow = __builtin_convertvector((Words)shifted, Bytes);
      memcpy(out + k, &narrow, L);
      continue;
    }
    store_words(bytes, (Words)shifted);
    for (int i = 0; i < count; ++i) out[k + i] = uint8_t(bytes[i]);
  }
  for (ptrdiff_t k = K; k % 4 != 0; ++k) out[k] = 0;
  return peak / 127.0f + invalid;
}

// Converts K values to words of bfloat16. A zero fills up the last word.
inline void round_row(const float* x, ptrdiff_t K, uint32_t* words) {
  constexpr int L = kWordLanes;
  uint16_t* const out = reinterpret_cast<uint16_t*>(words);
  alignas(64) uint32_t bits[L];
  for (ptrdiff_t k = 0; k < K; k += L) {
    const int count = int(min_of(L, K - k));
    if (count == L) {
      const Halves narrow = __builtin_convertvector(bfloat16_bits(load(x + k)), Halves);
      memcpy(out + k, &narrow, 2 * L);
      continue;
    }
    store_words(bits, bfloat16_bits(load_some(x + k, count)));
    for (int i = 0; i < count; ++i) out[k + i] = uint16_t(bits[i]);
  }
  if (K % 2) out[K] = 0;
}

// Converts rows of K values, `stride` apart, to words and scales. Rows of float32 are used where they lie.
inline WordRows prepare_rows(Precision precision, const float* x, ptrdiff_t stride, ptrdiff_t K, ptrdiff_t rows,
                             uint32_t* words, float* scales) {
  if (precision == Precision::float32) return {reinterpret_cast<const uint32_t*>(x), stride, nullptr};
  const ptrdiff_t width = words_of(precision, K);
  for (ptrdiff_t i = 0; i < rows; ++i) {
    if (precision == Precision::bfloat16) {
      round_row(x + i * stride, K, words + i * width);
    } else {
      scales[i] = quantise_row(x + i * stride, K, words + i * width);
    }
  }
  return {words, width, scales};
}

// The same for rows that are bfloat16 already. They are used where they lie if they are aligned to words.
inline WordRows prepare_rows(const uint16_t* x, ptrdiff_t K, ptrdiff_t rows, uint32_t* words) {
  if (K % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
    return {reinterpret_cast<const uint32_t*>(x), K / 2, nullptr};
  }
  const ptrdiff_t width = words_of(Precision::bfloat16, K);
  for (ptrdiff_t i = 0; i < rows; ++i) {
    uint16_t* const out = reinterpret_cast<uint16_t*>(words + i * width);
    memcpy(out, x + i * K, size_t(K) * 2);
    if (K % 2) out[K] = 0;
  }
  return {words, width, nullptr};
}

// ---------------------------------------------------------------- products

// out [MR, NV, L] = rows of x * panel [K words, NV, L]. If there are few sums, several chains along K hide the latency.
template <class P, int MR, int NV>
void word_tile(const uint32_t* x, ptrdiff_t x_row, const uint32_t* panel, ptrdiff_t K, typename P::Sum* out) {
  constexpr int L = kWordLanes, kChains = MR * NV >= 8 ? 1 : (8 + MR * NV - 1) / (MR * NV);
  for (int i = 0; i < MR * NV && K == 0; ++i) out[i] = typename P::Sum{};
  for (ptrdiff_t k0 = 0; k0 < K; k0 += P::kChain * kChains) {
    const ptrdiff_t k1 = min_of(K, k0 + P::kChain * kChains), whole = k0 + (k1 - k0) / kChains * kChains;
    typename P::Sum sum[kChains][MR][NV] = {};
    const auto step = [&](ptrdiff_t k, typename P::Sum(&chain)[MR][NV]) __attribute__((always_inline)) {
      Words w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = load_words(panel + (k * NV + v) * L);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const uint32_t word = x[m * x_row + k];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) P::multiply(chain[m][v], word, w[v]);
      }
    };
    for (ptrdiff_t k = k0; k < whole; k += kChains) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) step(k + c, sum[c]);
    }
    for (ptrdiff_t k = whole; k < k1; ++k) step(k, sum[0]);
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) {
#pragma GCC unroll 32
      for (int i = 0; i < MR * NV; ++i) sum[0][i / NV][i % NV] += sum[c][i / NV][i % NV];
    }
#pragma GCC unroll 32
    for (int i = 0; i < MR * NV; ++i) out[i] = k0 == 0 ? sum[0][i / NV][i % NV] : out[i] + sum[0][i / NV][i % NV];
  }
}

template <class P, int NV>
void word_rows(const WordRows& x, ptrdiff_t first, ptrdiff_t rows, const uint32_t* panel, ptrdiff_t K,
               typename P::Sum* out) {
  constexpr int kMost = SEQACCEL_REGISTERS >= 32 ? 6 : 2;
  const ptrdiff_t tiles = panel_count(rows, kMost);
  for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
    const ptrdiff_t i = rows * tile / tiles, count = rows * (tile + 1) / tiles - i;
    const uint32_t* const from = x.words + (first + i) * x.stride;
    typename P::Sum* const to = out + i * NV;
    switch (count) {
      case 1:
        word_tile<P, 1, NV>(from, x.stride, panel, K, to);
        break;
      case 2:
        word_tile<P, 2, NV>(from, x.stride, panel, K, to);
        break;
      case 3:
        word_tile<P, (kMost >= 3 ? 3 : 1), NV>(from, x.stride, panel, K, to);
        break;
      case 4:
        word_tile<P, (kMost >= 4 ? 4 : 1), NV>(from, x.stride, panel, K, to);
        break;
      case 5:
        word_tile<P, (kMost >= 5 ? 5 : 1), NV>(from, x.stride, panel, K, to);
        break;
      default:
        word_tile<P, kMost, NV>(from, x.stride, panel, K, to);
    }
  }
}

template <class P>
void word_product(int vectors, const WordRows& x, ptrdiff_t first, ptrdiff_t rows, const uint32_t* panel, ptrdiff_t K,
                  typename P::Sum* out) {
  switch (vectors) {
    case 2:
      return word_rows<P, 2>(x, first, rows, panel, K, out);
    case 3:
      return word_rows<P, 3>(x, first, rows, panel, K, out);
    default:
      return word_rows<P, 4>(x, first, rows, panel, K, out);
  }
}

// Multiplies rows of x, from row `first` on, with segment s of block u: out is [rows, vectors, L].
inline void session_product(const SessionMatrix& m, ptrdiff_t u, int s, const WordRows& x, ptrdiff_t first,
                            ptrdiff_t rows, float* out) {
  constexpr int L = kWordLanes;
  const ptrdiff_t width = m.vectors * L;
  const uint32_t* const panel = m.panels + u * m.panel_words + (s ? m.words[0] * width : 0);
  const ptrdiff_t K = m.words[s];
  if (m.precision == Precision::float32) {
    return word_product<Float32>(m.vectors, x, first, rows, panel, K, reinterpret_cast<Vec<float>*>(out));
  }
  if (m.precision == Precision::bfloat16) {
    return word_product<Bfloat16>(m.vectors, x, first, rows, panel, K, reinterpret_cast<Vec<float>*>(out));
  }
  word_product<Int8>(m.vectors, x, first, rows, panel, K, reinterpret_cast<Ints*>(out));
  const float* const scales = m.scales + (2 * u + s) * width;
  const int32_t* const offsets = m.offsets + (2 * u + s) * width;
  for (ptrdiff_t i = 0; i < rows; ++i) {
    const float scale = x.scales[first + i];
    for (int v = 0; v < m.vectors; ++v) {
      float* const at = out + i * width + v * L;
      const Ints sum = (Ints)load(at) - (Ints)load(reinterpret_cast<const float*>(offsets + v * L));
      store(at, __builtin_convertvector(sum, Vec<float>) * (load(scales + v * L) * scale));
    }
  }
}

// ---------------------------------------------------------------- packing

// Packs the L rows of a vector into out [K words, vectors, L]. A row has K values in `source`; rows past the last one
// are zero. `row` [L, words] and `wide` [K] are workspace.
inline void pack_vector(const SessionMatrix& m, int s, const void* source, bool bfloat16, ptrdiff_t first, int rows,
                        uint32_t* out, float* scales, int32_t* offsets, uint32_t* row, float* wide) {
  constexpr int L = kWordLanes;
  const ptrdiff_t K = m.columns[s], words = m.words[s], step = m.vectors * L;
  const uint32_t* from[L];
  for (int q = rows; q < L && scales; ++q) {
    scales[q] = 0.0f;
    offsets[q] = 0;
  }
  for (int q = 0; q < rows; ++q) {
    uint32_t* const to = row + q * words;
    from[q] = to;
    if (bfloat16 && m.precision == Precision::bfloat16) {
      const WordRows ready = prepare_rows(static_cast<const uint16_t*>(source) + (first + q) * K, K, 1, to);
      from[q] = ready.words;
      continue;
    }
    const float* values = wide;
    if (bfloat16) {
      const uint16_t* const narrow = static_cast<const uint16_t*>(source) + (first + q) * K;
      for (ptrdiff_t k = 0; k < K; ++k) {
        const uint32_t bits = uint32_t(narrow[k]) << 16;
        memcpy(wide + k, &bits, 4);
      }
    } else {
      values = static_cast<const float*>(source) + (first + q) * K;
    }
    if (m.precision == Precision::float32) {
      if (bfloat16) {
        memcpy(to, wide, size_t(K) * 4);
      } else {
        from[q] = reinterpret_cast<const uint32_t*>(values);
      }
    } else if (m.precision == Precision::bfloat16) {
      round_row(values, K, to);
    } else {
      scales[q] = quantise_row(values, K, to);
      int8_t* const bytes = reinterpret_cast<int8_t*>(to);
      int32_t sum = 0;
      for (ptrdiff_t k = 0; k < K; ++k) {
        bytes[k] = int8_t(bytes[k] ^ 0x80);
        sum += bytes[k];
      }
      offsets[q] = 128 * sum;
    }
  }
  for (ptrdiff_t k = 0; k < words; k += L) {
    const int count = int(min_of(L, words - k));
    Vec<float> square[L];
    for (int q = 0; q < L; ++q) {
      square[q] = q < rows ? load_some(reinterpret_cast<const float*>(from[q] + k), count) : Vec<float>{};
    }
    transpose<float>(square);
    for (int i = 0; i < count; ++i) store_words(out + (k + i) * step, (Words)square[i]);
  }
}

// Returns false where there is no memory for the workspace.
inline bool session_pack(const SessionPack* packs, int64_t count) {
  constexpr int L = kWordLanes;
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) {
    widest = max_of(widest, max_of(packs[i].matrix->columns[0], packs[i].matrix->columns[1]));
  }
  const size_t row = size_t(widest) + 4, thread_words = row * (L + 1);
  Workspace workspace;
  uint32_t* words;
  workspace.reserve(words, ptrdiff_t(thread_words) * omp_get_max_threads());
  if (!workspace.allocate()) return false;
#pragma omp parallel
  {
    uint32_t* const rows = words + thread_words * size_t(omp_get_thread_num());
    float* const wide = reinterpret_cast<float*>(rows + row * L);
    for (int64_t i = 0; i < count; ++i) {
      const SessionMatrix& m = *packs[i].matrix;
      const ptrdiff_t vector_rows = m.interleaved ? m.units : L, block_rows = m.interleaved ? L : m.vectors * L;
#pragma omp for schedule(static)
      for (int64_t u = 0; u < m.blocks; ++u) {
        for (int part = 0; part < 2 * m.vectors; ++part) {
          const int s = part / m.vectors, v = part % m.vectors;
          const ptrdiff_t unit = u * block_rows + (m.interleaved ? 0 : v * L);
          const ptrdiff_t at = (2 * u * m.vectors + part) * L;
          const bool quantised = m.precision == Precision::int8;
          pack_vector(m, s, packs[i].source[s], packs[i].bfloat16, v * vector_rows + u * block_rows,
                      int(max_of(0, min_of(L, m.units - unit))),
                      m.panels + u * m.panel_words + (s * m.words[0] * m.vectors + v) * L,
                      quantised ? m.scales + at : nullptr, quantised ? m.offsets + at : nullptr, rows, wide);
        }
      }
    }
  }
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
