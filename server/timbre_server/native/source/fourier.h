// Fourier transforms of real rows of even length, side by side in a register: eight rows, or sixteen.
#pragma once

#include "wide.h"

#define INLINED static inline __attribute__((always_inline))

// Of length n = 2 m. `roots` holds exp(-2 pi i k / m) for k < m, `half_roots` exp(-2 pi i k / n) for k <= m.
struct FourierPlan {
    int64_t m;
    int64_t num_factors;
    const int64_t *factors;  // Their product is m; the first one is 1, 2, 3, 5 or 7, others may be 4 and 8.
    const float *roots;
    const float *half_roots;
};

template <typename V> struct Complex {
    V re, im;
};

template <typename V> INLINED Complex<V> operator+(Complex<V> a, Complex<V> b) { return {a.re + b.re, a.im + b.im}; }
template <typename V> INLINED Complex<V> operator-(Complex<V> a, Complex<V> b) { return {a.re - b.re, a.im - b.im}; }
template <typename V> INLINED Complex<V> times(Complex<V> a, float re, float im) {
    return {a.re * re - a.im * im, a.re * im + a.im * re};
}
template <typename V> INLINED Complex<V> conjugate(Complex<V> a) { return {a.re, -a.im}; }

// sign -1: forward, 1: back, unscaled.
template <int SIGN, typename V>
INLINED Complex<V> rooted(Complex<V> a, const float *roots, int64_t k) {
    return times(a, roots[2 * k], SIGN < 0 ? roots[2 * k + 1] : -roots[2 * k + 1]);
}

template <int SIGN, typename V> INLINED Complex<V> quarter_turn(Complex<V> a) {
    return SIGN < 0 ? Complex<V>{a.im, -a.re} : Complex<V>{-a.im, a.re};
}

template <int SIGN, typename V> INLINED Complex<V> eighth_turn(Complex<V> a) {
    const Complex<V> sum = a + quarter_turn<SIGN>(a);
    return {sum.re * 0.70710678119f, sum.im * 0.70710678119f};
}

// out[u] = sum_t a[t] exp(SIGN 2 pi i t u / P)
template <int SIGN, int P, typename V>
INLINED void small_transform(const FourierPlan &plan, const Complex<V> *a, Complex<V> *out) {
    if constexpr (P == 1) {
        out[0] = a[0];
    } else if constexpr (P == 2) {
        out[0] = a[0] + a[1], out[1] = a[0] - a[1];
    } else if constexpr (P == 3) {
        const Complex<V> sum = a[1] + a[2], turned = quarter_turn<SIGN>(a[1] - a[2]);
        const Complex<V> middle = {a[0].re - sum.re * 0.5f, a[0].im - sum.im * 0.5f};
        const Complex<V> side = {turned.re * 0.86602540378f, turned.im * 0.86602540378f};
        out[0] = a[0] + sum, out[1] = middle + side, out[2] = middle - side;
    } else if constexpr (P == 4) {
        const Complex<V> even = a[0] + a[2], across = a[0] - a[2], odd = a[1] + a[3];
        const Complex<V> turned = quarter_turn<SIGN>(a[1] - a[3]);
        out[0] = even + odd, out[1] = across + turned, out[2] = even - odd, out[3] = across - turned;
    } else if constexpr (P == 8) {
        const Complex<V> evens[] = {a[0], a[2], a[4], a[6]}, odds[] = {a[1], a[3], a[5], a[7]};
        Complex<V> even[4], odd[4];
        small_transform<SIGN, 4>(plan, evens, even);
        small_transform<SIGN, 4>(plan, odds, odd);
        odd[1] = eighth_turn<SIGN>(odd[1]), odd[2] = quarter_turn<SIGN>(odd[2]);
        odd[3] = eighth_turn<SIGN>(quarter_turn<SIGN>(odd[3]));
        for (int u = 0; u < 4; u++) out[u] = even[u] + odd[u], out[u + 4] = even[u] - odd[u];
    } else {  // t and P - t at once.
        constexpr int HALF = P / 2;
        Complex<V> sums[HALF + 1], turned[HALF + 1];
        out[0] = a[0];
        for (int t = 1; t <= HALF; t++) {
            sums[t] = a[t] + a[P - t], turned[t] = quarter_turn<-1>(a[t] - a[P - t]);
            out[0] = out[0] + sums[t];
        }
#pragma GCC unroll 8
        for (int u = 1; u <= HALF; u++) {
            Complex<V> middle = a[0], side = {};
#pragma GCC unroll 8
            for (int t = 1; t <= HALF; t++) {
                const float *root = plan.roots + plan.m / P * (t * u % P) * 2;
                middle = {middle.re + sums[t].re * root[0], middle.im + sums[t].im * root[0]};
                side = {side.re - turned[t].re * root[1], side.im - turned[t].im * root[1]};
            }
            out[u] = SIGN < 0 ? middle + side : middle - side;
            out[P - u] = SIGN < 0 ? middle - side : middle + side;
        }
    }
}

