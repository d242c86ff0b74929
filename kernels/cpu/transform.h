#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

void to_nhwc(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel&);
void to_nchw(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel&);

}  // namespace convselect::CONVSELECT_ISA
