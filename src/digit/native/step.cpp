// One token step of a causal transformer on a CPU, all layers in one go: norms, matrix products, attention over the key-value cache.
//
// Why: at a batch of 1 a step does little but read the weights, half a millisecond to a few; a general compiler's calls, copies
// and fork-joins between some sixty small operations cost more than that. Here one parallel region does the whole step.
//
// Matrices come packed (sampling/engines/native.py): strips of some outputs; within a strip the inputs follow one another, so a
// thread reads its strips from first byte to last. A vector lane is an output, so every output is one sum in the order of the inputs:
// the result depends neither on the batch nor on the threads.
//
// Three formats of weights, all summed in 32 bits:
//   float     products in float32
//   bfloat    products of bfloat16, sums in float32; with AVX-512 inputs are rounded to bfloat16, too
//   narrow    int8 weights with a scale an output; inputs rounded to 13 bits or so with a scale a row; sums are exact integers
//
// Vectors have the processor's width (vectors.h), and so have the blocks of sums that are kept in its registers. Instructions that
// compilers do not find by themselves are named.

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "draw.h"
#include "threads.h"
#include "vectors.h"

namespace {

using digit::Team;

typedef int16_t shorts __attribute__((vector_size(4 * LANES)));  // 2 to a lane
typedef int8_t bytes __attribute__((vector_size(2 * LANES)));    // 2 to a lane

#if defined(__AVX512F__)
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(DIGIT_AVX2)
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

constexpr int PANEL = 64, TILES = PANEL / LANES;  // outputs that a thread takes at a time, and their vectors
constexpr int64_t AHEAD = 4096;                   // bytes: a page
constexpr int64_t FEW = 8 << 20;                  // bytes of weights of a network that one thread runs alone
constexpr int64_t TOGETHER = 16;                  // from as many rows on they are normed in shares, and waited for
constexpr int64_t CHUNK = 12;                     // rows that a thread takes through the whole network at a time

#if defined(__AVX512F__)
constexpr int STRIP = 4, ROWS = 8;  // vectors of a strip, rows that share a reading of the weights
constexpr int vectors(int rows) { return rows * TILES <= 24 ? TILES : TILES / 2; }  // whose sums leave room in 32 registers
#else
constexpr int STRIP = 16 / LANES, ROWS = 6;
constexpr int vectors(int rows) { return LANES == 4 ? (rows < 3 ? 4 : 2) : rows < 2 ? 8 : rows < 4 ? 4 : 2; }  // in 16 registers
#endif

inline float widened(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, uint16_t& to) {  // to the nearest bfloat16, ties to even
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    to = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- formats of weights ---------------------------------------------------------------------------------------------------------

struct Float {
    using Input = float;
    using Sum = floats;
    using Weight = floats;
    static constexpr bool DIRECT = true;                            // inputs are taken as they are
    static constexpr int GROUP = 1, PARTS = 1, BYTES = 4 * LANES;  // inputs side by side, of a product; bytes of a vector of outputs
    static Weight read(const char* at, int) { return load<floats>(at); }
    static Sum add(Sum sum, Weight w, const Input* x) { return sum + w * x[0]; }
    static floats value(Sum sum, float, const float*) { return sum; }
    static float prepare(const float* row, Input* to, int64_t count) {
        std::copy_n(row, count, to);
        return 1;
    }
};

#if defined(__AVX512F__)
struct BFloat {
    using Input = uint16_t;
    using Sum = floats;
    using Weight = ints;  // a pair of neighbouring inputs in each lane
    static constexpr bool DIRECT = false;
    static constexpr int GROUP = 2, PARTS = 1, BYTES = 4 * LANES;
    static Weight read(const char* at, int) { return load<ints>(at); }
    static Sum add(Sum sum, Weight w, const Input* x) {
#ifdef __AVX512BF16__
        return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(load<int32_t>(x)));
#else
        return sum + (floats)(w << 16) * widened(x[0]) + (floats)(w & ~0xffff) * widened(x[1]);
#endif
    }
    static floats value(Sum sum, float, const float*) { return sum; }
    static float prepare(const float* row, Input* to, int64_t count) {
        for (int64_t i = 0; i < count; i++) narrow(row[i], to[i]);
        return 1;
    }
};
#else
struct BFloat {  // a pair of neighbouring inputs in each lane; first one of them is widened and multiplied, then the other
    using Input = float;
    using Sum = floats;
    using Weight = floats;
    static constexpr bool DIRECT = true;
    static constexpr int GROUP = 2, PARTS = 2, BYTES = 4 * LANES;
    static Weight read(const char* at, int part) {
        const ints pair = load<ints>(at);
        return (floats)(part ? pair & ~0xffff : pair << 16);
    }
    static Sum add(Sum sum, Weight w, const Input* x) { return sum + w * x[0]; }
    static floats value(Sum sum, float, const float*) { return sum; }
    static float prepare(const float* row, Input* to, int64_t count) { return Float::prepare(row, to, count); }
};
#endif

struct Narrow {
    using Input = int16_t;
    using Sum = ints;
    using Weight = shorts;  // pairs again
    static constexpr bool DIRECT = false;
    static constexpr int GROUP = 2, PARTS = 1, BYTES = 2 * LANES;
    static Weight read(const char* at, int) {
#if defined(DIGIT_AVX2)
        return (shorts)_mm256_cvtepi8_epi16((__m128i)load<bytes>(at));  // for which g++ 12 takes four instructions
#else
        return __builtin_convertvector(load<bytes>(at), shorts);
#endif
    }
    static Sum add(Sum sum, Weight w, const Input* x) {
#if defined(__AVX512VNNI__)
        return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(load<int32_t>(x)));
#elif defined(DIGIT_AVX2)
        return sum + (ints)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(load<int32_t>(x)));
#else
        return sum + (((ints)w << 16) >> 16) * x[0] + ((ints)w >> 16) * x[1];
#endif
    }
    static floats value(Sum sum, float row_scale, const float* scale) {
        return __builtin_convertvector(sum, floats) * load<floats>(scale) * row_scale;
    }
    static float prepare(const float* row, Input* to, int64_t count) {
        float most = 1e-30f;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < count; i++) most = std::max(most, std::fabs(row[i]));
        const float limit = std::min(32767.0f, std::floor(2147483647.0f / 127 / float(count)));  // no sum can overflow
        const float unit = limit / most;
        for (int64_t i = 0; i < count; i++) to[i] = int16_t(row[i] * unit + (row[i] < 0 ? -0.5f : 0.5f));
        return most / limit;
    }
};

