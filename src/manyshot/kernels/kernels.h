/* What kernels.c offers to tiles.c and, through ctypes, to __init__.py. Shapes: rows (T, P) lie `stride` floats apart. */
#ifndef MANYSHOT_KERNELS_H
#define MANYSHOT_KERNELS_H
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { BF16 = 1, F32 = 2 }; /* stored types */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

EXPORT int widen(int32_t type, const void *in, float *out, int64_t n);
EXPORT int subtract(int32_t type, const void *in, const float *before, float *out, int64_t n);
EXPORT int add_to(int32_t type, const float *before, const float *merged, void *out, int64_t n);
EXPORT void low_rank(const float *b, int64_t b_row, int64_t b_rank, const float *a, int64_t a_rank, int64_t ranks,
                     int64_t columns, float scaling, int64_t start, int64_t n, float *out);
EXPORT void weighted_sum(const float *v, int64_t tasks, int64_t stride, const float *weights, float scaling,
                         float *out, int64_t n);
EXPORT void consensus(const float *v, int64_t tasks, int64_t stride, const float *weights, float threshold,
                      int32_t agreement, float scaling, float *out, int64_t n);
EXPORT void elect_and_average(const float *v, int64_t tasks, int64_t stride, const float *weights, float scaling,
                              float *out, int64_t n);
EXPORT void drop(const float *v, int64_t tasks, int64_t stride, const uint64_t *keys, int64_t offset, uint64_t limit,
                 float density, float *out, int64_t n);
EXPORT void histogram_high(const float *v, int64_t tasks, int64_t stride, int64_t n, int64_t *counts);
EXPORT void histogram_low(const float *v, int64_t tasks, int64_t stride, int64_t n, const uint32_t *highs,
                          int64_t *counts);
EXPORT void count_equal(const float *v, int64_t tasks, int64_t stride, int64_t n, const uint32_t *thresholds,
                        int64_t *counts);
/* `allowed` goes down by the entries that are equal to the threshold */
EXPORT void trim(const float *v, int64_t tasks, int64_t stride, int64_t n, const uint32_t *thresholds,
                 int64_t *allowed, float *out);
EXPORT void tally(const float *v, int64_t tasks, int64_t stride, const float *kept, int64_t n, int32_t pairs,
                  int64_t *counts, double *gram);
EXPORT double square_sum(const float *v, int64_t n);

#endif
