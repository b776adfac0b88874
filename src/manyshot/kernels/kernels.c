/* The inner loops of a merge, on float32 tiles that fit the cache.
 *
 * Every function has a twin in _torch.py that gives the same bits: one rounding per operation, in the order written
 * (compiled with -ffp-contract=off, never with -ffast-math), so results do not depend on which of the two ran, nor on
 * the vector width of the machine. Exceptions are sums for reports (sums.c), which are float64 and say so.
 *
 * Shapes: T tasks, P entries of a tile; rows (T, P) are contiguous with `stride` floats between tasks.
 */
#include "kernels.h"

#include <math.h>

static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* ---- stored types in and out ------------------------------------------------------------------------------------ */

/* out = float(in); returns 1 when an entry is NaN or Inf */
static inline int widen_bf16_(const uint16_t *restrict in, float *restrict out, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = (uint32_t)in[i] << 16;
        bad |= (uint32_t)((u & EXPONENT) == EXPONENT);
        out[i] = float_of(u);
    }
    return bad != 0;
}

static inline int widen_f32_(const float *restrict in, float *restrict out, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        bad |= (uint32_t)((bits_of(in[i]) & EXPONENT) == EXPONENT);
        out[i] = in[i];
    }
    return bad != 0;
}

/* out = float(in) - before: a task vector; returns 1 when an entry of `in` is NaN or Inf */
static inline int subtract_bf16_(const uint16_t *restrict in, const float *restrict before, float *restrict out,
                              int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = (uint32_t)in[i] << 16;
        bad |= (uint32_t)((u & EXPONENT) == EXPONENT);
        out[i] = float_of(u) - before[i];
    }
    return bad != 0;
}

static inline int subtract_f32_(const float *restrict in, const float *restrict before, float *restrict out, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        bad |= (uint32_t)((bits_of(in[i]) & EXPONENT) == EXPONENT);
        out[i] = in[i] - before[i];
    }
    return bad != 0;
}

/* out = before + merged, rounded to nearest even; returns 1 when a result is NaN or Inf */
static inline int add_to_bf16_(const float *restrict before, const float *restrict merged, uint16_t *restrict out,
                            int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits_of(before[i] + merged[i]);
        uint32_t is_nan = (uint32_t)((u & MAGNITUDE) > EXPONENT);
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        uint32_t result = is_nan ? 0x7fc0u : rounded;
        bad |= (uint32_t)((result & 0x7f80u) == 0x7f80u);
        out[i] = (uint16_t)result;
    }
    return bad != 0;
}

static inline int add_to_f32_(const float *restrict before, const float *restrict merged, float *restrict out,
                           int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        float sum = before[i] + merged[i];
        bad |= (uint32_t)((bits_of(sum) & EXPONENT) == EXPONENT);
        out[i] = sum;
    }
    return bad != 0;
}

/* ---- low-rank factors -------------------------------------------------------------------------------------------- */

/* out = scaling * (b @ a), entries start..start+n of the row-major product; b (N, R) has strides (b_row, b_rank), a (R, I)
 * has strides (a_rank, a_column), so that either may be a transposed view. The sum over R runs in order. */
static inline void product_span(const float *restrict b, int64_t b_rank, const float *restrict a, int64_t a_rank,
                                int64_t ranks, float scaling, float *restrict out, int64_t n) {
    enum { LANES = 64 };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        float sum[LANES];
        for (int l = 0; l < LANES; l++) sum[l] = b[0] * a[i + l];
        for (int64_t r = 1; r < ranks; r++) {
            float factor = b[r * b_rank];
            const float *restrict row = a + r * a_rank + i;
            for (int l = 0; l < LANES; l++) sum[l] += factor * row[l];
        }
        for (int l = 0; l < LANES; l++) out[i + l] = sum[l] * scaling;
    }
    for (; i < n; i++) {
        float sum = b[0] * a[i];
        for (int64_t r = 1; r < ranks; r++) sum += b[r * b_rank] * a[r * a_rank + i];
        out[i] = sum * scaling;
    }
}

static inline void low_rank_(const float *b, int64_t b_row, int64_t b_rank, const float *a, int64_t a_rank,
                          int64_t ranks, int64_t columns, float scaling, int64_t start, int64_t n,
                          float *restrict out) {
    int64_t done = 0;
    while (done < n) {
        int64_t row = (start + done) / columns, column = (start + done) % columns;
        int64_t span = least(columns - column, n - done);
        product_span(b + row * b_row, b_rank, a + column, a_rank, ranks, scaling, out + done, span);
        done += span;
    }
}