// One factor P of m, of which `done` is the product of those before, `left` of the others with it.
// (Stockham's order: T. G. Stockham, "High-speed convolution and correlation", 1966.)
template <int SIGN, int P, typename V>
static void pass(
    const FourierPlan &plan, const Complex<V> *__restrict from, Complex<V> *__restrict to, int64_t done, int64_t left
) {
    const int64_t step = left / P;
    for (int64_t j = 0; j < step; j++) {
        float re[P], im[P];
        for (int u = 1; u < P; u++) {
            re[u] = plan.roots[2 * j * u * done];
            im[u] = plan.roots[2 * j * u * done + 1] * -SIGN;
        }
        const bool is_turned = j > 0;  // Else its roots are ones.
        for (int64_t q = 0; q < done; q++) {
            Complex<V> a[P], b[P];
#pragma GCC unroll 8
            for (int t = 0; t < P; t++) a[t] = from[q + done * (j + step * t)];
            small_transform<SIGN, P>(plan, a, b);
            Complex<V> *out = to + q + done * P * j;
            out[0] = b[0];
            if (is_turned) {
#pragma GCC unroll 8
                for (int u = 1; u < P; u++) out[done * u] = times(b[u], re[u], im[u]);
            } else {
#pragma GCC unroll 8
                for (int u = 1; u < P; u++) out[done * u] = b[u];
            }
        }
    }
}

template <int SIGN, typename V>
static void pass_of(
    int64_t factor, const FourierPlan &plan, const Complex<V> *from, Complex<V> *to, int64_t done, int64_t left
) {
    switch (factor) {
        case 2: return pass<SIGN, 2>(plan, from, to, done, left);
        case 3: return pass<SIGN, 3>(plan, from, to, done, left);
        case 4: return pass<SIGN, 4>(plan, from, to, done, left);
        case 5: return pass<SIGN, 5>(plan, from, to, done, left);
        case 7: return pass<SIGN, 7>(plan, from, to, done, left);
        case 8: return pass<SIGN, 8>(plan, from, to, done, left);
    }
}

// 2 X of numbers k = q + done u and m - k of z, which are made at q and at done - q: of the transform of numbers 2 j
// and 2 j + 1 as the parts of one.
template <int P, typename V>
INLINED void put_parted(
    const FourierPlan &plan, int64_t q, const Complex<V> *z, const Complex<V> *mirrored, Complex<V> *X
) {
    const int64_t m = plan.m, done = m / P;
#pragma GCC unroll 8
    for (int u = 0; u < P; u++) {
        const int64_t k = q + done * u;
        const Complex<V> here = z[u], there = conjugate(mirrored[P - 1 - u]);
        const Complex<V> even = here + there, odd = rooted<-1>(here - there, plan.half_roots, k);
        X[k] = {even.re + odd.im, even.im - odd.re};
        X[m - k] = {even.re - odd.im, -even.im - odd.re};
    }
}

