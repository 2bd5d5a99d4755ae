// From logits and one uniform number a row to a token, on a CPU: guidance, temperature, top-k, top-p and the draw of sampling/logits.py in one go.
//
// Why: as some hundred operations over the vocabulary, each with a tensor of its own, the draw took longer than a small network.
//
// The tokens are those of sampling/logits.py, but where rounding decides.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

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

// What of v is at least the float with the bits ``least``; zero elsewhere.
inline floats kept(floats v, floats what, int32_t least) { return (floats)((ints)what & ((ints)v >= least)); }

// The bits of the largest t for which enough(the sum of value(p) over {p >= t}); 0 if there is none. It is found bit by bit, for floats
// from 0 to 1 are ordered like their bits: no sort of the vocabulary.
template <class Value, class Enough>
int32_t threshold(const std::vector<float>& p, Value value, Enough enough) {
    int32_t found = 0;
    for (int bit = 29; bit >= 0; bit--) {
        const int32_t candidate = found + (1 << bit);
        floats sums[4] = {};  // several, so that one addition need not wait for the other
        size_t i = 0;
        const auto add = [&](size_t at, int n) {
            const floats v = load<floats>(&p[at]);
            sums[n] += kept(v, value(v), candidate);
        };
        for (; i + 4 * LANES <= p.size(); i += 4 * LANES)
            for (int n = 0; n < 4; n++) add(i + n * LANES, n);
        for (; i < p.size(); i += LANES) add(i, 0);
        if (enough(total((sums[0] + sums[1]) + (sums[2] + sums[3])))) found = candidate;
    }
    return found;
}

inline floats itself(floats v) { return v; }
inline floats one(floats) { return floats{} + 1.0f; }

// The sum of value(p) over {p > t}.
template <class Value>
double above(const std::vector<float>& p, int32_t t, Value value) {
    floats sum = {};
    for (size_t i = 0; i < p.size(); i += LANES) {
        const floats v = load<floats>(&p[i]);
        sum += kept(v, value(v), t + 1);
    }
    return total(sum);
}

// Zero all below t, and of those that equal it, in the order of ids, all from the first that stay() refuses.
template <class Stay>
void cut(std::vector<float>& p, int32_t t, Stay stay) {
    for (size_t i = 0; i < p.size(); i += LANES) {
        const floats v = load<floats>(&p[i]);
        store(&p[i], kept(v, v, t));
    }
    bool open = true;
    for (float& value : p)
        if (__builtin_bit_cast(int32_t, value) == t && !(open = open && stay(value))) value = 0;
}

// Zero all but the k largest.
void largest(std::vector<float>& p, int64_t k) {
    const int32_t t = threshold(p, one, [&](double count) { return count >= k; });
    double count = above(p, t, one);
    cut(p, t, [&](float) { return count++ < k; });
}

// Zero all but the likeliest that begin before ``target``, the likeliest first; or, ``together``, without parting equal ones.
void nucleus(std::vector<float>& p, double target, bool together) {
    const int32_t t = threshold(p, itself, [&](double sum) { return sum >= target; });
    double before = above(p, t, itself);
    cut(p, t, [&](float value) {
        const bool stays = together || before < target;
        before += value;
        return stays;
    });
}

// Where the sum passes ``wanted``, the likeliest first and equal ones in the order of ids; never a place without probability.
int64_t ranked(const std::vector<float>& p, double wanted) {
    int32_t t = threshold(p, itself, [&](double sum) { return sum > wanted; });
    if (!t) {  // rounding can put ``wanted`` beyond the whole: then the least likely that there is
        float least = INFINITY;
        for (float value : p)
            if (value > 0) least = std::min(least, value);
        t = __builtin_bit_cast(int32_t, least);
    }
    double sum = above(p, t, itself);
    int64_t last = 0;
    for (size_t i = 0; i < p.size(); i++) {
        if (__builtin_bit_cast(int32_t, p[i]) != t) continue;
        last = int64_t(i);
        if ((sum += p[i]) > wanted) break;
    }
    return last;
}

// Where the sum passes ``wanted``, in the order of ids; never a place without probability.
int64_t place(const std::vector<float>& p, double wanted) {
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

int64_t token(const float* x, int64_t count, float uniform, float temperature, int64_t top_k, float top_p, std::vector<float>& p) {
    if (temperature == 0) return std::max_element(x, x + count) - x;
    double whole = exponentials(x, count, temperature, p);
    const bool few = 0 < top_k && top_k < count;
    if (few) {
        largest(p, top_k);
        whole = above(p, 0, itself);
    }
    if (top_p < 1) {
        nucleus(p, top_p * whole, !few);
        whole = above(p, 0, itself);
    }
    // the order of sampling/logits.py, so that the same number draws the same token
    return few ? ranked(p, uniform * whole) : place(p, uniform * whole);
}

}  // namespace
