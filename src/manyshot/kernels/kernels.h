/* What kernels.c and sums.c offer to tiles.c and, through ctypes, to __init__.py. Shapes: rows (T, P) lie `stride`
 * floats apart. */
#ifndef MANYSHOT_KERNELS_H
#define MANYSHOT_KERNELS_H
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline)) /* so that it is as wide as what calls it */

enum { BF16 = 1, F32 = 2 };        /* stored types */
enum { UNWEIGHTED = 1, SOFT = 2 }; /* how a consensus is reached: votes on v itself; a share of what too few vote for */
enum { EXPONENTS = 256 };          /* of a float32 */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define WIDE
#endif

enum { BLOCK = 512 };            /* entries handled at once: temporaries of a block stay in the first-level cache */
#define EXPONENT 0x7f800000u     /* all ones: Inf or NaN */
#define MAGNITUDE 0x7fffffffu    /* everything but the sign */

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

EXPORT int widen(int32_t type, const void *in, float *out, int64_t n);
EXPORT int subtract(int32_t type, const void *in, const float *before, float *out, int64_t n);
EXPORT int add_to(int32_t type, const float *before, const float *merged, void *out, int64_t n);
EXPORT void low_rank(const float *b, int64_t b_row, int64_t b_rank, const float *a, int64_t a_rank, int64_t ranks,
                     int64_t columns, float scaling, int64_t start, int64_t n, float *out);
EXPORT void weighted_sum(const float *v, int64_t tasks, int64_t stride, const float *weights, float scaling,
                         float *out, int64_t n);
EXPORT void consensus(const float *v, int64_t tasks, int64_t stride, const float *weights, float threshold,
                      int32_t agreement, int32_t how, float scaling, float *out, int64_t n);
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
EXPORT void square_bins(const float *v, int64_t n, int64_t *counts);

#endif
