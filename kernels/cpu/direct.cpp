// Direct convolution: a matrix product over the output pixels whose A is given by pointers into src (Dukhan, arXiv
// 1907.02129), so nothing is copied but the borders.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "transform.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// packed  [g][column group][tap][ic/g][registers][VL], from weight [oc, ic/g, kh, kw]
int64_t packed_floats(const Problem& p) {
  return p.g * ColumnGroups(p.oc / p.g).packed_floats(p.taps() * (p.ic / p.g));
}

void pack(const Problem& p, const float* weight, float* packed) {
  const int64_t k = p.ic / p.g, n = p.oc / p.g, taps = p.taps();
  const ColumnGroups groups(n);
  for (int64_t i = 0; i < p.g; ++i)
    pack_columns(groups, weight + i * n * k * taps, k, taps, k * taps, packed + i * groups.packed_floats(taps * k),
                 taps, 1);
}

// --- direct_nhwc: a tap for each kernel element

// Output pixels of a task: few enough for the pointers of many taps, and for their part of src to stay in L2.
int64_t rows_in_task(const Problem& p) { return max_of(24, min_of(96, 4096 / p.taps())); }

int64_t zeros_floats(const Problem& p) { return round_up(p.ic / p.g, 16); }
int64_t pointers_floats(const Problem& p) { return round_up(rows_in_task(p) * p.taps() * 2, 16); }

int64_t workspace_nhwc(const Problem& p, int threads) { return zeros_floats(p) + threads * pointers_floats(p); }

void run_nhwc(const Call& call) {
  const Problem& p = call.p;
  const int64_t k = p.ic / p.g, n = p.oc / p.g, pixels = p.mb * p.oh() * p.ow();
  const ColumnGroups groups(n);
  const TaskGrid grid(pixels, rows_in_task(p), groups.groups, call.parallel.threads);
  float* zeros = call.workspace;
  for (int64_t i = 0; i < zeros_floats(p); ++i) zeros[i] = 0.0f;
  for_tasks(call.parallel, p.g * grid.count(), [&](int64_t i, int64_t slot) {
    const int64_t group = i / grid.count(), task = i % grid.count();
    const int64_t begin = grid.row_begin(task), end = grid.row_end(task);
    const float** a = reinterpret_cast<const float**>(call.workspace + zeros_floats(p) + slot * pointers_floats(p));
    row_pointers(p, call.src, group * k, zeros, begin, end, a);
    const Epilogue& e = call.epilogue;
    const Epilogue own{e.bias ? e.bias + group * n : nullptr, nullptr, e.act, e.alpha, e.beta};
    Gemm g{};
    g.m = end - begin;
    g.taps = p.taps();
    g.k = k;
    g.a = a;
    g.b = call.packed + group * groups.packed_floats(p.taps() * k);
    g.c = call.dst + begin * call.dst_stride + group * n;
    g.ldc = call.dst_stride;
    g.residual = e.residual ? e.residual + begin * call.dst_stride + group * n : nullptr;
    g.epilogue = &own;
    gemm(g, groups, grid.group_begin(task), grid.group_end(task));
  });
}

// --- direct_padded: a tap for each kernel row, on a copy with borders
//
// In NHWC without dilation the kw * ic floats under one kernel row lie side by side, if the borders exist. A task
// copies the rows of src that it needs; a copy from NCHW exchanges the dimensions on the way. Meant for first layers,
// where ic alone would make a very short k.

struct Band {  // at most `rows` output rows, of a task
  int64_t rows, step, bands, width, floats, pointers;

  Band(const Problem& p, int threads) {
    const int64_t oh = p.oh(), ow = p.ow();
    step = max_of(1, min_of(oh, 96 / ow));  // output rows of one product
    // Long enough that neighbours share few rows of src, short enough for all threads to have work.
    const int64_t want = max_of(step, min_of(round_up(2 * p.kh, step), p.mb * oh / (4 * threads) / step * step));
    bands = min_of(oh, round_up(ceil_div(oh, want), threads));  // the same number for each thread, of even lengths
    rows = ceil_div(oh, bands);
    width = (p.iw + 2 * p.pw) * p.ic;
    floats = round_up(((rows - 1) * p.sh + (p.kh - 1) * p.dh + 1) * width, 16);
    pointers = round_up(p.kh * step * ow * 2, 16);
  }
};

int64_t workspace_padded(const Problem& p, int threads) {
  const Band band(p, threads);
  return threads * (band.floats + band.pointers);
}

void zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

// Row y of image n of src, with borders: to [pw + iw + pw][ic].
template <bool NHWC>
void pad_row(const Problem& p, const float* src, int64_t n, int64_t y, float* to) {
  const int64_t edge = p.pw * p.ic, inner = p.iw * p.ic;
  if (y < 0 || y >= p.ih) return zero(to, inner + 2 * edge);
  zero(to, edge);
  if (NHWC)
    __builtin_memcpy(to + edge, src + (n * p.ih + y) * inner, inner * sizeof(float));
  else
    transpose(src + (n * p.ic * p.ih + y) * p.iw, p.ih * p.iw, to + edge, p.ic, p.ic, p.iw);
  zero(to + edge + inner, edge);
}

template <bool NHWC>
void run_padded(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow();
  const ColumnGroups groups(p.oc);
  const Band band(p, call.parallel.threads);
  const TaskGrid grid(p.mb * band.bands, 1, groups.groups, call.parallel.threads);
  for_tasks(call.parallel, grid.count(), [&](int64_t task, int64_t slot) {
    float* padded = call.workspace + slot * (band.floats + band.pointers);
    const float** a = reinterpret_cast<const float**>(padded + band.floats);
    const int64_t row = grid.row_begin(task), n = row / band.bands;
    const int64_t y0 = row % band.bands * oh / band.bands, y1 = (row % band.bands + 1) * oh / band.bands;
    const int64_t top = y0 * p.sh - p.ph, rows = (y1 - 1 - y0) * p.sh + (p.kh - 1) * p.dh + 1;
    for (int64_t r = 0; r < rows; ++r) pad_row<NHWC>(p, call.src, n, top + r, padded + r * band.width);
    for (int64_t y = y0; y < y1; y += band.step) {
      const int64_t m = min_of(band.step, y1 - y) * ow, first = ((n * oh + y) * ow) * call.dst_stride;
      for (int64_t ky = 0; ky < p.kh; ++ky)
        for (int64_t i = 0, r = y - y0; i < m; i += ow, ++r)
          for (int64_t x = 0; x < ow; ++x)
            a[ky * m + i + x] = padded + (r * p.sh + ky * p.dh) * band.width + x * p.sw * p.ic;
      Gemm g{};
      g.m = m;
      g.taps = p.kh;
      g.k = p.kw * p.ic;
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

const Kernel direct_kernels[] = {
    {"direct_nhwc", true, true, packed_floats, pack, workspace_nhwc, run_nhwc},
    {"direct_padded_nhwc", true, true, packed_floats, pack, workspace_padded, run_padded<true>},
    {"direct_padded_nchw_nhwc", false, true, packed_floats, pack, workspace_padded, run_padded<false>},
};
const int direct_count = sizeof(direct_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
