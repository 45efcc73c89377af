// Gates of experts from logits R x + c, for rows whose adapters have routers and rules of their own.
#include <cmath>
#include <limits>

#include "lanes.h"

enum Logits { PLAIN, ABSOLUTE, UNIT };
enum Keep { ALL, TOP_K, TOP_P };
enum Gate { SOFTMAX, RENORMALISED, LOGIT, ONE };

struct RouterRule {
    int32_t is_normalised, logits, keep, top_k, gate, has_floor, again;
    float scale, top_p, floor;
};

struct RouterUse {
    const RouterRule *rule;
    const float *weight;      // [experts, in]
    const float *bias;        // [experts], or null
    const float *preference;  // [experts], or null
    int64_t experts;
    Rows rows;
    int64_t gates;  // Where those of its first row begin; each row has `stride`.
    int64_t stride;
};

static float dot(const float *a, const float *b, int64_t count) {
    Lanes sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sums[j] += load(a + i + j * LANES) * load(b + i + j * LANES);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

// Mean 0 and variance 1.
static void normalise(const float *x, int64_t count, float *to) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < count; i++) mean += x[i];
    mean /= count;
    for (int64_t i = 0; i < count; i++) variance += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / std::sqrt(variance / count + 1e-5);
    for (int64_t i = 0; i < count; i++) to[i] = (x[i] - mean) * scale;
}

// The softmax of those that `is_in` has; 0 for the others.
static void softmax(const float *values, const uint8_t *is_in, int64_t count, float *to) {
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t e = 0; e < count; e++)
        if (is_in[e] && !(values[e] <= largest)) largest = values[e];
    for (int64_t e = 0; e < count; e++) total += to[e] = is_in[e] ? std::exp(values[e] - largest) : 0;
    for (int64_t e = 0; e < count; e++)
        if (is_in[e]) to[e] /= total;
}

// From the largest on; equal ones stay in order, and what is not a number comes first.
static void sort(const float *values, int64_t count, int32_t *order) {
    for (int64_t e = 0; e < count; e++) {
        const bool is_none = std::isnan(values[e]);
        int64_t place = e;
        for (; place > 0; place--) {
            const float before = values[order[place - 1]];
            if (!(is_none ? !std::isnan(before) : values[e] > before)) break;
            order[place] = order[place - 1];
        }
        order[place] = e;
    }
}

// What one thread writes to on the way.
struct RowGates {
    std::vector<float> x, logits, scaled, preferred;
    std::vector<int32_t> order;
    std::vector<uint8_t> is_kept, every;

    RowGates(int64_t in, int64_t experts)
        : x(in), logits(experts), scaled(experts), preferred(experts), order(experts), is_kept(experts),
          every(experts, 1) {}
};

static void keep(const RouterUse &use, RowGates &own, float *mass) {
    const int64_t experts = use.experts;
    if (use.rule->keep == ALL) {
        own.is_kept = own.every;
        return;
    }
    for (int64_t e = 0; e < experts; e++)
        own.preferred[e] = own.scaled[e] + (use.preference ? use.preference[e] : 0);
    sort(own.preferred.data(), experts, own.order.data());
    if (use.rule->keep == TOP_P) softmax(own.scaled.data(), own.every.data(), experts, mass);
    float before = 0;
    for (int64_t place = 0; place < experts; place++) {
        const int32_t e = own.order[place];
        own.is_kept[e] = use.rule->keep == TOP_K ? place < use.rule->top_k : before <= use.rule->top_p;
        before += mass[e];
    }
}

static void gate_row(const RouterUse &use, const float *x, int64_t in, RowGates &own, float *gates) {
    const RouterRule &rule = *use.rule;
    const int64_t experts = use.experts;
    if (rule.is_normalised) normalise(x, in, own.x.data()), x = own.x.data();
    float squares = 0;
    for (int64_t e = 0; e < experts; e++) {
        const float logit = dot(use.weight + e * in, x, in) + (use.bias ? use.bias[e] : 0);
        own.logits[e] = rule.logits == ABSOLUTE ? std::fabs(logit) : logit;
        squares += logit * logit;
        gates[e] = 0;
    }
    const float length = std::sqrt(squares), least = std::numeric_limits<float>::min();
    for (int64_t e = 0; e < experts; e++) {
        if (rule.logits == UNIT) own.logits[e] /= length < least ? least : length;
        own.scaled[e] = own.logits[e] * rule.scale;
    }
    keep(use, own, gates);
    if (rule.gate == SOFTMAX || rule.gate == RENORMALISED) {
        const auto &among = rule.gate == SOFTMAX ? own.every : own.is_kept;
        softmax(own.scaled.data(), among.data(), experts, gates);
    }
    for (int64_t e = 0; e < experts; e++) {
        if (rule.gate == ONE) gates[e] = 1;
        if (rule.gate == LOGIT) gates[e] = own.scaled[e];
        if (!own.is_kept[e] || (rule.has_floor && own.logits[e] < rule.floor)) gates[e] = 0;
        own.is_kept[e] = gates[e] != 0;
    }
    if (rule.again) {
        std::memcpy(own.scaled.data(), gates, experts * sizeof *gates);
        softmax(own.scaled.data(), own.is_kept.data(), experts, gates);
    }
}

// x [T, in] is contiguous.
extern "C" void timbre_gates(
    const RouterUse *uses, int64_t count, const float *x, int64_t in, float *gates, int threads
) {
    int64_t experts = 0;
    for (int64_t u = 0; u < count; u++) experts = uses[u].experts > experts ? uses[u].experts : experts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        RowGates own(in, experts);
        for (int64_t u = 0; u < count; u++) {
            const RouterUse &use = uses[u];
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < use.rows.count; n++)
                gate_row(use, x + use.rows.rows[n] * in, in, own, gates + use.gates + n * use.stride);
        }
    }
}
PLAYED(timbre_gates)
