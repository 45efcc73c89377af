// Fourier transforms of real rows of even length, eight rows side by side.
#pragma once

#include "lanes.h"

// Of length n = 2 m. `roots` holds exp(-2 pi i k / m) for k < m, `half_roots` exp(-2 pi i k / n) for k <= m.
struct FourierPlan {
    int64_t m;
    int64_t num_factors;
    const int64_t *factors;  // Their product is m; 2, 3, 4, 5 and 7 are known.
    const float *roots;
    const float *half_roots;
};

struct Complex {
    Lanes re, im;
};

static inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
static inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
static inline Complex times(Complex a, float re, float im) {
    return {a.re * re - a.im * im, a.re * im + a.im * re};
}
static inline Complex times_i(Complex a) { return {-a.im, a.re}; }
static inline Complex conjugate(Complex a) { return {a.re, -a.im}; }

// sign -1: forward, 1: back, unscaled.
template <int SIGN>
static inline Complex rooted(Complex a, const float *roots, int64_t k) {
    return times(a, roots[2 * k], SIGN < 0 ? roots[2 * k + 1] : -roots[2 * k + 1]);
}

template <int SIGN>
static inline Complex quarter_turn(Complex a) {
    return SIGN < 0 ? Complex{a.im, -a.re} : times_i(a);
}

// out[u] = sum_t a[t] exp(SIGN 2 pi i t u / P)
template <int SIGN, int P>
static inline void small_transform(const FourierPlan &plan, const Complex *a, Complex *out) {
    if constexpr (P == 2) {
        out[0] = a[0] + a[1], out[1] = a[0] - a[1];
    } else if constexpr (P == 3) {
        const Complex sum = a[1] + a[2], turned = quarter_turn<SIGN>(a[1] - a[2]);
        const Complex middle = {a[0].re - sum.re * 0.5f, a[0].im - sum.im * 0.5f};
        const Complex side = {turned.re * 0.86602540378f, turned.im * 0.86602540378f};
        out[0] = a[0] + sum, out[1] = middle + side, out[2] = middle - side;
    } else if constexpr (P == 4) {
        const Complex even = a[0] + a[2], across = a[0] - a[2], odd = a[1] + a[3];
        const Complex turned = quarter_turn<SIGN>(a[1] - a[3]);
        out[0] = even + odd, out[1] = across + turned, out[2] = even - odd, out[3] = across - turned;
    } else {
        for (int u = 0; u < P; u++) {
            out[u] = a[0];
            for (int t = 1; t < P; t++)
                out[u] = out[u] + rooted<SIGN>(a[t], plan.roots, plan.m / P * (t * u % P));
        }
    }
}

// One factor P of m, of which `done` is the product of those before, `left` of the others with it.
// (Stockham's order: T. G. Stockham, "High-speed convolution and correlation", 1966.)
template <int SIGN, int P>
static void pass(const FourierPlan &plan, const Complex *__restrict from, Complex *__restrict to, int64_t done, int64_t left) {
    const int64_t step = left / P;
    if (step == 1) {  // The last one, whose roots are ones.
        for (int64_t q = 0; q < done; q++) {
            Complex a[P], b[P];
#pragma GCC unroll 8
            for (int t = 0; t < P; t++) a[t] = from[q + done * t];
            small_transform<SIGN, P>(plan, a, b);
#pragma GCC unroll 8
            for (int u = 0; u < P; u++) to[q + done * u] = b[u];
        }
        return;
    }
    for (int64_t j = 0; j < step; j++) {
        float re[P], im[P];
        for (int u = 1; u < P; u++) {
            re[u] = plan.roots[2 * j * u * done];
            im[u] = plan.roots[2 * j * u * done + 1] * -SIGN;
        }
        for (int64_t q = 0; q < done; q++) {
            Complex a[P], b[P];
#pragma GCC unroll 8
            for (int t = 0; t < P; t++) a[t] = from[q + done * (j + step * t)];
            small_transform<SIGN, P>(plan, a, b);
            to[q + done * P * j] = b[0];
#pragma GCC unroll 8
            for (int u = 1; u < P; u++) to[q + done * (P * j + u)] = times(b[u], re[u], im[u]);
        }
    }
}

// Of m complex numbers in `from`, which is lost. Returns where the result lies: `from` or `to`.
template <int SIGN>
static Complex *transform(const FourierPlan &plan, Complex *from, Complex *to) {
    int64_t left = plan.m, done = 1;
    for (int64_t f = 0; f < plan.num_factors; f++) {
        switch (plan.factors[f]) {
            case 2: pass<SIGN, 2>(plan, from, to, done, left); break;
            case 3: pass<SIGN, 3>(plan, from, to, done, left); break;
            case 4: pass<SIGN, 4>(plan, from, to, done, left); break;
            case 5: pass<SIGN, 5>(plan, from, to, done, left); break;
            case 7: pass<SIGN, 7>(plan, from, to, done, left); break;
        }
        left /= plan.factors[f], done *= plan.factors[f];
        Complex *swapped = from;
        from = to, to = swapped;
    }
    return from;
}

// 2 X[k] for k <= m of the real rows whose numbers 2 j and 2 j + 1 are the parts of `packed[j]`, which is lost.
static void spectra(const FourierPlan &plan, Complex *packed, Complex *scratch, Complex *X) {
    const int64_t m = plan.m;
    const Complex *z = transform<-1>(plan, packed, scratch);
    X[0] = {(z[0].re + z[0].im) * 2, Lanes{}};
    X[m] = {(z[0].re - z[0].im) * 2, Lanes{}};
    for (int64_t k = 1; 2 * k <= m; k++) {
        const Complex here = z[k], there = conjugate(z[m - k]);
        const Complex even = here + there, odd = rooted<-1>(here - there, plan.half_roots, k);
        X[k] = {even.re + odd.im, even.im - odd.re};
        X[m - k] = {even.re - odd.im, -even.im - odd.re};
    }
}

// The real rows of half spectra, packed as `spectra` takes them, times 2 m; of X[0] and X[m] the real parts count.
static Complex *rows_of_spectra(const FourierPlan &plan, const Complex *X, Complex *packed, Complex *scratch) {
    const int64_t m = plan.m;
    packed[0] = {X[0].re + X[m].re, X[0].re - X[m].re};
    for (int64_t k = 1; 2 * k <= m; k++) {
        const Complex here = X[k], there = conjugate(X[m - k]);
        const Complex even = here + there, odd = rooted<1>(here - there, plan.half_roots, k);
        packed[k] = {even.re - odd.im, even.im + odd.re};
        packed[m - k] = {even.re + odd.im, odd.re - even.im};
    }
    return transform<1>(plan, packed, scratch);
}
