#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// dst[c * dst_stride + r] = src[r * src_stride + c] for r < rows, c < columns.
void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t rows, int64_t columns);

void to_nhwc(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel&);
void to_nchw(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel&);

}  // namespace convselect::CONVSELECT_ISA
