// y[row] += weight (R x[row] - x[row]), R of small blocks, for adapters with rotations and rows of their own; x may
// be y.
//
// An adapter's blocks are read once for all of its rows, where they lie. Nothing is added before all is turned: so
// every adapter reads what x was, whoever else changes the row. A row's sums are the same ones in the same order
// whatever other rows there are.
#include <type_traits>

#include "rotation_unit.h"

struct Rotation {
    Numbers blocks;  // [factors, stored, size, size]; of bfloat16: what they change, R - 1.
    const int64_t *chunks;  // [factors]
    int64_t factors, stored, size;
};

// What is left of entries beside their products with numbers of a block.
template <typename Entries> static inline Entries kept(const float *, Entries) { return Entries{}; }
template <typename Entries> static inline Entries kept(const BFloat16 *, Entries entries) { return entries; }

template <int N> using Count = std::integral_constant<int, N>;

constexpr int ROWS = 4;  // Of one adapter, that read a block together.
constexpr int AHEAD = 6144;  // Bytes of blocks, that are on their way from memory.

// Vectors that lie in memory; null: in order.
struct Vectors {
    float *first;
    const int64_t *order;
    int64_t step;

    float *operator[](int64_t n) const { return first + (order ? order[n] : n) * step; }

    Vectors at(int64_t place) const { return {first + place, order, step}; }
};

// out[n, j] = sum_i block[j, i] in[n, i] for J outputs, from the o-th on, of N vectors from the n-th on. Blocks are
// read from their first number to their last, as memory is fastest. Most have a size that is known to the compiler.
template <int J, int N, typename Number, typename Size>
static void turn(
    const Number *block, int64_t o, Size size, const Vectors &all_in, const Vectors &all_out, int64_t first
) {
    block += o * size;
    const float *in[N];
    for (int n = 0; n < N; n++) in[n] = all_in[first + n];
    const int64_t wide_end = size / WIDTH * WIDTH, end = size / LANES * LANES;
    Lanes parts[N][J];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
        const Number *own = block + j * size;
        Wide sums[N] = {}, numbers;
        for (int64_t i = 0; i < wide_end; i += WIDTH) {
            __builtin_prefetch(reinterpret_cast<const char *>(own + i) + AHEAD, 0, 2);
            get(numbers, own + i);
            for (int n = 0; n < N; n++) add_product(sums[n], numbers, wide(in[n] + i));
        }
        for (int n = 0; n < N; n++) parts[n][j] = folded(sums[n]);
        if (wide_end < end)
            for (int n = 0; n < N; n++) add_product(parts[n][j], load(own + wide_end), load(in[n] + wide_end));
    }
    for (int n = 0; n < N; n++) {
        float *out = all_out[first + n] + o;
        if constexpr (J == LANES) store(out, sums_of(parts[n]) + kept(block, load(in[n] + o)));
        else out[0] = sum(parts[n][0]) + kept(block, in[n][o]);
        for (int j = 0; end < size && j < J; j++)
            for (int64_t i = end; i < size; i++) add_product(out[j], value(block[j * size + i]), in[n][i]);
    }
}

template <int J, typename Number, typename Size>
static void turn_all(
    const Number *block, int64_t o, Size size, int64_t count, const Vectors &in, const Vectors &out
) {
    int64_t n = 0;
    for (; n + ROWS <= count; n += ROWS) turn<J, ROWS>(block, o, size, in, out, n);
    for (; n < count; n++) turn<J, 1>(block, o, size, in, out, n);
}

template <typename Number, typename Size>
static void turn_outputs(
    const Number *block, Share own, Size size, int64_t count, const Vectors &in, const Vectors &out
) {
    int64_t o = own.begin;
    for (; o + LANES <= own.end; o += LANES) turn_all<LANES>(block, o, size, count, in, out);
    for (; o < own.end; o++) turn_all<1>(block, o, size, count, in, out);
}

