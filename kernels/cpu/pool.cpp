// Maximum and average pooling in NHWC, vectorised over the channels.
#include "pool.h"

#include "rows.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// The taps of a window that lie inside [0, size): tap i is at start + i * dilation.
struct Taps {
  int64_t begin, end;
};

CS_INLINE Taps inside(int64_t start, int64_t taps, int64_t dilation, int64_t size) {
  Taps t;
  clip(start, dilation, size, taps, &t.begin, &t.end);
  return t;
}

// The larger of the two; NaN wins, as in torch.
CS_INLINE Vec larger(Vec best, Vec value) { return (value > best) | (value != value) ? value : best; }

// NV registers of one output pixel. `window` is the source pixel of tap (0, 0), which may lie outside.
template <bool MAX, int NV>
CS_INLINE void pixel(const Pool& p, const float* window, Taps rows, Taps columns, float scale, float* dst,
                     int64_t last) {
  Vec acc[NV];
  for (int v = 0; v < NV; ++v) acc[v] = splat(MAX ? -__builtin_inff() : 0.0f);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    Vec row[NV];  // sums by rows: a window of 112 x 112 would lose three digits in one long sum
    for (int v = 0; v < NV; ++v) row[v] = MAX ? acc[v] : Vec{};
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const float* src = window + (i * p.dh * p.iw + j * p.dw) * p.channels;
      for (int v = 0; v < NV; ++v) {
        const Vec value = v == NV - 1 && last < VL ? load_part(src + v * VL, last) : load(src + v * VL);
        row[v] = MAX ? larger(row[v], value) : row[v] + value;
      }
    }
    for (int v = 0; v < NV; ++v) acc[v] = MAX ? row[v] : acc[v] + row[v];
  }
  for (int v = 0; v < NV; ++v) {
    const Vec value = MAX ? acc[v] : acc[v] * scale;
    if (v == NV - 1 && last < VL)
      store_part(dst + v * VL, value, last);
    else
      store(dst + v * VL, value);
  }
}

// The channels [c_begin, c_end) of one row of dst.
template <bool MAX>
void row(const Pool& p, int64_t n, int64_t y, int64_t c_begin, int64_t c_end) {
  const int64_t top = y * p.sh - p.ph;
  const Taps rows = inside(top, p.kh, p.dh, p.ih);
  for (int64_t x = 0; x < p.ow; ++x) {
    const int64_t left = x * p.sw - p.pw;
    const Taps columns = inside(left, p.kw, p.dw, p.iw);
    int64_t divisor = p.divisor;
    if (divisor == 0)
      divisor = p.include_pad ? (min_of(top + p.kh, p.ih + p.ph) - top) * (min_of(left + p.kw, p.iw + p.pw) - left)
                              : (rows.end - rows.begin) * (columns.end - columns.begin);
    const float scale = 1.0f / static_cast<float>(divisor);
    const float* window = p.src + ((n * p.ih + top) * p.iw + left) * p.channels;
    float* dst = p.dst + ((n * p.oh + y) * p.ow + x) * p.dst_stride;
    int64_t c = c_begin;
    for (; c + 4 * VL <= c_end; c += 4 * VL) pixel<MAX, 4>(p, window + c, rows, columns, scale, dst + c, VL);
    for (; c < c_end; c += VL) pixel<MAX, 1>(p, window + c, rows, columns, scale, dst + c, min_of(VL, c_end - c));
  }
}

}  // namespace

void pool(const Pool& p, const Parallel& parallel) {
  // A result of few rows, such as a global average, is split by channels too.
  const int64_t rows = p.mb * p.oh, registers = ceil_div(p.channels, VL);
  const int64_t parts = min_of(registers, ceil_div(parallel.threads, rows));
  for_tasks(parallel, rows * parts, [&](int64_t task, int64_t) {
    const int64_t part = task % parts, y = task / parts;
    const int64_t c_begin = part * registers / parts * VL, c_end = (part + 1) * registers / parts * VL;
    (p.max ? row<true> : row<false>)(p, y / p.oh, y % p.oh, c_begin, min_of(c_end, p.channels));
  });
}

}  // namespace convselect::CONVSELECT_ISA
