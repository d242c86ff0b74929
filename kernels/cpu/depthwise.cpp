// Depthwise convolutions, g == ic == oc: each channel has a filter of its own.
//
// A multiply-add for each element and tap and no reduction over channels, so memory decides: the NHWC kernel makes a
// block of output pixels at once to read each src line from L2 as few times as it can; the NCHW kernel copies a plane
// into L1 in an order in which every tap is a plain shift.
#include "activation.h"
#include "families.h"
#include "parallel.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// dst[i] = act(dst[i]) while it is still in the cache
void activate_span(float* dst, int64_t n, const Epilogue& e) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(dst + i, activate(load(dst + i), e.act, e.alpha, e.beta));
  if (i < n) store_part(dst + i, activate(load_part(dst + i, n - i), e.act, e.alpha, e.beta), n - i);
}

// ---- NHWC ----------------------------------------------------------------------------------------------------------

// packed  [kh * kw][round_up(channels, VL)], absent channels zero
int64_t packed_floats_nhwc(const Problem& p) { return p.taps() * round_up(p.oc, VL); }

void pack_nhwc(const Problem& p, const float* weight, float* packed) {
  const int64_t ld = round_up(p.oc, VL);
  for (int64_t t = 0; t < p.taps(); ++t)
    for (int64_t c = 0; c < ld; ++c) packed[t * ld + c] = c < p.oc ? flush_subnormal(weight[c * p.taps() + t]) : 0.0f;
}

// A line of zeros, which stands for the pixels of the padding.
int64_t workspace_nhwc(const Problem& p, int) { return round_up(p.ic, 16); }

struct Pixels {
  const float* const* src;  // [rows of src][columns of src], a pointer to each pixel of the block's window
  const float* packed;
  int64_t ld;  // of packed
  float* dst;
  int64_t dst_row, dst_pixel;
  int64_t c_begin, c_end;
  const Epilogue* epilogue;
};

// A block of PY x PX output pixels of a K x K filter with stride S, all channels in turn.
template <int K, int S, int PY, int PX>
void pixels(const Pixels& b) {
  constexpr int ROWS = (PY - 1) * S + K, COLUMNS = (PX - 1) * S + K;
  const Range range(*b.epilogue);
  const float *const bias = b.epilogue->bias, *const residual = b.epilogue->residual;
  const float* src[ROWS * COLUMNS];
  for (int i = 0; i < ROWS * COLUMNS; ++i) src[i] = b.src[i];
  auto channels = [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
    auto get = [&](const float* from) __attribute__((always_inline)) {
      return lanes == VL ? load(from) : load_part(from, lanes);
    };
    Vec acc[PY][PX];
    const Vec start = bias ? get(bias + c) : Vec{};
#pragma GCC unroll 8
    for (int y = 0; y < PY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) acc[y][x] = start;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      Vec row[COLUMNS];
#pragma GCC unroll 16
      for (int i = 0; i < COLUMNS; ++i) row[i] = get(src[r * COLUMNS + i] + c);
#pragma GCC unroll 8
      for (int y = 0; y < PY; ++y) {
        const int ky = r - y * S;
        if (ky < 0 || ky >= K) continue;
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          const Vec w = load(b.packed + (ky * K + kx) * b.ld + c);
#pragma GCC unroll 8
          for (int x = 0; x < PX; ++x) acc[y][x] += w * row[x * S + kx];
        }
      }
    }
#pragma GCC unroll 8
    for (int y = 0; y < PY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) {
        const int64_t at = y * b.dst_row + x * b.dst_pixel + c;
        Vec value = acc[y][x];
        if (residual) value += get(residual + at);
        value = in_range(value, range);
        if (lanes == VL)
          store(b.dst + at, value);
        else
          store_part(b.dst + at, value, lanes);
      }
  };
  int64_t c = b.c_begin;
  for (; c + VL <= b.c_end; c += VL) channels(c, VL);
  if (c < b.c_end) channels(c, b.c_end - c);
}

// One output pixel of any filter.
void any_pixel(const Problem& p, const Pixels& b) {
  const Range range(*b.epilogue);
  const int64_t taps = p.taps();
  for (int64_t c = b.c_begin; c < b.c_end; c += VL) {
    const int64_t lanes = min_of(VL, b.c_end - c);
    const bool whole = lanes == VL;
    auto get = [&](const float* from) __attribute__((always_inline)) { return whole ? load(from) : load_part(from, lanes); };
    Vec acc = b.epilogue->bias ? get(b.epilogue->bias + c) : Vec{};
    for (int64_t t = 0; t < taps; ++t) acc += load(b.packed + t * b.ld + c) * get(b.src[t] + c);
    if (b.epilogue->residual) acc += get(b.epilogue->residual + c);
    acc = in_range(acc, range);
    if (whole)
      store(b.dst + c, acc);
    else
      store_part(b.dst + c, acc, lanes);
  }
}

