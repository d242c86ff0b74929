// What must hold before a kernel runs. All of it throws std::runtime_error, naming the value and the rule.
#pragma once
#include <vector>

#include "program.h"

namespace convselect {

// The sizes: mb may be 0, for which no kernel may be called; and that the kernel fits. What holds fewer than 2^40
// floats, more than any machine does, keeps all products that a kernel computes far below 2^63.
void check(const Problem&);
void check(const Kernel&, const Problem&);  // that it takes the problem
void check(Act);
// The sizes, and that no window lies before or behind src.
void check(const Pool&);
// The sizes, and that the steps are finite.
void check(const Upsample&);

// Floats from the first element to the last, 0 where there is none.
int64_t extent(int64_t dim, const int64_t* sizes, const int64_t* strides);

// Memory that the steps of a program may use. Base i is `bases[i - 1]`; absolute addresses lie inside one of the
// `constants`, which are only read.
struct Memory {
  struct Base {
    int64_t floats;
    bool writable;
  };
  struct Range {
    uint64_t begin, end;
  };
  std::vector<Base> bases;
  std::vector<Range> constants;
};

// The `count` steps in the words [begin, end): each record, what the kernel takes, and that all that it reads and
// writes lies inside of `memory`, in no two places of which it could see its own writes.
void verify(const int64_t* begin, const int64_t* end, int64_t count, int threads, Memory memory, const KernelTable&);

}  // namespace convselect
