// 1x1 convolutions as a matrix product over the pixels, without a copy of src.
#include "families.h"
#include "gemm.h"
#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

int64_t packed_floats(const Problem& p) { return ColumnGroups(p.oc).packed_floats(p.ic); }

// packed  [group][ic][registers][VL], from weight [oc, ic, 1, 1]
void pack(const Problem& p, const float* weight, float* packed) {
  pack_columns(ColumnGroups(p.oc), weight, p.ic, 1, p.ic, packed);
}

constexpr int64_t ROWS = 96;  // pixels of a task: their A block, 96 x K_BLOCK floats, stays in L2

int64_t no_workspace(const Problem&, int) { return 0; }

void run_nhwc(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow(), pixels = p.mb * oh * ow;
  const ColumnGroups groups(p.oc);
  // Split over the rows first; over the column groups too when there are too few rows to keep all threads busy.
  const int64_t row_tasks = ceil_div(pixels, ROWS);
  const int64_t column_tasks =
      row_tasks >= 4 * call.parallel.threads ? 1 : min_of(groups.groups, ceil_div(4 * call.parallel.threads, row_tasks));
  for_tasks(call.parallel, row_tasks * column_tasks, [&](int64_t task, int64_t) {
    const int64_t row = task % row_tasks, column = task / row_tasks;
    const int64_t begin = row * pixels / row_tasks, end = (row + 1) * pixels / row_tasks;
    const float* a[ROWS + 1];
    for (int64_t q = begin; q < end; ++q) {
      const int64_t n = q / (oh * ow), y = q / ow % oh, x = q % ow;
      a[q - begin] = call.src + ((n * p.ih + y * p.sh) * p.iw + x * p.sw) * p.ic;
    }
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
    gemm(g, groups, column * groups.groups / column_tasks, (column + 1) * groups.groups / column_tasks);
  });
}

}  // namespace

const Kernel pointwise_kernels[] = {
    {"pointwise_nhwc", true, true, packed_floats, pack, no_workspace, run_nhwc},
};
const int pointwise_count = sizeof(pointwise_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