/* ---- the same, one stored tile or tensor at a time ---------------------------------------------------------------- */

EXPORT WIDE int widen(int32_t type, const void *in, float *out, int64_t n) {
    return type == BF16 ? widen_bf16_(in, out, n) : widen_f32_(in, out, n);
}

EXPORT WIDE int subtract(int32_t type, const void *in, const float *before, float *out, int64_t n) {
    return type == BF16 ? subtract_bf16_(in, before, out, n) : subtract_f32_(in, before, out, n);
}

EXPORT WIDE int add_to(int32_t type, const float *before, const float *merged, void *out, int64_t n) {
    return type == BF16 ? add_to_bf16_(before, merged, out, n) : add_to_f32_(before, merged, out, n);
}

EXPORT WIDE void low_rank(const float *b, int64_t b_row, int64_t b_rank, const float *a, int64_t a_rank,
                          int64_t ranks, int64_t columns, float scaling, int64_t start, int64_t n, float *out) {
    low_rank_(b, b_row, b_rank, a, a_rank, ranks, columns, scaling, start, n, out);
}

/* ---- operators --------------------------------------------------------------------------------------------------- */

/* out = scaling * sum_t weight_t v_t */
EXPORT WIDE void weighted_sum(const float *restrict v, int64_t tasks, int64_t stride, const float *restrict weights,
                              float scaling, float *restrict out, int64_t n) {
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t m = least(BLOCK, n - begin);
        float total[BLOCK];
        for (int64_t i = 0; i < m; i++) total[i] = weights[0] * v[begin + i];
        for (int64_t t = 1; t < tasks; t++) {
            const float *restrict row = v + t * stride + begin;
            float weight = weights[t];
            for (int64_t i = 0; i < m; i++) total[i] += weight * row[i];
        }
        for (int64_t i = 0; i < m; i++) out[begin + i] = total[i] * scaling;
    }
}

/* votes += 1 where |own| >= threshold * |total - own|, own = weight * row */
static INLINE void vote(const float *restrict row, float weight, float threshold, const float *restrict total,
                        int32_t *restrict votes, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float own = weight * row[i];
        votes[i] += fabsf(own) >= threshold * fabsf(total[i] - own) ? 1 : 0;
    }
}

/* out = scaling * V where at least `agreement` tasks have |w_t| >= threshold * |V - w_t|, else 0;
 * w_t = weight_t v_t, V = sum_t w_t. UNWEIGHTED: |v_t| >= threshold * |S - v_t|, S = sum_t v_t; V stays. SOFT: of V stays
 * the share votes / agreement, all of it at most. */
EXPORT WIDE void consensus(const float *restrict v, int64_t tasks, int64_t stride, const float *restrict weights,
                           float threshold, int32_t agreement, int32_t how, float scaling, float *restrict out,
                           int64_t n) {
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t m = least(BLOCK, n - begin);
        float total[BLOCK], plain[BLOCK];
        int32_t votes[BLOCK];
        for (int64_t i = 0; i < m; i++) total[i] = weights[0] * v[begin + i], votes[i] = 0;
        for (int64_t t = 1; t < tasks; t++) {
            const float *restrict row = v + t * stride + begin;
            float weight = weights[t];
            for (int64_t i = 0; i < m; i++) total[i] += weight * row[i];
        }
        if (how & UNWEIGHTED) {
            for (int64_t i = 0; i < m; i++) plain[i] = v[begin + i];
            for (int64_t t = 1; t < tasks; t++) {
                const float *restrict row = v + t * stride + begin;
                for (int64_t i = 0; i < m; i++) plain[i] += row[i];
            }
            for (int64_t t = 0; t < tasks; t++) vote(v + t * stride + begin, 1.0f, threshold, plain, votes, m);
        } else {
            for (int64_t t = 0; t < tasks; t++) vote(v + t * stride + begin, weights[t], threshold, total, votes, m);
        }
        if (how & SOFT) {
            for (int64_t i = 0; i < m; i++) {
                int32_t most = votes[i] < agreement ? votes[i] : agreement;
                out[begin + i] = total[i] * ((float)most / (float)agreement) * scaling;
            }
        } else {
            for (int64_t i = 0; i < m; i++) {
                float kept = votes[i] >= agreement ? total[i] : 0.0f;
                out[begin + i] = kept * scaling;
            }
        }
    }
}

