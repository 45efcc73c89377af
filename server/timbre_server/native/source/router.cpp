// Gates of experts from logits R x + c, for rows whose adapters have routers and rules of their own.
#include <algorithm>
#include <cmath>
#include <limits>

#include "gates.h"
#include "wide.h"

enum Logits { PLAIN, ABSOLUTE, UNIT };
enum Keep { ALL, TOP_K, TOP_P };
enum Gate { SOFTMAX, RENORMALISED, LOGIT, ONE };

struct RouterRule {
    int32_t is_normalised, logits, keep, top_k, gate, has_floor, again;
    float scale, top_p, floor;
};

struct Router {
    const RouterRule *rule;
    const float *weight;      // [experts, in]
    const float *bias;        // [experts], or null
    const float *preference;  // [experts], or null
    int64_t experts;
    int64_t column;  // Of its first expert's gate.
};

// Those of an adapter at a group of layers, and where they write.
struct AdapterRouters {
    const Router *routers;
    int64_t count;
    const Gates *gates;
};

// When routers ran last, by a clock that counts such calls.
struct Called {
    int64_t *clock;
    int64_t at;
};

constexpr int EXPERTS = 4;  // That read a row together.

// The products of E rows of a weight with x. The next weight is asked of memory meanwhile, from `soon` on.
template <int E> static void products(const float *weight, const float *x, int64_t in, const float *soon, float *to) {
    Wide sums[E][2] = {};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= in; i += 2 * WIDTH)
        for (int e = 0; e < E; e++)
            for (int j = 0; j < 2; j++) {
                const int64_t place = e * in + i + j * WIDTH;
                __builtin_prefetch(soon + place);
                add_product(sums[e][j], wide(weight + place), wide(x + i + j * WIDTH));
            }
    for (int e = 0; e < E; e++) {
        float total = sum(sums[e][0] + sums[e][1]);
        for (int64_t j = i; j < in; j++) add_product(total, weight[e * in + j], x[j]);
        to[e] = total;
    }
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
    std::vector<float> x, normalised, logits, scaled, preferred;
    std::vector<int32_t> order;
    std::vector<uint8_t> is_kept, every;

    RowGates(int64_t in, int64_t experts)
        : x(in), normalised(in), logits(experts), scaled(experts), preferred(experts), order(experts),
          is_kept(experts), every(experts, 1) {}
};

static void keep(const Router &router, RowGates &own, float *mass) {
    const int64_t experts = router.experts;
    if (router.rule->keep == ALL) {
        own.is_kept = own.every;
        return;
    }
    for (int64_t e = 0; e < experts; e++)
        own.preferred[e] = own.scaled[e] + (router.preference ? router.preference[e] : 0);
    sort(own.preferred.data(), experts, own.order.data());
    if (router.rule->keep == TOP_P) softmax(own.scaled.data(), own.every.data(), experts, mass);
    float before = 0;
    for (int64_t place = 0; place < experts; place++) {
        const int32_t e = own.order[place];
        own.is_kept[e] = router.rule->keep == TOP_K ? place < router.rule->top_k : before <= router.rule->top_p;
        before += mass[e];
    }
}

static void gate_row(
    const Router &router, const float *x, int64_t in, const float *soon, RowGates &own, float *gates
) {
    const RouterRule &rule = *router.rule;
    const int64_t experts = router.experts;
    if (rule.is_normalised) normalise(x, in, own.normalised.data()), x = own.normalised.data();
    int64_t first = 0;
    for (; first + EXPERTS <= experts; first += EXPERTS)
        products<EXPERTS>(router.weight + first * in, x, in, soon + first * in, own.logits.data() + first);
    for (; first < experts; first++)
        products<1>(router.weight + first * in, x, in, soon + first * in, own.logits.data() + first);
    float squares = 0;
    for (int64_t e = 0; e < experts; e++) {
        const float logit = own.logits[e] + (router.bias ? router.bias[e] : 0);
        own.logits[e] = rule.logits == ABSOLUTE ? std::fabs(logit) : logit;
        squares += logit * logit;
        gates[e] = 0;
    }
    const float length = std::sqrt(squares), least = std::numeric_limits<float>::min();
    for (int64_t e = 0; e < experts; e++) {
        if (rule.logits == UNIT) own.logits[e] /= length < least ? least : length;
        own.scaled[e] = own.logits[e] * rule.scale;
    }
    keep(router, own, gates);
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

// `next`: whose first router is read after these.
static void gate_row(
    const AdapterRouters &adapter, const AdapterRouters &next, const float *x, int64_t in, RowGates &own, float *values
) {
    int64_t *acted = adapter.gates->acted;
    const Router *end = adapter.routers + adapter.count;
    for (const Router *router = adapter.routers; router < end; router++) {
        const Router *following = router + 1 < end ? router + 1 : next.routers;
        float *gates = values + router->column;
        gate_row(*router, x, in, following->weight, own, gates);
        for (int64_t e = 0; e < router->experts && acted; e++)
            if (gates[e] != 0) {
#pragma omp atomic
                acted[e]++;
            }
    }
}

// x [rows, in] is contiguous, of float32 or of bfloat16; `called` may be null.
extern "C" void timbre_gates(
    const Uses<AdapterRouters> *all, const void *x, int64_t format, int64_t rows, int64_t in, Called *called,
    int threads
) {
    if (called) called->at = ++*called->clock;
    const auto uses = all->with_rows();
    std::vector<int64_t> ends;
    int64_t count = 0, experts = 0;
    for (const auto &use : uses) {
        ends.push_back(count += use.rows->count);
        for (int64_t r = 0; r < use.part->count; r++) experts = std::max(experts, use.part->routers[r].experts);
    }
    const int used = all->threads(rows, threads);
#pragma omp parallel num_threads(used) if (used > 1)
    {
        RowGates own(in, experts);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const int64_t u = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
            const AdapterRouters &adapter = *uses[u].part;
            const AdapterRouters &next = i + 1 < ends[u] || i + 1 == count ? adapter : *uses[u + 1].part;
            const int64_t n = i - (u ? ends[u - 1] : 0);
            as_they_lie({x, format}, [&](auto first) {
                const float *row = floats(first + uses[u].rows->rows[n] * in, in, own.x.data());
                gate_row(adapter, next, row, in, own, adapter.gates->values + n * adapter.gates->columns);
            });
        }
    }
}
PLAYED(timbre_gates)
