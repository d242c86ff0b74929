// Nearest and bilinear interpolation in NHWC.
#include "upsample.h"

#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int64_t MOST_COLUMNS = 256;  // of a task: where they read is worked out once for all of its rows
constexpr int64_t MOST_WIDE = 2048;    // floats of them that stay in L1, with a second row, where channels are few
constexpr int64_t FEW = 4 * VL;        // channels
constexpr int64_t FEWEST_ROWS = 8;     // that this pays for
constexpr int64_t CHUNK = 16 * 1024;   // floats of a task, so that it is worth a thread's while

// Where a row or a column of dst reads: low_weight * source[low] + high_weight * source[high].
struct Tap {
  int32_t low, high;
  float low_weight, high_weight;
};

// One dimension, from `in` to `out`, in ATen's arithmetic: float32 throughout.
struct Axis {
  int64_t in, out;
  bool linear, align_corners;
  float step;  // from pixel to pixel of dst, in pixels of the source

  Axis(int64_t in, int64_t out, bool linear, bool align_corners, float given)
      : in(in), out(out), linear(linear), align_corners(linear && align_corners) {
    if (this->align_corners)
      step = out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f;
    else
      step = given >= 0 ? given : static_cast<float>(in) / static_cast<float>(out);
  }

  Tap at(int64_t i) const {
    if (!linear) {
      const int32_t low = pixel(static_cast<float>(i) * step);
      return {low, low, 1.0f, 0.0f};
    }
    if (in == out) return {static_cast<int32_t>(i), static_cast<int32_t>(i), 1.0f, 0.0f};
    float place = align_corners ? static_cast<float>(i) * step : (static_cast<float>(i) + 0.5f) * step - 0.5f;
    if (place < 0) place = 0;
    const int32_t low = pixel(place);
    float weight = place - static_cast<float>(low);
    if (weight > 1) weight = 1;
    return {low, low + (low < in - 1), 1.0f - weight, weight};
  }

 private:
  int32_t pixel(float place) const {
    return static_cast<int32_t>(place < static_cast<float>(in - 1) ? static_cast<int64_t>(place) : in - 1);
  }
};

// Columns of a row of dst.
struct Stretch {
  const Tap* taps;
  int64_t columns, channels, stride;  // floats from a pixel of dst to the next
  const float* end;                   // of the source
};

// `lanes` floats of the source; what follows them, where that is in the source too.
CS_INLINE Vec read(const Stretch& s, const float* from, int64_t lanes) {
  return lanes == VL || s.end - from >= VL ? load(from) : load_part(from, lanes);
}

// A row of the source between the two columns of a tap.
CS_INLINE Vec between(const Stretch& s, const float* src, const Tap& tap, int64_t lanes) {
  return read(s, src + tap.low * s.channels, lanes) * tap.low_weight +
         read(s, src + tap.high * s.channels, lanes) * tap.high_weight;
}

// Writes the pixels of a stretch: value(tap, c, lanes) gives so many floats from channel c on. Where pixels touch,
// whole registers are written, and what is too much the next pixels correct.
template <class F>
CS_INLINE void write_pixels(const Stretch& s, float* dst, const F& value) {
  const int64_t whole = s.channels / VL * VL, rest = s.channels - whole;
  int64_t touching = s.columns;
  if (rest > 0) touching = s.stride == s.channels ? max_of(0, s.columns + 1 - ceil_div(whole + VL, s.channels)) : 0;
  auto write = [&](int64_t begin, int64_t end, bool exact) __attribute__((always_inline)) {
    for (int64_t x = begin; x < end; ++x) {
      const Tap tap = s.taps[x];
      float* const to = dst + x * s.stride;
      for (int64_t c = 0; c < whole; c += VL) store(to + c, value(tap, c, VL));
      if (exact)
        store_part(to + whole, value(tap, whole, rest), rest);
      else if (rest > 0)
        store(to + whole, value(tap, whole, rest));
    }
  };
  write(0, touching, false);
  write(touching, s.columns, true);
}

CS_INLINE void nearest(const Stretch s, const float* src, float* dst) {
  write_pixels(s, dst, [=](const Tap& tap, int64_t c, int64_t lanes) __attribute__((always_inline)) {
    return read(s, src + tap.low * s.channels + c, lanes);
  });
}

CS_INLINE void bilinear(const Stretch s, const float* low, const float* high, const Tap row, float* dst) {
  write_pixels(s, dst, [=](const Tap& tap, int64_t c, int64_t lanes) __attribute__((always_inline)) {
    return between(s, low + c, tap, lanes) * row.low_weight + between(s, high + c, tap, lanes) * row.high_weight;
  });
}