// ---- functions of vectors -------------------------------------------------------------------------------------------------------

// Lane i of the result is the sum over the lanes of v[i]. Each round adds neighbours and halves the number of vectors.
inline floats totals(floats (&v)[LANES]) {
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; i++) v[i] = SHUFFLE(v[2 * i], v[2 * i + 1], EVEN) + SHUFFLE(v[2 * i], v[2 * i + 1], ODD);
    return v[0];
}

// x Phi(x), with the error function of Abramowitz & Stegun 7.1.26: 1.5e-7 at most from the exact one.
inline floats gelu(floats x) {
    const floats z = (x < 0.0f ? -x : x) * 0.70710678f;
    const floats t = 1.0f / (z * 0.3275911f + 1.0f);
    floats p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const floats tail = p * t * exponential(-z * z);  // 1 - erf(z)
    return x * 0.5f * (x < 0.0f ? tail : 2.0f - tail);
}

}  // namespace

// ---- what Python hands over (mirrored in sampling/engines/native.py) -------------------------------------------------------

extern "C" {

struct Matrix {
    const char* weight;
    const float *scale, *bias;  // of the padded outputs; scale of int8 only
    int64_t inputs, outputs;    // outputs padded to whole panels
};

struct Norm {
    const float *weight, *bias;  // null where nothing is normalised
};

struct Layer { Matrix qkv, out, ffn_in, ffn_out; };

struct Network {
    const Layer* layers;
    const Norm* norms;  // before each half of a layer and before the head: 2 x depth + 1
    Matrix head;
    int64_t depth, width, heads, hidden;
    int64_t post_norm;   // the residual stream itself is normalised, not a copy of it
    int64_t weights;     // 0 float32, 1 bfloat16, 2 int8
    int64_t half_cache;  // keys and values in bfloat16
    float epsilon;
};

struct Cache {
    void* const* keys;  // of each layer (rows, heads, positions, head width)
    void* const* values;
    int64_t row, head;  // strides in numbers; positions follow one another
};

// A batch whose tokens are drawn.
struct Batch {
    // vectors of the tokens (vocab, width) and of their places (1 + length, width); bfloat16 where the cache is
    const void *table, *places;
    float embedding_scale;  // of the tokens' vectors
    int64_t rows, length, vocab, depth, prefix;  // vocab of each of ``depth`` codebooks, which take turns
    int64_t* tokens;       // (rows, length)
    const uint8_t* free;   // (rows, length), 0 where a token stays
    const float* uniform;  // (rows, length)
    const float* scale;    // (length), of guidance
    const float* starts;   // (rows or twice as many, width), what stands before token 0; null where token 0 is not drawn
    float temperature, top_p;
    int64_t top_k;
};
}

