// The selected convolution of one image: gates, selection, gathering of weights, convolution, scale, shift and ReLU.
//
// Maps are (channels, height * width) in float32. A filter is as wide as high, and as many zeros surround the map as it
// has positions on either side of its centre. Weights are gathered for the kept outputs and the present inputs only,
// scaled by the gates on the way, into panels of PANEL rows; tiles of PANEL rows times BLOCK positions are then summed
// up in registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, PANEL = 8, VECTORS = 3;
#else
constexpr int LANES = 8, PANEL = 4, VECTORS = 3;
#endif
constexpr int BLOCK = LANES * VECTORS;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// M rows times N vectors: result[m] = start[m] + sum over steps of w[step][m] * b[offsets[step] ...].
template <int M, int N>
void tile(const float* w, const float* b, const int64_t* offsets, int64_t steps, const float* start, float* result) {
    Vector sums[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = start[m] - Vector{};
    for (int64_t step = 0; step < steps; ++step, w += PANEL) {
        const float* row = b + offsets[step];
        Vector x[N];
        for (int n = 0; n < N; ++n) x[n] = *reinterpret_cast<const Vector*>(row + n * LANES);
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) sums[m][n] += w[m] * x[n];
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) *reinterpret_cast<Vector*>(result + m * BLOCK + n * LANES) = sums[m][n];
}

using Tile = void (*)(const float*, const float*, const int64_t*, int64_t, const float*, float*);

template <int M = PANEL>
Tile tile_of(int rows, int vectors) {
    static_assert(VECTORS == 3, "one case per number of vectors");
    if constexpr (M > 1)
        if (rows < M) return tile_of<M - 1>(rows, vectors);
    return vectors == 1 ? tile<M, 1> : vectors == 2 ? tile<M, 2> : tile<M, 3>;
}

// Asks for memory that is read soon: the processor cannot foresee which row comes next.
void fetch(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}
constexpr int64_t ROWS = 4, PART = 64;  // rows of a predictor that are added up at a time, and before a new sum

// Larger numbers have larger keys, and of equal ones the first has the largest.
uint64_t key(float value, int64_t place) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(bits) << 32 | uint32_t(~uint32_t(place));
}

// What a call needs besides its arguments; kept by the calling thread, since every layer asks for about as much.
struct Scratch {
    std::vector<float> gates, panels, starts, inputs, sums;
    std::vector<int64_t> offsets, local;
    std::vector<uint64_t> keys;
};
thread_local Scratch scratch;

template <class T>
T* of_size(std::vector<T>& memory, int64_t size) {
    if (int64_t(memory.size()) < size) memory.resize(size);
    return memory.data();
}

}  // namespace

