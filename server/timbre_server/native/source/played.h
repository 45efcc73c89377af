// Kernels whose arguments lie in memory, each in 64 bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

constexpr int64_t MOST_WORDS = 24;  // Of a kernel's arguments.

template <typename T> static inline T argument(const int64_t *word) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(*word);
    else if constexpr (std::is_integral_v<T>) return static_cast<T>(*word);
    T found;
    std::memcpy(&found, word, sizeof found);
    return found;
}

template <typename... Arguments, size_t... I>
static inline void call(void (*kernel)(Arguments...), const int64_t *words, std::index_sequence<I...>) {
    kernel(argument<Arguments>(words + I)...);
}

template <typename... Arguments> static inline void call(void (*kernel)(Arguments...), const int64_t *words) {
    static_assert(sizeof...(Arguments) <= MOST_WORDS);
    call(kernel, words, std::index_sequence_for<Arguments...>());
}

// NAME_played: the kernel of that name, with such arguments.
#define PLAYED(NAME) \
    extern "C" void NAME##_played(const int64_t *words) { call(NAME, words); }
