// 1x1 convolutions as a matrix product over the pixels, without a copy of src.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace convselect::CONVSELECT_ISA {
namespace {

int64_t packed_nhwc(const Problem& p) { return ColumnGroups(p.oc).packed_floats(p.ic); }

// packed  [group][ic][registers][VL], from weight [oc, ic, 1, 1]
void pack_nhwc(const Problem& p, const float* weight, float* packed) {
  pack_columns(ColumnGroups(p.oc), weight, p.ic, 1, p.ic, packed);
}

constexpr int64_t ROWS = 96;  // pixels of a task: their A block, 96 x K_BLOCK floats, stays in L2

int64_t no_workspace(const Problem&, int) { return 0; }

void run_nhwc(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow();
  const ColumnGroups groups(p.oc);
  const TaskGrid grid(p.mb * oh * ow, ROWS, groups.groups, call.parallel.threads);
  for_tasks(call.parallel, grid.count(), [&](int64_t task, int64_t) {
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
    g.c = call.dst + begin * p.oc;
    g.ldc = p.oc;
    g.residual = call.epilogue.residual ? call.epilogue.residual + begin * p.oc : nullptr;
    g.epilogue = &call.epilogue;
    gemm(g, groups, grid.group_begin(task), grid.group_end(task));
  });
}

}  // namespace

const Kernel pointwise_kernels[] = {
    {"pointwise_nhwc", true, true, packed_nhwc, pack_nhwc, no_workspace, run_nhwc},
};
const int pointwise_count = sizeof(pointwise_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
