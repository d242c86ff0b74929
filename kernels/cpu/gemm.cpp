#include "gemm.h"

namespace convselect::CONVSELECT_ISA {

void pack_columns(const ColumnGroups& groups, const float* b, int64_t k, int64_t k_stride, int64_t n_stride,
                  float* packed, int64_t taps, int64_t tap_stride) {
  for (int64_t i = 0; i < groups.groups; ++i) {
    const int64_t first = groups.begin(i) * VL, width = groups.begin(i + 1) * VL - first;
    float* to = packed + first * taps * k;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t x = 0; x < k; ++x)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t n = first + j;
          *to++ = n < groups.columns ? flush_subnormal(b[t * tap_stride + x * k_stride + n * n_stride]) : 0.0f;
        }
  }
}

void finish_row(float* dst, const float* from, int64_t n, float row_bias, const float* column_bias,
                const float* residual, const Epilogue& e) {
  for (int64_t i = 0; i < n; i += VL) {
    const int64_t part = min_of(VL, n - i);
    auto at = [&](const float* p) { return part == VL ? load(p + i) : load_part(p + i, part); };
    Vec value = at(from) + row_bias;
    if (column_bias) value += at(column_bias);
    if (residual) value += at(residual);
    value = activate(value, e.act, e.alpha, e.beta);
    if (part == VL)
      store(dst + i, value);
    else
      store_part(dst + i, value, part);
  }
}

namespace {

// One register tile: MR rows by NV registers.
struct Tile {
  const float* const* a;  // row pointers; those of the next tap are `tap_stride` further
  int64_t tap_stride, taps, k_begin, k_end;
  const float* b;
  const int64_t* b_taps;  // where each tap's B begins, from b; null: after the tap before
  int64_t b_k;            // B[x], register v at b + x * b_k + v * VL
  const float* fetch;     // what to bring to L2 meanwhile, fetch_step floats for each x
  int64_t fetch_step;
  float* c;
  int64_t ldc;
  int64_t last;  // valid lanes of the last register, 1..VL
  const float* column_bias;
  const float* row_bias;
  const float* residual;
  bool accumulate;
  bool clamp;  // to [low, high]: relu and clamp
  float low, high;
  const Epilogue* later;  // any other activation

  void finish(const Epilogue* epilogue) {
    clamp = epilogue && (epilogue->act == Act::relu || epilogue->act == Act::clamp);
    later = epilogue && epilogue->act != Act::identity && !clamp ? epilogue : nullptr;
    if (!clamp) return;
    low = epilogue->act == Act::relu ? 0.0f : epilogue->alpha;
    high = epilogue->act == Act::relu ? __builtin_inff() : epilogue->beta;
  }
};

template <int MR, int NV>
void tile(const Tile& t) {
  // The last register may be partial; it alone pays for a mask. Each step is one test, not one for each register.
  const bool whole = t.last == VL;
  auto at = [&](const float* from, int v) {
    return v < NV - 1 || whole ? load(from + v * VL) : load_part(from + v * VL, t.last);
  };
  Vec acc[MR][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const Vec start = t.column_bias ? at(t.column_bias, v) : Vec{};
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) acc[m][v] = start;
  }
  if (t.row_bias) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = splat(t.row_bias[m]);
  }
  const float *b = t.b, *fetch = t.fetch;
  const int64_t fetch_step = t.fetch_step;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const float* a[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) a[m] = t.a[tap * t.tap_stride + m] + t.k_end;
    if (t.b_taps) b = t.b + t.b_taps[tap];
    for (int64_t x = t.k_begin - t.k_end; x < 0; ++x) {
      Vec row[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) row[v] = load(b + v * VL);
      __builtin_prefetch(fetch, 0, 2);
      fetch += fetch_step;
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Vec scalar = splat(a[m][x]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] += scalar * row[v];
      }
      b += t.b_k;
    }
  }
  auto add = [&](const float* from) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] += at(from + m * t.ldc, v);
  };
  if (t.accumulate) add(t.c);
  if (t.residual) add(t.residual);
  if (t.clamp) {
    const float low = t.low, high = t.high;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = at_most(at_least(acc[m][v], low), high);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    float* c = t.c + m * t.ldc;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (v < NV - 1 || whole)
        store(c + v * VL, acc[m][v]);
      else
        store_part(c + v * VL, acc[m][v], t.last);
    }
  }
  // From L1; inlined above, the polynomials would make each tile ten times longer.
  if (t.later) activate_rows(t.c, t.ldc, MR, (NV - 1) * VL + t.last, *t.later);
}

