/* Sums over tiles: for reports float32 within a block and float64 over blocks; exact where a result depends on them. */
#include "kernels.h"

/* ---- sums for reports: float32 within a block, float64 over blocks ----------------------------------------------- */

enum { LANES = 32 };

static inline double dot(const float *restrict a, const float *restrict b, int64_t n) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[i + l] * b[i + l];
    double sum = 0;
    for (; i < n; i++) sum += (double)a[i] * (double)b[i];
    for (int l = 0; l < LANES; l++) sum += (double)lanes[l];
    return sum;
}

/* counts += [entries that some task changed, entries of `kept` that are not 0]; gram (T, T) += the squares of the tasks'
 * vectors on its diagonal and, with `pairs`, their inner products below it */
EXPORT WIDE void tally(const float *restrict v, int64_t tasks, int64_t stride, const float *restrict kept, int64_t n,
                       int32_t pairs, int64_t *restrict counts, double *restrict gram) {
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t m = least(BLOCK, n - begin);
        uint32_t changed[BLOCK], some = 0, nonzero = 0;
        for (int64_t i = 0; i < m; i++) changed[i] = 0;
        for (int64_t t = 0; t < tasks; t++) {
            const float *restrict row = v + t * stride + begin;
            for (int64_t i = 0; i < m; i++) changed[i] |= bits_of(row[i]) & MAGNITUDE;
        }
        for (int64_t i = 0; i < m; i++) some += (uint32_t)(changed[i] != 0);
        for (int64_t i = 0; i < m; i++) nonzero += (uint32_t)((bits_of(kept[begin + i]) & MAGNITUDE) != 0);
        counts[0] += some;
        counts[1] += nonzero;
        for (int64_t s = 0; s < tasks; s++)
            for (int64_t t = pairs ? 0 : s; t <= s; t++)
                gram[s * tasks + t] += dot(v + s * stride + begin, v + t * stride + begin, m);
    }
}

EXPORT WIDE double square_sum(const float *restrict v, int64_t n) {
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) sum += dot(v + begin, v + begin, least(BLOCK, n - begin));
    return sum;
}

/* counts (EXPONENTS, 2) += the squares of the entries, exactly: under an entry's exponent, the low 24 bits of its squared
 * mantissa and the others. Integers, so that neither order nor cuts matter. */
EXPORT void square_bins(const float *restrict v, int64_t n, int64_t *restrict counts) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(v[i]) & MAGNITUDE, exponent = magnitude >> 23;
        uint64_t mantissa = (magnitude & 0x7fffffu) | (exponent ? 0x800000u : 0u), square = mantissa * mantissa;
        counts[2 * exponent] += (int64_t)(square & 0xffffffu);
        counts[2 * exponent + 1] += (int64_t)(square >> 24);
    }
}
