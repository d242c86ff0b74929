#pragma once
#include "kernel.h"

namespace convselect {

// The numbering is that of isa() in kernels/__init__.py.
enum class Isa : int { portable, avx2, avx512, neon };

// The best instruction set that the processor has and the environment variable CONVSELECT_ISA allows; fixed at the
// first call. An unknown value of the variable gives null and sets `bad` to it.
const KernelTable* kernels(Isa* isa, const char** bad);

}  // namespace convselect
