// Kernels one after the other, as a tape has them.
#include <algorithm>

#include "played.h"

struct Choice;

// An argument that counts rows, or numbers in rows.
struct Counted {
    int64_t argument, per_row;
};

struct Call {
    void (*played)(const int64_t *words);  // Null: what is chosen here.
    union {
        const int64_t *words;
        const Choice *choice;
    };
    int64_t num_words, num_counted;  // Words are followed by those that are counted.
};

// Calls of kernels, for a state of what they follow from.
struct Known {
    int64_t state;
    const Call *calls;
    int64_t count;
};

struct Choice {
    const int64_t *state;
    int64_t num_known;
    Known known[];

    // Null: there are none.
    const Known *now() const {
        const Known *found = std::find_if(known, known + num_known, [&](const Known &own) { return own.state == *state; });
        return found < known + num_known ? found : nullptr;
    }
};

static void make(const Call &call, int64_t rows) {
    int64_t words[MOST_WORDS];
    std::copy_n(call.words, call.num_words, words);
    const Counted *counted = reinterpret_cast<const Counted *>(call.words + call.num_words);
    for (const Counted *own = counted; own < counted + call.num_counted; own++)
        words[own->argument] = own->per_row * rows;
    call.played(words);
}

// Calls from `first` on, for so many rows. Returns the number of the first one that is to be chosen anew, or `count`.
extern "C" int64_t timbre_play(const Call *calls, int64_t first, int64_t count, int64_t rows) {
    for (; first < count; first++) {
        const Call &call = calls[first];
        if (call.played) {
            make(call, rows);
            continue;
        }
        const Known *chosen = call.choice->now();
        if (!chosen) return first;
        for (int64_t n = 0; n < chosen->count; n++) make(chosen->calls[n], rows);
    }
    return count;
}
