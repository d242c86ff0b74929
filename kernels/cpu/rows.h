// How the matrix-based families with NHWC dst walk over the output pixels: pixel q = (n * oh + y) * ow + x is row q of
// C.
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace convselect::CONVSELECT_ISA {

// Tasks of a matrix product: blocks of at most `rows_in_task` rows, times blocks of column groups. Of the ways to split
// the columns, and the rows so that the tasks can be dealt out evenly, the one whose busiest thread has the least to
// do.
struct TaskGrid {
  int64_t rows, groups, row_tasks, column_tasks;

  TaskGrid(int64_t rows, int64_t rows_in_task, int64_t groups, int threads) : rows(rows), groups(groups) {
    constexpr int64_t PANEL = 8, TASK = 2;  // costs in rows of one group: to fetch a group's part of B; to start a task
    int64_t least = INT64_MAX;
    for (int64_t columns = 1; columns <= min_of(groups, 4 * threads); ++columns) {
      int64_t blocks = ceil_div(rows, rows_in_task);
      if (blocks * columns % threads) blocks = min_of(round_up(blocks, threads), rows);
      const int64_t task = (ceil_div(rows, blocks) + PANEL) * ceil_div(groups, columns) + TASK;
      int64_t cost = ceil_div(blocks * columns, threads) * task;
      if (columns > 1) cost += cost / 10;  // the next layer, split by rows, reads from another core's cache
      if (cost >= least) continue;
      least = cost;
      row_tasks = blocks;
      column_tasks = columns;
    }
  }
  int64_t count() const { return row_tasks * column_tasks; }
  int64_t row_begin(int64_t task) const { return task % row_tasks * rows / row_tasks; }
  int64_t row_end(int64_t task) const { return (task % row_tasks + 1) * rows / row_tasks; }
  int64_t group_begin(int64_t task) const { return task / row_tasks * groups / column_tasks; }
  int64_t group_end(int64_t task) const { return (task / row_tasks + 1) * groups / column_tasks; }
};

// Calls f(n, y, x, i, count) for each run of pixels [x, x + count) of one output row (n, y) within [begin, end); i
// counts pixels from begin.
template <class F>
CS_INLINE void for_runs(int64_t oh, int64_t ow, int64_t begin, int64_t end, const F& f) {
  int64_t n = begin / (oh * ow), y = begin / ow % oh, x = begin % ow;
  for (int64_t q = begin; q < end;) {
    const int64_t count = min_of(ow - x, end - q);
    f(n, y, x, q - begin, count);
    q += count;
    x = 0;
    if (++y == oh) y = 0, ++n;
  }
}

// The j of [0, count) for which first + j * step, step > 0, is inside [0, size): [*low, *high).
CS_INLINE void clip(int64_t first, int64_t step, int64_t size, int64_t count, int64_t* low, int64_t* high) {
  *low = first < 0 ? min_of(ceil_div(-first, step), count) : 0;
  *high = max_of(*low, first < size ? min_of(ceil_div(size - first, step), count) : 0);
}

// Row pointers of the output pixels [begin, end) into NHWC src, channels from `channel` on: a[t * m + i] is the pixel
// under tap t of pixel begin + i, or `zeros` in the padding; m = end - begin.
CS_INLINE void row_pointers(const Problem& p, const float* src, int64_t channel, const float* zeros, int64_t begin,
                            int64_t end, const float** a) {
  const int64_t m = end - begin;
  for_runs(p.oh(), p.ow(), begin, end, [&](int64_t n, int64_t y, int64_t x, int64_t i, int64_t count) {
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      const int64_t iy = y * p.sh - p.ph + ky * p.dh;
      const bool inside = iy >= 0 && iy < p.ih;
      for (int64_t kx = 0; kx < p.kw; ++kx) {
        const float** to = a + (ky * p.kw + kx) * m + i;
        const int64_t ix = x * p.sw - p.pw + kx * p.dw, step = p.sw * p.ic;
        int64_t low = count, high = count;
        if (inside) clip(ix, p.sw, p.iw, count, &low, &high);
        for (int64_t j = 0; j < low; ++j) to[j] = zeros;
        const int64_t from = ((n * p.ih + iy) * p.iw + ix) * p.ic + channel;
        for (int64_t j = low; j < high; ++j) to[j] = src + (from + j * step);
        for (int64_t j = high; j < count; ++j) to[j] = zeros;
      }
    }
  });
}

}  // namespace convselect::CONVSELECT_ISA
