// Winograd F(2x2, 3x3) and F(4x4, 3x3), NHWC, stride 1, in two schedules.
//
// A tile's r x r transformed inputs are r^2 rows of r^2 independent matrix products
//   M[xi] [tiles, oc] = V[xi] [tiles, ic] U[xi] [ic, oc],
// of which F(4x4) needs 36 for 16 outputs, a quarter of the direct algorithm's multiplications, F(2x2) 16 for 4.
// For 16 channels in and out of one F(4x4) tile the products are 576 fused multiply-adds of a register, the transforms
// 144 + 120 operations for each register of channels, once: at 64 channels 11% of the arithmetic, at 512 1.4%.
//
// fused   a task takes a block of tiles through all three stages, for one group of output columns after another, so
//         that V and M stay in L2; U, read once a task, is prefetched from L3 under the arithmetic.
// staged  each stage is one parallel loop over the whole image: reads U once in all, for the deep layers with few
//         tiles, where a task of the fused schedule would be short of rows or threads short of tasks.
//
// Floor, 64x224x224 -> 64 on one core of a Zen 5 (235 GFLOP/s): products 3.9 ms, transforms 0.9 ms when V and M are in
// L2 (64-byte lines in and out of it, not arithmetic, bound them), src and dst 0.4 ms; measured 5.7 ms, of which
// src 1.0 (latency of L3). NCHW has no variants: gathering 16 channels of a tile from 16 planes costs as much as the
// layout transform, which the plan can share between layers.
#include "activation.h"
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "winograd_transform.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// Matrices between the stages: xi's begins at xi * plane. An odd number of 64-byte lines apart, so that the r^2 streams
// of a transform fall into different sets of the cache.
int64_t plane_floats(int64_t rows, int64_t ld) { return (ceil_div(rows * ld, 16) | 1) * 16; }

struct Tiling {
  int64_t down, across, count;  // tiles of an image, of the batch
  int64_t ld_v, ld_m;           // floats of a row of V, of M
  ColumnGroups groups;
  Tiling(const Problem& p, int out)
      : down(ceil_div(p.oh(), out)),
        across(ceil_div(p.ow(), out)),
        count(p.mb * down * across),
        ld_v(round_up(p.ic, VL)),
        ld_m(round_up(p.oc, VL)),
        groups(p.oc) {}
};

// packed  [group][xi][ic][registers of the group][VL]; the group is a `ColumnGroups` one
template <class F>
int64_t packed_floats(const Problem& p) {
  return F::IN * F::IN * ColumnGroups(p.oc).packed_floats(p.ic);
}

// U = G g G^T in double, rounded once.
template <class F>
void pack(const Problem& p, const float* weight, float* packed) {
  const ColumnGroups groups(p.oc);
  for (int64_t i = 0; i < groups.groups; ++i) {
    const int64_t first = groups.begin(i) * VL, width = groups.begin(i + 1) * VL - first;
    float* const group = packed + F::IN * F::IN * p.ic * first;
    for (int64_t c = 0; c < p.ic; ++c)
      for (int64_t lane = 0; lane < width; ++lane) {
        double half[F::IN][3] = {};  // G g
        if (first + lane < p.oc) {
          const float* const g = weight + ((first + lane) * p.ic + c) * 9;
          for (int u = 0; u < F::IN; ++u)
            for (int x = 0; x < 3; ++x) half[u][x] = F::G[u][0] * g[x] + F::G[u][1] * g[3 + x] + F::G[u][2] * g[6 + x];
        }
        for (int u = 0; u < F::IN; ++u)
          for (int v = 0; v < F::IN; ++v) {
            const double value = F::G[v][0] * half[u][0] + F::G[v][1] * half[u][1] + F::G[v][2] * half[u][2];
            group[((u * F::IN + v) * p.ic + c) * width + lane] = flush_subnormal(static_cast<float>(value));
          }
      }
  }
}

