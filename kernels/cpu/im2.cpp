// A column (or row) matrix of a tile of output pixels in the workspace, then one matrix product: im2col in NCHW, im2row
// in NHWC. The tile is small enough to stay in L2, so the matrix of the whole image never exists.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int64_t TILE_FLOATS = 65536;  // 256 KiB of the matrix at a time

// --- im2row_nhwc: rows [pixel][tap][ic/g] times the weights as direct_nhwc packs them

int64_t packed_row(const Problem& p) { return p.g * ColumnGroups(p.oc / p.g).packed_floats(p.taps() * (p.ic / p.g)); }

void pack_row(const Problem& p, const float* weight, float* packed) {
  const int64_t k = p.ic / p.g, n = p.oc / p.g, taps = p.taps();
  const ColumnGroups groups(n);
  for (int64_t i = 0; i < p.g; ++i)
    pack_columns(groups, weight + i * n * k * taps, k, taps, k * taps, packed + i * groups.packed_floats(taps * k),
                 taps, 1);
}

struct RowTile {
  int64_t rows, zeros, pointers, matrix;
  explicit RowTile(const Problem& p) {
    const int64_t k = p.taps() * (p.ic / p.g);
    rows = max_of(24, min_of(96, TILE_FLOATS / k));
    zeros = round_up(p.ic / p.g, 16);
    pointers = round_up(rows * (p.taps() + 1) * 2, 16);
    matrix = round_up(rows * k, 16);
  }
};

int64_t workspace_row(const Problem& p, int threads) {
  const RowTile tile(p);
  return tile.zeros + threads * (tile.pointers + tile.matrix);
}

void run_row(const Call& call) {
  const Problem& p = call.p;
  const int64_t ic = p.ic / p.g, k = p.taps() * ic, n = p.oc / p.g;
  const ColumnGroups groups(n);
  const RowTile tile(p);
  const TaskGrid grid(p.mb * p.oh() * p.ow(), tile.rows, groups.groups, call.parallel.threads);
  float* zeros = call.workspace;
  for (int64_t i = 0; i < tile.zeros; ++i) zeros[i] = 0.0f;
  for_tasks(call.parallel, p.g * grid.count(), [&](int64_t i, int64_t slot) {
    const int64_t group = i / grid.count(), task = i % grid.count();
    const int64_t begin = grid.row_begin(task), end = grid.row_end(task), m = end - begin;
    float* matrix = call.workspace + tile.zeros + slot * (tile.pointers + tile.matrix);
    const float** from = reinterpret_cast<const float**>(matrix + tile.matrix);
    const float** a = from + p.taps() * m;
    row_pointers(p, call.src, group * ic, zeros, begin, end, from);
    for (int64_t q = 0; q < m; ++q) {
      float* to = matrix + q * k;
      a[q] = to;
      for (int64_t t = 0; t < p.taps(); ++t, to += ic) __builtin_memcpy(to, from[t * m + q], ic * sizeof(float));
    }
    const Epilogue& e = call.epilogue;
    const Epilogue own{e.bias ? e.bias + group * n : nullptr, nullptr, e.act, e.alpha, e.beta};
    Gemm g{};
    g.m = m;
    g.taps = 1;
    g.k = k;
    g.a = a;
    g.b = call.packed + group * groups.packed_floats(k);
    g.c = call.dst + begin * call.dst_stride + group * n;
    g.ldc = call.dst_stride;
    g.residual = e.residual ? e.residual + begin * call.dst_stride + group * n : nullptr;
    g.epilogue = &own;
    gemm(g, groups, grid.group_begin(task), grid.group_end(task));
  });
}

// --- im2col_nchw: the weights as they are times columns [ic/g][tap][pixel]

int64_t packed_column(const Problem& p) { return p.oc * (p.ic / p.g) * p.taps(); }

void pack_column(const Problem& p, const float* weight, float* packed) {
  for (int64_t i = 0; i < packed_column(p); ++i) packed[i] = flush_subnormal(weight[i]);
}

