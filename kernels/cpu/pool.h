#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

void pool(const Pool&, const Parallel&);

}  // namespace convselect::CONVSELECT_ISA
