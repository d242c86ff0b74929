#include "gemm.h"

namespace convselect::CONVSELECT_ISA {

void pack_columns(const ColumnGroups& groups, const float* b, int64_t k, int64_t k_stride, int64_t n_stride,
                  float* packed) {
  for (int64_t i = 0; i < groups.groups; ++i) {
    const int64_t first = groups.begin(i) * VL, width = groups.begin(i + 1) * VL - first;
    float* to = packed + first * k;
    for (int64_t x = 0; x < k; ++x)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t n = first + j;
        *to++ = n < groups.columns ? flush_subnormal(b[x * k_stride + n * n_stride]) : 0.0f;
      }
  }
}

namespace {

// One register tile: MR rows by NV registers.
struct Tile {
  const float* const* a;  // row pointers; those of the next tap are `tap_stride` further
  int64_t tap_stride, taps, k_begin, k_end;
  const float* b;
  int64_t b_k, b_v;  // B[x], register v at b + x * b_k + v * b_v; x runs on over the taps
  float* c;
  int64_t ldc;
  int64_t last;  // valid lanes of the last register, 1..VL
  const float* column_bias;
  const float* row_bias;
  const float* residual;
  const Epilogue* epilogue;
  bool accumulate;
};

template <int MR, int NV>
void tile(const Tile& t) {
  Vec acc[MR][NV] = {};
  const float* b = t.b;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const float* a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) a[m] = t.a[tap * t.tap_stride + m];
    for (int64_t x = t.k_begin; x < t.k_end; ++x) {
      Vec row[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) row[v] = load(b + v * t.b_v);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec scalar = splat(a[m][x]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] += scalar * row[v];
      }
      b += t.b_k;
    }
  }
  const bool partial = t.last < VL;
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    float* c = t.c + m * t.ldc;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const bool part = partial && v == NV - 1;
      Vec value = acc[m][v];
      if (t.accumulate) value += part ? load_part(c + v * VL, t.last) : load(c + v * VL);
      if (t.column_bias)
        value += part ? load_part(t.column_bias + v * VL, t.last) : load(t.column_bias + v * VL);
      if (t.row_bias) value += t.row_bias[m];
      if (t.residual) {
        const float* r = t.residual + m * t.ldc + v * VL;
        value += part ? load_part(r, t.last) : load(r);
      }
      if (t.epilogue) {
        if (t.epilogue->act == Act::relu)
          value = at_least(value, 0.0f);
        else if (t.epilogue->act != Act::identity)
          value = activate(value, t.epilogue->act, t.epilogue->alpha, t.epilogue->beta);
      }
      if (part)
        store_part(c + v * VL, value, t.last);
      else
        store(c + v * VL, value);
    }
  }
}

typedef void (*TileFn)(const Tile&);
#define CS_ROW(MR) {nullptr, tile<MR, 1>, tile<MR, 2>
#define CS_ROW4(MR) CS_ROW(MR), tile<MR, 3>, tile<MR, 4>}
#define CS_ROW3(MR) CS_ROW(MR), tile<MR, 3>, nullptr}
#define CS_ROW2(MR) CS_ROW(MR)}
#define CS_ROW1(MR) {nullptr, tile<MR, 1>, nullptr}
#if defined(__AVX512F__) || defined(__aarch64__)
const TileFn TILES[MR_MAX + 1][NV_MAX + 1] = {{},          CS_ROW4(1), CS_ROW4(2), CS_ROW4(3), CS_ROW4(4),
                                              CS_ROW4(5), CS_ROW4(6), CS_ROW3(7), CS_ROW3(8)};
#else
const TileFn TILES[MR_MAX + 1][NV_MAX + 1] = {{},          CS_ROW2(1), CS_ROW2(2), CS_ROW2(3), CS_ROW2(4),
                                              CS_ROW2(5), CS_ROW2(6), CS_ROW1(7), CS_ROW1(8)};
#endif

