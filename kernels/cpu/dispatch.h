#pragma once
#include <string>

#include "kernel.h"

namespace convselect {

// The numbering is that of isa() in kernels/__init__.py.
enum class Isa : int { portable, avx2, avx512, neon };

// The best instruction set that the processor has and the environment variable CONVSELECT_ISA allows; fixed at the
// first call. A value that this build does not know gives null, and an `error` that names those it does.
const KernelTable* kernels(Isa* isa, std::string* error);

}  // namespace convselect
