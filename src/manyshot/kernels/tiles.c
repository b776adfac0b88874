/* A long piece of one tensor in one call: read, scan or merge, write, in steps that fit the cache.
 *
 * The steps are those that stream.py takes one by one with the functions of kernels.c, so the bits are the same. They
 * are together here because threads that share Python's lock should ask for it rarely.
 */
#include "kernels.h"

#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* The structs are mirrored in _native.py. */

/* Where the entries of one tensor come from: nowhere (zeros), a file, or low-rank factors. */
enum { ZEROS = 0, FACTORS = 3 }; /* or a stored type */
typedef struct {
    int32_t type, file;
    int64_t begin; /* byte of the file at which the tensor begins */
    const float *b, *a;
    int64_t b_row, b_rank, a_rank, ranks, columns;
    float scaling;
    int32_t nonfinite; /* whether the factors hold NaN or Inf */
} source;

/* The task vectors of one tensor. sources = [base, start, task 1, …]. Rows of the tensor are kept in `cache` (T, whole
 * tensor) between passes where there is one. */
enum { ADD_START_TO_ROWS = 1 };
typedef struct {
    const source *sources;
    int64_t tasks, step; /* entries at once */
    int32_t flags, cached;
    float *cache;
    int64_t cache_stride;
    float *scratch; /* room for (2 T + 6) · step floats */
} reader;

enum { PLAIN = 0, DROP = 1, TRIM = 2 };
enum { SUM = 0, CONSENSUS = 1, ELECT = 2 };
typedef struct {
    int32_t prepare, combine, agreement, how; /* `how` of a consensus */
    float scaling, threshold, density;
    const float *weights;
    const uint64_t *keys;
    uint64_t limit;
    const uint32_t *thresholds;
    const int64_t *allowed; /* entries equal to the threshold that may stay, from the piece's start on */
} operation;

enum { ADD_TO_BASE = 0, AS_IT_IS = 1, ADD_TO_START = 2 };
typedef struct {
    int32_t mode, type, file, pairs;
    int64_t begin;
    int64_t *counts; /* changed, kept, bad in base, bad in each task, bad in what was written */
    double *sums;    /* gram (T, T), |merged|^2, |update|^2 */
} output;