typedef void (*PixelsFn)(const Pixels&);
struct Block {
  int64_t k, s, py, px;
  PixelsFn whole, row;  // py rows at once, one row at once
};
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
#define CS_BLOCK(K, S, PY, PX) {K, S, PY, PX, pixels<K, S, PY, PX>, pixels<K, S, 1, PX>}
constexpr Block BLOCKS[] = {CS_BLOCK(3, 1, 2, 4), CS_BLOCK(3, 2, 2, 4), CS_BLOCK(5, 1, 2, 4), CS_BLOCK(5, 2, 1, 4)};
#else
#define CS_BLOCK(K, S, PX) {K, S, 1, PX, pixels<K, S, 1, PX>, pixels<K, S, 1, PX>}
constexpr Block BLOCKS[] = {CS_BLOCK(3, 1, 4), CS_BLOCK(3, 2, 3), CS_BLOCK(5, 1, 4), CS_BLOCK(5, 2, 3)};
#endif

void run_nhwc(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow(), channels = p.oc;
  float* const zeros = call.workspace;
  for (int64_t c = 0; c < channels; ++c) zeros[c] = 0.0f;
  const Block* block = nullptr;
  for (const Block& b : BLOCKS)
    if (p.kh == b.k && p.kw == b.k && p.sh == b.s && p.sw == b.s && p.dh == 1 && p.dw == 1 && ow >= b.px) block = &b;
  const int64_t py = block ? block->py : 1, px = block ? block->px : 1;
  const int64_t strips = ceil_div(oh, py), tasks = p.mb * strips;
  // Small maps have too few rows for the threads: split the channels too, into parts of at least 4 registers.
  const int64_t want = ceil_div(4 * call.parallel.threads, tasks);
  const int64_t parts = max_of(1, min_of(want, channels / (4 * VL)));
  const int64_t registers = ceil_div(channels, VL);
  for_tasks(call.parallel, tasks * parts, [&](int64_t task, int64_t) {
    const int64_t part = task % parts, n = task / parts / strips, y0 = task / parts % strips * py;
    const int64_t rows = min_of(py, oh - y0);
    // The block kernel has `py` rows or one.
    const int64_t step = rows == py ? py : 1;
    Pixels b{};
    b.packed = call.packed;
    b.ld = round_up(channels, VL);
    b.dst_row = ow * channels;
    b.dst_pixel = channels;
    b.c_begin = part * registers / parts * VL;
    b.c_end = min_of(channels, (part + 1) * registers / parts * VL);
    Epilogue e = call.epilogue;
    b.epilogue = &e;
    constexpr int64_t WINDOW = 128;  // the most pointers of a block
    const float* window[WINDOW];
    b.src = window;
    auto pixel = [&](int64_t y, int64_t x) {
      return y >= 0 && y < p.ih && x >= 0 && x < p.iw ? call.src + ((n * p.ih + y) * p.iw + x) * channels : zeros;
    };
    for (int64_t y = y0; y < y0 + rows; y += step) {
      for (int64_t begin = 0; begin < ow; begin += px) {
        const int64_t x = min_of(begin, ow - px);  // the last block overlaps the one before it
        const int64_t at = ((n * oh + y) * ow + x) * channels;
        b.dst = call.dst + at;
        e.residual = call.epilogue.residual ? call.epilogue.residual + at : nullptr;
        if (block) {
          const int64_t window_rows = (step - 1) * p.sh + p.kh, window_columns = (px - 1) * p.sw + p.kw;
          for (int64_t r = 0; r < window_rows; ++r)
            for (int64_t i = 0; i < window_columns; ++i)
              window[r * window_columns + i] = pixel(y * p.sh - p.ph + r, x * p.sw - p.pw + i);
          (step == py ? block->whole : block->row)(b);
        } else {
          for (int64_t t = 0; t < p.taps(); ++t)
            window[t] = pixel(y * p.sh - p.ph + t / p.kw * p.dh, x * p.sw - p.pw + t % p.kw * p.dw);
          any_pixel(p, b);
        }
      }
      if (!Range(e).complete)
        for (int64_t r = 0; r < step; ++r)
          for (int64_t x = 0; x < ow; ++x)
            activate_span(call.dst + ((n * oh + y + r) * ow + x) * channels + b.c_begin, b.c_end - b.c_begin, e);
    }
  });
}

// ---- NCHW ----------------------------------------------------------------------------------------------------------

// packed  [channels][kh * kw]
int64_t packed_floats_nchw(const Problem& p) { return p.oc * p.taps(); }

void pack_nchw(const Problem& p, const float* weight, float* packed) {
  for (int64_t i = 0; i < packed_floats_nchw(p); ++i) packed[i] = flush_subnormal(weight[i]);
}

// A plane of src is copied with its padding into sh * sw planes, one for each phase of the stride:
//   phase[(Y % sh) * sw + X % sw] [Y / sh][X / sw] = padded[Y][X],  rows `pitch` apart.
// Output (y, x), flat index q = y * pitch + x, then reads for tap (ky, kx) the phase of (ky dh, kx dw) at
// q + (ky dh / sh) * pitch + kx dw / sw: a shift of q, for any filter, stride and dilation. The flat index runs over
// row ends, so that narrow maps fill whole registers; what falls on the gap between rows is dropped.
struct Phases {
  int64_t pitch, rows, size, count;
  explicit Phases(const Problem& p)
      : pitch(p.ow() + (p.kw - 1) * p.dw / p.sw),
        rows(p.oh() + (p.kh - 1) * p.dh / p.sh),
        size(round_up(pitch * rows + BLOCK * VL, 16)),
        count(p.sh * p.sw) {}
  static constexpr int64_t BLOCK = 8;  // registers of a flat run
};