namespace {

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Where the numbers of a step lie, in one piece of memory that Python keeps. Of some every thread has its own.
struct Room {
    char* end;
    int64_t stride, deep, kv_len;               // numbers of a row of inputs and of inner, and of a thread's scores
    int64_t own_size;                           // numbers of what a thread works out at a time
    float *q, *mixed, *inner, *scores;
    float *normed, *own, *scales, *inputs;      // of each thread: a normed row, what it works out, inputs of the next product in its format

    Room(const Network& net, int64_t rows, int64_t threads, int64_t positions, char* start) : end(start) {
        const int64_t width = net.width;
        stride = padded(std::max(net.width, net.hidden), PANEL);
        deep = padded(net.hidden, PANEL), kv_len = padded(positions, LANES), own_size = std::max(rows * PANEL, stride);
        q = take(rows * width), mixed = take(rows * width), inner = take(rows * deep), scores = take(threads * kv_len);
        normed = take(threads * width), own = take(threads * own_size);
        scales = take(threads * rows), inputs = take(threads * rows * stride);
    }

    float* take(int64_t count) {
        char* here = end;
        end += padded(count * 4, 64);
        return reinterpret_cast<float*>(here);
    }
};

// Tasks that threads share at most.
int64_t most_tasks(const Network& net, int64_t rows) {
    const int64_t outputs = std::max({padded(3 * net.width, PANEL), padded(net.hidden, PANEL), net.head.outputs});
    return std::max(rows * net.heads, outputs / PANEL);
}

// M rows times some vectors of one panel, from ``first`` on, as many at a time as leave the sums in registers: so up to ROWS rows read
// each weight once. What is read ``ahead`` bytes from here is fetched meanwhile: processors alone do not look across pages.
template <class T, int M>
void block(const Matrix& a, int64_t panel, int first, int last, const typename T::Input* x, int64_t stride, const float* scales,
           int64_t ahead, floats (*y)[TILES]) {
    constexpr int N = vectors(M), STEP = T::BYTES * STRIP;
    const int64_t steps = a.inputs / T::GROUP;
    for (; first < last; first += N) {
        const char* at = a.weight + (panel * TILES + first) / STRIP * steps * STEP + first % STRIP * T::BYTES;
        const int64_t strip = steps * STEP;
        typename T::Sum sum[M][N] = {};
        for (int64_t k = 0; k < steps; k++, at += STEP) {
            for (int r = 0; r < N; r += STRIP)
                for (int i = 0; i < T::BYTES * std::min(N, STRIP); i += 64) __builtin_prefetch(at + r / STRIP * strip + ahead + i, 0, 2);
            for (int part = 0; part < T::PARTS; part++) {
                typename T::Weight w[N];
                for (int r = 0; r < N; r++) w[r] = T::read(at + r / STRIP * strip + r % STRIP * T::BYTES, part);
                for (int m = 0; m < M; m++)
                    for (int r = 0; r < N; r++) sum[m][r] = T::add(sum[m][r], w[r], x + m * stride + k * T::GROUP + part);
            }
        }
        for (int m = 0; m < M; m++)
            for (int r = 0; r < N; r++) {
                const int64_t n = panel * PANEL + (first + r) * LANES;
                y[m][first + r] = T::value(sum[m][r], scales[m], a.scale + n) + load<floats>(a.bias + n);
            }
    }
}

template <class T, int... M>
constexpr auto blocks(std::integer_sequence<int, M...>) {
    return std::array<decltype(&block<T, 1>), sizeof...(M)>{block<T, M + 1>...};
}

// One panel of x (rows, inputs) times a matrix; done(row, first output within the panel, LANES results) takes it.
template <class T, class Done>
void multiply(const Matrix& a, int64_t panel, const typename T::Input* x, int64_t stride, const float* scales, int rows, Done done) {
    constexpr auto functions = blocks<T>(std::make_integer_sequence<int, ROWS>());
    const int64_t size = a.inputs / T::GROUP * T::BYTES * STRIP;
    const int parts = (rows + ROWS - 1) / ROWS;
    const int span = parts == 1 ? TILES : std::max(STRIP, vectors(3));  // vectors that stay in the cache from rows to rows
    for (int begin = 0; begin < TILES; begin += span)
        for (int part = 0; part < parts; part++) {
            const int first = rows * part / parts, count = rows * (part + 1) / parts - first;
            floats y[ROWS][TILES];
            functions[count - 1](a, panel, begin, begin + span, x + first * stride, stride, scales + first,
                                 parts == 1 ? AHEAD : part == parts - 1 ? size : 0, y);
            for (int m = 0; m < count; m++)
                for (int r = begin; r < begin + span; r++) done(first + m, r * LANES, y[m][r]);
        }
}

void normalise(const float* x, const Norm& norm, float epsilon, int64_t width, float* to) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += x[i];
    const float mean = sum / float(width);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    const float unit = 1 / std::sqrt(square / float(width) + epsilon);
    for (int64_t i = 0; i < width; i++) to[i] = (x[i] - mean) * unit * norm.weight[i] + norm.bias[i];
}

