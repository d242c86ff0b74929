#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

void scale_shift(const ScaleShift&, const Parallel&);

}  // namespace convselect::CONVSELECT_ISA
