// From logits and one uniform number a row to a token, on a CPU: temperature, top-k, top-p and the draw of filters.py in one go.
//
// Why: as some hundred operations over the vocabulary, each with a tensor of its own, the draw took longer than a small network.
//
// The tokens are those of filters.py, but where rounding decides.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

// A thread's room: p is filled up with zeros to whole vectors.
struct Row {
    std::vector<float> p;
    std::vector<int32_t> ids;
};

inline double total(floats v) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

// p = e^((x - max) / temperature), so at most 1; their sum.
double exponentials(const float* x, int64_t count, float temperature, std::vector<float>& p) {
    p.assign((count + LANES - 1) / LANES * LANES, -INFINITY);
    std::copy(x, x + count, p.begin());
    floats most = floats{} - INFINITY, sum = {};
    for (size_t i = 0; i < p.size(); i += LANES) {
        const floats v = load<floats>(&p[i]);
        most = most < v ? v : most;
    }
    float top = most[0];
    for (int lane = 1; lane < LANES; lane++) top = std::max(top, most[lane]);
    for (size_t i = 0; i < p.size(); i += LANES) {
        const floats scaled = (load<floats>(&p[i]) - top) / temperature;
        const floats value = scaled < -87.0f ? floats{} : exponential(scaled);
        store(&p[i], value);
        sum += value;
    }
    return total(sum);
}

// Zero all but {p >= t} for the largest t whose sum reaches ``target``; t is found bit by bit, for floats from 0 to 1 are ordered
// like their bits.
void nucleus(std::vector<float>& p, double target) {
    const auto kept = [](floats v, int32_t least) { return (floats)((ints)v & ((ints)v >= least)); };
    int32_t threshold = 0;
    for (int bit = 29; bit >= 0; bit--) {
        const int32_t candidate = threshold + (1 << bit);
        floats sums[4] = {};  // several, so that one addition need not wait for the other
        size_t i = 0;
        for (; i + 4 * LANES <= p.size(); i += 4 * LANES)
            for (int n = 0; n < 4; n++) sums[n] += kept(load<floats>(&p[i + n * LANES]), candidate);
        for (; i < p.size(); i += LANES) sums[0] += kept(load<floats>(&p[i]), candidate);
        if (total((sums[0] + sums[1]) + (sums[2] + sums[3])) >= target) threshold = candidate;
    }
    for (size_t i = 0; i < p.size(); i += LANES) store(&p[i], kept(load<floats>(&p[i]), threshold));
}

// Where the running sum of p passes ``uniform`` of the whole; never a place without probability. p is whole vectors.
int64_t place(const std::vector<float>& p, double uniform) {
    floats sums = {};
    for (size_t i = 0; i < p.size(); i += LANES) sums += load<floats>(&p[i]);
    const double wanted = uniform * total(sums);
    double sum = 0;
    int64_t last = int64_t(p.size()) - 1;
    while (last > 0 && !(p[last] > 0)) last--;
    for (int64_t i = 0; i <= last; i += LANES) {
        const double here = total(load<floats>(&p[i]));
        if (sum + here <= wanted) {
            sum += here;
            continue;
        }
        for (int64_t j = i; j < std::min<int64_t>(i + LANES, last); j++)
            if ((sum += p[j]) > wanted) return j;
    }
    return last;
}

int64_t token(const float* x, int64_t count, float uniform, float temperature, int64_t top_k, float top_p, Row& row) {
    if (temperature == 0) return std::max_element(x, x + count) - x;
    double whole = exponentials(x, count, temperature, row.p);
    if (top_k <= 0 || top_k >= count) {
        if (top_p < 1) nucleus(row.p, top_p * whole);
        return place(row.p, uniform);
    }
    // the likeliest first, as filters.py has them: the same number draws the same token
    row.ids.resize(count);
    std::iota(row.ids.begin(), row.ids.end(), 0);
    const auto first = [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
    std::nth_element(row.ids.begin(), row.ids.begin() + top_k - 1, row.ids.end(), first);
    std::sort(row.ids.begin(), row.ids.begin() + top_k, first);
    std::vector<float> kept((top_k + LANES - 1) / LANES * LANES);
    for (int64_t i = 0; i < top_k; i++) kept[i] = row.p[row.ids[i]];
    whole = std::accumulate(kept.begin(), kept.end(), 0.0);
    double before = 0;
    for (float& value : kept) {
        const float own = value;
        if (before >= top_p * whole) value = 0;
        before += own;
    }
    return row.ids[place(kept, uniform)];
}

}  // namespace

extern "C" {

// Draw a token for each row of logits (rows, count), ``stride`` numbers apart, with uniform (rows).
void digit_draw(const float* logits, int64_t rows, int64_t count, int64_t stride, int threads, const float* uniform,
                float temperature, int64_t top_k, float top_p, int64_t* tokens) {
#pragma omp parallel num_threads(threads)
    {
        Row own;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            tokens[row] = token(logits + row * stride, count, uniform[row], temperature, top_k, top_p, own);
    }
}
}