extern "C" {

struct Layer {
    const float* phi;         // (in_channels, dynamic)
    const float* phi_bias;    // (dynamic)
    const float* weight;      // (rows, in_channels, side * side), static rows first
    const float* terms;       // (2, rows): bias and beta
    const float* gamma;       // (rows)
    const int64_t* numbers;   // (rows): which of all channels a row is
    int64_t in_channels, rows, statics, dynamic, places, side, stride;
};

// Args:
//   x: (inputs, height * width); index: their channel numbers, or null for all; pooled: their means, (inputs).
//   relu: whether negative results become 0.
//   out: (statics + places, down * across), where a side of the result is (side of the map - 1) / stride + 1; kept:
//   their channel numbers, by ascending row; means: of `out` over positions.
void afds_gated_conv(const Layer* layer, const float* x, const int64_t* index, const float* pooled, int64_t inputs,
                     int64_t height, int64_t width, int64_t relu, int64_t threads, float* out, int64_t* kept,
                     float* means) {
    const Layer& l = *layer;
    const int64_t taps = l.side * l.side, edge = l.side / 2, stride = l.stride;
    const int64_t steps = inputs * taps, outputs = l.statics + l.places;
    const int64_t down = (height - 1) / stride + 1, across = (width - 1) / stride + 1, area = down * across;
    // Filters of one position read the map itself; for others it is copied with zeros around, one plane for each of the
    // stride * stride places of a position, so that a tap is the same distance away everywhere in a plane. Where a line
    // ends with zeros, the next needs none before it.
    const bool direct = l.side == 1 && stride == 1;
    const int64_t reach = (l.side - 1) / stride;
    const int64_t length = direct ? area : across;
    const int64_t line = direct ? area : stride == 1 ? across + edge : across + reach;
    const int64_t plane = (down + reach) * line + edge, padded = plane * stride * stride;
    const int64_t positions = direct ? area : (down - 1) * line + across;
    // As many panels for each thread, unless there are so many threads that they must share them.
    const int64_t fewest = (outputs + PANEL - 1) / PANEL, even = (fewest + threads - 1) / threads * threads;
    const bool apart = even * PANEL <= 2 * outputs;
    const int64_t panels = apart ? even : fewest, tall = (outputs + panels - 1) / panels;
    const int64_t blocks = (positions + BLOCK - 1) / BLOCK;

    float *gates = of_size(scratch.gates, 2 * l.dynamic), *starts = of_size(scratch.starts, panels * PANEL);
    float* packed = of_size(scratch.panels, (apart ? threads : panels) * steps * PANEL);
    // Tiles read past the end of the last channels, which are therefore copied in any case.
    const int64_t tail = std::min(inputs, (LANES + area - 1) / area);
    float* copied = of_size(scratch.inputs, (direct ? tail * area : inputs * padded) + BLOCK);
    float* sums = of_size(scratch.sums, panels * blocks * PANEL);
    int64_t *offsets = of_size(scratch.offsets, steps), *local = of_size(scratch.local, outputs);
    uint64_t* keys = of_size(scratch.keys, l.dynamic);
    const float* source = direct ? x : copied;

    const auto channel = [&](int64_t i) { return index ? index[i] : i; };
    const auto pack = [&](int64_t panel, float* to) {
        const int64_t top = panel * tall, rows = std::min(tall, outputs - top);
        if (rows <= 0) return;  // what a multiple of the threads leaves over
        const float* filters[PANEL];
        float etas[PANEL];
        for (int64_t r = 0; r < PANEL; ++r) {
            const int64_t row = local[top + std::min(r, rows - 1)];
            const float eta = row < l.statics ? l.gamma[row] : std::max(gates[row - l.statics], 0.0f);
            // A selected channel whose importance is 0 is not computed: neither scale nor shift.
            const float beta = row < l.statics || eta > 0 ? l.terms[l.rows + row] : 0.0f;
            starts[panel * PANEL + r] = eta * l.terms[row] + beta;
            filters[r] = l.weight + row * l.in_channels * taps;
            etas[r] = eta;
            const int64_t next = top + tall + r;
            if (r < tall && next < outputs)
                fetch(l.weight + local[next] * l.in_channels * taps, l.in_channels * taps);
        }
        for (int64_t i = 0; i < inputs; ++i) {
            const int64_t at = channel(i) * taps;
            for (int64_t t = 0; t < taps; ++t, to += PANEL)
                for (int64_t r = 0; r < PANEL; ++r) to[r] = etas[r] * filters[r][at + t];
        }
    };
    const auto compute = [&](int64_t panel, int64_t block, const float* weights) {
        const int64_t top = panel * tall, rows = std::min(tall, outputs - top);
        if (rows <= 0) return;
        const int64_t first = block * BLOCK, count = std::min<int64_t>(BLOCK, positions - first);
        float result[PANEL * BLOCK];
        tile_of(int(rows), int((count + LANES - 1) / LANES))(
            weights, source + first, offsets, steps, starts + panel * PANEL, result);
        for (int64_t r = 0; r < rows; ++r) {
            float* values = result + r * BLOCK;
            if (relu)
                for (int64_t p = 0; p < count; ++p) values[p] = std::max(values[p], 0.0f);
            float* to = out + (top + r) * area;
            float sum = 0;
            for (int64_t p = 0; p < count;) {  // line by line; a map that is read directly is one line
                const int64_t y = (first + p) / line, column = (first + p) % line;
                const int64_t run = std::min(line - column, count - p);
                const int64_t inside = std::max<int64_t>(0, std::min(length - column, run));
                std::copy_n(values + p, inside, to + y * across + column);
                for (int64_t i = 0; i < inside; ++i) sum += values[p + i];
                p += run;
            }
            sums[(panel * PANEL + r) * blocks + block] = sum;
        }
    };

#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        if (l.places) {
            const int64_t first = l.dynamic * me / team, last = l.dynamic * (me + 1) / team;
            std::copy(l.phi_bias + first, l.phi_bias + last, gates + first);
            // Part by part, for long sums of small numbers round more: selections at their edge would differ.
            float* part = gates + l.dynamic;
            for (int64_t begin = 0; begin < inputs; begin += PART) {
                std::fill(part + first, part + last, 0.0f);
                for (int64_t i = begin; i < std::min(begin + PART, inputs); i += ROWS) {
                    const float* rows[ROWS];
                    float by[ROWS];
                    for (int64_t r = 0; r < ROWS; ++r) {
                        rows[r] = l.phi + channel(std::min(i + r, inputs - 1)) * l.dynamic;
                        by[r] = i + r < inputs ? pooled[i + r] : 0;
                        if (i + r + ROWS < inputs)
                            fetch(l.phi + channel(i + r + ROWS) * l.dynamic + first, last - first);
                    }
                    for (int64_t d = first; d < last; ++d)
                        part[d] +=
                            (by[0] * rows[0][d] + by[1] * rows[1][d]) + (by[2] * rows[2][d] + by[3] * rows[3][d]);
                }
                for (int64_t d = first; d < last; ++d) gates[d] += part[d];
            }
        }
        if (!direct) {
            const int64_t first = inputs * me / team, last = inputs * (me + 1) / team;
            for (int64_t i = first; i < last; ++i) {
                float* to = copied + i * padded;
                const float* from = x + i * height * width;
                std::fill(to, to + padded, 0.0f);
                for (int64_t y = 0; y < height; ++y) {
                    const int64_t low = (y + edge) / stride, py = (y + edge) % stride;
                    if (low >= down + reach) break;
                    for (int64_t px = 0; px < stride; ++px) {
                        float* at = to + (py * stride + px) * plane + low * line;
                        // The first column of the plane that lies in the map, and its column there.
                        const int64_t c = (edge - px + stride - 1) / stride * (edge > px);
                        const int64_t begin = c * stride + px - edge;
                        const int64_t end = std::min(line, c + (width - begin + stride - 1) / stride);
                        if (stride == 1)
                            std::copy_n(from + y * width, width, at + c);
                        else
                            for (int64_t k = c; k < end; ++k) at[k] = from[y * width + begin + (k - c) * stride];
                    }
                }
            }
        }
        if (me == team - 1) {  // while the first one, which then selects, goes on
            int64_t* to = offsets;
            for (int64_t i = 0; i < inputs; ++i)
                for (int64_t ty = 0; ty < l.side; ++ty)
                    for (int64_t tx = 0; tx < l.side; ++tx)
                        *to++ = direct ? i * area
                                       : i * padded + (ty % stride * stride + tx % stride) * plane + ty / stride * line +
                                             tx / stride;
            if (direct) {
                std::copy_n(x + (inputs - tail) * area, tail * area, copied);
                for (int64_t i = 0; i < tail; ++i) offsets[inputs - tail + i] = copied + i * area - x;
            }
        }
#pragma omp barrier
#pragma omp single
        {
            int64_t* chosen = local;
            for (int64_t i = 0; i < l.statics; ++i) *chosen++ = i;
            const bool all = l.places == l.dynamic;
            for (int64_t d = 0; d < l.dynamic && !all; ++d) keys[d] = key(gates[d], d);
            if (!all) std::nth_element(keys, keys + l.places, keys + l.dynamic, std::greater<uint64_t>());
            for (int64_t p = 0; p < l.places; ++p) chosen[p] = l.statics + (all ? p : uint32_t(~uint32_t(keys[p])));
            if (!all) std::sort(chosen, chosen + l.places);
            for (int64_t o = 0; o < outputs; ++o) kept[o] = l.numbers[local[o]];
        }
        if (apart) {
            // Each thread packs a panel and uses it while it is in its own cache; the next one is fetched meanwhile.
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < panels; ++panel) {
                float* weights = packed + me * steps * PANEL;
                pack(panel, weights);
                for (int64_t block = 0; block < blocks; ++block) compute(panel, block, weights);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels; ++panel) pack(panel, packed + panel * steps * PANEL);
#pragma omp for schedule(dynamic, 2)
            for (int64_t job = 0; job < panels * blocks; ++job)
                compute(job % panels, job / panels, packed + job % panels * steps * PANEL);
        }
    }
    for (int64_t o = 0; o < outputs; ++o) {
        float sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += sums[(o / tall * PANEL + o % tall) * blocks + block];
        means[o] = sum / float(area);
    }
}

