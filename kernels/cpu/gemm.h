// The GEMM under all matrix-based families: a register tile of MR rows and NV registers of columns.
//
// A is given by row pointers, one set for each tap, so that the same code multiplies a plain matrix (one tap), runs a
// convolution without a copy (a tap for each kernel element, rows pointing into src), and skips padding (rows pointing
// to zeros). B is packed, or any matrix whose rows can be read in whole registers.
#pragma once
#include "activation.h"
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers: accumulators + one row of B + a broadcast
constexpr int NV_MAX = 4;
constexpr int MR_OF[NV_MAX + 1] = {0, 8, 12, 8, 6};
constexpr int MR_MAX = 12;
#else  // 16 registers
constexpr int NV_MAX = 2;
constexpr int MR_OF[NV_MAX + 1] = {0, 8, 6};
constexpr int MR_MAX = 8;
#endif

// K is blocked so that a block of B, K_BLOCK x NV_MAX registers, stays in half of a 512 KiB L2.
constexpr int64_t K_BLOCK = 1024;

// Columns are packed in groups of up to NV_MAX registers, as even as possible: group i of `groups` covers the
// registers [begin(i), begin(i + 1)), and is stored [k][registers][VL].
struct ColumnGroups {
  int64_t columns, registers, groups;
  explicit ColumnGroups(int64_t n) : columns(n), registers(ceil_div(n, VL)), groups(ceil_div(registers, NV_MAX)) {}
  int64_t begin(int64_t i) const { return i * registers / groups; }
  int64_t packed_floats(int64_t k) const { return registers * VL * k; }
};

// Packs B[t * k + x][n] = b[t * tap_stride + x * k_stride + n * n_stride], x < k, for n < groups.columns; absent
// columns are zero.
void pack_columns(const ColumnGroups& groups, const float* b, int64_t k, int64_t k_stride, int64_t n_stride,
                  float* packed, int64_t taps = 1, int64_t tap_stride = 0);

// dst[i] = act(from[i] + row_bias + column_bias[i] + residual[i]) for i < n; null is zero, and dst may be `from`.
void finish_row(float* dst, const float* from, int64_t n, float row_bias, const float* column_bias,
                const float* residual, const Epilogue& epilogue);

// C[i][n] = epilogue(sum over t < taps, x < k of A[t][i][x] * B[t * k + x][n]).
struct Gemm {
  int64_t m, taps, k;
  const float* const* a;  // a[t * m + i] points to A[t][i][0], k floats
  const float* b;         // from pack_columns
  float* c;               // C[i][n] at c[i * ldc + n]
  int64_t ldc;
  const float* residual;     // indexed as c, or null
  const Epilogue* epilogue;  // bias indexed by column; null: none, and `accumulate` decides about C's old value
  bool accumulate;
};

// Computes the column groups [group_begin, group_end) of C.
void gemm(const Gemm&, const ColumnGroups&, int64_t group_begin, int64_t group_end);

// C[i][n] = epilogue(sum over t < taps, x < k of A[i][t * k + x] * B[t][x][n]) for n < columns, bias indexed by row.
struct GemmRowMajor {
  int64_t m, k, columns;
  const float* a;  // A[i][x] at a[i * lda + x]
  int64_t lda;
  const float* b;  // B[t][x][n] at b[b_taps[t] + x * ldb + n]
  int64_t ldb;
  float* c;  // C[i][n] at c[i * ldc + n]
  int64_t ldc;
  const float* bias;         // [m] or null
  const float* residual;     // indexed as c, or null
  const Epilogue* epilogue;  // as above; its own bias and residual are not used
  bool accumulate;
  int64_t taps = 1;
  const int64_t* b_taps = nullptr;  // null: t * k * ldb
};

// `edge` is scratch of taps * k * VL floats, for the last columns of a B whose rows do not end on a whole register;
// null if each row of B can be read on to the end of its last register.
void gemm_row_major(const GemmRowMajor&, float* edge);

}  // namespace convselect::CONVSELECT_ISA
