// Winograd's minimal filtering F(m x n, kh x kw), NHWC, stride 1, in three schedules.
//
// A tile's transformed inputs are a row of each of XI = (m + kh - 1) (n + kw - 1) independent matrix products
//   M[xi] [tiles, oc] = V[xi] [tiles, ic] U[xi] [ic, oc],
// of which F(4x4, 3x3) needs 36 for 16 outputs, a quarter of the direct algorithm's multiplications. A filter of one
// row or one column has tiles of one row or column: F(4, 1x7) needs 10 for 4 outputs.
// For 16 channels in and out of one F(4x4, 3x3) tile the products are 576 fused multiply-adds of a register, the
// transforms 144 + 120 operations for each register of channels, once: at 64 channels 11% of the arithmetic, at 512
// 1.4%.
//
// fused   a task takes a block of tiles through all three stages, for one group of output columns after another, so
//         that V and M stay in L2; U, read once a task, is prefetched from L3 under the arithmetic.
// staged  each stage is one parallel loop over the whole image: reads U once in all, for the deep layers with few
//         tiles, where a task of the fused schedule would be short of rows or threads short of tasks.
// lean    keeps the weights as they are and makes U in registers, for a few tiles at a time: where there are no more
//         tiles, reading U is what takes the time, and U of F(4x4, 3x3) is four times the weights.
//
// Floor, 64x224x224 -> 64 by F(4x4, 3x3) on one core of a Zen 5 (235 GFLOP/s): products 3.9 ms, transforms 0.9 ms when
// V and M are in L2 (64-byte lines in and out of it, not arithmetic, bound them), src and dst 0.4 ms; measured 5.7 ms,
// of which src 1.0 (latency of L3). NCHW has no variants: gathering 16 channels of a tile from 16 planes costs as much
// as the layout transform, which the plan can share between layers.
#include "activation.h"
#include "families.h"
#include "gemm.h"
#include "parallel.h"
#include "winograd_transform.h"

