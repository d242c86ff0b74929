// Grouped 3x3 convolutions with few channels in a group, NHWC: several groups share one register.
//
// Lane l of a register of output channels belongs to group l / (oc/g) of those in the register, and needs channel c of
// that group: lane l / (oc/g) * (ic/g) + c of the register of input channels. One permutation for each c brings them
// there, so that no lane multiplies by a zero of the block-diagonal matrix. A block of output pixels uses each
// permuted pixel for all the taps that reach it.
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "window.h"

namespace convselect::CONVSELECT_ISA {
namespace {

constexpr int K = 3, TAPS = K * K;
constexpr int64_t MOST_CHANNELS = 16;  // of a group

bool takes(const Problem& p) {
  const bool narrow = p.g > 1 && p.ic / p.g <= MOST_CHANNELS && p.oc / p.g <= MOST_CHANNELS;
  return narrow && p.kh == K && p.kw == K && p.dh == 1 && p.dw == 1 && p.sh == p.sw && p.sh <= 2;
}

// How the channels fall into registers. A group with more than VL channels takes whole registers of outputs for
// itself, and then the permutation is a broadcast.
struct Lanes {
  int64_t ic, oc;         // of a group
  int64_t groups, parts;  // groups in a register; registers of a group
  int64_t g, registers;   // all groups, all registers
  explicit Lanes(const Problem& p) : ic(p.ic / p.g), oc(p.oc / p.g), g(p.g) {
    groups = max_of(1, VL / max_of(ic, oc));
    parts = ceil_div(groups * oc, VL);
    registers = ceil_div(g, groups) * parts;
  }
  int64_t first_group(int64_t r) const { return r / parts * groups; }
  int64_t present(int64_t r) const { return min_of(groups, g - first_group(r)); }
  int64_t src_begin(int64_t r) const { return first_group(r) * ic; }
  int64_t src_lanes(int64_t r) const { return present(r) * ic; }
  int64_t dst_begin(int64_t r) const { return first_group(r) * oc + r % parts * VL; }
  int64_t dst_lanes(int64_t r) const { return min_of(VL, present(r) * oc - r % parts * VL); }
};

// packed  [register][ic/g][tap][VL], absent channels zero
int64_t packed_floats(const Problem& p) { return Lanes(p).registers * (p.ic / p.g) * TAPS * VL; }

void pack(const Problem& p, const float* weight, float* packed) {
  const Lanes lanes(p);
  for (int64_t r = 0; r < lanes.registers; ++r)
    for (int64_t c = 0; c < lanes.ic; ++c)
      for (int64_t t = 0; t < TAPS; ++t)
        for (int64_t i = 0; i < VL; ++i)
          *packed++ = i < lanes.dst_lanes(r)
                          ? flush_subnormal(weight[((lanes.dst_begin(r) + i) * lanes.ic + c) * TAPS + t])
                          : 0.0f;
}

// A line of zeros, which stands for the pixels of the padding.
int64_t workspace(const Problem& p, int) { return round_up(p.ic, 16); }

// A block of output pixels.
struct Pixels {
  const Lanes* lanes;
  const float* const* window;  // a pointer to each pixel under the block
  const float* packed;
  float* dst;
  const float* residual;
  int64_t dst_row, dst_stride, begin, end;  // registers [begin, end)
  const Epilogue* epilogue;
};

// PY x PX output pixels with stride S. SHARED: several groups in a register.
template <int S, int PY, int PX, bool SHARED>
void pixels(const Pixels& b) {
  constexpr int ROWS = (PY - 1) * S + K, COLUMNS = (PX - 1) * S + K;
  const Lanes& lanes = *b.lanes;
  const Range range(*b.epilogue);
  const float *const bias = b.epilogue->bias, *const residual = b.residual;
  VecI first{};
  if (SHARED)
    for (int i = 0; i < VL; ++i) first[i] = static_cast<int32_t>(i / lanes.oc * lanes.ic);
  for (int64_t reg = b.begin; reg < b.end; ++reg) {
    const int64_t from = lanes.src_begin(reg), src_lanes = lanes.src_lanes(reg);
    const int64_t to = lanes.dst_begin(reg), dst_lanes = lanes.dst_lanes(reg);
    const float* packed = b.packed + reg * lanes.ic * TAPS * VL;
    Vec acc[PY][PX];
    const Vec start = bias ? load_part(bias + to, dst_lanes) : Vec{};
#pragma GCC unroll 8
    for (int y = 0; y < PY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) acc[y][x] = start;
    auto sum = [&](bool whole) __attribute__((always_inline)) {
      for (int64_t c = 0; c < lanes.ic; ++c, packed += TAPS * VL) {
        const VecI index = first + static_cast<int32_t>(c);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          Vec row[COLUMNS];
#pragma GCC unroll 16
          for (int i = 0; i < COLUMNS; ++i) {
            const float* const pixel = b.window[r * COLUMNS + i] + from;
            row[i] =
                SHARED ? __builtin_shuffle(whole ? load(pixel) : load_part(pixel, src_lanes), index) : splat(pixel[c]);
          }
          add_row<K, S>(r, row, packed, acc);
        }
      }
    };
    if (src_lanes == VL || !SHARED)
      sum(true);
    else
      sum(false);
#pragma GCC unroll 8
    for (int y = 0; y < PY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < PX; ++x) {
        const int64_t at = y * b.dst_row + x * b.dst_stride + to;
        Vec value = acc[y][x];
        if (residual) value += load_part(residual + at, dst_lanes);
        store_part(b.dst + at, in_range(value, range), dst_lanes);
      }
  }
}

typedef void (*PixelsFn)(const Pixels&);
struct Block {
  int64_t s, py, px;
  PixelsFn fn[2][2];  // [py rows at once, one row][one group in a register, several]
};
#define CS_BLOCK(S, PY, PX)                                                                                    \
  {                                                                                                            \
    S, PY, PX, {                                                                                               \
      {pixels<S, PY, PX, false>, pixels<S, PY, PX, true>}, { pixels<S, 1, PX, false>, pixels<S, 1, PX, true> } \
    }                                                                                                          \
  }
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
constexpr Block BLOCKS[] = {CS_BLOCK(1, 2, 7), CS_BLOCK(1, 2, 4), CS_BLOCK(1, 1, 1), CS_BLOCK(2, 2, 4),
                            CS_BLOCK(2, 1, 1)};
#else
constexpr Block BLOCKS[] = {CS_BLOCK(1, 1, 4), CS_BLOCK(1, 1, 1), CS_BLOCK(2, 1, 3), CS_BLOCK(2, 1, 1)};
#endif

// The block that computes the fewest pixels twice; the last of a row overlaps the one before it.
const Block& block_of(const Problem& p) {
  const int64_t ow = p.ow();
  const Block* best = nullptr;
  for (const Block& b : BLOCKS)
    if (b.s == p.sw && b.px <= ow &&
        (!best || (b.px > 1 && ceil_div(ow, b.px) * b.px < ceil_div(ow, best->px) * best->px)))
      best = &b;
  return *best;
}

void run(const Call& call) {
  const Problem& p = call.p;
  const int64_t oh = p.oh(), ow = p.ow();
  float* const zeros = call.workspace;
  for (int64_t c = 0; c < p.ic; ++c) zeros[c] = 0.0f;
  const Lanes lanes(p);
  const Block& block = block_of(p);
  const int64_t strips = ceil_div(oh, block.py), tasks = p.mb * strips;
  // Small maps have too few rows for the threads: split the registers too.
  const int64_t parts = min_of(ceil_div(4 * call.parallel.threads, tasks), ceil_div(lanes.registers, 4));
  for_tasks(call.parallel, tasks * parts, [&](int64_t task, int64_t) {
    const int64_t part = task % parts, n = task / parts / strips, y0 = task / parts % strips * block.py;
    const int64_t rows = min_of(block.py, oh - y0), step = rows == block.py ? block.py : 1;
    const int64_t columns = (block.px - 1) * p.sw + K;
    const float* window[64];
    Pixels b{};
    b.lanes = &lanes;
    b.window = window;
    b.packed = call.packed;
    b.dst_row = ow * call.dst_stride;
    b.dst_stride = call.dst_stride;
    b.begin = part * lanes.registers / parts;
    b.end = (part + 1) * lanes.registers / parts;
    b.epilogue = &call.epilogue;
    for (int64_t y = y0; y < y0 + rows; y += step)
      for (int64_t i = 0; i < ow; i += block.px) {
        const int64_t x0 = min_of(i, ow - block.px), at = ((n * oh + y) * ow + x0) * call.dst_stride;
        for (int64_t r = 0; r < (step - 1) * p.sh + K; ++r)
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t iy = y * p.sh - p.ph + r, ix = x0 * p.sw - p.pw + j;
            const bool inside = iy >= 0 && iy < p.ih && ix >= 0 && ix < p.iw;
            window[r * columns + j] = inside ? call.src + ((n * p.ih + iy) * p.iw + ix) * p.ic : zeros;
          }
        b.dst = call.dst + at;
        b.residual = call.epilogue.residual ? call.epilogue.residual + at : nullptr;
        block.fn[step != block.py][lanes.groups > 1](b);
      }
    if (Range(call.epilogue).complete) return;
    const int64_t first = lanes.dst_begin(b.begin), end = lanes.dst_begin(b.end - 1) + lanes.dst_lanes(b.end - 1);
    for (int64_t q = 0; q < rows * ow; ++q) {
      float* const dst = call.dst + ((n * oh + y0) * ow + q) * call.dst_stride + first;
      finish_row(dst, dst, end - first, 0.0f, nullptr, nullptr, call.epilogue);
    }
  });
}

}  // namespace

const Kernel grouped_kernels[] = {
    {"grouped_nhwc", true, true, takes, packed_floats, pack, workspace, run},
};
const int grouped_count = sizeof(grouped_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
