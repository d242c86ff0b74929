// The rows each family contributes to the table of kernels, and what they take.
#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

#define CS_FAMILY(name)                 \
  extern const Kernel name##_kernels[]; \
  extern const int name##_count;

CS_FAMILY(depthwise)
CS_FAMILY(direct)
CS_FAMILY(direct_nchw)
CS_FAMILY(grouped)
CS_FAMILY(im2)
CS_FAMILY(kn2)
CS_FAMILY(mec)
CS_FAMILY(pointwise)
CS_FAMILY(winograd)

#undef CS_FAMILY

// What several kernels take.
inline bool any(const Problem&) { return true; }
inline bool ungrouped(const Problem& p) { return p.g == 1; }

}  // namespace convselect::CONVSELECT_ISA