constexpr int64_t CHUNK = 2048;  // floats of output between the taps and the epilogue, in L1

int64_t chunk_rows(const Phases& f) { return max_of(1, CHUNK / f.pitch); }

int64_t slot_floats_nchw(const Problem& p) {
  const Phases f(p);
  return f.count * f.size + round_up(chunk_rows(f) * f.pitch + Phases::BLOCK * VL, 16) + round_up(p.taps(), 16) * 2;
}

int64_t workspace_nchw(const Problem& p, int threads) { return threads * slot_floats_nchw(p); }

void copy_phases(const Problem& p, const Phases& f, const float* src, float* to) {
  for (int64_t i = 0; i < f.count * f.size; ++i) to[i] = 0.0f;
  for (int64_t y = 0; y < p.ih; ++y) {
    const int64_t at = y + p.ph;
    if (at / p.sh >= f.rows) break;
    float* const row = to + at % p.sh * p.sw * f.size + at / p.sh * f.pitch;
    const float* const from = src + y * p.iw;
    for (int64_t phase = 0; phase < p.sw; ++phase) {
      // column X = q * sw + phase of the padded row, x = X - pw of src
      const int64_t first = max_of(0, ceil_div(p.pw - phase, p.sw));
      const int64_t last = min_of(f.pitch, ceil_div(p.iw + p.pw - phase, p.sw));
      float* const line = row + phase * f.size;
      const float* const base = from + phase - p.pw;
      if (p.sw == 1)
        for (int64_t q = first; q < last; ++q) line[q] = base[q];
      else if (p.sw == 2)
        for (int64_t q = first; q < last; ++q) line[q] = base[2 * q];
      else
        for (int64_t q = first; q < last; ++q) line[q] = base[q * p.sw];
    }
  }
}

void run_nchw(const Call& call) {
  const Problem& p = call.p;
  const Phases f(p);
  const Epilogue& e = call.epilogue;
  const Range range(e);
  const int64_t oh = p.oh(), ow = p.ow(), taps = p.taps(), rows_step = chunk_rows(f);
  for_tasks(call.parallel, p.mb * p.oc, [&](int64_t task, int64_t slot) {
    float* const phases = call.workspace + slot * slot_floats_nchw(p);
    float* const chunk = phases + f.count * f.size;
    int64_t* const shift = reinterpret_cast<int64_t*>(chunk + round_up(rows_step * f.pitch + Phases::BLOCK * VL, 16));
    const int64_t c = task % p.oc;
    const float* const w = call.packed + c * taps;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t y = t / p.kw * p.dh, x = t % p.kw * p.dw;
      shift[t] = (y % p.sh * p.sw + x % p.sw) * f.size + y / p.sh * f.pitch + x / p.sw;
    }
    copy_phases(p, f, call.src + task * p.ih * p.iw, phases);
    const float bias = e.bias ? e.bias[c] : 0.0f;
    for (int64_t y = 0; y < oh; y += rows_step) {
      const int64_t rows = min_of(rows_step, oh - y), length = (rows - 1) * f.pitch + ow;
      for (int64_t q = 0; q < length; q += Phases::BLOCK * VL) {
        const float* const from = phases + y * f.pitch + q;
        Vec acc[Phases::BLOCK];
#pragma GCC unroll 8
        for (int v = 0; v < Phases::BLOCK; ++v) acc[v] = splat(bias);
        for (int64_t t = 0; t < taps; ++t) {
          const Vec weight = splat(w[t]);
#pragma GCC unroll 8
          for (int v = 0; v < Phases::BLOCK; ++v) acc[v] += weight * load(from + shift[t] + v * VL);
        }
#pragma GCC unroll 8
        for (int v = 0; v < Phases::BLOCK; ++v) store(chunk + q + v * VL, acc[v]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (task * oh + y + r) * ow;
        for (int64_t x = 0; x < ow; x += VL) {
          const int64_t lanes = min_of(VL, ow - x);
          Vec value = load(chunk + r * f.pitch + x);  // the chunk is longer than its rows by a register and more
          if (e.residual) value += lanes == VL ? load(e.residual + at + x) : load_part(e.residual + at + x, lanes);
          value = range.complete ? in_range(value, range) : activate(value, e.act, e.alpha, e.beta);
          if (lanes == VL)
            store(call.dst + at + x, value);
          else
            store_part(call.dst + at + x, value, lanes);
        }
      }
    }
  });
}

}  // namespace

const Kernel depthwise_kernels[] = {
    {"depthwise_nhwc", true, true, packed_floats_nhwc, pack_nhwc, workspace_nhwc, run_nhwc},
    {"depthwise_nchw", false, false, packed_floats_nchw, pack_nchw, workspace_nchw, run_nchw},
};
const int depthwise_count = sizeof(depthwise_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
