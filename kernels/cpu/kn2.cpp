// A convolution as the sum over its taps of 1x1 convolutions, each shifted (Anderson et al., arXiv 1709.03395: kn2row
// and kn2col, accumulating), so that src is read in place and memory does not grow with the taps. In NHWC a shift is a
// choice of rows, and each product is added to dst as it is made; in NCHW it is kept in the workspace and then added.
// Stride 1.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace convselect::CONVSELECT_ISA {
namespace {

bool unit_stride(const Problem& p) { return p.sh == 1 && p.sw == 1 && ungrouped(p); }

// What the product of tap (ky, kx) adds to the output rows [y0, y1): from the src rows [top, bottom), the pixels
// [j, j + count), to the pixels from x on. Output pixel (y, x) takes src pixel (y + dy, x + dx).
struct Shift {
  int64_t dy, dx, top, bottom, x, j, count;

  Shift(const Problem& p, int64_t ky, int64_t kx, int64_t y0, int64_t y1) {
    dy = ky * p.dh - p.ph;
    dx = kx * p.dw - p.pw;
    top = max_of(0, y0 + dy);
    bottom = min_of(p.ih, y1 + dy);
    j = max_of(0, dx);
    x = j - dx;
    count = min_of(p.iw - j, p.ow() - x);
  }
  bool empty() const { return top >= bottom || count <= 0; }
};

struct Band {  // output rows of a task
  int64_t rows, bands;
  Band(const Problem& p, int64_t pixels) {
    const int64_t oh = p.oh();
    bands = ceil_div(oh, max_of(1, pixels / p.iw));
    rows = ceil_div(oh, bands);
    bands = ceil_div(oh, rows);
  }
};

// --- kn2row_nchw: T[oc][pixels] = weight of a tap x src[ic][pixels]

constexpr int64_t OC = 48, PIXELS = 256;  // of one product

// packed  [tap][oc][ic]
int64_t packed_row(const Problem& p) { return p.oc * p.ic * p.taps(); }

void pack_row(const Problem& p, const float* weight, float* packed) {
  for (int64_t t = 0; t < p.taps(); ++t)
    for (int64_t i = 0; i < p.oc * p.ic; ++i) *packed++ = flush_subnormal(weight[i * p.taps() + t]);
}

int64_t product_row(const Problem& p) { return OC * round_up(Band(p, PIXELS).rows * p.iw, 16); }

int64_t workspace_row(const Problem& p, int threads) { return threads * (product_row(p) + p.ic * VL); }

void run_row(const Call& call) {
  const Problem& p = call.p;
  const Epilogue& e = call.epilogue;
  const int64_t oh = p.oh(), ow = p.ow(), ldc = product_row(p) / OC, oc_tasks = ceil_div(p.oc, OC);
  const Band band(p, PIXELS);
  for_tasks(call.parallel, p.mb * band.bands * oc_tasks, [&](int64_t task, int64_t slot) {
    const int64_t part = task % oc_tasks, image = task / oc_tasks / band.bands;
    const int64_t y0 = task / oc_tasks % band.bands * band.rows, y1 = min_of(oh, y0 + band.rows);
    const int64_t oc = part * p.oc / oc_tasks, count = (part + 1) * p.oc / oc_tasks - oc;
    float* product = call.workspace + slot * (product_row(p) + p.ic * VL);
    float* edge = product + product_row(p);
    auto dst = [&](int64_t o, int64_t y) { return ((image * p.oc + oc + o) * oh + y) * ow; };
    for (int64_t o = 0; o < count; ++o)
      for (int64_t q = 0; q < (y1 - y0) * ow; ++q) call.dst[dst(o, y0) + q] = 0.0f;
    for (int64_t tap = 0; tap < p.taps(); ++tap) {
      const Shift s(p, tap / p.kw, tap % p.kw, y0, y1);
      if (s.empty()) continue;
      GemmRowMajor g{};
      g.m = count;
      g.k = p.ic;
      g.columns = (s.bottom - s.top) * p.iw;
      g.a = call.packed + (tap * p.oc + oc) * p.ic;
      g.lda = p.ic;
      g.b = call.src + (image * p.ic * p.ih + s.top) * p.iw;
      g.ldb = p.ih * p.iw;
      g.c = product;
      g.ldc = ldc;
      gemm_row_major(g, edge);
      for (int64_t o = 0; o < count; ++o)
        for (int64_t i = s.top; i < s.bottom; ++i) {
          const float* from = product + o * ldc + (i - s.top) * p.iw + s.j;
          float* to = call.dst + dst(o, i - s.dy) + s.x;
          for (int64_t k = 0; k < s.count; ++k) to[k] += from[k];
        }
    }
    for (int64_t o = 0; o < count; ++o) {
      float* row = call.dst + dst(o, y0);
      finish_row(row, row, (y1 - y0) * ow, e.bias ? e.bias[oc + o] : 0.0f, nullptr,
                 e.residual ? e.residual + dst(o, y0) : nullptr, e);
    }
  });
}

// --- kn2col_nhwc: dst[pixels][oc] += src[shifted pixels][ic] x weight of a tap

constexpr int64_t ROWS = 96;  // output pixels of one product: its C stays in L2

// packed  [tap][column group][ic][registers][VL]
int64_t packed_column(const Problem& p) { return p.taps() * ColumnGroups(p.oc).packed_floats(p.ic); }

void pack_column(const Problem& p, const float* weight, float* packed) {
  const ColumnGroups groups(p.oc);
  for (int64_t t = 0; t < p.taps(); ++t)
    pack_columns(groups, weight + t, p.ic, p.taps(), p.ic * p.taps(), packed + t * groups.packed_floats(p.ic));
}

int64_t zeros_floats(const Problem& p) { return round_up(p.ic, 16); }
int64_t pointers_floats(const Problem& p) { return round_up(ROWS * p.taps() * 2, 16); }

int64_t workspace_column(const Problem& p, int threads) { return zeros_floats(p) + threads * pointers_floats(p); }

void run_column(const Call& call) {
  const Problem& p = call.p;
  const ColumnGroups groups(p.oc);
  const TaskGrid grid(p.mb * p.oh() * p.ow(), ROWS, groups.groups, call.parallel.threads);
  float* zeros = call.workspace;
  for (int64_t i = 0; i < zeros_floats(p); ++i) zeros[i] = 0.0f;
  for_tasks(call.parallel, grid.count(), [&](int64_t task, int64_t slot) {
    const int64_t begin = grid.row_begin(task), end = grid.row_end(task);
    const float** a = reinterpret_cast<const float**>(call.workspace + zeros_floats(p) + slot * pointers_floats(p));
    row_pointers(p, call.src, 0, zeros, begin, end, a);
    Gemm g{};
    g.taps = 1;
    g.k = p.ic;
    g.ldc = call.dst_stride;
    const int64_t last = p.taps() - 1;
    for (int64_t tap = 0; tap <= last; ++tap) {
      const float** const rows = a + tap * (end - begin);
      int64_t low = 0, high = end - begin;
      if (tap > 0 && tap < last) {  // the first writes all of dst, and the last finishes all of it
        while (low < high && rows[low] == zeros) ++low;
        while (low < high && rows[high - 1] == zeros) --high;
        if (low == high) continue;
      }
      const int64_t first = (begin + low) * call.dst_stride;
      g.m = high - low;
      g.a = rows + low;
      g.b = call.packed + tap * groups.packed_floats(p.ic);
      g.accumulate = tap > 0;
      g.c = call.dst + first;
      g.residual = call.epilogue.residual ? call.epilogue.residual + first : nullptr;
      g.epilogue = tap == last ? &call.epilogue : nullptr;
      gemm(g, groups, grid.group_begin(task), grid.group_end(task));
    }
  });
}

}  // namespace

const Kernel kn2_kernels[] = {
    {"kn2row_nchw", false, false, unit_stride, packed_row, pack_row, workspace_row, run_row},
    {"kn2col_nhwc", true, true, unit_stride, packed_column, pack_column, workspace_column, run_column},
};
const int kn2_count = sizeof(kn2_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
