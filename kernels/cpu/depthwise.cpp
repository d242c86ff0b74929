// Depthwise convolutions, g == ic == oc: each channel has a filter of its own.
//
// A multiply-add for each element and tap and no reduction over channels, so memory decides: the NHWC kernel makes a
// block of output pixels at once to read each src line from L2 as few times as it can; the NCHW kernel copies a plane
// into L1 in an order in which every tap is a plain shift.
#include "activation.h"
#include "families.h"
#include "parallel.h"
#include "window.h"

namespace convselect::CONVSELECT_ISA {
namespace {

bool one_filter_a_channel(const Problem& p) { return p.g == p.ic && p.g == p.oc; }

// ---- NHWC ----------------------------------------------------------------------------------------------------------

constexpr int64_t MOST_TAPS = 121;  // pointers of a window

bool few_taps(const Problem& p) { return one_filter_a_channel(p) && p.taps() <= MOST_TAPS; }

// packed  [channels / VL][kh * kw][VL], absent channels zero
int64_t packed_floats_nhwc(const Problem& p) { return p.taps() * round_up(p.oc, VL); }

void pack_nhwc(const Problem& p, const float* weight, float* packed) {
  for (int64_t c = 0; c < p.oc; c += VL)
    for (int64_t t = 0; t < p.taps(); ++t)
      for (int64_t i = c; i < c + VL; ++i) *packed++ = i < p.oc ? flush_subnormal(weight[i * p.taps() + t]) : 0.0f;
}

// A line of zeros, which stands for the pixels of the padding.
int64_t workspace_nhwc(const Problem& p, int) { return round_up(p.ic, 16); }

// A run of blocks of output pixels.
struct Pixels {
  const float* src;            // the first pixel of the first block's window; rows src_row apart, or
  const float* const* window;  // a pointer to each pixel of the only block's window, where it reaches into the padding
  const float* packed;
  float* dst;
  const float* residual;
  int64_t channels, src_row, dst_row, dst_stride, blocks;
  int64_t c_begin, c_end;
  const Epilogue* epilogue;
};

// Blocks of PY x PX output pixels of a K x K filter with stride S, all channels of one before the next. The window's
// pixels are loaded once, and the filter is read from L1 for each PY x PX outputs.
template <int K, int S, int PY, int PX, bool PADDED>
void pixels(const Pixels& b) {
  constexpr int ROWS = (PY - 1) * S + K, COLUMNS = (PX - 1) * S + K, TAPS = K * K;
  const Range range(*b.epilogue);
  const float *const bias = b.epilogue->bias, *residual = b.residual, *src = b.src;
  float* dst = b.dst;
  const float* window[PADDED ? ROWS * COLUMNS : 1];
  if (PADDED)
    for (int i = 0; i < ROWS * COLUMNS; ++i) window[i] = b.window[i];
  const int64_t channels = b.channels, src_row = b.src_row, dst_row = b.dst_row, dst_stride = b.dst_stride,
                c_end = b.c_end;
  auto at_channel = [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
    auto get = [&](const float* from)
                   __attribute__((always_inline)) { return lanes == VL ? load(from) : load_part(from, lanes); };
    const float* const packed = b.packed + c * TAPS;
    Vec acc[PY][PX];
    const Vec start = bias ? get(bias + c) : Vec{};
#pragma GCC unroll 8
    for (int y = 0; y < PY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) acc[y][x] = start;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float* from = src + r * src_row + c;
      Vec row[COLUMNS];
#pragma GCC unroll 16
      for (int i = 0; i < COLUMNS; ++i, from += channels) row[i] = get(PADDED ? window[r * COLUMNS + i] + c : from);
      add_row<K, S>(r, row, packed, acc);
    }
#pragma GCC unroll 8
    for (int y = 0; y < PY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) {
        const int64_t at = y * dst_row + x * dst_stride + c;
        Vec value = acc[y][x];
        if (residual) value += get(residual + at);
        value = in_range(value, range);
        if (lanes == VL)
          store(dst + at, value);
        else
          store_part(dst + at, value, lanes);
      }
  };
  for (int64_t i = 0; i < b.blocks; ++i) {
    int64_t c = b.c_begin;
    for (; c + VL <= c_end; c += VL) at_channel(c, VL);
    if (c < c_end) at_channel(c, c_end - c);
    if (!range.complete)
      for (int y = 0; y < PY; ++y)
        activate_rows(dst + y * dst_row + b.c_begin, dst_stride, PX, c_end - b.c_begin, *b.epilogue);
    src += PX * S * channels;
    dst += PX * dst_stride;
    if (residual) residual += PX * dst_stride;
  }
}

// One output pixel of any filter.
void any_pixel(int64_t taps, const Pixels& b) {
  const Range range(*b.epilogue);
  for (int64_t c = b.c_begin; c < b.c_end; c += VL) {
    const int64_t lanes = min_of(VL, b.c_end - c);
    const bool whole = lanes == VL;
    auto get = [&](const float* from)
                   __attribute__((always_inline)) { return whole ? load(from) : load_part(from, lanes); };
    Vec acc = b.epilogue->bias ? get(b.epilogue->bias + c) : Vec{};
    for (int64_t t = 0; t < taps; ++t) acc += load(b.packed + c * taps + t * VL) * get(b.window[t] + c);
    if (b.residual) acc += get(b.residual + c);
    acc = in_range(acc, range);
    if (whole)
      store(b.dst + c, acc);
    else
      store_part(b.dst + c, acc, lanes);
  }
  if (!range.complete) activate_rows(b.dst + b.c_begin, b.dst_stride, 1, b.c_end - b.c_begin, *b.epilogue);
}

typedef void (*PixelsFn)(const Pixels&);
struct Block {
  int64_t k, s, py, px;
  PixelsFn fn[2][2];  // [py rows at once, one row][inside, padded]
};
#define CS_BLOCK(K, S, PY, PX)                                     \
  {                                                                \
    K, S, PY, PX, {                                                \
      {pixels<K, S, PY, PX, false>, pixels<K, S, PY, PX, true>}, { \
        pixels<K, S, 1, PX, false>, pixels<K, S, 1, PX, true>      \
      }                                                            \
    }                                                              \
  }
// Of those that fit, the one that computes the fewest pixels twice, or the first: maps of 7 x 7 and 14 x 14 are common.
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
constexpr Block BLOCKS[] = {CS_BLOCK(3, 1, 3, 4), CS_BLOCK(3, 1, 2, 7), CS_BLOCK(3, 2, 2, 4), CS_BLOCK(3, 2, 1, 7),
                            CS_BLOCK(5, 1, 2, 7), CS_BLOCK(5, 1, 2, 4), CS_BLOCK(5, 2, 1, 7), CS_BLOCK(5, 2, 1, 4),
                            CS_BLOCK(7, 1, 2, 4), CS_BLOCK(7, 2, 1, 4)};
#else
constexpr Block BLOCKS[] = {CS_BLOCK(3, 1, 1, 4), CS_BLOCK(3, 2, 1, 3), CS_BLOCK(5, 1, 1, 4),
                            CS_BLOCK(5, 2, 1, 3), CS_BLOCK(7, 1, 1, 4), CS_BLOCK(7, 2, 1, 3)};
#endif

const Block* choose(const Problem& p) {
  const Block* best = nullptr;
  auto computed = [&](const Block& b) { return round_up(p.ow(), b.px); };
  for (const Block& b : BLOCKS)
    if (p.kh == b.k && p.kw == b.k && p.sh == b.s && p.sw == b.s && p.dh == 1 && p.dw == 1 && p.ow() >= b.px &&
        (!best || computed(b) < computed(*best)))
      best = &b;
  return best;
}

void run_nhwc(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow(), channels = p.oc;
  float* const zeros = call.workspace;
  for (int64_t c = 0; c < channels; ++c) zeros[c] = 0.0f;
  const Block* const block = choose(p);
  const int64_t py = block ? block->py : 1, px = block ? block->px : 1;
  const int64_t strips = ceil_div(oh, py), tasks = p.mb * strips;
  // Small maps have too few rows for the threads: split the channels too, into parts of at least 4 registers.
  const int64_t want = ceil_div(4 * call.parallel.threads, tasks);
  const int64_t parts = max_of(1, min_of(want, channels / (4 * VL)));
  const int64_t registers = ceil_div(channels, VL);
  // The blocks [inside_begin, inside_end) of a row read no padding to the left or the right.
  const int64_t inside_begin = ceil_div(p.pw, p.sw * px);
  const int64_t inside_end = p.iw + p.pw < p.kw ? 0 : ((p.iw + p.pw - p.kw) / p.sw + 1) / px;
  for_tasks(call.parallel, tasks * parts, [&](int64_t task, int64_t) {
    const int64_t part = task % parts, n = task / parts / strips, y0 = task / parts % strips * py;
    const int64_t rows = min_of(py, oh - y0);
    const int64_t step = rows == py ? py : 1;  // there are blocks of py rows and of one
    Epilogue e = call.epilogue;
    Pixels b{};
    b.packed = call.packed;
    b.channels = channels;
    b.src_row = p.iw * channels;
    b.dst_row = ow * call.dst_stride;
    b.dst_stride = call.dst_stride;
    b.c_begin = part * registers / parts * VL;
    b.c_end = min_of(channels, (part + 1) * registers / parts * VL);
    b.epilogue = &e;
    constexpr int64_t WINDOW = 128;  // the most pointers of a block
    const float* window[WINDOW];
    b.window = window;
    const float* const image = call.src + n * p.ih * p.iw * channels;
    auto pixel = [&](int64_t y, int64_t x) {
      return y >= 0 && y < p.ih && x >= 0 && x < p.iw ? image + (y * p.iw + x) * channels : zeros;
    };
    for (int64_t y = y0; y < y0 + rows; y += step) {
      const int64_t top = y * p.sh - p.ph, window_rows = (step - 1) * p.sh + p.kh,
                    window_columns = (px - 1) * p.sw + p.kw;
      const bool inside = top >= 0 && top + window_rows <= p.ih;
      for (int64_t i = 0; i * px < ow;) {
        const int64_t x = min_of(i * px, ow - px);  // the last block overlaps the one before it
        const int64_t at = ((n * oh + y) * ow + x) * call.dst_stride, left = x * p.sw - p.pw;
        b.dst = call.dst + at;
        b.residual = e.residual ? e.residual + at : nullptr;
        b.blocks = 1;
        if (!block) {
          for (int64_t t = 0; t < p.taps(); ++t) window[t] = pixel(top + t / p.kw * p.dh, left + t % p.kw * p.dw);
          any_pixel(p.taps(), b);
        } else if (inside && i >= inside_begin && i < inside_end) {
          b.src = image + (top * p.iw + left) * channels;
          b.blocks = inside_end - i;
          block->fn[step != py][0](b);
        } else {
          for (int64_t r = 0; r < window_rows; ++r)
            for (int64_t j = 0; j < window_columns; ++j) window[r * window_columns + j] = pixel(top + r, left + j);
          block->fn[step != py][1](b);
        }
        i += b.blocks;
      }
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
        size(round_up(pitch * rows + VL, 16)),
        count(p.sh * p.sw) {}
  static constexpr int64_t BLOCK = 8;  // registers of a flat run
};

// Small planes are taken several at a time through each of three steps (copy, taps, epilogue), because a load that
// overlaps two stores still on their way to L1 waits for both. `chunk` holds the flat outputs between the last two.
struct Batch {
  int64_t planes, rows, plane_floats, chunk_floats;  // `rows` of output of each plane at once
  Batch(const Problem& p, const Phases& f) {
    constexpr int64_t CHUNK = 2048, COPIES = 6144;  // floats: both in L1
    plane_floats = f.count * f.size;
    rows = min_of(p.oh(), max_of(1, CHUNK / f.pitch));
    planes = max_of(1, min_of(CHUNK / (f.pitch * p.oh()), COPIES / plane_floats));
    chunk_floats = round_up(rows * f.pitch + 2 * VL, 16);
  }
  int64_t floats() const { return planes * (plane_floats + chunk_floats); }
};

// For each thread the copies and the chunks; then the shift of each tap, int64.
int64_t workspace_nchw(const Problem& p, int threads) { return threads * Batch(p, Phases(p)).floats() + 2 * p.taps(); }

// to[q] = from[q * step], q < n
void copy_every(const float* from, int64_t step, int64_t n, float* to) {
  if (step == 1) {
    int64_t q = 0;
    for (; q + VL <= n; q += VL) store(to + q, load(from + q));
    if (q < n) store_part(to + q, load_part(from + q, n - q), n - q);
  } else if (step == 2) {
    VecI even;
    for (int i = 0; i < VL; ++i) even[i] = 2 * i;
    for (int64_t q = 0; q < n; q += VL) {
      const int64_t lanes = min_of(VL, n - q), read = 2 * lanes - 1;
      const Vec low = read >= VL ? load(from + 2 * q) : load_part(from + 2 * q, read);
      const Vec high = read > VL ? load_part(from + 2 * q + VL, read - VL) : Vec{};
      const Vec value = __builtin_shuffle(low, high, even);
      if (lanes == VL)
        store(to + q, value);
      else
        store_part(to + q, value, lanes);
    }
  } else {
    for (int64_t q = 0; q < n; ++q) to[q] = from[q * step];
  }
}

// The padding of `to` is zero already and stays so.
void copy_phases(const Problem& p, const Phases& f, const float* src, float* to) {
  for (int64_t i = 0; i < min_of(p.sw, p.iw); ++i) {  // the columns x = i, i + sw, .. share a phase
    const int64_t q = (i + p.pw) / p.sw, n = min_of(ceil_div(p.iw - i, p.sw), f.pitch - q);
    float* const column = to + (i + p.pw) % p.sw * f.size + q;
    int64_t row = p.ph / p.sh, phase = p.ph % p.sh;  // of the padded row y + ph
    for (int64_t y = 0; y < p.ih && row < f.rows; ++y) {
      copy_every(src + y * p.iw + i, p.sw, n, column + phase * p.sw * f.size + row * f.pitch);
      if (++phase == p.sh) {
        phase = 0;
        ++row;
      }
    }
  }
}

// V registers of a flat run: to[q] = bias + sum over the taps of w[t] * from[shift[t] + q].
template <int V>
void flat(const float* from, const int64_t* shift, const float* w, int64_t taps, float bias, float* to) {
  Vec acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[v] = splat(bias);
  for (int64_t t = 0; t < taps; ++t) {
    const Vec weight = splat(w[t]);
    const float* const x = from + shift[t];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] += weight * load(x + v * VL);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(to + v * VL, acc[v]);
}

typedef void (*FlatFn)(const float*, const int64_t*, const float*, int64_t, float, float*);
const FlatFn FLAT[Phases::BLOCK + 1] = {nullptr, flat<1>, flat<2>, flat<3>, flat<4>,
                                        flat<5>, flat<6>, flat<7>, flat<8>};

// Rows of flat output to dst, with the epilogue.
void finish_rows(const Call& call, const float* chunk, int64_t pitch, int64_t at, int64_t rows, int64_t ow) {
  const Epilogue& e = call.epilogue;
  const Range range(e);
  for (int64_t r = 0; r < rows; ++r, at += ow)
    for (int64_t x = 0; x < ow; x += VL) {
      const int64_t lanes = min_of(VL, ow - x);
      Vec value = load(chunk + r * pitch + x);  // the chunk is longer than its rows by more than a register
      if (e.residual) value += lanes == VL ? load(e.residual + at + x) : load_part(e.residual + at + x, lanes);
      value = range.complete ? in_range(value, range) : activate(value, e.act, e.alpha, e.beta);
      if (lanes == VL)
        store(call.dst + at + x, value);
      else
        store_part(call.dst + at + x, value, lanes);
    }
}

void run_nchw(const Call& call) {
  const Problem& p = call.p;
  const Phases f(p);
  const Batch batch(p, f);
  const int64_t oh = p.oh(), ow = p.ow(), taps = p.taps(), threads = call.parallel.threads;
  int64_t* const shift = reinterpret_cast<int64_t*>(call.workspace + threads * batch.floats());
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t y = t / p.kw * p.dh, x = t % p.kw * p.dw;
    shift[t] = (y % p.sh * p.sw + x % p.sw) * f.size + y / p.sh * f.pitch + x / p.sw;
  }
  for (int64_t slot = 0; slot < threads; ++slot)
    for (int64_t i = 0; i < batch.planes * batch.plane_floats; ++i) call.workspace[slot * batch.floats() + i] = 0.0f;
  const int64_t planes = p.mb * p.oc;
  for_tasks(call.parallel, ceil_div(planes, batch.planes), [&](int64_t task, int64_t slot) {
    float* const phases = call.workspace + slot * batch.floats();
    float* const chunk = phases + batch.planes * batch.plane_floats;
    const int64_t first = task * batch.planes, count = min_of(batch.planes, planes - first);
    for (int64_t i = 0; i < count; ++i)
      copy_phases(p, f, call.src + (first + i) * p.ih * p.iw, phases + i * batch.plane_floats);
    for (int64_t y = 0; y < oh; y += batch.rows) {
      const int64_t rows = min_of(batch.rows, oh - y), registers = ceil_div((rows - 1) * f.pitch + ow, VL);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = (first + i) % p.oc;
        const float bias = call.epilogue.bias ? call.epilogue.bias[c] : 0.0f;
        for (int64_t v = 0; v < registers; v += Phases::BLOCK)
          FLAT[min_of(Phases::BLOCK, registers - v)](phases + i * batch.plane_floats + y * f.pitch + v * VL, shift,
                                                     call.packed + c * taps, taps, bias,
                                                     chunk + i * batch.chunk_floats + v * VL);
        // The last row's last register reads on; what lay there may be subnormal, and slow.
        store(chunk + i * batch.chunk_floats + registers * VL, Vec{});
      }
      for (int64_t i = 0; i < count; ++i)
        finish_rows(call, chunk + i * batch.chunk_floats, f.pitch, ((first + i) * oh + y) * ow, rows, ow);
    }
  });
}

}  // namespace

const Kernel depthwise_kernels[] = {
    {"depthwise_nhwc", true, true, few_taps, packed_floats_nhwc, pack_nhwc, workspace_nhwc, run_nhwc},
    {"depthwise_nchw", false, false, one_filter_a_channel, packed_floats_nchw, pack_nchw, workspace_nchw, run_nchw},
};
const int depthwise_count = sizeof(depthwise_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
