// What blocks of output pixels share, each of which sees a window of source pixels.
#pragma once

#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// Adds what row `r` of the window gives to PY x PX output pixels of a K x K filter with stride S. `packed`: a register
// for each tap. The loops of the caller and these are unrolled as one, so that what is not a tap costs nothing.
template <int K, int S, int PY, int PX>
CS_INLINE void add_row(int r, const Vec* row, const float* packed, Vec (&acc)[PY][PX]) {
#pragma GCC unroll 8
  for (int y = 0; y < PY; ++y) {
    const int ky = r - y * S;
    if (ky < 0 || ky >= K) continue;
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      const Vec w = load(packed + (ky * K + kx) * VL);
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) acc[y][x] += w * row[x * S + kx];
    }
  }
}

}  // namespace convselect::CONVSELECT_ISA
