// The contract between the kernels and their callers. Free of torch and of templates of the C++ library, because it
// is compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace convselect {

// A convolution, in benchdnn's letters; dilation 1 means none. src [mb, ic, ih, iw], weight [oc, ic/g, kh, kw],
// dst [mb, oc, oh, ow].
struct Problem {
  int64_t mb, ic, ih, iw, oc, kh, kw, sh, sw, ph, pw, dh, dw, g;

  int64_t oh() const { return (ih + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
  int64_t ow() const { return (iw + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
  int64_t taps() const { return kh * kw; }
};

// The order is that of ACTIVATIONS in convselect/primitive.py.
enum class Act : int64_t { identity, relu, clamp, leaky_relu, silu, sigmoid, hardswish, hardsigmoid, gelu, gelu_tanh };

// dst = act(conv + bias + residual). bias f32 [oc] or null; residual in dst's own layout or null.
struct Epilogue {
  const float* bias;
  const float* residual;
  Act act;
  float alpha, beta;
};

// How to run tasks in parallel: `loop` calls body(context, begin, end) over disjoint parts of [0, n) and returns when
// all have returned. `threads` bounds how many run at once.
struct Parallel {
  int threads;
  void (*loop)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

struct Call {
  Problem p;
  const float* src;
  const float* packed;
  float* dst;
  int64_t dst_stride;  // floats from a pixel of an NHWC dst (and residual) to the next, at least oc; unused in NCHW
  float* workspace;    // workspace_floats(p, parallel.threads) floats, 64-byte aligned, contents undefined
  Epilogue epilogue;
  Parallel parallel;
};

// One row of the table of kernels. A kernel reads and writes only inside the buffers of `Call`.
struct Kernel {
  const char* name;
  bool src_nhwc, dst_nhwc;
  // Whether the problem is one of the kernel's; the other functions may be called for these only. As the refusals in
  // convselect/primitives, which say why not.
  bool (*takes)(const Problem&);
  int64_t (*packed_floats)(const Problem&);
  void (*pack)(const Problem&, const float* weight, float* packed);
  int64_t (*workspace_floats)(const Problem&, int threads);
  void (*run)(const Call&);
};

// dst = act(src * scale[c] + shift[c] + addend) of f32 [mb, channels, pixels], or [mb, pixels, channels] if nhwc. Null
// for `scale`, `shift`, `addend` leaves that step out; dst may be src. Strides are floats from a pixel to the next,
// and only NHWC has them; addend is dense. `scale_stride` is from an image's scale to the next one's, 0 if they share
// it.
struct ScaleShift {
  int64_t mb, channels, pixels;
  bool nhwc;
  const float *src, *scale, *shift, *addend;
  float* dst;
  int64_t src_stride, dst_stride, scale_stride;
  Act act;
  float alpha, beta;
};

// dst[i][n] = act(sum over x of src[i][x] * weight[n][x] + bias[n]); src f32 [m, k], weight f32 [n, k], bias or null.
struct Linear {
  int64_t m, n, k;
  const float *src, *weight, *bias;
  float* dst;
  Act act;
  float alpha, beta;
};

// Pooling of f32 [mb, ih, iw, channels] into [mb, oh, ow, channels], with windows kh x kw; `dst_stride` floats from a
// pixel of dst to the next. An average divides by `divisor`, or if that is 0 by the taps inside the source (and its
// padding, if include_pad).
struct Pool {
  int64_t mb, channels, ih, iw, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;
  bool max, include_pad;
  int64_t divisor;
  const float* src;
  float* dst;
  int64_t dst_stride;
};

// Interpolation of f32 [mb, ih, iw, channels] to [mb, oh, ow, channels], by the nearest pixel or, if `linear`,
// bilinear; `dst_stride` floats from a pixel of dst to the next. `step_h` and `step_w` are from a pixel of dst to the
// next in pixels of the source; negative, they follow from the sizes. Sizes are below 2^31.
struct Upsample {
  int64_t mb, channels, ih, iw, oh, ow;
  bool linear, align_corners;
  float step_h, step_w;
  const float* src;
  float* dst;
  int64_t dst_stride;
};

// What one build of the sources for one instruction set offers.
struct KernelTable {
  const Kernel* rows;
  int count;
  // NCHW <-> NHWC of f32 [mb, channels, pixels]: dst[n][q][c] = src[n][c][q], or the inverse.
  void (*to_nhwc)(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel&);
  void (*to_nchw)(const float* src, float* dst, int64_t mb, int64_t channels, int64_t pixels, const Parallel&);
  void (*scale_shift)(const ScaleShift&, const Parallel&);
  void (*linear)(const Linear&, const Parallel&);
  void (*pool)(const Pool&, const Parallel&);
  void (*upsample)(const Upsample&, const Parallel&);
};

}  // namespace convselect
