// Runs digit_step and digit_tokens on what it reads, for processors that the tests have no Python for.
//
// Input: 10 numbers (int64), then the arrays in the order in which they are read below. Output: the logits of each step, then tokens.

#include <cstdio>
#include <cstdlib>

#include "../../src/digit/native/step.cpp"

template <class T>
T* take(int64_t count) {
    T* here = static_cast<T*>(std::aligned_alloc(64, padded(count * int64_t(sizeof(T)) + 1, 64)));
    if (int64_t(std::fread(here, sizeof(T), count, stdin)) != count) std::exit(2);
    return here;
}

int main() {
    const int64_t* n = take<int64_t>(10);
    const int64_t depth = n[0], width = n[1], heads = n[2], hidden = n[3], weights = n[4], half = n[5], rows = n[6], length = n[7], vocab = n[8];
    const int64_t bytes = weights == 0 ? 4 : weights == 1 ? 2 : 1;
    const auto matrix = [&](int64_t inputs, int64_t outputs) {
        outputs = padded(outputs, PANEL);
        const char* weight = take<char>(inputs * outputs * bytes);
        const float *scale = take<float>(outputs), *bias = take<float>(outputs);
        return Matrix{weight, scale, bias, inputs, outputs};
    };
    std::vector<Layer> layers;
    for (int64_t l = 0; l < depth; l++) {
        const Matrix qkv = matrix(width, 3 * width), out = matrix(width, width), in = matrix(width, hidden);
        layers.push_back({qkv, out, in, matrix(hidden, width)});
    }
    std::vector<Norm> norms;
    for (int64_t i = 0; i < 2 * depth + 1; i++) {
        const float* weight = take<float>(width);
        norms.push_back({weight, take<float>(width)});
    }
    const Matrix head = matrix(width, vocab);
    const Network net{layers.data(), norms.data(), head, depth, width, heads, hidden, 0, weights, half, 1e-5f};
    const int64_t item = half ? 2 : 4, places = length + 1, numbers = rows * places * width;
    std::vector<void*> keys, values;
    for (int64_t l = 0; l < depth; l++) keys.push_back(std::calloc(numbers, item)), values.push_back(std::calloc(numbers, item));
    const Cache cache{keys.data(), values.data(), places * width, places * (width / heads)};

    std::vector<float> logits(rows * head.outputs);
    for (int64_t position = 0; position < length; position++) {
        float* x = take<float>(rows * width);
        std::vector<char> room(digit_room(&net, rows, 2, places));
        digit_step(&net, &cache, 2, int(rows), position, x, room.data(), logits.data());
        std::fwrite(logits.data(), 4, logits.size(), stdout);
    }

    const char *table = take<char>(vocab * width * item), *at = take<char>((1 + length) * width * item);
    const float *starts = take<float>(rows * width), *uniform = take<float>(rows * length);
    std::vector<int64_t> tokens(rows * length);
    const std::vector<uint8_t> free(rows * length, 1);
    const std::vector<float> scale(length, 1);
    const Batch batch{table, at, 1, rows, length, vocab, 1, 0, tokens.data(), free.data(), uniform, scale.data(), starts, 1, 1, 5};
    std::vector<char> room(digit_tokens_room(&net, &batch, 2));
    digit_tokens(&net, &cache, &batch, 2, 0, length, 0, room.data());
    std::fwrite(tokens.data(), 8, tokens.size(), stdout);
}
