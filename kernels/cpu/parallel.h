// Tasks over threads. Each thread takes the next task when it is free, because a neighbour on a shared core can slow
// one thread down; which thread runs a task never changes its result.
#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// Calls f(task, slot) for each task in [0, n). `slot` < parallel.threads is the same for no two concurrent calls: it
// indexes per-thread scratch.
template <class F>
CS_INLINE void for_tasks(const Parallel& parallel, int64_t n, const F& f) {
  struct Context {
    const F* f;
    int64_t n, next;
  } context{&f, n, 0};
  auto body = [](void* opaque, int64_t begin, int64_t end) {
    Context& c = *static_cast<Context*>(opaque);
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t task; (task = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) < c.n;) (*c.f)(task, slot);
  };
  const int64_t slots = min_of(parallel.threads, n);
  if (slots == 1)
    body(&context, 0, 1);
  else if (slots > 1)
    parallel.loop(slots, body, &context);
}

}  // namespace convselect::CONVSELECT_ISA
