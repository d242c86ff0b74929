// Activations of one register. NaN in gives NaN out, as in torch.
#pragma once
#include "kernel.h"
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// Comparisons with NaN are false, so NaN passes through both.
CS_INLINE Vec at_least(Vec x, float low) { return x < splat(low) ? splat(low) : x; }
CS_INLINE Vec at_most(Vec x, float high) { return x > splat(high) ? splat(high) : x; }

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and a degree-6 Taylor polynomial; relative error below 3e-7.
// The argument is clamped to [-87, 89]: the least result is normal, and from 88.4 on it is infinite, so that what is
// divided by it is 0, or NaN if it is infinite itself.
CS_INLINE Vec exp_of(Vec x) {
  x = at_most(at_least(x, -87.0f), 89.0f);
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec sum = x * 1.44269504088896341f + shift;
  const Vec n = sum - shift;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecI bits = (reinterpret_cast<VecI>(sum) << 23) + (127 << 23);  // 2^n: n is in the low bits of the sum
  return p * reinterpret_cast<Vec>(bits);
}

CS_INLINE Vec sigmoid_of(Vec x) { return 1.0f / (1.0f + exp_of(-x)); }

// tanh(x) = 1 - 2 / (e^2x + 1)
CS_INLINE Vec tanh_of(Vec x) { return 1.0f - 2.0f / (exp_of(x + x) + 1.0f); }

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
CS_INLINE Vec erf_of(Vec x) {
  Vec a = x < Vec{} ? -x : x;
  Vec t = 1.0f / (1.0f + 0.3275911f * a);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Vec y = 1.0f - p * t * exp_of(-a * a);
  return x < Vec{} ? -y : y;
}

CS_INLINE Vec activate(Vec x, Act act, float alpha, float beta) {
  switch (act) {
    case Act::identity: return x;
    case Act::relu: return at_least(x, 0.0f);
    case Act::clamp: return at_most(at_least(x, alpha), beta);
    case Act::leaky_relu: return x < Vec{} ? alpha * x : x;
    case Act::silu: return x / (1.0f + exp_of(-x));
    case Act::sigmoid: return sigmoid_of(x);
    case Act::hardswish: return x * (at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6));
    case Act::hardsigmoid: return at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6);
    case Act::gelu: return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f));
    case Act::gelu_tanh: return 0.5f * x * (1.0f + tanh_of(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

// act(x) for the activations that are a clamp; the others have an infinite range here and go over dst afterwards.
struct Range {
  float low, high;
  bool complete;  // whether the range is all of the activation
  explicit Range(const Epilogue& e) {
    low = e.act == Act::relu ? 0.0f : e.act == Act::clamp ? e.alpha : -__builtin_inff();
    high = e.act == Act::clamp ? e.beta : __builtin_inff();
    complete = e.act == Act::identity || e.act == Act::relu || e.act == Act::clamp;
  }
};

// dst[row][i] = act(dst[row][i]) for i < n, rows `stride` apart; for what has just been written and is still in L1.
void activate_rows(float* dst, int64_t stride, int64_t rows, int64_t n, const Epilogue&);

CS_INLINE Vec in_range(Vec x, const Range& r) { return at_most(at_least(x, r.low), r.high); }

}  // namespace convselect::CONVSELECT_ISA
