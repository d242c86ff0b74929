#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

void linear(const Linear&, const Parallel&);

}  // namespace convselect::CONVSELECT_ISA