// N vectors of values at each position, weighted by p and divided by their sum.
template <int N, class C>
inline void mix(const float* p, const C* values, int64_t d, int64_t count, float whole, float* out) {
    floats sum[N] = {};
    for (int64_t t = 0; t < count; t++)
        for (int n = 0; n < N; n++) sum[n] += p[t] * widened(values + t * d + n * LANES);
    for (int n = 0; n < N; n++) store(out + n * LANES, sum[n] / whole);
}

// The products of q with ``here`` keys, at most as many as there are lanes.
template <class C>
inline floats products(const float* q, const C* keys, int64_t d, int64_t here) {
    floats part[LANES] = {};
    if (LANES < 16 && here == LANES) {  // so many stay in registers, if the compiler knows their number
        for (int64_t i = 0; i < d; i += LANES)
#pragma GCC unroll 8
            for (int64_t j = 0; j < LANES; j++) part[j] += load<floats>(q + i) * widened(keys + j * d + i);
    } else {
        for (int64_t j = 0; j < here; j++)
            for (int64_t i = 0; i < d; i += LANES) part[j] += load<floats>(q + i) * widened(keys + j * d + i);
    }
    return totals(part);
}

// Attend with one head's q (d) to everything up to ``position``.
template <class C>
void attend(const float* q, const C* keys, const C* values, int64_t d, int64_t position, float* p, float* out) {
    const float unit = 1 / std::sqrt(float(d));
    const int64_t count = position + 1;
    floats most = floats{} - INFINITY, sum = {};
    for (int64_t t = 0; t < count; t += LANES) {
        const int64_t here = std::min<int64_t>(LANES, count - t);
        floats score = products(q, keys + t * d, d, here) * unit;
        for (int64_t j = here; j < LANES; j++) score[j] = -INFINITY;
        store(p + t, score);
        most = most < score ? score : most;
    }
    float top = most[0], whole = 0;
    for (int i = 1; i < LANES; i++) top = std::max(top, most[i]);
    for (int64_t t = 0; t < count; t += LANES) {
        const floats weight = exponential(load<floats>(p + t) - top);
        store(p + t, weight);
        sum += weight;
    }
    for (int i = 0; i < LANES; i++) whole += sum[i];
    int64_t i = 0;
    for (; i + 64 <= d; i += 64) mix<64 / LANES>(p, values + i, d, count, whole, out + i);
    if (LANES < 16)
        for (; i + 4 * LANES <= d; i += 4 * LANES) mix<4>(p, values + i, d, count, whole, out + i);
    for (; i < d; i += LANES) mix<1>(p, values + i, d, count, whole, out + i);
}

constexpr auto nothing = [](auto...) {};