/* out = scaling * (sum of the weighted entries with the elected sign) / (sum of their weights); the elected sign is that
 * of sum_t weight_t v_t, plus for zero. A divisor of zero counts as one. */
EXPORT WIDE void elect_and_average(const float *restrict v, int64_t tasks, int64_t stride,
                                   const float *restrict weights, float scaling, float *restrict out, int64_t n) {
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t m = least(BLOCK, n - begin);
        float total[BLOCK], agreeing[BLOCK], divisor[BLOCK];
        for (int64_t i = 0; i < m; i++) total[i] = weights[0] * v[begin + i];
        for (int64_t t = 1; t < tasks; t++) {
            const float *restrict row = v + t * stride + begin;
            float weight = weights[t];
            for (int64_t i = 0; i < m; i++) total[i] += weight * row[i];
        }
        for (int64_t i = 0; i < m; i++) agreeing[i] = divisor[i] = 0.0f;
        for (int64_t t = 0; t < tasks; t++) {
            const float *restrict row = v + t * stride + begin;
            float weight = weights[t];
            for (int64_t i = 0; i < m; i++) {
                float own = weight * row[i];
                float side = total[i] >= 0.0f ? own : -own;
                agreeing[i] += side > 0.0f ? own : 0.0f;
                divisor[i] += side > 0.0f ? weight : 0.0f;
            }
        }
        for (int64_t i = 0; i < m; i++) {
            float by = divisor[i] == 0.0f ? 1.0f : divisor[i];
            out[begin + i] = agreeing[i] / by * scaling;
        }
    }
}

/* ---- DARE: a draw per coordinate that depends on (key, position) alone ------------------------------------------- */

/* The finaliser of MurmurHash3 (public domain), a bijection of 32-bit words. */
static inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    x ^= x >> 16;
    return x;
}

/* out = v / density where mix(mix(position + low key) ^ high key) < limit, else 0. The high half of the position goes
 * into both keys, so that positions beyond 2^32 draw anew. */
static inline void drop_row(const float *restrict v, uint64_t key, int64_t offset, uint64_t limit, float density,
                            float *restrict out, int64_t n) {
    int64_t done = 0;
    while (done < n) {
        uint64_t position = (uint64_t)(offset + done);
        uint32_t low = (uint32_t)position, page = (uint32_t)(position >> 32);
        int64_t span = least(n - done, (int64_t)((1ull << 32) - low));
        uint32_t first = low + (uint32_t)key + mix(page), second = (uint32_t)(key >> 32) ^ (page * 0x9e3779b9u);
        uint32_t top = limit > 0xffffffffull ? 0xffffffffu : (uint32_t)limit;
        uint32_t all = limit > 0xffffffffull;
        for (int64_t i = 0; i < span; i++) {
            uint32_t draw = mix(mix(first + (uint32_t)i) ^ second);
            float kept = (draw < top) | all ? v[done + i] : 0.0f;
            out[done + i] = kept / density;
        }
        done += span;
    }
}

EXPORT WIDE void drop(const float *restrict v, int64_t tasks, int64_t stride, const uint64_t *restrict keys,
                      int64_t offset, uint64_t limit, float density, float *restrict out, int64_t n) {
    for (int64_t t = 0; t < tasks; t++) drop_row(v + t * stride, keys[t], offset, limit, density, out + t * n, n);
}

/* ---- TIES: exact trimming without a sort ------------------------------------------------------------------------- */

/* counts (T, 2^15) += entries whose magnitude has the high 15 bits b */
EXPORT void histogram_high(const float *restrict v, int64_t tasks, int64_t stride, int64_t n,
                           int64_t *restrict counts) {
    for (int64_t t = 0; t < tasks; t++) {
        const float *restrict row = v + t * stride;
        int64_t *restrict bins = counts + (t << 15);
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) { /* two entries a load; which half is which does not matter */
            uint64_t one, two;
            memcpy(&one, row + i, 8);
            memcpy(&two, row + i + 2, 8);
            bins[one >> 16 & 0x7fffu]++;
            bins[one >> 48 & 0x7fffu]++;
            bins[two >> 16 & 0x7fffu]++;
            bins[two >> 48 & 0x7fffu]++;
        }
        for (; i < n; i++) bins[(bits_of(row[i]) & MAGNITUDE) >> 16]++;
    }
}

