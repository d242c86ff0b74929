// A program: the steps of one graph, each a call of a kernel on addresses that were planned ahead.
#pragma once
#include <variant>

#include "kernel.h"

namespace convselect {

// `kernel` is a row of the table.
struct Conv {
  int64_t kernel;
  Call call;
};

struct ToLayout {
  bool nhwc;  // of dst
  int64_t mb, channels, pixels;
  const float* src;
  float* dst;
};

// The order is that of STEPS in convselect/graph/program/steps.py.
using Step = std::variant<Conv, ToLayout, ScaleShift, Linear, Pool, Upsample>;

// An address of a program is a number of bytes from a base: bits 48 to 63 hold the base's index, and 0 is the base of
// absolute addresses.
struct Address {
  static constexpr int OFFSET_BITS = 48;
  uint64_t word;

  explicit Address(const void* in_a_step) : word(reinterpret_cast<uint64_t>(in_a_step)) {}
  explicit Address(int64_t word) : word(static_cast<uint64_t>(word)) {}
  uint64_t base() const { return word >> OFFSET_BITS; }
  uint64_t offset() const { return word & ((uint64_t{1} << OFFSET_BITS) - 1); }
};

// A step is a record of 64-bit words: its kind, its length, then the fields of the kernel's own structure in their
// order, activations as (kind, alpha, beta) with the bits of doubles. `bases[i]` is where base i lies, and
// `bases[0]` is null; without `bases`, addresses stay the words they are. Moves `word` to the end of the record, which
// is never longer than LONGEST.
constexpr int LONGEST = 32;
Step decode(const int64_t*& word, char* const* bases);

// Runs the `count` steps at `steps`, which have been verified (verify.h). `nanoseconds`, if not null, receives each
// step's time.
void execute(const int64_t* steps, int64_t count, char* const* bases, const KernelTable& table,
             const Parallel& parallel, int64_t* nanoseconds);

}  // namespace convselect