// The first half of `bilinear`: one row of the source at the width of dst.
CS_INLINE void widen(const Stretch s, const float* src, float* dst) {
  write_pixels(s, dst, [=](const Tap& tap, int64_t c, int64_t lanes) __attribute__((always_inline)) {
    return between(s, src + c, tap, lanes);
  });
}

// The other half, over a run of floats. Reads whole registers.
CS_INLINE void mix(const float* low, const float* high, const Tap row, float* dst, int64_t n) {
  auto mixed = [=](int64_t i) __attribute__((always_inline)) {
    return load(low + i) * row.low_weight + load(high + i) * row.high_weight;
  };
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(dst + i, mixed(i));
  if (i < n) store_part(dst + i, mixed(i), n - i);
}

CS_INLINE void copy(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

// What one task makes: rows of an image, in columns from `column` on.
struct Task {
  const Upsample& u;
  const Axis& rows;
  int64_t image, row_begin, row_end, column;
  Stretch stretch;

  const float* src(int64_t y) const { return u.src + (image * u.ih + y) * u.iw * u.channels; }
  float* dst(int64_t y) const { return u.dst + ((image * u.oh + y) * u.ow + column) * u.dst_stride; }
  int64_t floats() const { return stretch.columns * u.channels; }

  void run_nearest() const {
    const bool copies = u.channels < VL && u.dst_stride == u.channels;  // a run of floats is faster than pixels then
    int64_t before = -1;
    for (int64_t y = row_begin; y < row_end; ++y) {
      const int64_t from = rows.at(y).low;
      if (copies && from == before)
        copy(dst(y - 1), dst(y), floats());
      else
        nearest(stretch, src(from), dst(y));
      before = from;
    }
  }

  void run_bilinear() const {
    for (int64_t y = row_begin; y < row_end; ++y) {
      const Tap row = rows.at(y);
      bilinear(stretch, src(row.low), src(row.high), row, dst(y));
    }
  }

  // One dimension after the other: a row of the source is widened once for all rows of dst that read it.
  void run_separately() const {
    alignas(64) float wide[2][MOST_WIDE + VL];
    int64_t held[2] = {-1, -1};  // the source rows that these are
    auto widened = [&](int64_t y) {
      if (held[y % 2] != y) widen(stretch, src(y), wide[y % 2]);
      held[y % 2] = y;
      return wide[y % 2];
    };
    for (int64_t y = row_begin; y < row_end; ++y) {
      const Tap row = rows.at(y);
      const float *low = widened(row.low), *high = widened(row.high);
      mix(low, high, row, dst(y), floats());
    }
  }
};

}  // namespace

void upsample(const Upsample& u, const Parallel& parallel) {
  const Axis rows(u.ih, u.oh, u.linear, u.align_corners, u.step_h);
  const Axis columns(u.iw, u.ow, u.linear, u.align_corners, u.step_w);
  const bool separately = u.linear && u.channels < FEW && u.dst_stride == u.channels && u.oh > u.ih;
  const int64_t blocks = ceil_div(u.ow, separately ? min_of(MOST_COLUMNS, MOST_WIDE / u.channels) : MOST_COLUMNS);
  const int64_t useful = min_of(4 * parallel.threads, ceil_div(u.mb * u.oh * u.ow * u.channels, CHUNK));
  const int64_t parts = max_of(1, min_of(ceil_div(useful, u.mb), u.oh / FEWEST_ROWS));
  for_tasks(parallel, u.mb * parts * blocks, [&](int64_t index, int64_t) {
    const int64_t block = index % blocks, part = index / blocks % parts, image = index / blocks / parts;
    const int64_t begin = block * u.ow / blocks, end = (block + 1) * u.ow / blocks;
    Tap taps[MOST_COLUMNS];
    for (int64_t x = begin; x < end; ++x) taps[x - begin] = columns.at(x);
    const Stretch stretch{taps, end - begin, u.channels, u.dst_stride, u.src + u.mb * u.ih * u.iw * u.channels};
    const Task task{u, rows, image, part * u.oh / parts, (part + 1) * u.oh / parts, begin, stretch};
    if (!u.linear)
      task.run_nearest();
    else if (separately)
      task.run_separately();
    else
      task.run_bilinear();
  });
}

}  // namespace convselect::CONVSELECT_ISA