// One factor of a rotation.
template <typename Number> struct Factor {
    const Number *blocks;
    int64_t stored, size, chunk;

    Factor(const Rotation &all, const Number *first, int64_t number)
        : blocks(first + number * all.stored * all.size * all.size), stored(all.stored), size(all.size),
          chunk(all.chunks[number]) {}

    bool is_dealt() const { return chunk > size; }

    // Where a block begins in a vector: it has half its entries there, and half in the other half of the chunk.
    int64_t begin(int64_t number) const {
        const int64_t in_chunk = chunk / size;
        return number / in_chunk * chunk + number % in_chunk * (size / 2);
    }

    int64_t place(int64_t entry) const { return entry < size / 2 ? entry : entry - size / 2 + chunk / 2; }

    // Some outputs of one block, of so many vectors.
    void turn_block(
        int64_t number, Share own, int64_t count, const Vectors &from, const Vectors &to, Scratch &scratch
    ) const {
        const Number *block = blocks + (stored > 1 ? number : 0) * size * size;
        const int64_t first = begin(number);
        Vectors in = from.at(first), out = to.at(first);
        if (is_dealt()) {
            const Vectors v = in;
            in = {scratch.of(2 * count * size), nullptr, size}, out = in.at(count * size);
            for (int64_t n = 0; n < count; n++)
                for (int64_t i = 0; i < size; i++) in[n][i] = v[n][place(i)];
        }
        switch (size) {
            case 16: turn_outputs(block, own, Count<16>(), count, in, out); break;
            case 32: turn_outputs(block, own, Count<32>(), count, in, out); break;
            case 64: turn_outputs(block, own, Count<64>(), count, in, out); break;
            default: turn_outputs(block, own, size, count, in, out);
        }
        for (int64_t n = 0; is_dealt() && n < count; n++)
            for (int64_t o = own.begin; o < own.end; o++) to[n][first + place(o)] = out[n][o];
    }

    // Some blocks, each smaller than a register.
    template <int SIZE> void turn_small(Share own, int64_t count, const Vectors &from, const Vectors &to) const {
        for (int64_t n = 0; n < count; n++)
            for (int64_t number = own.begin; number < own.end; number++) {
                const Number *block = blocks + (stored > 1 ? number : 0) * SIZE * SIZE;
                const float *in = from[n] + begin(number);
                float *out = to[n] + begin(number);
                for (int j = 0; j < SIZE; j++) {
                    float total = 0;
                    for (int i = 0; i < SIZE; i++) add_product(total, value(block[j * SIZE + i]), in[place(i)]);
                    out[place(j)] = total + kept(block, in[place(j)]);
                }
            }
    }

    // A thread's share of all: of all blocks in steps of LANES outputs.
    void turn_share(int64_t features, int64_t count, const Vectors &from, const Vectors &to, Scratch &scratch) const {
        const int64_t steps = (size + LANES - 1) / LANES;
        const Share own = share(features / size * steps, thread_number(), thread_count(), 1);
        switch (size) {
            case 2: return turn_small<2>(own, count, from, to);
            case 3: return turn_small<3>(own, count, from, to);
            case 4: return turn_small<4>(own, count, from, to);
            case 5: return turn_small<5>(own, count, from, to);
            case 6: return turn_small<6>(own, count, from, to);
            case 7: return turn_small<7>(own, count, from, to);
        }
        for (int64_t step = own.begin, end; step < own.end; step = end) {
            const int64_t number = step / steps, first = number * steps;
            end = std::min(own.end, first + steps);
            const Share outputs = {(step - first) * LANES, std::min(size, (end - first) * LANES)};
            turn_block(number, outputs, count, from, to, scratch);
        }
    }
};

// Whether the matrix unit may multiply its blocks, for rows that nothing else turns.
static bool may_be_tiled(const Rotation &part) {
    const bool is_one = part.factors == 1 && part.chunks[0] == part.size;
    return is_one && part.blocks.format == BFLOAT16 && TiledTurns::may_turn(part.size);
}

