// Fourier transforms of real rows, side by side in a register: eight rows, or sixteen.
#pragma once

#include "passes.h"

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

// 2 X of the real rows whose numbers lie in `packed`, one after the other, which is lost; of an even length numbers 2 j
// and 2 j + 1 are the parts of one. There is room for m in `packed` and in `scratch`.
template <typename V>
static void spectra(const FourierPlan &plan, Complex<V> *packed, Complex<V> *scratch, Complex<V> *X) {
    if (plan.is_odd) {
        const V *numbers = reinterpret_cast<const V *>(packed);
        for (int64_t i = 0; i < plan.m; i++) scratch[i] = {numbers[i], V{}};
        std::swap(packed, scratch);
    }
    int64_t left = plan.m, done = 1;
    for (int64_t f = plan.num_factors - 1; f > 0; f--) {
        pass_of<-1>(plan.factors[f], plan, packed, scratch, done, left);
        left /= plan.factors[f], done *= plan.factors[f];
        std::swap(packed, scratch);
    }
    if (plan.is_odd) {
        for (int64_t k = 0; k < plan.frequencies(); k++) X[k] = packed[k] + packed[k];
        return;
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

// Numbers k and m - k of an odd number m, whose first factor is 1.
template <typename V> static void put_mirrored(const FourierPlan &plan, const Complex<V> *X, Complex<V> *to) {
    to[0] = X[0];
    for (int64_t k = 1; k < plan.frequencies(); k++) to[k] = X[k], to[plan.m - k] = conjugate(X[k]);
}

// The real rows of half spectra, which are lost, as `spectra` takes them, times their length; real numbers of X have no
// imaginary parts. Where they lie: in X, or in `packed`, which has room for 2 m.
template <typename V>
static const V *rows_of_spectra(const FourierPlan &plan, Complex<V> *X, Complex<V> *packed) {
    X[0].im = V{};
    if (plan.is_odd) {
        put_mirrored(plan, X, packed);
        X = packed + plan.m;
    } else {
        X[plan.m].im = V{};
        switch (plan.factors[0]) {
            case 1: first_pass<1>(plan, X, packed); break;
            case 2: first_pass<2>(plan, X, packed); break;
            case 3: first_pass<3>(plan, X, packed); break;
            case 5: first_pass<5>(plan, X, packed); break;
            case 7: first_pass<7>(plan, X, packed); break;
        }
    }
    int64_t done = plan.factors[0], left = plan.m / done;
    for (int64_t f = 1; f < plan.num_factors; f++) {
        pass_of<1>(plan.factors[f], plan, packed, X, done, left);
        left /= plan.factors[f], done *= plan.factors[f];
        std::swap(packed, X);
    }
    V *numbers = reinterpret_cast<V *>(packed);
    for (int64_t i = 0; plan.is_odd && i < plan.m; i++) numbers[i] = packed[i].re;
    return numbers;
}