static int read_fully(int file, void *out, int64_t bytes, int64_t offset) {
    char *to = out;
    while (bytes > 0) {
        ssize_t count = pread(file, to, (size_t)bytes, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : ENODATA;
        to += count, offset += count, bytes -= count;
    }
    return 0;
}

static int write_fully(int file, const void *in, int64_t bytes, int64_t offset) {
    const char *from = in;
    while (bytes > 0) {
        ssize_t count = pwrite(file, from, (size_t)bytes, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : ENOSPC;
        from += count, offset += count, bytes -= count;
    }
    return 0;
}

static int64_t width(int32_t type) { return type == BF16 ? 2 : 4; }

/* out = the entries of a source, less `before` where they are stored and `before` is given. Returns 0, 1 for NaN or Inf,
 * or -errno. `stored` has room for n floats. */
static int read_source(const source *from, int64_t start, int64_t n, const float *before, void *stored, float *out) {
    if (from->type == ZEROS) {
        memset(out, 0, (size_t)n * sizeof(float));
        return 0;
    }
    if (from->type == FACTORS) {
        low_rank(from->b, from->b_row, from->b_rank, from->a, from->a_rank, from->ranks, from->columns,
                 from->scaling, start, n, out);
        return from->nonfinite;
    }
    int error = read_fully(from->file, stored, n * width(from->type), from->begin + start * width(from->type));
    if (error) return -error;
    return before ? subtract(from->type, stored, before, out, n) : widen(from->type, stored, out, n);
}

typedef struct {
    float *before, *start, *rows, *prepared, *kept, *merged;
    int64_t stride;
} tile;

/* Task vectors (and base and start, where they are read) of the next tile; bad (1 + T) counts tiles with NaN or Inf. */
static int read_tile(const reader *in, int64_t start, int64_t n, int rows_only, tile *out, int64_t *bad) {
    const source *base = in->sources, *started = in->sources + 1;
    float *at = in->scratch;
    void *stored = at;
    out->before = (at += in->step);
    out->start = (at += in->step);
    out->kept = (at += in->step);
    out->merged = (at += in->step);
    out->prepared = (at += in->step);
    out->rows = in->cache ? in->cache + start : at + in->tasks * in->step;
    out->stride = in->cache ? in->cache_stride : in->step;
    if (in->cached && rows_only) return 0;
    if (started->type != ZEROS) {
        int found = read_source(started, start, n, 0, stored, out->start);
        if (found < 0) return -found;
    } else {
        out->start = 0;
    }
    if (base->type != ZEROS) {
        int found = read_source(base, start, n, 0, stored, out->before);
        if (found < 0) return -found;
        bad[0] += found;
        if (out->start)
            for (int64_t i = 0; i < n; i++) out->before[i] += out->start[i];
    } else {
        out->before = 0;
    }
    if (in->cached) return 0;
    for (int64_t t = 0; t < in->tasks; t++) {
        float *row = out->rows + t * out->stride;
        int found = read_source(in->sources + 2 + t, start, n, out->before, stored, row);
        if (found < 0) return -found;
        bad[1 + t] += found;
        if (out->start && (in->flags & ADD_START_TO_ROWS))
            for (int64_t i = 0; i < n; i++) row[i] += out->start[i];
    }
    return 0;
}

/* One counting pass of TIES over entries start … start + n: stage 0, 1, 2 as in _trim.py. Returns 0 or an errno. */
EXPORT int scan_piece(const reader *in, int64_t start, int64_t n, int32_t stage, const uint32_t *words,
                      int64_t *counts, int64_t *bad) {
    for (int64_t done = 0; done < n; done += in->step) {
        int64_t m = least(in->step, n - done);
        tile one;
        int error = read_tile(in, start + done, m, 1, &one, bad);
        if (error) return error;
        if (stage == 0) histogram_high(one.rows, in->tasks, one.stride, m, counts);
        if (stage == 1) histogram_low(one.rows, in->tasks, one.stride, m, words, counts);
        if (stage == 2) count_equal(one.rows, in->tasks, one.stride, m, words, counts);
    }
    return 0;
}

static void apply(const reader *in, const operation *op, tile *one, int64_t position, int64_t n, int64_t *allowed) {
    const float *rows = one->rows;
    int64_t stride = one->stride;
    if (op->prepare == DROP) {
        drop(rows, in->tasks, stride, op->keys, position, op->limit, op->density, one->prepared, n);
    } else if (op->prepare == TRIM) {
        trim(rows, in->tasks, stride, n, op->thresholds, allowed, one->prepared);
    }
    if (op->prepare != PLAIN) rows = one->prepared, stride = n;
    if (op->combine == SUM) weighted_sum(rows, in->tasks, stride, op->weights, op->scaling, one->kept, n);
    if (op->combine == ELECT) elect_and_average(rows, in->tasks, stride, op->weights, op->scaling, one->kept, n);
    if (op->combine == CONSENSUS)
        consensus(rows, in->tasks, stride, op->weights, op->threshold, op->agreement, op->how, op->scaling, one->kept,
                  n);
}

/* counts (2, EXPONENTS, 2) += the exact squares of the weighted sum, and of what the operation makes of it, in entries
 * start … start + n. Only for an operation that prepares nothing. Returns 0 or an errno. */
EXPORT int norm_piece(const reader *in, const operation *op, int64_t start, int64_t n, int64_t *counts, int64_t *bad) {
    for (int64_t done = 0; done < n; done += in->step) {
        int64_t m = least(in->step, n - done);
        tile one;
        int error = read_tile(in, start + done, m, 1, &one, bad);
        if (error) return error;
        weighted_sum(one.rows, in->tasks, one.stride, op->weights, 1.0f, one.kept, m);
        square_bins(one.kept, m, counts);
        apply(in, op, &one, start + done, m, 0);
        square_bins(one.kept, m, counts + 2 * EXPONENTS);
    }
    return 0;
}

/* Merge entries start … start + n of one tensor and write them. Returns 0 or an errno. */
EXPORT int merge_piece(const reader *in, const operation *op, const output *out, int64_t start, int64_t n) {
    int64_t allowed[in->tasks], *bad = out->counts + 2;
    for (int64_t t = 0; t < in->tasks; t++) allowed[t] = op->prepare == TRIM ? op->allowed[t] : 0;
    double *squares = out->sums + in->tasks * in->tasks;
    for (int64_t done = 0; done < n; done += in->step) {
        int64_t position = start + done, m = least(in->step, n - done);
        tile one;
        int error = read_tile(in, position, m, 0, &one, bad);
        if (error) return error;
        apply(in, op, &one, position, m, allowed);
        const float *added_to = out->mode == ADD_TO_BASE ? one.before : out->mode == ADD_TO_START ? one.start : 0;
        int found = added_to ? add_to(out->type, added_to, one.kept, one.merged, m)
                             : widen(F32, one.kept, one.merged, m);
        bad[1 + in->tasks] += found;
        error = write_fully(out->file, one.merged, m * width(out->type), out->begin + position * width(out->type));
        if (error) return error;
        tally(one.rows, in->tasks, one.stride, one.kept, m, out->pairs, out->counts, out->sums);
        if (out->mode == ADD_TO_BASE || !one.start) {
            double square = square_sum(one.kept, m);
            squares[0] += square, squares[1] += square;
        } else {
            squares[0] += square_sum(one.merged, m);
            if (out->mode == AS_IT_IS) subtract(F32, one.merged, one.start, one.kept, m);
            squares[1] += square_sum(one.kept, m);
        }
    }
    return 0;
}
