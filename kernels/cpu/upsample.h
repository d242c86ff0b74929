#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

void upsample(const Upsample&, const Parallel&);

}  // namespace convselect::CONVSELECT_ISA