// V of the tiles [begin, end), a row each.
template <class F>
void transform_src(const Call& call, const Tiling& tiling, int64_t begin, int64_t end, float* v, int64_t plane) {
  const Problem& p = call.p;
  for (int64_t t = begin; t < end; ++t, v += tiling.ld_v) {
    const int64_t n = t / (tiling.down * tiling.across);
    const int64_t y = t / tiling.across % tiling.down * F::OUT - p.ph, x = t % tiling.across * F::OUT - p.pw;
    const int64_t at = ((n * p.ih + y) * p.iw + x) * p.ic;  // may lie outside of src
    const int64_t row = p.iw * p.ic;
    int64_t c = 0;
    const bool inside = y >= 0 && x >= 0 && y + F::IN <= p.ih && x + F::IN <= p.iw;
    if (inside)
      for (; c + VL <= p.ic; c += VL) {
        const float* const from = call.src + at + c;
        // The columns that the next tile adds: runs too short for the hardware's prefetcher to find.
        const float* const ahead = from + F::IN * p.ic;
#pragma GCC unroll 6
        for (int i = 0; i < F::IN; ++i)
#pragma GCC unroll 6
          for (int j = 0; j < F::OUT; ++j) __builtin_prefetch(ahead + i * row + j * p.ic, 0, 3);
        F::input_tile([&](int i, int j) __attribute__((always_inline)) { return load(from + i * row + j * p.ic); },
                      v + c, plane);
      }
    for (; c < p.ic; c += VL) {  // tiles over the edge and the last channels: by a copy filled up with zeros
      Vec copy[F::IN][F::IN];
      const int64_t lanes = min_of(VL, p.ic - c);
      for (int64_t i = 0; i < F::IN; ++i)
        for (int64_t j = 0; j < F::IN; ++j) {
          const bool there = y + i >= 0 && y + i < p.ih && x + j >= 0 && x + j < p.iw;
          const int64_t from = at + c + i * row + j * p.ic;
          copy[i][j] = !there ? Vec{} : lanes == VL ? load(call.src + from) : load_part(call.src + from, lanes);
        }
      F::input_tile([&](int i, int j) __attribute__((always_inline)) { return copy[i][j]; }, v + c, plane);
    }
  }
}

// dst of the tiles [begin, end) and the channels [first, first + registers * VL), from rows of M `ld` apart.
template <class F>
void transform_dst(const Call& call, const Tiling& tiling, int64_t begin, int64_t end, int64_t first, int64_t registers,
                   const float* m, int64_t plane, int64_t ld) {
  const Problem& p = call.p;
  const Epilogue& e = call.epilogue;
  const Range range(e);
  const int64_t oh = p.oh(), ow = p.ow();
  for (int64_t t = begin; t < end; ++t, m += ld) {
    const int64_t n = t / (tiling.down * tiling.across);
    const int64_t y0 = t / tiling.across % tiling.down * F::OUT, x0 = t % tiling.across * F::OUT;
    const int64_t rows = min_of(F::OUT, oh - y0), columns = min_of(F::OUT, ow - x0);
    const bool inside = rows == F::OUT && columns == F::OUT && range.complete;
    for (int64_t v = 0; v < registers; ++v) {
      const int64_t c = first + v * VL, lanes = min_of(VL, p.oc - c);
      const int64_t at = ((n * oh + y0) * ow + x0) * call.dst_stride + c;
      Vec y[F::OUT][F::OUT];
      output_tile<F>(m + v * VL, plane, y);
      const Vec bias = !e.bias ? Vec{} : lanes == VL ? load(e.bias + c) : load_part(e.bias + c, lanes);
      if (inside && lanes == VL) {
        float* const to = call.dst + at;
#pragma GCC unroll 4
        for (int i = 0; i < F::OUT; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < F::OUT; ++j) {
            const int64_t o = (i * ow + j) * call.dst_stride;
            __builtin_prefetch(to + o + F::OUT * call.dst_stride, 1,
                               3);  // the next tile's, so that its stores find their lines
            Vec value = y[i][j] + bias;
            if (e.residual) value += load(e.residual + at + o);
            store(to + o, in_range(value, range));
          }
        continue;
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t o = at + (i * ow + j) * call.dst_stride;
          Vec value = y[i][j] + bias;
          if (e.residual) value += lanes == VL ? load(e.residual + o) : load_part(e.residual + o, lanes);
          value = range.complete ? in_range(value, range) : activate(value, e.act, e.alpha, e.beta);
          if (lanes == VL)
            store(call.dst + o, value);
          else
            store_part(call.dst + o, value, lanes);
        }
    }
  }
}

