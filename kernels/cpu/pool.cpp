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

template <int NV>
CS_INLINE Vec load_of(const float* src, int v, int64_t last) {
  return v == NV - 1 && last < VL ? load_part(src + v * VL, last) : load(src + v * VL);
}

template <int NV>
CS_INLINE void store_of(float* dst, int v, int64_t last, Vec value) {
  if (v == NV - 1 && last < VL)
    store_part(dst + v * VL, value, last);
  else
    store(dst + v * VL, value);
}

// NV registers of one output pixel. `window` is the source pixel of tap (0, 0), which may lie outside.
template <int NV>
CS_INLINE void maximum(const Pool& p, const float* window, Taps rows, Taps columns, float* dst, int64_t last) {
  Vec best[NV];
  for (int v = 0; v < NV; ++v) best[v] = splat(-__builtin_inff());
  for (int64_t i = rows.begin; i < rows.end; ++i)
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const float* src = window + (i * p.dh * p.iw + j * p.dw) * p.channels;
      for (int v = 0; v < NV; ++v) best[v] = larger(best[v], load_of<NV>(src, v, last));
    }
  for (int v = 0; v < NV; ++v) store_of<NV>(dst, v, last, best[v]);
}

// Of at most SMALL x SMALL taps: sums of the rows, and their sum.
constexpr int64_t SMALL = 28;
template <int NV>
CS_INLINE void average(const Pool& p, const float* window, Taps rows, Taps columns, double scale, float* dst,
                       int64_t last) {
  Vec sum[NV] = {};
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    Vec row[NV] = {};
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const float* src = window + (i * p.dh * p.iw + j * p.dw) * p.channels;
      for (int v = 0; v < NV; ++v) row[v] += load_of<NV>(src, v, last);
    }
    for (int v = 0; v < NV; ++v) sum[v] += row[v];
  }
  for (int v = 0; v < NV; ++v) store_of<NV>(dst, v, last, sum[v] * static_cast<float>(scale));
}

// Of more by a cascade, as one long sum in float would lose four digits on a map of 1024 x 1024: RUN taps of a row
// as two sums, which are added, then RUNS of these, and those in double. Where all values are equal, the worst case, it
// errs by 5e-7 at most, and by 2e-7 on average.
template <int NV>
CS_INLINE void average_of_many(const Pool& p, const float* window, Taps rows, Taps columns, double scale, float* dst,
                               int64_t last) {
  constexpr int64_t RUN = 56, RUNS = 4;
  const int64_t step = p.dw * p.channels;
  Vec sum[NV] = {};
  VecD total[NV] = {};
  int64_t runs = 0;  // in `sum`
  auto flush = [&]() __attribute__((always_inline)) {
    for (int v = 0; v < NV; ++v) total[v] += __builtin_convertvector(sum[v], VecD), sum[v] = Vec{};
    runs = 0;
  };
  for (int64_t i = rows.begin; i < rows.end; ++i)
    for (int64_t begin = columns.begin; begin < columns.end; begin += RUN) {
      const float* src = window + i * p.dh * p.iw * p.channels + begin * step;
      int64_t taps = min_of(RUN, columns.end - begin);
      Vec even[NV] = {}, odd[NV] = {};
      for (; taps >= 2; taps -= 2, src += 2 * step)
        for (int v = 0; v < NV; ++v) {
          even[v] += load_of<NV>(src, v, last);
          odd[v] += load_of<NV>(src + step, v, last);
        }
      if (taps > 0)
        for (int v = 0; v < NV; ++v) even[v] += load_of<NV>(src, v, last);
      for (int v = 0; v < NV; ++v) sum[v] += even[v] + odd[v];
      if (++runs == RUNS) flush();
    }
  flush();
  for (int v = 0; v < NV; ++v) store_of<NV>(dst, v, last, __builtin_convertvector(total[v] * scale, Vec));
}

enum class Kind { maximum, average, average_of_many };

template <Kind KIND, int NV>
CS_INLINE void pixel(const Pool& p, const float* window, Taps rows, Taps columns, double scale, float* dst,
                     int64_t last) {
  if (KIND == Kind::maximum)
    maximum<NV>(p, window, rows, columns, dst, last);
  else if (KIND == Kind::average)
    average<NV>(p, window, rows, columns, scale, dst, last);
  else
    average_of_many<NV>(p, window, rows, columns, scale, dst, last);
}

// The channels [c_begin, c_end) of one row of dst.
template <Kind KIND>
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
    const double scale = 1.0 / static_cast<double>(divisor);
    const float* window = p.src + ((n * p.ih + top) * p.iw + left) * p.channels;
    float* dst = p.dst + ((n * p.oh + y) * p.ow + x) * p.dst_stride;
    int64_t c = c_begin;
    for (; c + 4 * VL <= c_end; c += 4 * VL) pixel<KIND, 4>(p, window + c, rows, columns, scale, dst + c, VL);
    for (; c + VL <= c_end; c += VL) pixel<KIND, 1>(p, window + c, rows, columns, scale, dst + c, VL);
    if (c < c_end) pixel<KIND, 1>(p, window + c, rows, columns, scale, dst + c, c_end - c);
  }
}

}  // namespace

void pool(const Pool& p, const Parallel& parallel) {
  // A result of few rows, such as a global average, is split by channels too.
  const int64_t rows = p.mb * p.oh, registers = ceil_div(p.channels, VL);
  const int64_t parts = min_of(registers, ceil_div(parallel.threads, rows));
  const bool small = p.kh <= SMALL && p.kw <= SMALL;
  const auto of_row = p.max ? row<Kind::maximum> : small ? row<Kind::average> : row<Kind::average_of_many>;
  for_tasks(parallel, rows * parts, [&](int64_t task, int64_t) {
    const int64_t part = task % parts, y = task / parts;
    const int64_t c_begin = part * registers / parts * VL, c_end = (part + 1) * registers / parts * VL;
    of_row(p, y / p.oh, y % p.oh, c_begin, min_of(c_end, p.channels));
  });
}

}  // namespace convselect::CONVSELECT_ISA
