// The definitions of what the kernels compute, in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"

using convselect::Act;
using convselect::Problem;

inline double activated(double x, Act act, double alpha, double beta) {
  auto clamp = [](double v, double low, double high) { return v < low ? low : v > high ? high : v; };
  switch (act) {
    case Act::identity: return x;
    case Act::relu: return x < 0 ? 0 : x;
    case Act::clamp: return clamp(x, alpha, beta);
    case Act::leaky_relu: return x < 0 ? alpha * x : x;
    case Act::silu: return x / (1 + std::exp(-x));
    case Act::sigmoid: return 1 / (1 + std::exp(-x));
    case Act::hardswish: return x * clamp(x + 3, 0, 6) / 6;
    case Act::hardsigmoid: return clamp(x + 3, 0, 6) / 6;
    case Act::gelu: return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
    case Act::gelu_tanh: return x * 0.5 * (1 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
  }
  return NAN;
}

// dst [mb, oc, oh, ow] of src [mb, ic, ih, iw] and weight [oc, ic / g, kh, kw]
inline std::vector<double> convolved(const Problem& p, const std::vector<float>& src,
                                     const std::vector<float>& weight) {
  const int64_t oh = p.oh(), ow = p.ow(), ic = p.ic / p.g, oc = p.oc / p.g;
  std::vector<double> dst(p.mb * p.oc * oh * ow);
  for (int64_t no = 0; no < p.mb * p.oc; ++no)
    for (int64_t c = 0; c < ic; ++c) {
      const int64_t n = no / p.oc, o = no % p.oc;
      const float* const plane = &src[(n * p.ic + o / oc * ic + c) * p.ih * p.iw];
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        const double w = weight[(o * ic + c) * p.taps() + tap];
        const int64_t top = tap / p.kw * p.dh - p.ph, left = tap % p.kw * p.dw - p.pw;
        for (int64_t y = 0; y < oh; ++y) {
          if (y * p.sh + top < 0 || y * p.sh + top >= p.ih) continue;
          const float* const row = plane + (y * p.sh + top) * p.iw;
          double* const to = &dst[(no * oh + y) * ow];
          for (int64_t x = 0; x < ow; ++x)
            if (x * p.sw + left >= 0 && x * p.sw + left < p.iw) to[x] += w * row[x * p.sw + left];
        }
      }
    }
  return dst;
}

// The two pixels of the source that one of dst lies between, and how near it is to the second; the same one twice for
// the nearest.
struct Between {
  int64_t low, high;
  double share;
  double mix(double a, double b) const { return (1 - share) * a + share * b; }
};

// The i-th of `out` heights or widths, of `in`: in float32 as far as that decides which pixels they are.
inline Between between(const convselect::Upsample& u, int64_t in, int64_t out, float step, int64_t i) {
  const int64_t last = in - 1;
  if (step < 0) step = float(in) / float(out);
  if (!u.linear) {
    const int64_t low = std::min(int64_t(std::floor(float(i) * step)), last);
    return {low, low, 0};
  }
  if (in == out) return {i, i, 0};
  if (u.align_corners) step = out > 1 ? float(last) / float(out - 1) : 0;
  const float place = u.align_corners ? float(i) * step : std::fmax(step * (float(i) + 0.5f) - 0.5f, 0.0f);
  const int64_t low = std::min(int64_t(std::floor(place)), last);
  return {low, std::min(low + 1, last), std::fmin(place - float(low), 1.0f)};
}
