// One SIMD register of floats, by the compiler's vector extensions: the same source serves AVX-512, AVX2, NEON and
// plain SSE. Each build lives in a namespace of its own (CONVSELECT_ISA), so that the linker never mixes them.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define CONVSELECT_ISA avx512
#define CONVSELECT_VL 16
#elif defined(__AVX2__)
#define CONVSELECT_ISA avx2
#define CONVSELECT_VL 8
#elif defined(__aarch64__)
#define CONVSELECT_ISA neon
#define CONVSELECT_VL 4
#else
#define CONVSELECT_ISA portable
#define CONVSELECT_VL 4
#endif

#define CS_INLINE static inline __attribute__((always_inline))

namespace convselect::CONVSELECT_ISA {

constexpr int VL = CONVSELECT_VL;  // floats in a register
typedef float Vec __attribute__((vector_size(CONVSELECT_VL * 4)));
typedef float VecU __attribute__((vector_size(CONVSELECT_VL * 4), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(CONVSELECT_VL * 4)));
typedef double VecD __attribute__((vector_size(CONVSELECT_VL * 8)));  // as many lanes, in two registers

CS_INLINE Vec load(const float* from) { return *reinterpret_cast<const VecU*>(from); }
CS_INLINE void store(float* to, Vec value) { *reinterpret_cast<VecU*>(to) = value; }
CS_INLINE Vec splat(float value) { return value - Vec{}; }

#if defined(__AVX2__) && !defined(__AVX512F__)
CS_INLINE __m256i first_lanes(int64_t n) {
  alignas(32) static const int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + 8 - n));
}
#endif

// The first n <= VL lanes; the others are zero. Touches no memory past from[n - 1].
CS_INLINE Vec load_part(const float* from, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(from, first_lanes(n));
#else
  Vec value{};
  for (int64_t i = 0; i < n; ++i) value[i] = from[i];
  return value;
#endif
}
CS_INLINE void store_part(float* to, Vec value, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), value);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, first_lanes(n), value);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = value[i];
#endif
}

CS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CS_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
CS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
CS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Weights smaller than the least normal float become zero when packed: a multiply by a subnormal costs 40 times more.
CS_INLINE float flush_subnormal(float w) { return __builtin_fabsf(w) < 1.17549435e-38f ? 0.0f * w : w; }

}  // namespace convselect::CONVSELECT_ISA