// A step with weights of format T, by one of the threads at work.
template <class T>
void step(const Network& net, const Cache& cache, Team::Member& member, int rows, int64_t position, float* x, const Room& room,
          float* logits) {
    using Input = typename T::Input;
    const int64_t width = net.width, d = width / net.heads;
    const bool shared = member.all > 1 && rows >= TOGETHER;  // else every thread computes norms and inputs of all rows for itself
    const int64_t mine = shared ? 0 : member.me;
    float *normed = room.normed + member.me * width, *own = room.own + member.me * room.own_size;
    float *scales = room.scales + mine * rows, *p = room.scores + member.me * room.kv_len, own_scale = 1;
    auto* inputs = reinterpret_cast<Input*>(room.inputs + mine * rows * room.stride);
    auto* own_inputs = reinterpret_cast<Input*>(own);

    // ``from`` (rows, count), normed before where there is a norm, times a matrix; done(n)(row, results of ``act``) takes them
    const auto product = [&](const Matrix& a, const Norm* norm, const float* from, int64_t stride, int64_t count, auto act, auto done) {
        const auto prepare = [&](int64_t row, Input* to, float& scale) {
            const float* numbers = from + row * stride;
            if (norm) normalise(numbers, *norm, net.epsilon, count, normed), numbers = normed;
            scale = T::prepare(numbers, to, count);
        };
        const auto panels = [&](const Input* numbers, int64_t apart, const auto& begin) {
            const auto compute = [&](int64_t panel) {
                const auto keep = [&](int64_t row, int64_t n, floats y) { store(own + row * PANEL + n, act(y)); };
                multiply<T>(a, panel, numbers, apart, scales, rows, keep);
            };
            const auto commit = [&](int64_t panel) {
                for (int64_t n = 0; n < PANEL; n += LANES) {
                    const auto take = done(panel * PANEL + n);
                    for (int64_t row = 0; row < rows; row++) take(row, load<floats>(own + row * PANEL + n));
                }
            };
            member.share(a.outputs / PANEL, begin, compute, commit);
        };
        if constexpr (T::DIRECT)
            if (!norm) return panels(from, stride, nothing);
        const auto all = [&] {
            for (int64_t row = 0; row < rows; row++) prepare(row, inputs + row * room.stride, scales[row]);
        };
        if (!shared) return panels(inputs, room.stride, all);
        const auto one = [&](int64_t row) { prepare(row, own_inputs, own_scale); };
        member.share(rows, nothing, one, [&](int64_t row) {
            std::copy_n(own_inputs, count, inputs + row * room.stride);
            scales[row] = own_scale;
        });
        panels(inputs, room.stride, nothing);
    };
    // before a half of a layer: the norm of its inputs, if it is not the residual stream itself that is normed
    const auto enter = [&](const Norm& norm) -> const Norm* {
        if (!norm.weight || !net.post_norm) return norm.weight ? &norm : nullptr;
        const auto compute = [&](int64_t row) { normalise(x + row * width, norm, net.epsilon, width, own); };
        member.share(rows, nothing, compute, [&](int64_t row) { std::copy_n(own, width, x + row * width); });
        return nullptr;
    };
    const auto same = [](floats y) { return y; };
    const auto into = [](float* numbers, int64_t stride) {
        return [=](int64_t n) { return [=](int64_t row, floats y) { store(numbers + row * stride + n, y); }; };
    };
    const auto residual = [&](int64_t n) {
        return [&, n](int64_t row, floats y) {
            float* to = x + row * width + n;
            if (n < width) store(to, load<floats>(to) + y);  // not where a panel is filled up
        };
    };
    const auto in_cache = [&](int64_t l, auto run) {
        if (net.half_cache) return run((uint16_t*)cache.keys[l], (uint16_t*)cache.values[l]);
        run((float*)cache.keys[l], (float*)cache.values[l]);
    };

    for (int64_t l = 0; l < net.depth; l++) {
        const Layer& layer = net.layers[l];
        const Norm* norm = enter(net.norms[2 * l]);
        in_cache(l, [&](auto* keys, auto* values) {
            product(layer.qkv, norm, x, width, width, same, [&](int64_t n) {
                const int64_t part = n / width, at = n % width;
                auto* to = (part == 1 ? keys : values) + at / d * cache.head + position * d + at % d;
                return [&, part, at, to](int64_t row, floats y) {
                    if (part == 0) store(room.q + row * width + at, y);
                    if (part == 1 || part == 2) narrow(y, to + row * cache.row);
                };
            });
            const auto place = [&](int64_t task) { return task / net.heads * width + task % net.heads * d; };  // of a head of a row
            const auto compute = [&](int64_t task) {
                const int64_t offset = task / net.heads * cache.row + task % net.heads * cache.head;
                attend(room.q + place(task), keys + offset, values + offset, d, position, p, own);
            };
            member.share(rows * net.heads, nothing, compute, [&](int64_t task) { std::copy_n(own, d, room.mixed + place(task)); });
        });
        product(layer.out, nullptr, room.mixed, width, width, same, residual);
        norm = enter(net.norms[2 * l + 1]);
        product(layer.ffn_in, norm, x, width, width, gelu, into(room.inner, room.deep));
        product(layer.ffn_out, nullptr, room.inner, room.deep, net.hidden, same, residual);
    }
    const Norm* norm = enter(net.norms[2 * net.depth]);
    product(net.head, norm, x, width, width, same, into(logits, net.head.outputs));
}

