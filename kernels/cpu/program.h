// A program: the steps of one graph, each a call of a kernel on addresses that were planned ahead.
#pragma once
#include "kernel.h"

namespace convselect {

// The order is that of STEPS in convselect/graph/steps.py.
enum class Step : int64_t { conv, to_layout, scale_shift, linear, pool, upsample };

// Runs `count` steps. A step is a record of 64-bit words: its kind, its length, then the fields of the kernel's own
// structure in their order, activations as (kind, alpha, beta) with the bits of doubles. An address is a number of
// bytes from a base: bits 48 to 63 hold the base's index in `bases`, of which the first is null, for absolute
// addresses. `nanoseconds`, if not null, receives each step's time.
void execute(const int64_t* steps, int64_t count, char* const* bases, const KernelTable& table,
             const Parallel& parallel, int64_t* nanoseconds);

}  // namespace convselect