// C[i][n] = sum over x < k of A[i][x] B[x][n], MR rows and NV registers; a line of `ahead` is prefetched for each x.
template <int MR, int NV>
void tile(const float* a, int64_t lda, const float* b, int64_t k, float* c, int64_t ldc, const float* ahead) {
  Vec acc[MR][NV] = {};
  for (int64_t x = 0; x < k; ++x) {
    __builtin_prefetch(ahead + x * 16, 0, 2);
    Vec row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load(b + (x * NV + v) * VL);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec scalar = splat(a[m * lda + x]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] += scalar * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + m * ldc + v * VL, acc[m][v]);
}

typedef void (*TileFn)(const float*, int64_t, const float*, int64_t, float*, int64_t, const float*);
#define CS_ROW2(MR) {nullptr, tile<MR, 1>, tile<MR, 2>}
#define CS_ROW4(MR) {nullptr, tile<MR, 1>, tile<MR, 2>, tile<MR, 3>, tile<MR, 4>}
constexpr int MR = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
const TileFn TILES[MR + 1][NV_MAX + 1] = {{}, CS_ROW4(1), CS_ROW4(2), CS_ROW4(3), CS_ROW4(4), CS_ROW4(5), CS_ROW4(6)};
#else
const TileFn TILES[MR + 1][NV_MAX + 1] = {{}, CS_ROW2(1), CS_ROW2(2), CS_ROW2(3), CS_ROW2(4), CS_ROW2(5), CS_ROW2(6)};
#endif

// `rows` rows of M[xi] = V[xi] U[xi] for one group of columns; `next` is the block of U wanted after this one.
void multiply(const float* v, int64_t ld_v, const float* u, int64_t k, int64_t nv, int64_t rows, float* m, int64_t ld_m,
              const float* next) {
  const int64_t tiles = ceil_div(rows, MR);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = i * rows / tiles, end = (i + 1) * rows / tiles;
    TILES[end - begin][nv](v + begin * ld_v, ld_v, u, k, m + begin * ld_m, ld_m,
                           i * 16 < nv * VL ? next + i * k * 16 : u);
  }
}

// Tiles of a task: the most that keep V and one group's M in an L2 of 1 MiB, but enough rows to hide the reading of U
// under the arithmetic; or fewer, where that lets the threads end together.
template <class F>
int64_t block_tiles(const Tiling& tiling, int64_t threads) {
  constexpr int64_t BUDGET = 225 * 1024, LEAST = 4 * MR, MOST = 8 * MR;  // floats, tiles, tiles
  const int64_t fit = BUDGET / (F::IN * F::IN * (tiling.ld_v + NV_MAX * VL)) / MR * MR;
  const int64_t most = min_of(MOST, max_of(LEAST, fit));
  int64_t best = most, least_cost = INT64_MAX;
  for (int64_t block = most; block >= MR; block -= MR) {
    const int64_t whole = tiling.count / block, rest = tiling.count % block, tasks = whole + (rest > 0);
    // The busiest thread's tiles, and the cost of starting a task, which is about that of a tile.
    const int64_t tiles = whole % threads ? ceil_div(whole, threads) * block : whole / threads * block + rest;
    const int64_t cost = tiles + ceil_div(tasks, threads);
    if (cost < least_cost) {
      least_cost = cost;
      best = block;
    }
  }
  return best;
}

template <class F>
int64_t fused_slot_floats(const Tiling& tiling, int64_t block) {
  return F::IN * F::IN * (plane_floats(block, tiling.ld_v) + plane_floats(block, NV_MAX * VL));
}

template <class F>
int64_t fused_workspace(const Problem& p, int threads) {
  const Tiling tiling(p, F::OUT);
  return threads * fused_slot_floats<F>(tiling, block_tiles<F>(tiling, threads));
}

