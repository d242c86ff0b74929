// dst = act(src * scale[c] + shift[c] + addend): a batch norm that no convolution before it can absorb, the excitation
// of squeeze-and-excite, a sum, an activation that stands alone, or a copy into a range of channels.
#include "scale_shift.h"

#include "activation.h"
#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int64_t CHUNK = 16 * 1024;  // floats of a task, so that it is worth a thread's while

// One row: a pixel's channels, with a scale and a shift for each, or a channel's pixels, which have them in common.
struct Row {
  const float *src, *scale, *shift, *addend;
  float* dst;
  Act act;
  float alpha, beta;
};

template <bool COMMON>
CS_INLINE void run(const Row& r, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) {
    const int64_t lanes = min_of(VL, n - i);
    auto get = [&](const float* from)
                   __attribute__((always_inline)) { return lanes == VL ? load(from + i) : load_part(from + i, lanes); };
    Vec value = get(r.src);
    if (r.scale) value *= COMMON ? splat(*r.scale) : get(r.scale);
    if (r.shift) value += COMMON ? splat(*r.shift) : get(r.shift);
    if (r.addend) value += get(r.addend);
    value = activate(value, r.act, r.alpha, r.beta);
    if (lanes == VL)
      store(r.dst + i, value);
    else
      store_part(r.dst + i, value, lanes);
  }
}

CS_INLINE const float* at(const float* base, int64_t offset) { return base ? base + offset : nullptr; }

// Without factors of a channel, dense values are one run, whatever their sizes are.
void run_dense(const ScaleShift& s, const Parallel& parallel) {
  const int64_t n = s.mb * s.channels * s.pixels, vectors = ceil_div(n, VL), tasks = ceil_div(n, CHUNK);
  for_tasks(parallel, tasks, [&](int64_t task, int64_t) {
    const int64_t begin = task * vectors / tasks * VL, end = min_of(n, (task + 1) * vectors / tasks * VL);
    const Row r{s.src + begin, nullptr, nullptr, at(s.addend, begin), s.dst + begin, s.act, s.alpha, s.beta};
    run<false>(r, end - begin);
  });
}

}  // namespace

void scale_shift(const ScaleShift& s, const Parallel& parallel) {
  const bool dense = !s.nhwc || (s.src_stride == s.channels && s.dst_stride == s.channels);
  if (dense && !s.scale && !s.shift) return run_dense(s, parallel);
  const bool nhwc = s.nhwc && !(dense && s.channels == 1);  // a map of one channel is one row of its pixels
  const int64_t per_image = nhwc ? s.pixels : s.channels, rows = s.mb * per_image;
  const int64_t length = nhwc ? s.channels : s.pixels;
  const int64_t src_stride = nhwc ? s.src_stride : length, dst_stride = nhwc ? s.dst_stride : length;
  const int64_t tasks = max_of(1, min_of(rows, ceil_div(rows * length, CHUNK)));
  for_tasks(parallel, tasks, [&](int64_t task, int64_t) {
    for (int64_t row = task * rows / tasks; row < (task + 1) * rows / tasks; ++row) {
      const int64_t channel = nhwc ? 0 : row % s.channels;
      const Row r{s.src + row * src_stride,
                  at(s.scale, channel + row / per_image * s.scale_stride),
                  at(s.shift, channel),
                  at(s.addend, row * length),
                  s.dst + row * dst_stride,
                  s.act,
                  s.alpha,
                  s.beta};
      if (nhwc)
        run<false>(r, length);
      else
        run<true>(r, length);
    }
  });
}

}  // namespace convselect::CONVSELECT_ISA
