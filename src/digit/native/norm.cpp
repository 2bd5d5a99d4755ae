// Group norm and SiLU of numbers (images, places, channels): channels lie side by side.
//
// Why: for bfloat16 in this layout, in which convolutions are quickest, the norm and the activation took more time than the convolutions
// around them.
//
// The numbers of an image are read three times (mean, deviation, result), but from the nearest cache. Sums are in float32.

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

struct Norm {
    int64_t places, channels, groups;  // of an image
    const float *weight, *bias;        // of each channel
    float epsilon;
};

constexpr int64_t TOGETHER = 16;  // channels: a line of the cache

// What the places of a channel sum up to, f(vector, first channel) of them.
template <class T, class F>
void sums(const Norm& n, const T* x, float* to, F f) {
    for (int64_t c = 0; c < n.channels; c += TOGETHER) {
        floats sum[TOGETHER / LANES] = {};
        for (int64_t p = 0; p < n.places; p++)
            for (int64_t i = 0; i < TOGETHER; i += LANES) sum[i / LANES] += f(widened(x + p * n.channels + c + i), c + i);
        for (int64_t i = 0; i < TOGETHER; i += LANES) store(to + c + i, sum[i / LANES]);
    }
}

// The mean over a group's channels and places of what ``sums`` found.
float mean(const Norm& n, const float* sum, int64_t group) {
    const int64_t each = n.channels / n.groups;
    float whole = 0;
    for (int64_t i = 0; i < each; i++) whole += sum[group * each + i];
    return whole / float(each * n.places);
}

// One image. ``gain`` and ``offset`` (channels) follow the norm's own where given; ``room`` has space for two numbers a channel.
template <class T>
void normalise(const Norm& n, const T* x, T* y, const float* gain, const float* offset, float* room) {
    const int64_t each = n.channels / n.groups;
    float *scale = room, *shift = room + n.channels;  // of each channel
    sums(n, x, scale, [](floats v, int64_t) { return v; });
    for (int64_t g = 0; g < n.groups; g++) std::fill_n(shift + g * each, each, mean(n, scale, g));
    sums(n, x, scale, [&](floats v, int64_t c) {
        const floats d = v - load<floats>(shift + c);
        return d * d;
    });
    for (int64_t g = 0; g < n.groups; g++) {
        const float unit = 1 / std::sqrt(mean(n, scale, g) + n.epsilon);
        for (int64_t c = g * each; c < (g + 1) * each; c++) {
            const float more = gain ? 1 + gain[c] : 1;
            scale[c] = unit * n.weight[c] * more;
            shift[c] = n.bias[c] * more - shift[c] * scale[c] + (offset ? offset[c] : 0);
        }
    }
    for (int64_t p = 0; p < n.places; p++)
        for (int64_t c = 0; c < n.channels; c += LANES) {
            const floats v = widened(x + p * n.channels + c) * load<floats>(scale + c) + load<floats>(shift + c);
            narrow(v / (1.0f + exponential(-v < 87.0f ? -v : floats{} + 87.0f)), y + p * n.channels + c);
        }
}

template <class T>
void all(const Norm& n, const T* x, T* y, const float* gain, const float* offset, int64_t images, int threads) {
    std::atomic<int64_t> next{0};
    digit::Team::run(threads, 0, [&](const digit::Team::Member&) {
        std::vector<float> room(2 * n.channels);
        for (int64_t i; (i = next++) < images;) {
            const int64_t at = i * n.places * n.channels, own = i * n.channels;
            normalise(n, x + at, y + at, gain ? gain + own : nullptr, offset ? offset + own : nullptr, room.data());
        }
    });
}

}  // namespace

// Channels are a multiple of 16, and of the groups. ``gain`` and ``offset`` (images, channels) are null where there are none.
extern "C" void digit_norm(const void* x, void* y, int64_t images, int64_t places, int64_t channels, int64_t groups, const float* weight,
                           const float* bias, const float* gain, const float* offset, float epsilon, int bfloat, int threads) {
    const Norm n{places, channels, groups, weight, bias, epsilon};
    if (bfloat) return all(n, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), gain, offset, images, threads);
    all(n, static_cast<const float*>(x), static_cast<float*>(y), gain, offset, images, threads);
}