/* counts (T, 2^16) += entries whose magnitude has the task's high bits `highs` and the low 16 bits b */
EXPORT WIDE void histogram_low(const float *restrict v, int64_t tasks, int64_t stride, int64_t n,
                               const uint32_t *restrict highs, int64_t *restrict counts) {
    for (int64_t t = 0; t < tasks; t++) {
        const float *restrict row = v + t * stride;
        int64_t *restrict bins = counts + (t << 16);
        uint32_t first = highs[t] << 16, usual = first;
        for (int64_t begin = 0; begin < n; begin += 64) { /* few entries share the high bits */
            int64_t m = least(64, n - begin);
            uint8_t hit[64] = {0};
            if (m == 64)
                for (int64_t i = 0; i < 64; i++) hit[i] = (bits_of(row[begin + i]) & MAGNITUDE) - first < 0x10000u;
            else
                for (int64_t i = 0; i < m; i++) hit[i] = (bits_of(row[begin + i]) & MAGNITUDE) - first < 0x10000u;
            uint64_t words[8];
            memcpy(words, hit, 64);
            if (!(words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7])) continue;
            /* of those, many may be one value (differences of bfloat16 numbers are): count that one without a table */
            uint32_t same = 0;
            for (int64_t i = 0; i < m; i++) same += (uint32_t)((bits_of(row[begin + i]) & MAGNITUDE) == usual);
            bins[usual & 0xffffu] += same;
            for (int64_t i = 0; i < m; i++) hit[i] &= (bits_of(row[begin + i]) & MAGNITUDE) != usual;
            memcpy(words, hit, 64);
            for (int64_t w = 0; w < 8; w++)
                if (words[w])
                    for (int64_t i = 8 * w; i < 8 * w + 8; i++)
                        if (hit[i]) usual = bits_of(row[begin + i]) & MAGNITUDE, bins[usual & 0xffffu]++;
        }
    }
}

/* counts (T) += entries whose magnitude is exactly the task's threshold */
EXPORT WIDE void count_equal(const float *restrict v, int64_t tasks, int64_t stride, int64_t n,
                             const uint32_t *restrict thresholds, int64_t *restrict counts) {
    for (int64_t t = 0; t < tasks; t++) {
        const float *restrict row = v + t * stride;
        for (int64_t begin = 0; begin < n; begin += 4096) {
            int64_t m = least(4096, n - begin);
            uint32_t some = 0;
            for (int64_t i = 0; i < m; i++) some += (uint32_t)((bits_of(row[begin + i]) & MAGNITUDE) == thresholds[t]);
            counts[t] += some;
        }
    }
}

/* out = v where its magnitude is above `threshold`, or equal to it and among the first `allowed` such entries; else 0.
 * Returns how many more such entries may stay. */
static inline int64_t trim_row(const float *restrict v, int64_t n, uint32_t threshold, int64_t allowed,
                            float *restrict out) {
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t m = least(BLOCK, n - begin);
        uint32_t equal = 0;
        for (int64_t i = 0; i < m; i++) equal += (uint32_t)((bits_of(v[begin + i]) & MAGNITUDE) == threshold);
        if (equal <= allowed || allowed <= 0) {
            uint32_t from = allowed > 0 ? threshold : threshold + 1;
            for (int64_t i = 0; i < m; i++)
                out[begin + i] = (bits_of(v[begin + i]) & MAGNITUDE) >= from ? v[begin + i] : 0.0f;
        } else {
            int64_t left = allowed;
            for (int64_t i = 0; i < m; i++) {
                uint32_t u = bits_of(v[begin + i]) & MAGNITUDE;
                int keep = u > threshold || (u == threshold && left-- > 0);
                out[begin + i] = keep ? v[begin + i] : 0.0f;
            }
        }
        allowed -= equal;
    }
    return allowed;
}

EXPORT WIDE void trim(const float *restrict v, int64_t tasks, int64_t stride, int64_t n,
                      const uint32_t *restrict thresholds, int64_t *restrict allowed, float *restrict out) {
    for (int64_t t = 0; t < tasks; t++)
        allowed[t] = trim_row(v + t * stride, n, thresholds[t], allowed[t], out + t * n);
}
