// The transforms of Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308), one register of channels at a
// time.
//
// An F(m x m, 3x3) computes a tile of m x m outputs from r x r inputs, r = m + 2:
//   Y = A^T [ (G g G^T) . (B^T d B) ] A,  summed over the input channels between the brackets.
// A^T, G and B^T are Cook and Toom's for the points p_i of the struct and infinity. With m_i(x) the product of (x -
// p_l) over all l but i: column i of A^T is [1, p_i, .., p_i^(m-1)], row i of G is [1, p_i, p_i^2] / m_i(p_i), and row
// i of B^T holds the coefficients of m_i(x). For infinity they are the last unit vectors and the coefficients of the
// product over all points.
#pragma once
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// Points 0, 1, -1. Signs are moved from row 0 of B^T to row 0 of G.
struct F2x3 {
  static constexpr int OUT = 2, IN = 4;
  static constexpr double G[IN][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

  // v = B^T d, elements `step` apart in d.
  CS_INLINE void input(const Vec* d, int step, Vec* v) {
    v[0] = d[0] - d[2 * step];
    v[1] = d[2 * step] + d[step];
    v[2] = d[2 * step] - d[step];
    v[3] = d[3 * step] - d[step];
  }

  // y = A^T m
  CS_INLINE void output(const Vec* m, int step, Vec* y) {
    const Vec sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
    y[0] = m[0] + sum;
    y[1] = difference + m[3 * step];
  }

  // V = B^T d B. d(i, j) is the input at row i and column j; V[i][j] goes to v + (i * IN + j) * plane.
  template <class D>
  CS_INLINE void input_tile(const D& d, float* v, int64_t plane) {
    Vec columns[IN][IN];
#pragma GCC unroll 4
    for (int j = 0; j < IN; ++j) {
      const Vec column[IN] = {d(0, j), d(1, j), d(2, j), d(3, j)};
      input(column, 1, columns[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < IN; ++i) {
      Vec row[IN];
      input(&columns[0][i], IN, row);
#pragma GCC unroll 4
      for (int j = 0; j < IN; ++j) store(v + (i * IN + j) * plane, row[j]);
    }
  }
};

// Points 0, 5/8, -5/8, 3/2, -3/2: pairs of opposite points share their even and odd halves, which makes 12 operations
// of each 6-point transform. rel-L2 error at 64 / 512 channels 7.4e-7 / 2.0e-6, against 1.6e-6 / 4.5e-6 for the usual
// 0, 1, -1, 2, -2 and 1.1e-6 / 2.8e-6 for 0, 1, -1, 1/2, -2. All coefficients are exact in float32.
struct F4x3 {
  static constexpr int OUT = 4, IN = 6;
  static constexpr double P = 0.625, Q = 1.5, PP = P * P, QQ = Q * Q;
  static constexpr double NP = 2 * PP * (PP - QQ), NQ = 2 * QQ * (QQ - PP);  // m_i(p_i) of +-P, of +-Q
  static constexpr double G[IN][3] = {{1 / (PP * QQ), 0, 0},     {1 / NP, P / NP, PP / NP},  {1 / NP, -P / NP, PP / NP},
                                      {1 / NQ, Q / NQ, QQ / NQ}, {1 / NQ, -Q / NQ, QQ / NQ}, {0, 0, 1}};

  static constexpr float p = P, q = Q, pp = PP, qq = QQ, ppp = P * PP, qqq = Q * QQ, sum = PP + QQ, product = PP * QQ;

  // (x^2 - P^2)(x^2 - Q^2): the row of point 0, and times x that of infinity
  CS_INLINE Vec outer(Vec d0, Vec d2, Vec d4) { return (d4 - sum * d2) + product * d0; }

  CS_INLINE void input(const Vec* d, Vec* v) {
    v[0] = outer(d[0], d[2], d[4]);
    const Vec even_p = d[4] - qq * d[2], odd_p = d[3] - qq * d[1];  // x (x +- P)(x^2 - Q^2)
    v[1] = even_p + p * odd_p;
    v[2] = even_p - p * odd_p;
    const Vec even_q = d[4] - pp * d[2], odd_q = d[3] - pp * d[1];  // x (x +- Q)(x^2 - P^2)
    v[3] = even_q + q * odd_q;
    v[4] = even_q - q * odd_q;
    v[5] = outer(d[1], d[3], d[5]);
  }

  CS_INLINE void output(const Vec* m, int step, Vec* y) {
    const Vec sum_p = m[step] + m[2 * step], difference_p = m[step] - m[2 * step];
    const Vec sum_q = m[3 * step] + m[4 * step], difference_q = m[3 * step] - m[4 * step];
    y[0] = m[0] + sum_p + sum_q;
    y[1] = p * difference_p + q * difference_q;
    y[2] = pp * sum_p + qq * sum_q;
    y[3] = ppp * difference_p + (qqq * difference_q + m[5 * step]);
  }

  // Rows of B^T d are made one or two at a time and leave through the transform along the row at once: 36 values and
  // their temporaries fit no register file, two rows do. That reads d 84 times instead of 36, and writes nothing.
  template <class D>
  CS_INLINE void input_tile(const D& d, float* v, int64_t plane) {
    auto along = [&](const Vec* row, int i) __attribute__((always_inline)) {
      Vec out[IN];
      input(row, out);
#pragma GCC unroll 6
      for (int j = 0; j < IN; ++j) store(v + (i * IN + j) * plane, out[j]);
    };
    auto pair = [&](float other, float point, int i) __attribute__((always_inline)) {
      Vec plus[IN], minus[IN];
#pragma GCC unroll 6
      for (int j = 0; j < IN; ++j) {
        const Vec even = d(4, j) - other * d(2, j), odd = d(3, j) - other * d(1, j);
        plus[j] = even + point * odd;
        minus[j] = even - point * odd;
      }
      along(plus, i);
      along(minus, i + 1);
    };
    auto single = [&](int first, int i) __attribute__((always_inline)) {
      Vec row[IN];
#pragma GCC unroll 6
      for (int j = 0; j < IN; ++j) row[j] = outer(d(first, j), d(first + 2, j), d(first + 4, j));
      along(row, i);
    };
    single(0, 0);
    pair(qq, p, 1);
    pair(pp, q, 3);
    single(1, 5);
  }
};

// Y = A^T M A, where M[i][j] is at m + (i * IN + j) * plane.
template <class F>
CS_INLINE void output_tile(const float* m, int64_t plane, Vec (*y)[F::OUT]) {
  Vec columns[F::IN][F::OUT];
#pragma GCC unroll 6
  for (int j = 0; j < F::IN; ++j) {
    Vec column[F::IN];
#pragma GCC unroll 6
    for (int i = 0; i < F::IN; ++i) column[i] = load(m + (i * F::IN + j) * plane);
    F::output(column, 1, columns[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < F::OUT; ++i) F::output(&columns[0][i], F::OUT, y[i]);
}

}  // namespace convselect::CONVSELECT_ISA
