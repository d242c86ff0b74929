// NCHW <-> NHWC: for each image the transpose of a [channels, pixels] matrix.
#include "transform.h"

#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// dst[c * rows + r] = src[r * columns + c], in square blocks that fit into L1 from both sides.
void transpose(const float* src, float* dst, int64_t mb, int64_t rows, int64_t columns, const Parallel& parallel) {
  constexpr int64_t BLOCK = 32;
  const int64_t strips = ceil_div(columns, BLOCK);
  for_tasks(parallel, mb * strips, [&](int64_t task, int64_t) {
    const float* s = src + task / strips * rows * columns;
    float* d = dst + task / strips * rows * columns;
    const int64_t c0 = task % strips * BLOCK, c1 = min_of(columns, c0 + BLOCK);
    for (int64_t r0 = 0; r0 < rows; r0 += BLOCK) {
      const int64_t r1 = min_of(rows, r0 + BLOCK);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = r0; r < r1; ++r) d[c * rows + r] = s[r * columns + c];
    }
  });
}

}  // namespace

void to_nhwc(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel& parallel) {
  transpose(src, dst, mb, channels, pixels, parallel);
}

void to_nchw(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel& parallel) {
  transpose(src, dst, mb, pixels, channels, parallel);
}

}  // namespace convselect::CONVSELECT_ISA
