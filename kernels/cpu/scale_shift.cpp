// dst = act(src * scale[c] + shift[c]): a batch norm that no convolution before it can absorb, with its activation.
#include "scale_shift.h"

#include "activation.h"
#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int64_t CHUNK = 16 * 1024;  // floats of a task, so that it is worth a thread's while

struct Rows {
  const float *src, *scale, *shift;
  float* dst;
  Act act;
  float alpha, beta;
};

// n floats whose scale and shift run along with them.
CS_INLINE void along(const Rows& r, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) {
    const int64_t lanes = min_of(VL, n - i);
    if (lanes == VL)
      store(r.dst + i, activate(load(r.src + i) * load(r.scale + i) + load(r.shift + i), r.act, r.alpha, r.beta));
    else
      store_part(r.dst + i,
                 activate(load_part(r.src + i, lanes) * load_part(r.scale + i, lanes) + load_part(r.shift + i, lanes),
                          r.act, r.alpha, r.beta),
                 lanes);
  }
}

// n floats of one channel.
CS_INLINE void plane(const Rows& r, int64_t n) {
  const Vec scale = splat(*r.scale), shift = splat(*r.shift);
  for (int64_t i = 0; i < n; i += VL) {
    const int64_t lanes = min_of(VL, n - i);
    if (lanes == VL)
      store(r.dst + i, activate(load(r.src + i) * scale + shift, r.act, r.alpha, r.beta));
    else
      store_part(r.dst + i, activate(load_part(r.src + i, lanes) * scale + shift, r.act, r.alpha, r.beta), lanes);
  }
}

}  // namespace

void scale_shift(const ScaleShift& s, const Parallel& parallel) {
  // A row is a pixel's channels in NHWC, a channel's pixels in NCHW.
  const int64_t rows = s.mb * (s.nhwc ? s.pixels : s.channels), length = s.nhwc ? s.channels : s.pixels;
  const int64_t tasks = max_of(1, min_of(rows, ceil_div(rows * length, CHUNK)));
  for_tasks(parallel, tasks, [&](int64_t task, int64_t) {
    for (int64_t row = task * rows / tasks; row < (task + 1) * rows / tasks; ++row) {
      const int64_t channel = s.nhwc ? 0 : row % s.channels, at = row * length;
      const Rows r{s.src + at, s.scale + channel, s.shift + channel, s.dst + at, s.act, s.alpha, s.beta};
      if (s.nhwc)
        along(r, length);
      else
        plane(r, length);
    }
  });
}

}  // namespace convselect::CONVSELECT_ISA
