// The transforms of Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308), one register of channels at a
// time, made by the compiler from the points.
//
// A tile of m outputs of a filter of r taps in one dimension needs n = m + r - 1 inputs and products:
//   y = A^T [ (G g) . (B^T d) ],
// in two dimensions Y = A^T [ (G g G^T) . (B^T d B) ] A, where each dimension may have an m and r of its own; with
// r = 1 it has none. The brackets are summed over the input channels before A^T.
//
// A^T, G and B^T are Cook and Toom's for n - 1 points p_i and infinity. With m_i(x) the product of (x - p_l) over all l
// but i: column i of A^T is [1, p_i, .., p_i^(m-1)], row i of G is [1, p_i, .., p_i^(r-1)] / m_i(p_i), and row i of B^T
// holds the coefficients of m_i(x). For infinity they are the last unit vectors and the coefficients of the product
// over all points.
#pragma once
#include "vec.h"

namespace convselect::CONVSELECT_ISA {

// Finite points for n products: 0, then pairs of opposite ones, whose rows share their halves. Independent relative
// errors of the products grow by a factor f = mean over y of sum over i of A[y][i]^2 |G_i|^2 |B_i|^2 / r in the square,
// f^2 in two dimensions. These are least in f among multiples of 1/8 up to 3, for the m and r used: sqrt(f) is 1.3 for
// F(2, 3), 2.2 for F(4, 3) (2.9 with 0, +-1, +-2), 2.3 for F(2, 5), 4.5 for F(6, 3), 4.4 for F(4, 5), 5.0 for F(2, 7),
// 10 for F(4, 7), 24 for F(6, 7). All coefficients of A^T and B^T are exact in float32.
template <int N>
struct Points;
template <>
struct Points<1> {
  static constexpr double at[1] = {};  // infinity alone: the identity
};
template <>
struct Points<4> {
  static constexpr double at[] = {0, 1, -1};
};
template <>
struct Points<6> {
  static constexpr double at[] = {0, 0.625, -0.625, 1.5, -1.5};
};
template <>
struct Points<8> {
  static constexpr double at[] = {0, 0.5, -0.5, 1, -1, 2, -2};
};
template <>
struct Points<10> {
  static constexpr double at[] = {0, 0.375, -0.375, 0.875, -0.875, 1.25, -1.25, 2.375, -2.375};
};
template <>
struct Points<12> {
  static constexpr double at[] = {0, 0.375, -0.375, 0.625, -0.625, 1, -1, 1.5, -1.5, 2.75, -2.75};
};

template <int I>
struct Constant {
  constexpr operator int() const { return I; }
};

// f(Constant<0>), f(Constant<STEP>), .. below N
template <int N, int STEP = 1, int I = 0, class F>
CS_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    unroll<N, STEP, I + STEP>(f);
  }
}

#define CS_LAMBDA __attribute__((always_inline))

// F(M, R) in one dimension.
template <int M, int R>
struct Toom {
  static constexpr int OUT = M, TAPS = R, IN = M + R - 1;
  using P = Points<IN>;

  // Whether products i and i + 1 belong to a pair of opposite points.
  static constexpr bool pair(int i) { return i % 2 == 1 && i + 1 < IN; }
  static constexpr bool second(int i) { return i > 0 && pair(i - 1); }
  static constexpr double power(double x, int k) { return k ? x * power(x, k - 1) : 1; }

  struct Matrices {
    double g[IN][R];
    // Row i: the coefficients of m_i(x), of a pair's first h(x) = m_i(x) / (x - p_(i+1)); monic.
    float b[IN][IN];
    int degree[IN];  // of that polynomial
  };
  static constexpr Matrices make() {
    Matrices made{};
    for (int i = 0; i < IN; ++i) {
      double c[IN] = {1}, scale = 1;
      int degree = 0;
      for (int l = 0; l < IN - 1; ++l) {
        if (l == i) continue;
        if (i < IN - 1) scale *= P::at[i] - P::at[l];
        if (pair(i) && l == i + 1) continue;
        for (int k = ++degree; k >= 0; --k) c[k] = (k ? c[k - 1] : 0) - P::at[l] * c[k];
      }
      for (int k = 0; k < R; ++k) made.g[i][k] = i < IN - 1 ? power(P::at[i], k) / scale : k == R - 1;
      for (int k = 0; k < IN; ++k) made.b[i][k] = static_cast<float>(c[k]);
      made.degree[i] = degree;
    }
    return made;
  }
  static constexpr Matrices MADE = make();

  // sum over k of b[ROW][k] d(k + SHIFT)
  template <int ROW, int SHIFT, class D>
  CS_INLINE Vec row(const D& d) {
    constexpr int TOP = MADE.degree[ROW];
    Vec sum = d(TOP + SHIFT);
    unroll<TOP>([&](auto i) CS_LAMBDA {
      constexpr int k = TOP - 1 - i;
      constexpr float c = MADE.b[ROW][k];
      if constexpr (c != 0) sum += c * d(k + SHIFT);
    });
    return sum;
  }