// Runs `t` down m rows, in tiles of sizes as even as possible: a tail of one row would cost as much as a whole tile.
void down(Tile t, int64_t m, int nv) {
  const int64_t tiles = ceil_div(m, MR_OF[nv]);
  const float* const* a = t.a;
  float* c = t.c;
  const float *residual = t.residual, *row_bias = t.row_bias;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = i * m / tiles, end = (i + 1) * m / tiles;
    t.a = a + begin;
    t.c = c + begin * t.ldc;
    if (residual) t.residual = residual + begin * t.ldc;
    if (row_bias) t.row_bias = row_bias + begin;
    TILES[end - begin][nv](t);
  }
}

}  // namespace

void gemm(const Gemm& g, const ColumnGroups& groups, int64_t group_begin, int64_t group_end) {
  // A block of K is a run of whole taps, or a part of one tap when a tap alone is longer than a block.
  const int64_t taps_step = max_of(1, K_BLOCK / g.k);
  const int64_t k_parts = g.k > K_BLOCK ? ceil_div(g.k, K_BLOCK) : 1;
  for (int64_t tap = 0; tap < g.taps; tap += taps_step) {
    for (int64_t part = 0; part < k_parts; ++part) {
      Tile t{};
      t.taps = min_of(taps_step, g.taps - tap);
      t.tap_stride = g.m;
      t.k_begin = part * g.k / k_parts;
      t.k_end = (part + 1) * g.k / k_parts;
      t.ldc = g.ldc;
      t.accumulate = g.accumulate || tap + part > 0;
      const bool last = tap + t.taps == g.taps && part == k_parts - 1;
      t.epilogue = last ? g.epilogue : nullptr;
      for (int64_t i = group_begin; i < group_end; ++i) {
        const int64_t first = groups.begin(i), nv = groups.begin(i + 1) - first, n = first * VL;
        t.a = g.a + tap * g.m;
        t.b = g.b + n * (g.taps * g.k) + (tap * g.k + t.k_begin) * nv * VL;
        t.b_k = nv * VL;
        t.b_v = VL;
        t.c = g.c + n;
        t.last = min_of(VL, groups.columns - (n + (nv - 1) * VL));
        t.column_bias = t.epilogue && t.epilogue->bias ? t.epilogue->bias + n : nullptr;
        t.residual = t.epilogue && g.residual ? g.residual + n : nullptr;
        down(t, g.m, static_cast<int>(nv));
      }
    }
  }
}

void gemm_row_major(const GemmRowMajor& g, float* edge) {
  constexpr int64_t M_BLOCK = 96;  // row pointers kept on the stack at once
  const int64_t whole = g.columns / VL, rest = g.columns % VL;
  const int64_t k_parts = max_of(1, ceil_div(g.k, K_BLOCK));
  const float* rows[M_BLOCK];
  if (rest)
    for (int64_t x = 0; x < g.k; ++x) store(edge + x * VL, load_part(g.b + x * g.ldb + whole * VL, rest));
  for (int64_t part = 0; part < k_parts; ++part) {
    Tile t{};
    t.taps = 1;
    t.k_begin = part * g.k / k_parts;
    t.k_end = (part + 1) * g.k / k_parts;
    t.ldc = g.ldc;
    t.accumulate = g.accumulate || part > 0;
    t.epilogue = part == k_parts - 1 ? g.epilogue : nullptr;
    for (int64_t m = 0; m < g.m; m += M_BLOCK) {
      const int64_t count = min_of(M_BLOCK, g.m - m);
      for (int64_t i = 0; i < count; ++i) rows[i] = g.a + (m + i) * g.lda;
      t.a = rows;
      t.row_bias = t.epilogue && g.bias ? g.bias + m : nullptr;
      auto columns = [&](int64_t n, int64_t nv, const float* b, int64_t b_k, int64_t last) {
        t.b = b + t.k_begin * b_k;
        t.b_k = b_k;
        t.b_v = VL;
        t.c = g.c + m * g.ldc + n;
        t.residual = t.epilogue && g.residual ? g.residual + m * g.ldc + n : nullptr;
        t.last = last;
        down(t, count, static_cast<int>(nv));
      };
      const ColumnGroups full(whole * VL);
      for (int64_t i = 0; i < full.groups; ++i) {
        const int64_t first = full.begin(i);
        columns(first * VL, full.begin(i + 1) - first, g.b + first * VL, g.ldb, VL);
      }
      if (rest) columns(whole * VL, 1, edge, VL, rest);
    }
  }
}

}  // namespace convselect::CONVSELECT_ISA
