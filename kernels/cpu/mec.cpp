// Convolutions as matrix products on a copy of src whose rows overlap.
//
// MEC (Cho and Brand, arXiv 1706.06873) lowers src over the kernel's width only: L[x][h][kw * ic] holds what the
// kernel sees of row h at output column x. The patch of output (y, x) is then the run of kh rows from L[x][y * sh] on,
// so that neighbouring outputs of a column share kh - sh rows of memory, and L is kh / sh times smaller than the matrix
// of im2row. Without dilation, and with borders in the copy, neighbours of a row can share memory too: the kw * ic
// floats under a kernel row lie side by side in a plain padded row. That copy, direct_padded, is kw / sw times smaller
// still, and pays with kh runs in each patch instead of one. Both are
//   patch(y, x, ky) = copy + (y * sh + ky * dh) * row + x * column, kw * ic floats,
// which pointers into the copy hand to the matrix product. A task copies the rows of src that its output rows need.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "transform.h"

namespace convselect::CONVSELECT_ISA {
namespace {

enum class Copy { lowered, padded, padded_from_nchw };

bool undilated_width(const Problem& p) { return p.dw == 1 && ungrouped(p); }

// packed  [column group][tap][ic][registers][VL], from weight [oc, ic, kh, kw]
int64_t packed_floats(const Problem& p) { return ColumnGroups(p.oc).packed_floats(p.taps() * p.ic); }

void pack(const Problem& p, const float* weight, float* packed) {
  pack_columns(ColumnGroups(p.oc), weight, p.ic, p.taps(), p.ic * p.taps(), packed, p.taps(), 1);
}

struct Band {                     // at most `rows` output rows, of a task
  int64_t rows, step, bands;      // `step` of them make one product
  int64_t src_rows, row, column;  // of the copy: see above
  int64_t floats, pointers;