// Adds maps to some channels of a residual stream, takes the ReLU of the sums, and their means over positions.
//
// Args:
//   stream: (channels, area), changed; values: (count, area); index: (count) channel numbers.
//   means: (channels), of the stream, changed. Unless `known`, they are not known yet, nor is the stream's ReLU taken.
void afds_add_relu(float* stream, int64_t channels, int64_t area, const float* values, const int64_t* index,
                   int64_t count, int64_t known, int64_t threads, float* means) {
    const auto finish = [&](int64_t channel, const float* more) {
        float* row = stream + channel * area;
        if (more)
            for (int64_t p = 0; p < area; ++p) row[p] += more[p];
        float sums[LANES] = {};
        int64_t p = 0;
        for (; p + LANES <= area; p += LANES)
            for (int lane = 0; lane < LANES; ++lane) {
                row[p + lane] = std::max(row[p + lane], 0.0f);
                sums[lane] += row[p + lane];
            }
        for (; p < area; ++p) {
            row[p] = std::max(row[p], 0.0f);
            sums[0] += row[p];
        }
        float sum = 0;
        for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
        means[channel] = sum / float(area);
    };
    std::vector<const float*> added;
    if (!known) {
        added.resize(channels);
        for (int64_t i = 0; i < count; ++i) added[index[i]] = values + i * area;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < (known ? count : channels); ++i)
        known ? finish(index[i], values + i * area) : finish(i, added[i]);
}
}