namespace convselect::CONVSELECT_ISA {
namespace {

// Matrices between the stages: xi's begins at xi * plane. An odd number of 64-byte lines apart, so that the streams of
// a transform fall into different sets of the cache.
int64_t plane_floats(int64_t rows, int64_t ld) { return (ceil_div(rows * ld, 16) | 1) * 16; }

struct Tiling {
  int64_t down, across, count;  // tiles of an image, of the batch
  int64_t ld_v, ld_m;           // floats of a row of V, of M
  ColumnGroups groups;
  Tiling(const Problem& p, int rows, int columns)
      : down(ceil_div(p.oh(), rows)),
        across(ceil_div(p.ow(), columns)),
        count(p.mb * down * across),
        ld_v(round_up(p.ic, VL)),
        ld_m(round_up(p.oc, VL)),
        groups(p.oc) {}
};

template <class F>
bool takes(const Problem& p) {
  const bool dense = p.sh == 1 && p.sw == 1 && p.dh == 1 && p.dw == 1;
  return p.kh == F::Y::TAPS && p.kw == F::X::TAPS && dense && ungrouped(p);
}

// packed  [group][xi][ic][registers of the group][VL]; the group is a `ColumnGroups` one
template <class F>
int64_t packed_floats(const Problem& p) {
  return F::XI * ColumnGroups(p.oc).packed_floats(p.ic);
}

// U = G g G^T in double, rounded once.
template <class F>
void pack(const Problem& p, const float* weight, float* packed) {
  using Y = typename F::Y;
  using X = typename F::X;
  const ColumnGroups groups(p.oc);
  for (int64_t i = 0; i < groups.groups; ++i) {
    const int64_t first = groups.begin(i) * VL, width = groups.begin(i + 1) * VL - first;
    float* const group = packed + F::XI * p.ic * first;
    for (int64_t c = 0; c < p.ic; ++c)
      for (int64_t lane = 0; lane < width; ++lane) {
        double half[Y::IN][X::TAPS] = {};  // G g
        if (first + lane < p.oc) {
          const float* const g = weight + ((first + lane) * p.ic + c) * F::TAPS;
          for (int u = 0; u < Y::IN; ++u)
            for (int y = 0; y < Y::TAPS; ++y)
              for (int x = 0; x < X::TAPS; ++x) half[u][x] += Y::MADE.g[u][y] * g[y * X::TAPS + x];
        }
        for (int u = 0; u < Y::IN; ++u)
          for (int v = 0; v < X::IN; ++v) {
            double value = 0;
            for (int x = 0; x < X::TAPS; ++x) value += X::MADE.g[v][x] * half[u][x];
            group[((u * X::IN + v) * p.ic + c) * width + lane] = flush_subnormal(static_cast<float>(value));
          }
      }
  }
}

// V of the tiles [begin, end), a row each.
template <class F>
void transform_src(const Call& call, const Tiling& tiling, int64_t begin, int64_t end, float* v, int64_t plane) {
  using Y = typename F::Y;
  using X = typename F::X;
  const Problem& p = call.p;
  for (int64_t t = begin; t < end; ++t, v += tiling.ld_v) {
    const int64_t n = t / (tiling.down * tiling.across);
    const int64_t y = t / tiling.across % tiling.down * Y::OUT - p.ph, x = t % tiling.across * X::OUT - p.pw;
    const int64_t at = ((n * p.ih + y) * p.iw + x) * p.ic;  // may lie outside of src
    const int64_t row = p.iw * p.ic;
    int64_t c = 0;
    const bool inside = y >= 0 && x >= 0 && y + Y::IN <= p.ih && x + X::IN <= p.iw;
    if (inside)
      for (; c + VL <= p.ic; c += VL) {
        const float* const from = call.src + at + c;
        // The columns that the next tile adds: runs too short for the hardware's prefetcher to find.
        const float* const ahead = from + X::IN * p.ic;
#pragma GCC unroll 12
        for (int i = 0; i < Y::IN; ++i)
#pragma GCC unroll 12
          for (int j = 0; j < X::OUT; ++j) __builtin_prefetch(ahead + i * row + j * p.ic, 0, 3);
        F::template transform<typename F::Input>(
            [&](int i, int j) CS_LAMBDA { return load(from + i * row + j * p.ic); }, v + c, plane);
      }
    for (; c < p.ic; c += VL) {  // tiles over the edge and the last channels: by a copy filled up with zeros
      Vec copy[Y::IN][X::IN];
      const int64_t lanes = min_of(VL, p.ic - c);
      for (int64_t i = 0; i < Y::IN; ++i)
        for (int64_t j = 0; j < X::IN; ++j) {
          const bool there = y + i >= 0 && y + i < p.ih && x + j >= 0 && x + j < p.iw;
          const int64_t from = at + c + i * row + j * p.ic;
          copy[i][j] = !there ? Vec{} : lanes == VL ? load(call.src + from) : load_part(call.src + from, lanes);
        }
      F::template transform<typename F::Input>([&](int i, int j) CS_LAMBDA { return copy[i][j]; }, v + c, plane);
    }
  }
}

// dst of the tiles [begin, end) and the channels [first, first + registers * VL), from rows of M `ld` apart.
template <class F>
void transform_dst(const Call& call, const Tiling& tiling, int64_t begin, int64_t end, int64_t first, int64_t registers,
                   const float* m, int64_t plane, int64_t ld) {
  using Y = typename F::Y;
  using X = typename F::X;
  const Problem& p = call.p;
  const Epilogue& e = call.epilogue;
  const Range range(e);
  const int64_t oh = p.oh(), ow = p.ow();
  for (int64_t t = begin; t < end; ++t, m += ld) {
    const int64_t n = t / (tiling.down * tiling.across);
    const int64_t y0 = t / tiling.across % tiling.down * Y::OUT, x0 = t % tiling.across * X::OUT;
    const int64_t rows = min_of(Y::OUT, oh - y0), columns = min_of(X::OUT, ow - x0);
    const bool inside = rows == Y::OUT && columns == X::OUT && range.complete;
    for (int64_t v = 0; v < registers; ++v) {
      const int64_t c = first + v * VL, lanes = min_of(VL, p.oc - c);
      const int64_t at = ((n * oh + y0) * ow + x0) * call.dst_stride + c;
      Vec y[Y::OUT][X::OUT];
      F::output(m + v * VL, plane, y);
      const Vec bias = !e.bias ? Vec{} : lanes == VL ? load(e.bias + c) : load_part(e.bias + c, lanes);
      if (inside && lanes == VL) {
        float* const to = call.dst + at;
#pragma GCC unroll 12
        for (int i = 0; i < Y::OUT; ++i)
#pragma GCC unroll 12
          for (int j = 0; j < X::OUT; ++j) {
            const int64_t o = (i * ow + j) * call.dst_stride;
            __builtin_prefetch(to + o + X::OUT * call.dst_stride, 1,
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
  const int64_t fit = BUDGET / (F::XI * (tiling.ld_v + NV_MAX * VL)) / MR * MR;
  const int64_t most = min_of(min_of(MOST, max_of(LEAST, fit)), round_up(tiling.count, MR));
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
  return F::XI * (plane_floats(block, tiling.ld_v) + plane_floats(block, NV_MAX * VL));
}

template <class F>
int64_t fused_workspace(const Problem& p, int threads) {
  const Tiling tiling(p, F::Y::OUT, F::X::OUT);
  return threads * fused_slot_floats<F>(tiling, block_tiles<F>(tiling, threads));
}

template <class F>
void run_fused(const Call& call) {
  const Problem& p = call.p;
  const Tiling tiling(p, F::Y::OUT, F::X::OUT);
  const int64_t block = block_tiles<F>(tiling, call.parallel.threads);
  const int64_t plane_v = plane_floats(block, tiling.ld_v), plane_m = plane_floats(block, NV_MAX * VL);
  for_tasks(call.parallel, ceil_div(tiling.count, block), [&](int64_t task, int64_t slot) {
    float* const v = call.workspace + slot * fused_slot_floats<F>(tiling, block);
    float* const m = v + F::XI * plane_v;
    const int64_t begin = task * block, end = min_of(tiling.count, begin + block);
    transform_src<F>(call, tiling, begin, end, v, plane_v);
    for (int64_t i = 0; i < tiling.groups.groups; ++i) {
      const int64_t first = tiling.groups.begin(i), nv = tiling.groups.begin(i + 1) - first;
      const float* const u = call.packed + F::XI * p.ic * first * VL;
      const int64_t step = p.ic * nv * VL;
      for (int64_t xi = 0; xi < F::XI; ++xi)
        multiply(v + xi * plane_v, tiling.ld_v, u + xi * step, p.ic, nv, end - begin, m + xi * plane_m, NV_MAX * VL,
                 u + (xi + 1) * step);
      transform_dst<F>(call, tiling, begin, end, first * VL, nv, m, plane_m, NV_MAX * VL);
    }
  });
}

// V of all tiles, in parallel.
template <class F>
void transform_all(const Call& call, const Tiling& tiling, float* v, int64_t plane) {
  const int64_t parts = min_of(tiling.count, 4 * call.parallel.threads);
  for_tasks(call.parallel, parts, [&](int64_t task, int64_t) {
    const int64_t begin = task * tiling.count / parts, end = (task + 1) * tiling.count / parts;
    transform_src<F>(call, tiling, begin, end, v + begin * tiling.ld_v, plane);
  });
}

template <class F>
int64_t staged_workspace(const Problem& p, int) {
  const Tiling tiling(p, F::Y::OUT, F::X::OUT);
  return F::XI * (plane_floats(tiling.count, tiling.ld_v) + plane_floats(tiling.count, tiling.ld_m));
}

template <class F>
void run_staged(const Call& call) {
  const Problem& p = call.p;
  const Tiling tiling(p, F::Y::OUT, F::X::OUT);
  const int64_t plane_v = plane_floats(tiling.count, tiling.ld_v), plane_m = plane_floats(tiling.count, tiling.ld_m);
  float *const v = call.workspace, *const m = v + F::XI * plane_v;
  const int64_t threads = call.parallel.threads;
  const int64_t parts = min_of(tiling.count, 4 * threads);
  auto part = [&](int64_t i) { return i * tiling.count / parts; };
  transform_all<F>(call, tiling, v, plane_v);
  const int64_t groups = tiling.groups.groups;
  for_tasks(call.parallel, F::XI * groups, [&](int64_t task, int64_t) {
    const int64_t i = task / F::XI, xi = task % F::XI;
    const int64_t first = tiling.groups.begin(i), nv = tiling.groups.begin(i + 1) - first;
    const float* const u = call.packed + F::XI * p.ic * first * VL + xi * p.ic * nv * VL;
    multiply(v + xi * plane_v, tiling.ld_v, u, p.ic, nv, tiling.count, m + xi * plane_m + first * VL, tiling.ld_m,
             u + threads * p.ic * nv * VL);
  });
  for_tasks(call.parallel, parts, [&](int64_t task, int64_t) {
    transform_dst<F>(call, tiling, part(task), part(task + 1), 0, tiling.groups.registers, m + part(task) * tiling.ld_m,
                     plane_m, tiling.ld_m);
  });
}

// Tiles of a block of the lean schedule: the products of a row of xi, X::IN * LEAN_TILES registers, are accumulators.
constexpr int LEAN_TILES = NV_MAX == 4 ? 4 : 2;
constexpr int64_t LEAN_K = 64;  // input channels whose weights stay in L2 while all rows of xi read them

// packed  [oc/VL][ic][taps][VL]: the weights themselves
template <class F>
int64_t lean_packed_floats(const Problem& p) {
  return F::TAPS * p.ic * round_up(p.oc, VL);
}

template <class F>
void lean_pack(const Problem& p, const float* weight, float* packed) {
  const int64_t taps = p.ic * F::TAPS;
  for (int64_t first = 0; first < p.oc; first += VL)
    for (int64_t x = 0; x < taps; ++x)
      for (int64_t n = first; n < first + VL; ++n) *packed++ = n < p.oc ? flush_subnormal(weight[n * taps + x]) : 0.0f;
}

// Workspace: V as it is elsewhere; lines [block][row of xi][ic][xi of the row][tile], of which the products broadcast
// one float after another; and for each thread M of a block and a register of output channels.
template <class F>
struct Lean {
  static constexpr int64_t LINE = F::X::IN * LEAN_TILES;
  Tiling tiling;
  int64_t blocks, plane_v, plane_m;
  explicit Lean(const Problem& p)
      : tiling(p, F::Y::OUT, F::X::OUT),
        blocks(ceil_div(tiling.count, LEAN_TILES)),
        plane_v(plane_floats(tiling.count, tiling.ld_v)),
        plane_m(plane_floats(LEAN_TILES, VL)) {}
  int64_t lines() const { return blocks * F::Y::IN * tiling.ld_v; }
};

template <class F>
int64_t lean_workspace(const Problem& p, int threads) {
  const Lean<F> lean(p);
  return F::XI * lean.plane_v + lean.lines() * lean.LINE + threads * F::XI * lean.plane_m;
}

// M[I][j][t] += sum over c < depth of U[I][j][c] V[I][j][t][c] for one register of output channels; U is made of the
// taps in registers. v  [depth][j][t]
template <class F, int I>
void lean_row(const float* v, const float* taps, int64_t depth, float* m, int64_t plane, bool accumulate,
              const float* ahead) {
  using Y = typename F::Y;
  using X = typename F::X;
  constexpr int FIRST = I - Y::second(I);
  Vec acc[X::IN][LEAN_TILES] = {};
  if (accumulate)
    unroll<X::IN>([&](auto j) CS_LAMBDA {
      unroll<LEAN_TILES>([&](auto t) CS_LAMBDA { acc[j][t] = load(m + j * plane + t * VL); });
    });
  for (int64_t c = 0; c < depth; ++c, taps += F::TAPS * VL, v += X::IN * LEAN_TILES) {
    __builtin_prefetch(ahead + c * (F::TAPS * VL / Y::IN), 0, 2);
    __builtin_prefetch(ahead + c * (F::TAPS * VL / Y::IN) + 16, 0, 2);
    Vec row[X::TAPS];
    unroll<X::TAPS>([&](auto j) CS_LAMBDA {
      Vec out[2];
      Y::template filter<FIRST>([&](int k) CS_LAMBDA { return load(taps + (k * X::TAPS + j) * VL); }, out);
      row[j] = out[I - FIRST];
    });
    unroll<X::IN>([&](auto j) CS_LAMBDA {
      if constexpr (X::second(j)) return;
      Vec u[2];
      X::template filter<j>([&](int k) CS_LAMBDA { return row[k]; }, u);
      unroll<1 + X::pair(j)>([&](auto i) CS_LAMBDA {
        unroll<LEAN_TILES>([&](auto t) CS_LAMBDA { acc[j + i][t] += splat(v[(j + i) * LEAN_TILES + t]) * u[i]; });
      });
    });
  }
  unroll<X::IN>([&](auto j) CS_LAMBDA {
    unroll<LEAN_TILES>([&](auto t) CS_LAMBDA { store(m + j * plane + t * VL, acc[j][t]); });
  });
}

template <class F>
void run_lean(const Call& call) {
  using Y = typename F::Y;
  using X = typename F::X;
  const Problem& p = call.p;
  const Lean<F> lean(p);
  const Tiling& tiling = lean.tiling;
  float *const v = call.workspace, *const lines = v + F::XI * lean.plane_v;
  transform_all<F>(call, tiling, v, lean.plane_v);
  for_tasks(call.parallel, lean.blocks * Y::IN, [&](int64_t task, int64_t) {
    const int64_t begin = task / Y::IN * LEAN_TILES, i = task % Y::IN;
    float* const to = lines + task * tiling.ld_v * lean.LINE;
    for (int64_t j = 0; j < X::IN; ++j)
      for (int64_t t = 0; t < LEAN_TILES; ++t) {
        const bool there = begin + t < tiling.count;
        const float* const from = v + (i * X::IN + j) * lean.plane_v + (begin + t) * tiling.ld_v;
        for (int64_t c = 0; c < p.ic; ++c) to[c * lean.LINE + j * LEAN_TILES + t] = there ? from[c] : 0.0f;
      }
  });
  const int64_t groups = tiling.groups.registers;
  for_tasks(call.parallel, groups * lean.blocks, [&](int64_t task, int64_t slot) {
    const int64_t group = task / lean.blocks, block = task % lean.blocks;
    float* const m = lines + lean.lines() * lean.LINE + slot * F::XI * lean.plane_m;
    for (int64_t k = 0; k < p.ic; k += LEAN_K) {
      const int64_t depth = min_of(LEAN_K, p.ic - k);
      const float* const taps = call.packed + (group * p.ic + k) * F::TAPS * VL;
      unroll<Y::IN>([&](auto i) CS_LAMBDA {
        const float* const line = lines + ((block * Y::IN + i) * tiling.ld_v + k) * lean.LINE;
        lean_row<F, i>(line, taps, depth, m + i * X::IN * lean.plane_m, lean.plane_m, k > 0,
                       taps + depth * F::TAPS * VL + i * depth * (F::TAPS * VL / Y::IN));
      });
    }
    const int64_t begin = block * LEAN_TILES, end = min_of(tiling.count, begin + LEAN_TILES);
    transform_dst<F>(call, tiling, begin, end, group * VL, 1, m, lean.plane_m, VL);
  });
}

// Rows of the table.
template <class F>
constexpr Kernel fused(const char* name) {
  return {name, true, true, takes<F>, packed_floats<F>, pack<F>, fused_workspace<F>, run_fused<F>};
}
template <class F>
constexpr Kernel staged(const char* name) {
  return {name, true, true, takes<F>, packed_floats<F>, pack<F>, staged_workspace<F>, run_staged<F>};
}
template <class F>
constexpr Kernel lean(const char* name) {
  return {name, true, true, takes<F>, lean_packed_floats<F>, lean_pack<F>, lean_workspace<F>, run_lean<F>};
}

template <int M, int R>
using Square = Tile<Toom<M, R>, Toom<M, R>>;
template <int M, int R>
using Row = Tile<Toom<1, 1>, Toom<M, R>>;
template <int M, int R>
using Column = Tile<Toom<M, R>, Toom<1, 1>>;
using F2x4 = Tile<Toom<2, 3>, Toom<4, 3>>;

}  // namespace

const Kernel winograd_kernels[] = {
    fused<Square<2, 3>>("winograd_f2x2_3x3_nhwc"),
    staged<Square<2, 3>>("winograd_f2x2_3x3_staged_nhwc"),
    fused<F2x4>("winograd_f2x4_3x3_nhwc"),
    staged<F2x4>("winograd_f2x4_3x3_staged_nhwc"),
    fused<Square<4, 3>>("winograd_f4x4_3x3_nhwc"),
    staged<Square<4, 3>>("winograd_f4x4_3x3_staged_nhwc"),
    lean<Square<4, 3>>("winograd_f4x4_3x3_lean_nhwc"),
    fused<Square<6, 3>>("winograd_f6x6_3x3_nhwc"),
    fused<Square<2, 5>>("winograd_f2x2_5x5_nhwc"),
    staged<Square<2, 5>>("winograd_f2x2_5x5_staged_nhwc"),
    fused<Square<4, 5>>("winograd_f4x4_5x5_nhwc"),
    staged<Square<4, 5>>("winograd_f4x4_5x5_staged_nhwc"),
    fused<Square<2, 7>>("winograd_f2x2_7x7_nhwc"),
    staged<Square<2, 7>>("winograd_f2x2_7x7_staged_nhwc"),
    staged<Row<4, 3>>("winograd_f4_1x3_staged_nhwc"),
    staged<Column<4, 3>>("winograd_f4_3x1_staged_nhwc"),
    fused<Row<4, 7>>("winograd_f4_1x7_nhwc"),
    fused<Column<4, 7>>("winograd_f4_7x1_nhwc"),
    fused<Row<6, 7>>("winograd_f6_1x7_nhwc"),
    fused<Column<6, 7>>("winograd_f6_7x1_nhwc"),
    staged<Row<6, 7>>("winograd_f6_1x7_staged_nhwc"),
    staged<Column<6, 7>>("winograd_f6_7x1_staged_nhwc"),
};
const int winograd_count = sizeof(winograd_kernels) / sizeof(Kernel);

}  // namespace convselect::CONVSELECT_ISA
