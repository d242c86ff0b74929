#include "activation.h"

namespace convselect::CONVSELECT_ISA {
namespace {

template <Act ACT>
void activate_as(float* dst, int64_t stride, int64_t rows, int64_t n, float alpha, float beta) {
  for (int64_t row = 0; row < rows; ++row, dst += stride) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(dst + i, activate(load(dst + i), ACT, alpha, beta));
    if (i < n) store_part(dst + i, activate(load_part(dst + i, n - i), ACT, alpha, beta), n - i);
  }
}

}  // namespace

void activate_rows(float* dst, int64_t stride, int64_t rows, int64_t n, const Epilogue& e) {
  switch (e.act) {
#define CS_CASE(ACT) \
  case Act::ACT: return activate_as<Act::ACT>(dst, stride, rows, n, e.alpha, e.beta);
    CS_CASE(identity)
    CS_CASE(relu)
    CS_CASE(clamp)
    CS_CASE(leaky_relu)
    CS_CASE(silu)
    CS_CASE(sigmoid)
    CS_CASE(hardswish)
    CS_CASE(hardsigmoid)
    CS_CASE(gelu)
    CS_CASE(gelu_tanh)
#undef CS_CASE
  }
}

}  // namespace convselect::CONVSELECT_ISA