// The last one, of a factor P, and what makes half spectra of it.
template <int P, typename V>
static void last_pass(const FourierPlan &plan, const Complex<V> *__restrict from, Complex<V> *__restrict X) {
    const int64_t done = plan.m / P;
    const auto transformed = [&](int64_t q, Complex<V> *z) __attribute__((always_inline)) {
        Complex<V> a[P];
#pragma GCC unroll 8
        for (int t = 0; t < P; t++) a[t] = from[q + done * t];
        small_transform<-1, P>(plan, a, z);
    };
    Complex<V> first[P], turned[P];
    transformed(0, first);
    for (int u = 0; u < P; u++) turned[P - 1 - u] = first[(P - u) % P];
    put_parted<P>(plan, 0, first, turned, X);
    for (int64_t q = 1; 2 * q <= done; q++) {
        Complex<V> z[P], mirrored[P];
        transformed(q, z);
        transformed(done - q, mirrored);
        put_parted<P>(plan, q, z, mirrored, X);
    }
}

// 2 X[k] for k <= m of the real rows whose numbers 2 j and 2 j + 1 are the parts of `packed[j]`, which is lost.
template <typename V>
static void spectra(const FourierPlan &plan, Complex<V> *packed, Complex<V> *scratch, Complex<V> *X) {
    int64_t left = plan.m, done = 1;
    for (int64_t f = plan.num_factors - 1; f > 0; f--) {
        pass_of<-1>(plan.factors[f], plan, packed, scratch, done, left);
        left /= plan.factors[f], done *= plan.factors[f];
        std::swap(packed, scratch);
    }
    switch (plan.factors[0]) {
        case 1: return last_pass<1>(plan, packed, X);
        case 2: return last_pass<2>(plan, packed, X);
        case 3: return last_pass<3>(plan, packed, X);
        case 5: return last_pass<5>(plan, packed, X);
        case 7: return last_pass<7>(plan, packed, X);
    }
}

template <int P, typename V>
INLINED void put_turned(const FourierPlan &plan, const Complex<V> *a, int64_t j, Complex<V> *to) {
    Complex<V> b[P];
    small_transform<1, P>(plan, a, b);
    to[P * j] = b[0];
#pragma GCC unroll 8
    for (int u = 1; u < P; u++) to[P * j + u] = rooted<1>(b[u], plan.roots, j * u);
}

// The first one, of a factor P, of what half spectra are made to: numbers k = j + step t and m - k, for j and step - j.
template <int P, typename V>
static void first_pass(const FourierPlan &plan, const Complex<V> *__restrict X, Complex<V> *__restrict to) {
    const int64_t m = plan.m, step = m / P;
    for (int64_t j = 0; 2 * j <= step; j++) {
        Complex<V> a[P], mirrored[P];
#pragma GCC unroll 8
        for (int t = 0; t < P; t++) {
            const int64_t k = j + step * t;
            const Complex<V> here = X[k], there = conjugate(X[m - k]);
            const Complex<V> even = here + there, odd = rooted<1>(here - there, plan.half_roots, k);
            a[t] = {even.re - odd.im, even.im + odd.re};
            mirrored[P - 1 - t] = {even.re + odd.im, odd.re - even.im};
        }
        put_turned<P>(plan, a, j, to);
        if (j > 0 && 2 * j < step) put_turned<P>(plan, mirrored, step - j, to);
    }
}

// The real rows of half spectra, packed as `spectra` takes them, times 2 m; X[0] and X[m] are real. Where they lie:
// in `packed`, or in X, which is lost.
template <typename V>
static const Complex<V> *rows_of_spectra(const FourierPlan &plan, Complex<V> *X, Complex<V> *packed) {
    switch (plan.factors[0]) {
        case 1: first_pass<1>(plan, X, packed); break;
        case 2: first_pass<2>(plan, X, packed); break;
        case 3: first_pass<3>(plan, X, packed); break;
        case 5: first_pass<5>(plan, X, packed); break;
        case 7: first_pass<7>(plan, X, packed); break;
    }
    int64_t done = plan.factors[0], left = plan.m / done;
    for (int64_t f = 1; f < plan.num_factors; f++) {
        pass_of<1>(plan.factors[f], plan, packed, X, done, left);
        left /= plan.factors[f], done *= plan.factors[f];
        std::swap(packed, X);
    }
    return packed;
}
