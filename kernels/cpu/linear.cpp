// The classifier: dst[i][n] = act(sum over x of src[i][x] * weight[n][x] + bias[n]) for a few rows i. It reads each
// weight once, so that memory bounds it; the weights are used where they lie.
#include "linear.h"

#include "activation.h"
#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int64_t OUTPUTS = 4;                   // rows of the weight read at once, each a stream of its own
constexpr int64_t TASK_FLOATS = 64 * 1024;       // of weights, so that a task is worth a thread's while
constexpr int64_t AHEAD = 1024 / sizeof(float);  // prefetch distance in each stream

CS_INLINE float sum(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < VL; ++i) total += v[i];
  return total;
}

// Outputs [n, n + count) of one row of src.
template <int COUNT>
void outputs(const Linear& l, const float* src, const float* weight, float* dst, int64_t n) {
  Vec acc[COUNT][2] = {};
  int64_t x = 0;
  for (; x + 2 * VL <= l.k; x += 2 * VL) {
    const Vec a = load(src + x), b = load(src + x + VL);
    for (int j = 0; j < COUNT; ++j) {
      const float* w = weight + j * l.k + x;
      __builtin_prefetch(w + AHEAD);
      acc[j][0] += a * load(w);
      acc[j][1] += b * load(w + VL);
    }
  }
  for (; x < l.k; x += VL) {
    const int64_t lanes = min_of(VL, l.k - x);
    const Vec a = load_part(src + x, lanes);
    for (int j = 0; j < COUNT; ++j) acc[j][0] += a * load_part(weight + j * l.k + x, lanes);
  }
  for (int j = 0; j < COUNT; ++j) {
    const float value = sum(acc[j][0] + acc[j][1]) + (l.bias ? l.bias[n + j] : 0.0f);
    dst[n + j] = activate(splat(value), l.act, l.alpha, l.beta)[0];
  }
}

}  // namespace

void linear(const Linear& l, const Parallel& parallel) {
  const int64_t quads = l.n / OUTPUTS;
  const int64_t tasks = max_of(1, min_of(quads, ceil_div(l.n * l.k, TASK_FLOATS)));
  for_tasks(parallel, tasks, [&](int64_t task, int64_t) {
    const int64_t begin = task * quads / tasks * OUTPUTS;
    const int64_t end = task + 1 == tasks ? l.n : (task + 1) * quads / tasks * OUTPUTS;
    for (int64_t n = begin; n < end;) {
      const int64_t count = n + OUTPUTS <= end ? OUTPUTS : 1;
      for (int64_t i = 0; i < l.m; ++i) {
        const float* weight = l.weight + n * l.k;
        (count == OUTPUTS ? outputs<OUTPUTS> : outputs<1>)(l, l.src + i * l.k, weight, l.dst + i * l.n, n);
      }
      n += count;
    }
  });
}

}  // namespace convselect::CONVSELECT_ISA