// Whether every thread takes rows of its own through the whole network. It reads all weights then, so they must be few enough to stay
// in the processor's cache; but it waits for nobody, and what one layer leaves for the next does not travel between the cores.
bool small(const Network& net) {
    const int64_t bytes = net.weights == 0 ? 4 : net.weights == 1 ? 2 : 1;
    const int64_t layer = (4 * net.width + 2 * net.hidden) * net.width;
    return net.depth * layer * bytes <= FEW;
}

// The keys and values of some rows alone.
struct Rows {
    std::vector<void*> keys, values;
    Cache cache;

    Rows(const Network& net, const Cache& whole, int64_t first) : keys(net.depth), values(net.depth) {
        const int64_t bytes = first * whole.row * (net.half_cache ? 2 : 4);
        for (int64_t l = 0; l < net.depth; l++) {
            keys[l] = static_cast<char*>(whole.keys[l]) + bytes;
            values[l] = static_cast<char*>(whole.values[l]) + bytes;
        }
        cache = {keys.data(), values.data(), whole.row, whole.head};
    }
};

using Step = decltype(&step<Float>);
Step step_of(const Network& net) { return net.weights == 0 ? step<Float> : net.weights == 1 ? step<BFloat> : step<Narrow>; }

// The vector of a token at its place, rounded as a model of C rounds it.
template <class C>
void embed(const Batch& b, int64_t token, int64_t place, int64_t width, float* to) {
    const C *vector = (const C*)b.table + token * width, *at = (const C*)b.places + place * width;
    const auto wide = [](C x) {
        if constexpr (sizeof(C) == 4) return x;
        else return widened(x);
    };
    for (int64_t i = 0; i < width; i++) {
        C scaled, sum;
        narrow(wide(vector[i]) * b.embedding_scale, scaled);
        narrow(wide(scaled) + wide(at[i]), sum);
        to[i] = wide(sum);
    }
}

// Draw tokens begin to end - 1 of some rows, one after the other, by the threads at work.
void draw_rows(const Network& net, const Cache& cache, const Batch& b, Team::Member& member, int64_t first, int64_t count, int64_t begin,
               int64_t end, bool guided, char* start) {
    const int64_t outputs = net.head.outputs, alone = count * net.width;
    const bool joined = guided && count == b.rows;  // rows with and without a label follow one another in the cache: one step for both
    const int64_t rows = joined ? 2 * count : count, runs = guided && !joined ? 2 : 1;
    const Rows with(net, cache, first), without(net, cache, guided ? b.rows + first : first);
    Room room(net, rows, member.all, b.prefix + b.length, start);
    float *x = room.take(2 * alone), *logits = room.take(2 * count * outputs);
    std::vector<float> scratch, guide(guided ? b.vocab : 0);
    const auto feed = [&](int64_t row, int64_t index) {  // what stands before a token
        float *to = x + row * net.width, *other = to + alone;
        if (index) {
            const int64_t token = b.tokens[(first + row) * b.length + index - 1];
            (net.half_cache ? embed<uint16_t> : embed<float>)(b, token, index, net.width, to);
            if (guided) std::copy_n(to, net.width, other);
        } else {
            std::copy_n(b.starts + (first + row) * net.width, net.width, to);
            if (guided) std::copy_n(b.starts + (b.rows + first + row) * net.width, net.width, other);
        }
    };
    const Step run = step_of(net);
    member.share(count, nothing, nothing, [&](int64_t row) { feed(row, begin); });
    for (int64_t index = begin; index < end; index++) {
        run(net, with.cache, member, int(rows), b.prefix + index, x, room, logits);
        if (runs == 2) run(net, without.cache, member, int(rows), b.prefix + index, x + alone, room, logits + count * outputs);
        const int64_t code = index % b.depth * b.vocab;  // the first of this token's codebook
        int64_t drawn = 0;
        const auto draw = [&](int64_t row) {
            const int64_t at = (first + row) * b.length + index;
            const float *c = logits + row * outputs + code, *u = c + count * outputs;
            if (!b.free[at]) return;
            for (int64_t i = 0; guided && i < b.vocab; i++) guide[i] = u[i] + b.scale[index] * (c[i] - u[i]);
            drawn = code + token(guided ? guide.data() : c, b.vocab, b.uniform[at], b.temperature, b.top_k, b.top_p, scratch);
        };
        member.share(count, nothing, draw, [&](int64_t row) {
            const int64_t at = (first + row) * b.length + index;
            if (b.free[at]) b.tokens[at] = drawn;
            if (index + 1 < end) feed(row, index + 1);
        });
    }
}

