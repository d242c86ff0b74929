// The table of this instruction set's kernels; dispatch.cpp picks one table at run time.
#include "families.h"
#include "linear.h"
#include "pool.h"
#include "scale_shift.h"
#include "transform.h"
#include "upsample.h"

namespace convselect::CONVSELECT_ISA {
namespace {

struct Family {
  const Kernel* rows;
  int count;
};

constexpr int CAPACITY = 128;
Kernel rows[CAPACITY];

}  // namespace

const KernelTable& table() {
  static const KernelTable built = [] {
    const Family families[] = {
        {depthwise_kernels, depthwise_count},
        {direct_kernels, direct_count},
        {direct_nchw_kernels, direct_nchw_count},
        {grouped_kernels, grouped_count},
        {im2_kernels, im2_count},
        {kn2_kernels, kn2_count},
        {mec_kernels, mec_count},
        {pointwise_kernels, pointwise_count},
        {winograd_kernels, winograd_count},
    };
    int count = 0;
    for (const Family& family : families)
      for (int i = 0; i < family.count && count < CAPACITY; ++i) rows[count++] = family.rows[i];
    return KernelTable{rows, count, to_nhwc, to_nchw, scale_shift, linear, pool, upsample};
  }();
  return built;
}

}  // namespace convselect::CONVSELECT_ISA
