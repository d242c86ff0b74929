// 1x1 convolutions as a matrix product over the pixels, without a copy of src.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace convselect::CONVSELECT_ISA {
namespace {

bool one_by_one(const Problem& p) { return p.taps() == 1 && p.ph == 0 && p.pw == 0 && ungrouped(p); }

int64_t packed_nhwc(const Problem& p) { return ColumnGroups(p.oc).packed_floats(p.ic); }

// packed  [group][ic][registers][VL], from weight [oc, ic, 1, 1]
void pack_nhwc(const Problem& p, const float* weight, float* packed) {
  pack_columns(ColumnGroups(p.oc), weight, p.ic, 1, p.ic, packed);
}

constexpr int64_t ROWS = 96;           // pixels of a task: their A block, 96 x K_BLOCK floats, stays in L2
constexpr int64_t SERIAL = 16 * 1024;  // multiply-adds that take less time than to wake a thread

int64_t no_workspace(const Problem&, int) { return 0; }

void run_nhwc(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow();
  const ColumnGroups groups(p.oc);
  const Parallel parallel{p.mb * oh * ow * p.ic * p.oc < SERIAL ? 1 : call.parallel.threads, call.parallel.loop};
  const TaskGrid grid(p.mb * oh * ow, ROWS, groups.groups, parallel.threads);
  for_tasks(parallel, grid.count(), [&](int64_t task, int64_t) {
    const int64_t begin = grid.row_begin(task), end = grid.row_end(task);
    const float* a[ROWS + 1];
    for_runs(oh, ow, begin, end, [&](int64_t n, int64_t y, int64_t x, int64_t i, int64_t count) {
      const float* from = call.src + ((n * p.ih + y * p.sh) * p.iw + x * p.sw) * p.ic;
      for (int64_t j = 0; j < count; ++j, from += p.sw * p.ic) a[i + j] = from;
    });
    Gemm g{};
    g.m = end - begin;
    g.taps = 1;
    g.k = p.ic;
    g.a = a;
    g.b = call.packed;
    g.c = call.dst + begin * call.dst_stride;
    g.ldc = call.dst_stride;
    g.residual = call.epilogue.residual ? call.epilogue.residual + begin * call.dst_stride : nullptr;
    g.epilogue = &call.epilogue;
    gemm(g, groups, grid.group_begin(task), grid.group_end(task));
  });
}

// --- pointwise_nchw: the weights as they are times src as it is, [ic, pixels]

int64_t packed_nchw(const Problem& p) { return p.oc * p.ic; }

void pack_nchw(const Problem& p, const float* weight, float* packed) {
  for (int64_t i = 0; i < packed_nchw(p); ++i) packed[i] = flush_subnormal(weight[i]);
}

struct Tiles {
  int64_t columns, tiles, oc_tasks;  // pixels of a task; tasks of an image, of the output channels
  Tiles(const Problem& p, int threads) {
    const int64_t pixels = p.oh() * p.ow();
    tiles = ceil_div(pixels, 2 * NV_MAX * VL);
    columns = round_up(ceil_div(pixels, tiles), VL);
    tiles = ceil_div(pixels, columns);
    oc_tasks = threads == 1 ? 1 : max_of(1, min_of(ceil_div(2 * threads, p.mb * tiles), p.oc / 32));
  }
};

// With a stride, the pixels that are used, [ic][columns]; else the last columns of src, which end in mid-register.
int64_t scratch_nchw(const Problem& p, const Tiles& tiles) {
  return round_up(p.ic * (p.sh * p.sw > 1 ? tiles.columns : VL), 16);
}

int64_t workspace_nchw(const Problem& p, int threads) { return threads * scratch_nchw(p, Tiles(p, threads)); }

void run_nchw(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow(), pixels = oh * ow;
  const Tiles tiles(p, call.parallel.threads);
  for_tasks(call.parallel, p.mb * tiles.tiles * tiles.oc_tasks, [&](int64_t task, int64_t slot) {
    const int64_t part = task % tiles.oc_tasks, begin = task / tiles.oc_tasks % tiles.tiles * tiles.columns;
    const int64_t image = task / tiles.oc_tasks / tiles.tiles, oc = part * p.oc / tiles.oc_tasks;
    const int64_t columns = min_of(tiles.columns, pixels - begin), first = (image * p.oc + oc) * pixels + begin;
    const float* src = call.src + image * p.ic * p.ih * p.iw;
    float* scratch = call.workspace + slot * scratch_nchw(p, tiles);
    const bool strided = p.sh * p.sw > 1;
    if (strided)
      for (int64_t c = 0; c < p.ic; ++c)
        for_runs(oh, ow, begin, begin + columns, [&](int64_t, int64_t y, int64_t x, int64_t i, int64_t count) {
          const float* from = src + (c * p.ih + y * p.sh) * p.iw + x * p.sw;
          for (int64_t j = 0; j < count; ++j) scratch[c * tiles.columns + i + j] = from[j * p.sw];
        });
    GemmRowMajor g{};
    g.m = (part + 1) * p.oc / tiles.oc_tasks - oc;
    g.k = p.ic;
    g.columns = columns;
    g.a = call.packed + oc * p.ic;
    g.lda = p.ic;
    g.b = strided ? scratch : src + begin;
    g.ldb = strided ? tiles.columns : pixels;
    g.c = call.dst + first;
    g.ldc = pixels;
    g.bias = call.epilogue.bias ? call.epilogue.bias + oc : nullptr;
    g.residual = call.epilogue.residual ? call.epilogue.residual + first : nullptr;
    g.epilogue = &call.epilogue;
    gemm_row_major(g, strided ? nullptr : scratch);
  });
}

}  // namespace

const Kernel pointwise_kernels[] = {
    {"pointwise_nhwc", true, true, one_by_one, packed_nhwc, pack_nhwc, no_workspace, run_nhwc},
    {"pointwise_nchw", false, false, one_by_one, packed_nchw, pack_nchw, workspace_nchw, run_nchw},
};
const int pointwise_count = sizeof(pointwise_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
