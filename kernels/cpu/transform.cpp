// NCHW <-> NHWC: for each image the transpose of a [channels, pixels] matrix.
#include "transform.h"

#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// Exchanges bit `S` of the row number with bit S of the lane number, for all pairs of rows; all S: a transpose.
template <int S>
CS_INLINE void exchange(Vec (&v)[VL]) {
  VecI low{}, high{};
  for (int i = 0; i < VL; ++i) {
    low[i] = i & S ? VL + (i ^ S) : i;
    high[i] = i & S ? VL + i : i ^ S;
  }
#pragma GCC unroll 16
  for (int r = 0; r < VL; ++r) {
    if (r & S) continue;
    const Vec a = v[r], b = v[r | S];
    v[r] = __builtin_shuffle(a, b, low);
    v[r | S] = __builtin_shuffle(a, b, high);
  }
}

// Registers a and b as one vector of 2 VL lanes; out[i] = that[lane(i)].
template <class F>
CS_INLINE Vec pick(Vec a, Vec b, F lane) {
  VecI mask{};
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) mask[i] = lane(i);
  return __builtin_shuffle(a, b, mask);
}

// The transpose of R rows of dense columns, R <= 4: dst[c * R + r] = src[r * src_stride + c]. A pixel of NHWC is then
// shorter than a register, and stores of parts of registers would take most of the time.
template <int R>
CS_INLINE void interleave(const float* src, int64_t src_stride, float* dst, int64_t columns) {
  int64_t c = 0;
  for (; c + VL <= columns; c += VL) {
    Vec v[R];
    for (int r = 0; r < R; ++r) v[r] = load(src + r * src_stride + c);
#pragma GCC unroll 4
    for (int o = 0; o < R; ++o) {  // lane i of register o: row (o * VL + i) % R, column (o * VL + i) / R
      Vec out = v[0];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        out = pick(out, v[r], [&](int i) { return (o * VL + i) % R == r ? VL + (o * VL + i) / R : i; });
      store(dst + c * R + o * VL, out);
    }
  }
  for (; c < columns; ++c)
    for (int r = 0; r < R; ++r) dst[c * R + r] = src[r * src_stride + c];
}

// Its inverse: dst[c * dst_stride + r] = src[r * C + c].
template <int C>
CS_INLINE void deinterleave(const float* src, float* dst, int64_t dst_stride, int64_t rows) {
  int64_t r = 0;
  for (; r + VL <= rows; r += VL) {
    Vec v[C];
    for (int o = 0; o < C; ++o) v[o] = load(src + r * C + o * VL);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {  // lane i of register c: element i * C + c
      Vec out = v[0];
#pragma GCC unroll 4
      for (int o = 0; o < C; ++o)
        out = pick(out, v[o], [&](int i) { return (i * C + c) / VL == o ? VL + (i * C + c) % VL : i; });
      store(dst + c * dst_stride + r, out);
    }
  }
  for (; r < rows; ++r)
    for (int c = 0; c < C; ++c) dst[c * dst_stride + r] = src[r * C + c];
}

// One block of at most VL x VL.
CS_INLINE void block(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t rows,
                     int64_t columns) {
  Vec v[VL];
  if (rows == VL && columns == VL) {
#pragma GCC unroll 16
    for (int r = 0; r < VL; ++r) v[r] = load(src + r * src_stride);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < VL; ++r) v[r] = r < rows ? load_part(src + r * src_stride, columns) : Vec{};
  }
  exchange<1>(v);
  exchange<2>(v);
  if constexpr (VL > 4) exchange<4 % VL>(v);
  if constexpr (VL > 8) exchange<8 % VL>(v);
  if (rows == VL && columns == VL) {
#pragma GCC unroll 16
    for (int c = 0; c < VL; ++c) store(dst + c * dst_stride, v[c]);
  } else {
#pragma GCC unroll 16
    for (int c = 0; c < VL; ++c)
      if (c < columns) store_part(dst + c * dst_stride, v[c], rows);
  }
}

// The transposes of `mb` matrices, in strips: as many rows of dst as fill whole cache lines of src.
void transposes(const float* src, float* dst, int64_t mb, int64_t rows, int64_t columns, const Parallel& parallel) {
  // The longer side is cut; 64 lines of the shorter one keep a strip of both sides in L1.
  const bool by_rows = rows > columns;
  const int64_t side = by_rows ? rows : columns, other = by_rows ? columns : rows;
  const int64_t width = round_up(max_of(VL, min_of(side, 8192 / max_of(other, 1))), VL), strips = ceil_div(side, width);
  for_tasks(parallel, mb * strips, [&](int64_t task, int64_t) {
    const float* s = src + task / strips * rows * columns;
    float* d = dst + task / strips * rows * columns;
    const int64_t begin = task % strips * width, count = min_of(width, side - begin);
    if (by_rows)
      transpose(s + begin * columns, columns, d + begin, rows, count, columns);
    else
      transpose(s + begin, columns, d + begin * rows, rows, rows, count);
  });
}

}  // namespace

void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t rows, int64_t columns) {
  if (rows == 3 && dst_stride == 3) return interleave<3>(src, src_stride, dst, columns);
  if (rows == 4 && dst_stride == 4) return interleave<4>(src, src_stride, dst, columns);
  if (columns == 3 && src_stride == 3) return deinterleave<3>(src, dst, dst_stride, rows);
  if (columns == 4 && src_stride == 4) return deinterleave<4>(src, dst, dst_stride, rows);
  for (int64_t c = 0; c < columns; c += VL)
    for (int64_t r = 0; r < rows; r += VL)
      block(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride, min_of(VL, rows - r),
            min_of(VL, columns - c));
}

void to_nhwc(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel& parallel) {
  transposes(src, dst, mb, channels, pixels, parallel);
}

void to_nchw(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel& parallel) {
  transposes(src, dst, mb, pixels, channels, parallel);
}

}  // namespace convselect::CONVSELECT_ISA
