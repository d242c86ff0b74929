// Direct convolution: a matrix product over the output pixels whose A is given by pointers into src (Dukhan, arXiv
// 1907.02129), so nothing is copied but the borders.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"

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

// Output pixels of a task: few enough for the pointers of many taps, and for their part of src to stay in L2.
int64_t rows_in_task(const Problem& p) { return max_of(24, min_of(96, 4096 / p.taps())); }

int64_t zeros_floats(const Problem& p) { return round_up(p.ic / p.g, 16); }
int64_t pointers_floats(const Problem& p) { return round_up(rows_in_task(p) * p.taps() * 2, 16); }

int64_t workspace(const Problem& p, int threads) { return zeros_floats(p) + threads * pointers_floats(p); }

void run(const Call& call) {
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

}  // namespace

const Kernel direct_kernels[] = {
    {"direct_nhwc", true, true, any, packed_floats, pack, workspace, run},
};
const int direct_count = sizeof(direct_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