int64_t room_of_rows(const Network& net, const Batch& b, int64_t count, int64_t threads) {
    Room room(net, 2 * count, threads, b.prefix + b.length, nullptr);
    room.take(2 * count * (net.width + net.head.outputs) + 64);
    return room.end - (char*)nullptr;
}

// Rows that a thread takes at a time: so few that none waits long for the last, and so many that all take equally often.
int64_t chunk(int64_t rows, int64_t threads) {
    const int64_t times = std::max<int64_t>(2, (rows + CHUNK * threads - 1) / (CHUNK * threads));  // of each thread
    return (rows + times * threads - 1) / (times * threads);
}

}  // namespace

extern "C" {

// Bytes that digit_tokens needs for such batches.
int64_t digit_tokens_room(const Network* net, const Batch* batch, int threads) {
    if (!small(*net)) return room_of_rows(*net, *batch, batch->rows, threads);
    return threads * room_of_rows(*net, *batch, chunk(batch->rows, threads), 1);
}

// Draw tokens begin to end - 1 of a batch, from what the cache holds of those before begin - 1. With guidance the cache has the rows
// without a label after those with one.
void digit_tokens(const Network* net, const Cache* cache, const Batch* batch, int threads, int64_t begin, int64_t end, int guided, char* start) {
    const auto draw = [&](Team::Member& member, int64_t first, int64_t count, char* room) {
        draw_rows(*net, *cache, *batch, member, first, count, begin, end, guided, room);
    };
    if (!small(*net)) {
        const int64_t rows = (guided ? 2 : 1) * batch->rows;
        return Team::run(threads, most_tasks(*net, rows), [&](Team::Member& member) { draw(member, 0, batch->rows, start); });
    }
    const int64_t each = chunk(batch->rows, threads), size = room_of_rows(*net, *batch, each, 1);
    std::atomic<int64_t> next{0};
    Team::run(int(std::min<int64_t>(threads, batch->rows)), 0, [&](const Team::Member& member) {
        Team::Member alone{nullptr, 0, 1, 0};
        for (int64_t first; (first = each * next++) < batch->rows;)  // a thread that has less of its core takes fewer
            draw(alone, first, std::min(each, batch->rows - first), start + member.me * size);
    });
}

// Outputs of a strip of packed weights.
int64_t digit_strip() { return STRIP * LANES; }

// Bytes that a step needs besides its inputs and outputs.
int64_t digit_room(const Network* net, int64_t rows, int64_t threads, int64_t positions) {
    return Room(*net, rows, threads, positions, nullptr).end - (char*)nullptr;
}

// Run x (rows, width), embeddings of the token at ``position`` of the cache, through the network: logits (rows, padded outputs).
// x is overwritten.
void digit_step(const Network* net, const Cache* cache, int threads, int rows, int64_t position, float* x, char* start, float* logits) {
    const Room room(*net, rows, threads, position + 1, start);
    const auto run = [&](Team::Member& member) { step_of(*net)(*net, *cache, member, rows, position, x, room, logits); };
    Team::run(threads, most_tasks(*net, rows), run);
}
}
