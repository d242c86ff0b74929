// Tasks over threads. Each thread has its share of the tasks, the same part of a layer in each layer, so that it finds
// in its own cache what it wrote; and it takes over tasks of the others when it is done, because a neighbour on a
// shared core can slow one thread down. Which thread runs a task never changes its result.
#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// Calls f(task, slot) for each task in [0, n). `slot` < parallel.threads is the same for no two concurrent calls: it
// indexes per-thread scratch.
template <class F>
CS_INLINE void for_tasks(const Parallel& parallel, int64_t n, const F& f) {
  struct alignas(64) Share {
    int64_t next, end;
  };
  constexpr int64_t SHARES = 64;  // more threads than that have shares in common
  struct Context {
    const F* f;
    int64_t count;
    Share shares[SHARES];
  } context;
  const int64_t slots = min_of(parallel.threads, n);
  context.f = &f;
  context.count = min_of(slots, SHARES);
  for (int64_t i = 0; i < context.count; ++i) context.shares[i] = {i * n / context.count, (i + 1) * n / context.count};
  auto body = [](void* opaque, int64_t begin, int64_t end) {
    Context& c = *static_cast<Context*>(opaque);
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t i = 0; i < c.count; ++i) {
        Share& share = c.shares[(slot + i) % c.count];
        for (int64_t task; (task = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.end;)
          (*c.f)(task, slot);
      }
  };
  if (slots == 1)
    body(&context, 0, 1);
  else if (slots > 1)
    parallel.loop(slots, body, &context);
}

}  // namespace convselect::CONVSELECT_ISA
