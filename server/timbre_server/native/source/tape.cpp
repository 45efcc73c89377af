// Kernels one after the other, as a tape has them.
#include <cstdint>

struct Choice;

struct Call {
    void (*played)(const int64_t *words);  // Null: what is chosen here.
    union {
        const int64_t *words;
        const Choice *choice;
    };
};

// Calls of kernels, for as long as what they follow from is in one state.
struct Choice {
    const int64_t *state;
    int64_t known;
    const Call *calls;
    int64_t count;
};

static void play(const Call *calls, int64_t count) {
    for (const Call *call = calls; call < calls + count; call++) call->played(call->words);
}

// Calls from `first` on. Returns the number of the first one that is to be chosen anew, or `count`.
extern "C" int64_t timbre_play(const Call *calls, int64_t first, int64_t count) {
    for (; first < count; first++) {
        const Call &call = calls[first];
        if (call.played) {
            call.played(call.words);
            continue;
        }
        const Choice &choice = *call.choice;
        if (*choice.state != choice.known) return first;
        play(choice.calls, choice.count);
    }
    return count;
}
