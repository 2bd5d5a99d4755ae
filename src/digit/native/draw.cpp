// Draws of tokens (draw.h) for rows of logits, shared among threads.

#include "draw.h"
#include "threads.h"

extern "C" {

// Draw a token for each row of logits (rows, count), ``stride`` numbers apart, with uniform (rows). ``unguided``, as many of them laid out
// alike or null, are what guidance of ``scale`` leads away from.
void digit_draw(const float* logits, const float* unguided, float scale, int64_t rows, int64_t count, int64_t stride, int threads,
                const float* uniform, float temperature, int64_t top_k, float top_p, int64_t* tokens) {
    std::atomic<int64_t> next{0};
    digit::Team::run(threads, 0, [&](const digit::Team::Member&) {
        std::vector<float> own, guided(unguided ? count : 0);
        for (int64_t row; (row = next++) < rows;) {
            const float* x = logits + row * stride;
            if (unguided) {
                const float* u = unguided + row * stride;
                for (int64_t i = 0; i < count; i++) guided[i] = u[i] + scale * (x[i] - u[i]);
                x = guided.data();
            }
            tokens[row] = token(x, count, uniform[row], temperature, top_k, top_p, own);
        }
    });
}
}