  // Row I of B^T d, and row I + 1 if they are a pair: m(x) = h(x) (x +- p).
  template <int I, class D>
  CS_INLINE void input(const D& d, Vec* v) {
    if constexpr (pair(I)) {
      constexpr float p = static_cast<float>(P::at[I]);
      const Vec even = row<I, 1>(d), odd = row<I, 0>(d);
      v[0] = even + p * odd;
      v[1] = even - p * odd;
    } else {
      v[0] = row<I, 0>(d);
    }
  }

  // Row I of G g, and row I + 1 if they are a pair, from the even and the odd taps.
  template <int I, class D>
  CS_INLINE void filter(const D& g, Vec* u) {
    if constexpr (pair(I)) {
      Vec half[2] = {static_cast<float>(MADE.g[I][0]) * g(0), static_cast<float>(MADE.g[I][1]) * g(1)};
      unroll<R - 2>([&](auto k) CS_LAMBDA { half[k % 2] += static_cast<float>(MADE.g[I][k + 2]) * g(k + 2); });
      u[0] = half[0] + half[1];
      u[1] = half[0] - half[1];
    } else {
      u[0] = I == IN - 1 ? g(R - 1) : static_cast<float>(MADE.g[I][0]) * g(0);
    }
  }

  // y = A^T m, by sums and differences of the pairs; y[i] to y[i * step].
  template <class D>
  CS_INLINE void output(const D& m, Vec* y, int step) {
    if constexpr (IN == 1) {
      y[0] = m(0);
    } else {
      Vec half[2][IN];
      unroll<IN - 2, 2>([&](auto k) CS_LAMBDA {
        const Vec plus = m(k + 1), minus = m(k + 2);
        half[0][k] = plus + minus;
        half[1][k] = plus - minus;
      });
      unroll<M>([&](auto i) CS_LAMBDA {
        Vec sum;
        unroll<IN - 2, 2>([&](auto k) CS_LAMBDA {
          constexpr float c = static_cast<float>(power(P::at[k + 1], i));
          if constexpr (k == 0)
            sum = c * half[i % 2][k];
          else
            sum += c * half[i % 2][k];
        });
        if constexpr (i == 0) sum += m(0);
        if constexpr (i == M - 1) sum += m(IN - 1);
        y[i * step] = sum;
      });
    }
  }
};

// F(Y::OUT x X::OUT, Y::TAPS x X::TAPS)
template <class Y_, class X_>
struct Tile {
  using Y = Y_;
  using X = X_;
  static constexpr int XI = Y::IN * X::IN, TAPS = Y::TAPS * X::TAPS;

  // The two transforms of this shape: V = B^T d B of the inputs, U = G g G^T of the taps.
  struct Input {
    template <class T>
    static constexpr int LENGTH = T::IN;
    template <class T, int I, class D>
    CS_INLINE void rows(const D& d, Vec* v) {
      T::template input<I>(d, v);
    }
  };
  struct Filter {
    template <class T>
    static constexpr int LENGTH = T::TAPS;
    template <class T, int I, class D>
    CS_INLINE void rows(const D& g, Vec* u) {
      T::template filter<I>(g, u);
    }
  };

  // V or U from d(i, j), the element of row i and column j; element [i][j] goes to v + (i * X::IN + j) * plane.
  template <class Of, class D>
  CS_INLINE void transform(const D& d, float* v, int64_t plane) {
    unroll<Y::IN>([&](auto i) CS_LAMBDA {
      if constexpr (!Y::second(i)) transform_rows<Of, i>(d, v + i * X::IN * plane, plane);
    });
  }

  // Row I of it, and row I + 1 if they are a pair. They leave through the transform along the row at once: 36 values
  // and their temporaries fit no register file, two rows do. That reads d 84 times instead of 36, and writes nothing.
  template <class Of, int I, class D>
  CS_INLINE void transform_rows(const D& d, float* v, int64_t plane) {
    constexpr int LENGTH = Of::template LENGTH<X>;
    Vec rows[2][LENGTH];
    unroll<LENGTH>([&](auto j) CS_LAMBDA {
      Vec out[2];
      Of::template rows<Y, I>([&](int k) CS_LAMBDA { return d(k, j); }, out);
      rows[0][j] = out[0];
      if constexpr (Y::pair(I)) rows[1][j] = out[1];
    });
    unroll<1 + Y::pair(I)>([&](auto i) CS_LAMBDA {
      unroll<X::IN>([&](auto j) CS_LAMBDA {
        if constexpr (X::second(j)) return;
        Vec out[2];
        Of::template rows<X, j>([&](int k) CS_LAMBDA { return rows[i][k]; }, out);
        store(v + (i * X::IN + j) * plane, out[0]);
        if constexpr (X::pair(j)) store(v + (i * X::IN + j + 1) * plane, out[1]);
      });
    });
  }

  // Y = A^T M A, where M[i][j] is at m + (i * X::IN + j) * plane.
  CS_INLINE void output(const float* m, int64_t plane, Vec (*y)[X::OUT]) {
    Vec columns[Y::OUT][X::IN];
    unroll<X::IN>([&](auto j) CS_LAMBDA {
      Y::output([&](int i) CS_LAMBDA { return load(m + (i * X::IN + j) * plane); }, &columns[0][j], X::IN);
    });
    unroll<Y::OUT>([&](auto i) CS_LAMBDA { X::output([&](int j) CS_LAMBDA { return columns[i][j]; }, y[i], 1); });
  }
};

}  // namespace convselect::CONVSELECT_ISA
