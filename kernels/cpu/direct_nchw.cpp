// Direct convolution in NCHW: the weights times rows of pixels, read from a copy of src in which the pixels under one
// tap lie side by side for all outputs.
//
// The copy has borders and splits each plane by phase: [ic][sh][sw][hq][wq], element (a, b, i, j) = plane(i * sh + a,
// j * sw + b). Tap (ky, kx) of output (y, x) is then at f + y * wq + x with f fixed by the tap, so that several rows
// make one long row of columns; the wq - ow columns between two rows are computed and dropped.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int64_t OC = 32;  // output channels of one product: its C stays in L1

int64_t packed_floats(const Problem& p) { return p.oc * (p.ic / p.g) * p.taps(); }

// packed  [oc][tap][ic/g]
void pack(const Problem& p, const float* weight, float* packed) {
  const int64_t ic = p.ic / p.g;
  for (int64_t o = 0; o < p.oc; ++o)
    for (int64_t t = 0; t < p.taps(); ++t)
      for (int64_t c = 0; c < ic; ++c) *packed++ = flush_subnormal(weight[(o * ic + c) * p.taps() + t]);
}

struct Band {
  int64_t rows, bands, oc_tasks;             // output rows of a task; tasks of an image, of a group's channels
  int64_t hq, wq, plane;                     // of the copy
  int64_t columns, copy, c_floats, offsets;  // columns of C; floats of the copy, of C, of the taps' offsets

  Band(const Problem& p, int threads) {
    const int64_t oh = p.oh(), ow = p.ow(), ic = p.ic / p.g;
    wq = ceil_div((ow - 1) * p.sw + (p.kw - 1) * p.dw + 1, p.sw);
    const int64_t of_row = ic * p.sh * p.sw * wq;
    rows = max_of(1, min_of(min_of(oh, 256 / wq), 131072 / of_row - ceil_div((p.kh - 1) * p.dh, p.sh)));
    bands = ceil_div(oh, rows);
    rows = ceil_div(oh, bands);
    bands = ceil_div(oh, rows);
    hq = ceil_div((rows - 1) * p.sh + (p.kh - 1) * p.dh + 1, p.sh);
    plane = p.sh * p.sw * hq * wq;
    columns = (rows - 1) * wq + ow;
    copy = round_up(ic * plane + VL, 16);
    c_floats = round_up(OC * round_up(columns, VL), 16);
    offsets = round_up(p.taps() * 2, 16);
    const int64_t tasks = p.mb * p.g * bands;
    oc_tasks = threads == 1 ? 1 : max_of(1, min_of(ceil_div(2 * threads, tasks), p.oc / p.g / OC));
  }
};

int64_t workspace(const Problem& p, int threads) {
  const Band band(p, threads);
  return threads * (band.copy + band.c_floats + band.offsets);
}

// Copies rows [top, ...) of one plane of src, with borders, split by phase.
void split(const Problem& p, const Band& band, const float* plane, int64_t top, float* to) {
  for (int64_t a = 0; a < p.sh; ++a)
    for (int64_t b = 0; b < p.sw; ++b)
      for (int64_t i = 0; i < band.hq; ++i, to += band.wq) {
        const int64_t y = top + i * p.sh + a, x = b - p.pw;
        int64_t low = band.wq, high = band.wq;
        if (y >= 0 && y < p.ih) clip(x, p.sw, p.iw, band.wq, &low, &high);
        for (int64_t j = 0; j < low; ++j) to[j] = 0.0f;
        const int64_t from = y * p.iw + x;
        if (p.sw == 1)
          for (int64_t j = low; j < high; ++j) to[j] = plane[from + j];
        else
          for (int64_t j = low; j < high; ++j) to[j] = plane[from + j * p.sw];
        for (int64_t j = high; j < band.wq; ++j) to[j] = 0.0f;
      }
}

void run(const Call& call) {
  const Problem& p = call.p;
  const Epilogue& e = call.epilogue;
  const int64_t ic = p.ic / p.g, n = p.oc / p.g, oh = p.oh(), ow = p.ow();
  const Band band(p, call.parallel.threads);
  for_tasks(call.parallel, p.mb * p.g * band.bands * band.oc_tasks, [&](int64_t task, int64_t slot) {
    const int64_t part = task % band.oc_tasks, y0 = task / band.oc_tasks % band.bands * band.rows;
    const int64_t image = task / band.oc_tasks / band.bands / p.g, group = task / band.oc_tasks / band.bands % p.g;
    const int64_t rows = min_of(band.rows, oh - y0), columns = (rows - 1) * band.wq + ow;
    float* copy = call.workspace + slot * (band.copy + band.c_floats + band.offsets);
    float* c = copy + band.copy;
    int64_t* offsets = reinterpret_cast<int64_t*>(c + band.c_floats);
    for (int64_t i = 0; i < ic; ++i)
      split(p, band, call.src + (image * p.ic + group * ic + i) * p.ih * p.iw, y0 * p.sh - p.ph, copy + i * band.plane);
    // The last vector of columns reads on behind the last plane; what it computes of that is dropped, but what lay
    // there may be subnormal, and slow.
    for (int64_t j = 0; j < VL; ++j) copy[ic * band.plane + j] = 0.0f;
    for (int64_t ky = 0; ky < p.kh; ++ky)
      for (int64_t kx = 0; kx < p.kw; ++kx) {
        const int64_t y = ky * p.dh, x = kx * p.dw, phase = y % p.sh * p.sw + x % p.sw;
        offsets[ky * p.kw + kx] = (phase * band.hq + y / p.sh) * band.wq + x / p.sw;
      }
    GemmRowMajor g{};
    g.taps = p.taps();
    g.k = ic;
    g.columns = columns;
    g.lda = ic * p.taps();
    g.b = copy;
    g.b_taps = offsets;
    g.ldb = band.plane;
    g.c = c;
    g.ldc = round_up(band.columns, VL);
    const int64_t end = group * n + (part + 1) * n / band.oc_tasks;
    for (int64_t o = group * n + part * n / band.oc_tasks; o < end; o += OC) {
      g.m = min_of(OC, end - o);
      g.a = call.packed + o * g.lda;
      gemm_row_major(g, nullptr);
      for (int64_t i = 0; i < g.m; ++i)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = ((image * p.oc + o + i) * oh + y0 + r) * ow;
          finish_row(call.dst + at, c + i * g.ldc + r * band.wq, ow, e.bias ? e.bias[o + i] : 0.0f, nullptr,
                     e.residual ? e.residual + at : nullptr, e);
        }
    }
  });
}

}  // namespace

const Kernel direct_nchw_kernels[] = {
    {"direct_nchw", false, false, any, packed_floats, pack, workspace, run},
};
const int direct_nchw_count = sizeof(direct_nchw_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