template <class F>
void run_fused(const Call& call) {
  constexpr int64_t XI = F::IN * F::IN;
  const Problem& p = call.p;
  const Tiling tiling(p, F::OUT);
  const int64_t block = block_tiles<F>(tiling, call.parallel.threads);
  const int64_t plane_v = plane_floats(block, tiling.ld_v), plane_m = plane_floats(block, NV_MAX * VL);
  for_tasks(call.parallel, ceil_div(tiling.count, block), [&](int64_t task, int64_t slot) {
    float* const v = call.workspace + slot * fused_slot_floats<F>(tiling, block);
    float* const m = v + XI * plane_v;
    const int64_t begin = task * block, end = min_of(tiling.count, begin + block);
    transform_src<F>(call, tiling, begin, end, v, plane_v);
    for (int64_t i = 0; i < tiling.groups.groups; ++i) {
      const int64_t first = tiling.groups.begin(i), nv = tiling.groups.begin(i + 1) - first;
      const float* const u = call.packed + XI * p.ic * first * VL;
      const int64_t step = p.ic * nv * VL;
      for (int64_t xi = 0; xi < XI; ++xi)
        multiply(v + xi * plane_v, tiling.ld_v, u + xi * step, p.ic, nv, end - begin, m + xi * plane_m, NV_MAX * VL,
                 u + (xi + 1) * step);
      transform_dst<F>(call, tiling, begin, end, first * VL, nv, m, plane_m, NV_MAX * VL);
    }
  });
}

template <class F>
int64_t staged_workspace(const Problem& p, int) {
  const Tiling tiling(p, F::OUT);
  return F::IN * F::IN * (plane_floats(tiling.count, tiling.ld_v) + plane_floats(tiling.count, tiling.ld_m));
}

template <class F>
void run_staged(const Call& call) {
  constexpr int64_t XI = F::IN * F::IN;
  const Problem& p = call.p;
  const Tiling tiling(p, F::OUT);
  const int64_t plane_v = plane_floats(tiling.count, tiling.ld_v), plane_m = plane_floats(tiling.count, tiling.ld_m);
  float *const v = call.workspace, *const m = v + XI * plane_v;
  const int64_t threads = call.parallel.threads;
  const int64_t parts = min_of(tiling.count, 4 * threads);
  auto part = [&](int64_t i) { return i * tiling.count / parts; };
  for_tasks(call.parallel, parts, [&](int64_t task, int64_t) {
    transform_src<F>(call, tiling, part(task), part(task + 1), v + part(task) * tiling.ld_v, plane_v);
  });
  const int64_t groups = tiling.groups.groups;
  for_tasks(call.parallel, XI * groups, [&](int64_t task, int64_t) {
    const int64_t i = task / XI, xi = task % XI;
    const int64_t first = tiling.groups.begin(i), nv = tiling.groups.begin(i + 1) - first;
    const float* const u = call.packed + XI * p.ic * first * VL + xi * p.ic * nv * VL;
    multiply(v + xi * plane_v, tiling.ld_v, u, p.ic, nv, tiling.count, m + xi * plane_m + first * VL, tiling.ld_m,
             u + threads * p.ic * nv * VL);
  });
  for_tasks(call.parallel, parts, [&](int64_t task, int64_t) {
    transform_dst<F>(call, tiling, part(task), part(task + 1), 0, tiling.groups.registers, m + part(task) * tiling.ld_m,
                     plane_m, tiling.ld_m);
  });
}

}  // namespace

const Kernel winograd_kernels[] = {
    {"winograd_f2x2_3x3_nhwc", true, true, packed_floats<F2x3>, pack<F2x3>, fused_workspace<F2x3>, run_fused<F2x3>},
    {"winograd_f4x4_3x3_nhwc", true, true, packed_floats<F4x3>, pack<F4x3>, fused_workspace<F4x3>, run_fused<F4x3>},
    {"winograd_f2x2_3x3_staged_nhwc", true, true, packed_floats<F2x3>, pack<F2x3>, staged_workspace<F2x3>,
     run_staged<F2x3>},
    {"winograd_f4x4_3x3_staged_nhwc", true, true, packed_floats<F4x3>, pack<F4x3>, staged_workspace<F4x3>,
     run_staged<F4x3>},
};
const int winograd_count = sizeof(winograd_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