  template <Copy COPY>
  static Band of(const Problem& p, int threads) {
    Band b;
    const int64_t oh = p.oh(), ow = p.ow();
    b.step = max_of(1, min_of(oh, 96 / ow));
    // Long enough that neighbours share few rows of src, short enough for all threads to have work.
    const int64_t want =
        max_of(b.step, min_of(round_up(2 * p.kh, b.step), p.mb * oh / (4 * threads) / b.step * b.step));
    b.bands = min_of(oh, round_up(ceil_div(oh, want), threads));  // the same number for each thread, of even lengths
    b.rows = ceil_div(oh, b.bands);
    b.src_rows = (b.rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
    b.row = COPY == Copy::lowered ? p.kw * p.ic : (p.iw + 2 * p.pw) * p.ic;
    b.column = COPY == Copy::lowered ? b.src_rows * b.row : p.sw * p.ic;
    b.floats = round_up(COPY == Copy::lowered ? ow * b.column : b.src_rows * b.row, 16);
    b.pointers = round_up(p.kh * b.step * ow * 2, 16);
    return b;
  }
};

template <Copy COPY>
int64_t workspace(const Problem& p, int threads) {
  const Band band = Band::of<COPY>(p, threads);
  return threads * (band.floats + band.pointers);
}

void zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

CS_INLINE void copy(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

// Row y of image n of src, with borders: to [pw + iw + pw][ic].
template <Copy COPY>
void pad_row(const Problem& p, const float* src, int64_t n, int64_t y, float* to) {
  const int64_t edge = p.pw * p.ic, inner = p.iw * p.ic;
  if (y < 0 || y >= p.ih) return zero(to, inner + 2 * edge);
  zero(to, edge);
  if (COPY == Copy::padded)
    __builtin_memcpy(to + edge, src + (n * p.ih + y) * inner, inner * sizeof(float));
  else
    transpose(src + (n * p.ic * p.ih + y) * p.iw, p.ih * p.iw, to + edge, p.ic, p.ic, p.iw);
  zero(to + edge + inner, edge);
}

// Row y of image n of src, lowered: the kw pixels under the kernel at output column x to to[x * column].
void lower_row(const Problem& p, const float* src, int64_t n, int64_t y, int64_t column, float* to) {
  const bool inside = y >= 0 && y < p.ih;
  const float* const row = src + (n * p.ih + y) * p.iw * p.ic;
  for (int64_t x = 0; x < p.ow(); ++x, to += column) {
    const int64_t left = x * p.sw - p.pw;
    if (!inside) {
      zero(to, p.kw * p.ic);
    } else if (p.dw == 1 && left >= 0 && left + p.kw <= p.iw) {
      copy(to, row + left * p.ic, p.kw * p.ic);
    } else {
      for (int64_t kx = 0; kx < p.kw; ++kx) {
        const int64_t ix = left + kx * p.dw;
        if (ix >= 0 && ix < p.iw)
          copy(to + kx * p.ic, row + ix * p.ic, p.ic);
        else
          zero(to + kx * p.ic, p.ic);
      }
    }
  }
}

template <Copy COPY>
void run(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow();
  const ColumnGroups groups(p.oc);
  const Band band = Band::of<COPY>(p, call.parallel.threads);
  const TaskGrid grid(p.mb * band.bands, 1, groups.groups, call.parallel.threads);
  const bool one_run = COPY == Copy::lowered && p.dh == 1;  // the rows of a patch are one run of memory
  const int64_t taps = one_run ? 1 : p.kh;
  for_tasks(call.parallel, grid.count(), [&](int64_t task, int64_t slot) {
    float* buffer = call.workspace + slot * (band.floats + band.pointers);
    const float** a = reinterpret_cast<const float**>(buffer + band.floats);
    const int64_t row = grid.row_begin(task), n = row / band.bands;
    const int64_t y0 = row % band.bands * oh / band.bands, y1 = (row % band.bands + 1) * oh / band.bands;
    const int64_t top = y0 * p.sh - p.ph, rows = (y1 - 1 - y0) * p.sh + (p.kh - 1) * p.dh + 1;
    for (int64_t r = 0; r < rows; ++r) {
      if (COPY == Copy::lowered)
        lower_row(p, call.src, n, top + r, band.column, buffer + r * band.row);
      else
        pad_row<COPY>(p, call.src, n, top + r, buffer + r * band.row);
    }
    for (int64_t y = y0; y < y1; y += band.step) {
      const int64_t m = min_of(band.step, y1 - y) * ow, first = ((n * oh + y) * ow) * call.dst_stride;
      for (int64_t ky = 0; ky < taps; ++ky)
        for (int64_t i = 0, r = y - y0; i < m; i += ow, ++r)
          for (int64_t x = 0; x < ow; ++x)
            a[ky * m + i + x] = buffer + (r * p.sh + ky * p.dh) * band.row + x * band.column;
      Gemm g{};
      g.m = m;
      g.taps = taps;
      g.k = p.kh * p.kw * p.ic / taps;
      g.a = a;
      g.b = call.packed;
      g.c = call.dst + first;
      g.ldc = call.dst_stride;
      g.residual = call.epilogue.residual ? call.epilogue.residual + first : nullptr;
      g.epilogue = &call.epilogue;
      gemm(g, groups, grid.group_begin(task), grid.group_end(task));
    }
  });
}

}  // namespace

const Kernel mec_kernels[] = {
    {"mec_nhwc", true, true, ungrouped, packed_floats, pack, workspace<Copy::lowered>, run<Copy::lowered>},
    {"direct_padded_nhwc", true, true, undilated_width, packed_floats, pack, workspace<Copy::padded>,
     run<Copy::padded>},
    {"direct_padded_nchw_nhwc", false, true, undilated_width, packed_floats, pack, workspace<Copy::padded_from_nchw>,
     run<Copy::padded_from_nchw>},
};
const int mec_count = sizeof(mec_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