typedef void (*TileFn)(const Tile&);
#define CS_ROW1(MR) tile<MR, 1>
#define CS_ROW2(MR) CS_ROW1(MR), tile<MR, 2>
#define CS_ROW3(MR) CS_ROW2(MR), tile<MR, 3>
#define CS_ROW4(MR) CS_ROW3(MR), tile<MR, 4>
#if defined(__AVX512F__) || defined(__aarch64__)
const TileFn TILES[MR_MAX][NV_MAX] = {{CS_ROW4(1)},           {CS_ROW4(2)},           {CS_ROW4(3)},
                                      {CS_ROW4(4)},           {CS_ROW4(5)},           {CS_ROW4(6)},
                                      {CS_ROW3(7)},           {CS_ROW3(8)},           {nullptr, tile<9, 2>},
                                      {nullptr, tile<10, 2>}, {nullptr, tile<11, 2>}, {nullptr, tile<12, 2>}};
#else
const TileFn TILES[MR_MAX][NV_MAX] = {{CS_ROW2(1)}, {CS_ROW2(2)}, {CS_ROW2(3)}, {CS_ROW2(4)},
                                      {CS_ROW2(5)}, {CS_ROW2(6)}, {CS_ROW1(7)}, {CS_ROW1(8)}};
#endif

// Runs `t` down m rows, in tiles of sizes as even as possible: a tail of one row would cost as much as a whole tile.
// Meanwhile the tiles fetch, each its share, the part of B that comes `next`; or, if null, the rows of A after their
// own.
void down(Tile t, int64_t m, int nv, const float* next) {
  const int64_t tiles = ceil_div(m, MR_OF[nv]), depth = t.taps * (t.k_end - t.k_begin);
  const int64_t step = min_of(16, ceil_div(nv * VL, tiles));  // of `next`, for each x; at most a cache line
  const float* const* a = t.a;
  float* c = t.c;
  const float *residual = t.residual, *row_bias = t.row_bias;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = i * m / tiles, end = (i + 1) * m / tiles;
    t.a = a + begin;
    t.c = c + begin * t.ldc;
    if (residual) t.residual = residual + begin * t.ldc;
    if (row_bias) t.row_bias = row_bias + begin;
    t.fetch = next ? next + i * depth * step : a[end - 1] + t.k_end;
    t.fetch_step = next ? step : end - begin;
    TILES[end - begin - 1][nv - 1](t);
  }
}

}  // namespace

void gemm(const Gemm& g, const ColumnGroups& groups, int64_t group_begin, int64_t group_end) {
  // A block of K is a run of whole taps, or a part of one tap when a tap alone is longer than a block.
  const int64_t tap_blocks = ceil_div(g.taps, max_of(1, K_BLOCK / g.k)), k_parts = ceil_div(g.k, K_BLOCK);
  for (int64_t block = 0; block < tap_blocks; ++block) {
    const int64_t tap = block * g.taps / tap_blocks;
    for (int64_t part = 0; part < k_parts; ++part) {
      Tile t{};
      t.taps = (block + 1) * g.taps / tap_blocks - tap;
      t.tap_stride = g.m;
      t.k_begin = part * g.k / k_parts;
      t.k_end = (part + 1) * g.k / k_parts;
      t.ldc = g.ldc;
      t.accumulate = g.accumulate || tap + part > 0;
      const bool first_block = tap + part == 0, last = tap + t.taps == g.taps && part == k_parts - 1;
      const Epilogue* epilogue = last ? g.epilogue : nullptr;
      t.finish(epilogue);
      for (int64_t i = group_begin; i < group_end; ++i) {
        const int64_t first = groups.begin(i), nv = groups.begin(i + 1) - first, n = first * VL;
        t.a = g.a + tap * g.m;
        const int64_t offset = tap * g.k + t.k_begin, depth = g.taps * g.k;
        t.b = g.b + n * depth + offset * nv * VL;
        t.b_k = nv * VL;
        t.c = g.c + n;
        t.last = min_of(VL, groups.columns - (n + (nv - 1) * VL));
        t.column_bias = first_block && g.epilogue && g.epilogue->bias ? g.epilogue->bias + n : nullptr;
        t.residual = epilogue && g.residual ? g.residual + n : nullptr;
        const int64_t after = groups.begin(i + 1) * VL;
        const float* next =
            i + 1 < group_end ? g.b + after * depth + offset * (groups.begin(i + 2) * VL - after) : nullptr;
        const bool rows_first = i == group_begin && g.taps == 1 && g.m > nv * VL;  // A is the larger of the two
        down(t, g.m, static_cast<int>(nv), rows_first ? nullptr : next);
      }
    }
  }
}