// Of each row, whether it is one of a chunk, and of one use alone.
static std::vector<uint8_t> turned_once(
    const std::vector<Use<Rotation>> &uses, const uint8_t *in_chunks, int64_t rows
) {
    std::vector<uint8_t> found(in_chunks, in_chunks + rows);
    std::vector<bool> seen(rows);
    for (const auto &use : uses)
        for (int64_t n = 0; n < use.rows->count; n++) {
            const int64_t row = use.rows->rows[n];
            if (seen[row]) found[row] = false;
            seen[row] = true;
        }
    return found;
}

// A thread's share of the blocks.
static void add_tiled(const Use<Rotation> &use, const float *x, float *y, int64_t features) {
    const auto &[blocks, chunks, factors, stored, size] = *use.part;
    const Share own = share(features / size, thread_number(), thread_count(), 1);
    TiledTurns turns(size);
    for (int64_t b = own.begin; b < own.end; b++) {
        const BFloat16 *changes = static_cast<const BFloat16 *>(blocks.first) + (stored > 1 ? b * size * size : 0);
        turns.add(changes, *use.rows, x + b * size, y + b * size, features);
    }
}

// Nothing is added before all is turned.
static void add_turned(const std::vector<Use<Rotation>> &uses, float *x, float *y, int64_t features, int threads) {
    int64_t size = 0, most = 0;
    for (const auto &use : uses) size += use.rows->count * features, most = std::max(most, use.part->factors);
    thread_local Scratch first, second;  // Kept: fresh memory costs more than what is written to it.
    float *const turned[] = {first.of(size), most > 1 ? second.of(size) : nullptr};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch;
        for (int64_t f = 0; f < most; f++) {
            int64_t start = 0;
            for (const auto &use : uses) {
                const int64_t left = use.part->factors - f;  // Factors, with this one.
                const auto lying = [&](int64_t n) { return Vectors{turned[n % 2] + start, nullptr, features}; };
                if (left > 0) {
                    const Vectors from = f ? lying(left) : Vectors{x, use.rows->rows, features};
                    const auto turn = [&](auto first) {
                        const Factor factor(*use.part, first, f);
                        factor.turn_share(features, use.rows->count, from, lying(left - 1), scratch);
                    };
                    const Numbers &blocks = use.part->blocks;
                    if (blocks.format == BFLOAT16) turn(static_cast<const BFloat16 *>(blocks.first));
                    else turn(static_cast<const float *>(blocks.first));
                }
                start += use.rows->count * features;
            }
#pragma omp barrier
        }
        const Share own = share(features, thread_number(), thread_count(), WIDTH);
        const auto of_each = [&](auto visit) {
            float *v = turned[0];
            for (const auto &use : uses)
                for (int64_t n = 0; n < use.rows->count; n++, v += features)
                    visit(v, use.rows->rows[n] * features, use.rows->weights[n]);
        };
        of_each([&](float *v, int64_t row, float) {
            for (int64_t d = own.begin; d < own.end; d++) v[d] -= x[row + d];
        });
        of_each([&](const float *v, int64_t row, float weight) {
            for (int64_t d = own.begin; d < own.end; d++) y[row + d] += weight * v[d];
        });
    }
}

// x and y [rows, features] are contiguous.
extern "C" void timbre_rotation(
    const Uses<Rotation> *all, float *x, float *y, int64_t rows, int64_t features, int threads
) {
    const auto uses = all->with_rows();
    threads = all->threads(rows, threads);
    std::vector<uint8_t> once;
    if (all->chunks()) once = turned_once(uses, all->chunks(), rows);
    const Parted<Rotation> parted(uses, once.empty() ? nullptr : once.data(), may_be_tiled);
    if (!parted.tiled.empty()) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        for (const auto &use : parted.tiled) add_tiled(use, x, y, features);
    }
    if (!parted.others.empty()) add_turned(parted.others, x, y, features, threads);
}
PLAYED(timbre_rotation)
