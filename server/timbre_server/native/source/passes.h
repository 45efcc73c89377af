// The passes of Fourier transforms of rows that lie side by side in a register, each of one factor of their length.
#pragma once

#include "side_by_side.h"

#define INLINED static inline __attribute__((always_inline))

constexpr int64_t MOST_FACTOR = 256;  // As in `fourier.py`.

// Of length n = 2 m, or m where that is odd: half of such a transform is of zeros, but few ask for it.
// `roots` holds exp(-2 pi i k / m) for k < m, `half_roots` exp(-2 pi i k / n) for k <= m, of even lengths.
struct FourierPlan {
    int64_t m;
    int64_t num_factors;
    const int64_t *factors;  // Their product is m; the first one is 1, 2, 3, 5 or 7, others are 2, 4, 8 or odd.
    const float *roots;
    const float *half_roots;
    int64_t is_odd;

    int64_t length() const { return is_odd ? m : 2 * m; }
    int64_t frequencies() const { return length() / 2 + 1; }
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

// out[u] and out[P - u], so far `apart`, for COUNT numbers u from `first` on: of the sums and the turned differences of
// a[t] and a[P - t], by `roots` [P, 2] of P. Each is turned by the root u `turn` of the plan.
template <int SIGN, int COUNT, typename V>
INLINED void put_pairs(
    const FourierPlan &plan, const float (*roots)[2], int64_t P, int64_t first, const Complex<V> *sums,
    const Complex<V> *turned, int64_t turn, Complex<V> *out, int64_t apart
) {
    Complex<V> middle[COUNT], side[COUNT] = {};
    int64_t angle[COUNT] = {};
    for (int c = 0; c < COUNT; c++) middle[c] = sums[0];
    for (int64_t t = 1; t <= P / 2; t++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) {
            angle[c] += first + c;
            angle[c] -= angle[c] < P ? 0 : P;
            const V cosine = V{} + roots[angle[c]][0], sine = V{} + roots[angle[c]][1];
            add_product(middle[c].re, sums[t].re, cosine), add_product(middle[c].im, sums[t].im, cosine);
            add_product(side[c].re, turned[t].re, sine), add_product(side[c].im, turned[t].im, sine);
        }
    for (int64_t c = 0, u = first; c < COUNT; c++, u++) {
        out[apart * u] = rooted<SIGN>(middle[c] + side[c], plan.roots, turn * u);
        out[apart * (P - u)] = rooted<SIGN>(middle[c] - side[c], plan.roots, turn * (P - u));
    }
}

// As `pass`, of any odd factor P up to MOST_FACTOR.
template <int SIGN, typename V>
static void odd_pass(
    int64_t P, const FourierPlan &plan, const Complex<V> *__restrict from, Complex<V> *__restrict to, int64_t done,
    int64_t left
) {
    constexpr int TOGETHER = SIDE<V> > LANES ? 4 : 2;  // As many as registers have room for.
    const int64_t step = left / P;
    float roots[MOST_FACTOR][2];
    for (int64_t i = 0; i < P; i++) {
        roots[i][0] = plan.roots[2 * (plan.m / P) * i];
        roots[i][1] = -plan.roots[2 * (plan.m / P) * i + 1];
    }
    Complex<V> sums[MOST_FACTOR / 2 + 1], turned[MOST_FACTOR / 2 + 1];
    for (int64_t j = 0; j < step; j++)
        for (int64_t q = 0; q < done; q++) {
            const auto a = [&](int64_t t) { return from[q + done * (j + step * t)]; };
            Complex<V> all = sums[0] = a(0);
            for (int64_t t = 1; t <= P / 2; t++) {
                const Complex<V> here = a(t), there = a(P - t);
                sums[t] = here + there, turned[t] = quarter_turn<SIGN>(here - there);
                all = all + sums[t];
            }
            Complex<V> *out = to + q + done * P * j;
            out[0] = all;
            int64_t u = 1;
            for (; u + TOGETHER <= P / 2 + 1; u += TOGETHER)
                put_pairs<SIGN, TOGETHER>(plan, roots, P, u, sums, turned, j * done, out, done);
            for (; u <= P / 2; u++) put_pairs<SIGN, 1>(plan, roots, P, u, sums, turned, j * done, out, done);
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
        default: return odd_pass<SIGN>(factor, plan, from, to, done, left);
    }
}