void gemm_row_major(const GemmRowMajor& g, float* edge) {
  constexpr int64_t M_BLOCK = 96, TAPS = 32;  // A's rows are used on all columns before the next ones: they stay in L2
  const int64_t taps_step = min_of(TAPS, max_of(1, K_BLOCK / g.k));
  const int64_t k_parts = max_of(1, ceil_div(g.k, K_BLOCK));
  const int64_t rest = edge ? g.columns % VL : 0, whole = g.columns - rest;
  const ColumnGroups groups(whole);
  const float* rows[TAPS * M_BLOCK];
  auto tap_begin = [&](int64_t tap) { return g.b_taps ? g.b_taps[tap] : tap * g.k * g.ldb; };
  if (rest)
    for (int64_t tap = 0; tap < g.taps; ++tap)
      for (int64_t x = 0; x < g.k; ++x)
        store(edge + (tap * g.k + x) * VL, load_part(g.b + tap_begin(tap) + x * g.ldb + whole, rest));
  for (int64_t tap = 0; tap < g.taps; tap += taps_step) {
    for (int64_t part = 0; part < k_parts; ++part) {
      Tile t{};
      t.taps = min_of(taps_step, g.taps - tap);
      t.k_begin = part * g.k / k_parts;
      t.k_end = (part + 1) * g.k / k_parts;
      t.ldc = g.ldc;
      t.accumulate = g.accumulate || tap + part > 0;
      const Epilogue* epilogue = tap + t.taps == g.taps && part == k_parts - 1 ? g.epilogue : nullptr;
      t.finish(epilogue);
      for (int64_t m = 0; m < g.m; m += M_BLOCK) {
        const int64_t count = min_of(M_BLOCK, g.m - m);
        for (int64_t j = 0; j < t.taps; ++j)
          for (int64_t i = 0; i < count; ++i) rows[j * count + i] = g.a + (m + i) * g.lda + (tap + j) * g.k;
        t.a = rows;
        t.tap_stride = count;
        t.row_bias = tap + part == 0 && g.epilogue && g.bias ? g.bias + m : nullptr;
        auto columns = [&](int64_t n, int64_t nv, int64_t last) {
          t.c = g.c + m * g.ldc + n;
          t.residual = epilogue && g.residual ? g.residual + m * g.ldc + n : nullptr;
          t.last = last;
          down(t, count, static_cast<int>(nv), nullptr);
        };
        t.b_k = g.ldb;
        t.b_taps = g.b_taps ? g.b_taps + tap : nullptr;
        for (int64_t i = 0; i < groups.groups; ++i) {
          const int64_t n = groups.begin(i) * VL, nv = groups.begin(i + 1) - groups.begin(i);
          t.b = g.b + n + t.k_begin * g.ldb + (g.b_taps ? 0 : tap_begin(tap));
          columns(n, nv, min_of(VL, whole - (n + (nv - 1) * VL)));
        }
        if (rest) {
          t.b = edge + (tap * g.k + t.k_begin) * VL;
          t.b_k = VL;
          t.b_taps = nullptr;
          columns(whole, 1, rest);
        }
      }
    }
  }
}

}  // namespace convselect::CONVSELECT_ISA