struct ColumnTile {
  int64_t columns, channels, matrix;  // pixels and channels of one matrix; its floats
  int64_t tiles, oc_tasks;            // pixel tiles of one image; tasks over the output channels
  ColumnTile(const Problem& p, int threads) {
    const int64_t pixels = p.oh() * p.ow(), most = 2 * NV_MAX * VL;
    tiles = ceil_div(pixels, most);
    columns = round_up(ceil_div(pixels, tiles), VL);
    tiles = ceil_div(pixels, columns);
    channels = max_of(1, min_of(p.ic / p.g, TILE_FLOATS / (columns * p.taps())));
    matrix = channels * p.taps() * columns;
    const int64_t tasks = p.mb * p.g * tiles;
    oc_tasks = threads == 1 ? 1 : max_of(1, min_of(ceil_div(2 * threads, tasks), p.oc / p.g / 32));
  }
};

int64_t workspace_column(const Problem& p, int threads) { return threads * ColumnTile(p, threads).matrix; }

// One row of the matrix: the pixels [begin, begin + count) of the plane under tap (ky, kx).
CS_INLINE void column_row(const Problem& p, const float* plane, int64_t ky, int64_t kx, int64_t begin, int64_t count,
                          float* row) {
  for_runs(p.oh(), p.ow(), begin, begin + count, [&](int64_t, int64_t y, int64_t x, int64_t i, int64_t run) {
    const int64_t iy = y * p.sh - p.ph + ky * p.dh, ix = x * p.sw - p.pw + kx * p.dw;
    int64_t low = run, high = run;
    if (iy >= 0 && iy < p.ih) clip(ix, p.sw, p.iw, run, &low, &high);
    float* to = row + i;
    for (int64_t j = 0; j < low; ++j) to[j] = 0.0f;
    const float* from = plane + (iy * p.iw + ix);
    if (p.sw == 1)
      for (int64_t j = low; j < high; ++j) to[j] = from[j];
    else
      for (int64_t j = low; j < high; ++j) to[j] = from[j * p.sw];
    for (int64_t j = high; j < run; ++j) to[j] = 0.0f;
  });
}

void run_column(const Call& call) {
  const Problem& p = call.p;
  const int64_t ic = p.ic / p.g, n = p.oc / p.g, k = ic * p.taps(), pixels = p.oh() * p.ow();
  const ColumnTile tile(p, call.parallel.threads);
  for_tasks(call.parallel, p.mb * p.g * tile.tiles * tile.oc_tasks, [&](int64_t task, int64_t slot) {
    const int64_t part = task % tile.oc_tasks, begin = task / tile.oc_tasks % tile.tiles * tile.columns;
    const int64_t image = task / tile.oc_tasks / tile.tiles / p.g, group = task / tile.oc_tasks / tile.tiles % p.g;
    const int64_t oc = group * n + part * n / tile.oc_tasks, oc_end = group * n + (part + 1) * n / tile.oc_tasks;
    const int64_t columns = min_of(tile.columns, pixels - begin), first = (image * p.oc + oc) * pixels + begin;
    float* matrix = call.workspace + slot * tile.matrix;
    for (int64_t c = 0; c < ic; c += tile.channels) {
      const int64_t channels = min_of(tile.channels, ic - c);
      float* row = matrix;
      for (int64_t i = 0; i < channels; ++i) {
        const float* plane = call.src + (image * p.ic + group * ic + c + i) * p.ih * p.iw;
        for (int64_t ky = 0; ky < p.kh; ++ky)
          for (int64_t kx = 0; kx < p.kw; ++kx, row += tile.columns) {
            column_row(p, plane, ky, kx, begin, columns, row);
            for (int64_t j = columns; j < tile.columns; ++j) row[j] = 0.0f;
          }
      }
      const bool last = c + channels == ic;
      GemmRowMajor g{};
      g.m = oc_end - oc;
      g.k = channels * p.taps();
      g.columns = columns;
      g.a = call.packed + oc * k + c * p.taps();
      g.lda = k;
      g.b = matrix;
      g.ldb = tile.columns;
      g.c = call.dst + first;
      g.ldc = pixels;
      g.bias = call.epilogue.bias ? call.epilogue.bias + oc : nullptr;
      g.residual = call.epilogue.residual ? call.epilogue.residual + first : nullptr;
      g.epilogue = last ? &call.epilogue : nullptr;
      g.accumulate = c > 0;
      gemm_row_major(g, nullptr);
    }
  });
}

}  // namespace

const Kernel im2_kernels[] = {
    {"im2row_nhwc", true, true, any, packed_row, pack_row, workspace_row, run_row},
    {"im2col_nchw", false, false, any, packed_column, pack_column, workspace_column, run_column},
};
const int im2_count = sizeof(im2_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
