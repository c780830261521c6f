/* Attention of a few queries over packed keys and values; nothing is unpacked to memory.

   Keys: q.k = sum_c (q_c scale_gc) code_tc + sum_c q_c min_gc, so a group of tokens scales the
   query once. Values: sum_t w_t v_tc. Bits are masked where they lie in a byte, and the power of
   two they are too large by is divided out where it costs least. Recent tokens in full precision
   follow behind the packed ones. Sizes come from the command line, so loops have known ends:
   HEAD_DIM, ROWS (queries that share a KV head), KEY_BITS, VALUE_BITS, KEY_GROUP, VALUE_GROUP.

   Two families of codes, see narrows/kv/codec.py and blockfloat.py for their layout. Affine: keys
   have a scale and a minimum for KEY_GROUP tokens of a channel, values for VALUE_GROUP channels of
   a token. With BLOCK_FLOAT defined: an exponent for KEY_GROUP channels of a token, and for
   VALUE_GROUP tokens of a channel. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define KEY_PLANES (8 / KEY_BITS)
#define KEY_WIDTH (HEAD_DIM * KEY_BITS / 8)
#define KEY_MASK ((1 << KEY_BITS) - 1)
#define VALUE_PLANES (8 / VALUE_BITS)
#define VALUE_WIDTH (HEAD_DIM * VALUE_BITS / 8)
#define VALUE_MASK ((1 << VALUE_BITS) - 1)
#define STRIP(width) ((width) % 16 ? (width) : 16) /* bytes of a vector: longer loops over bytes
                                                      make gcc go through memory, 3 times as slow */
#define LANES 16 /* accumulators of a reduction, of which the compiler makes vectors */
#ifdef BLOCK_FLOAT
#define TOGETHER VALUE_GROUP /* tokens that share what they are read by */
#define KEY_SCALES (HEAD_DIM / KEY_GROUP)  /* a token */
#define VALUE_SCALES HEAD_DIM              /* a group of tokens */
#define KEYS_AT(t) ((t) * KEY_SCALES) /* where what a token is read by begins */
#define VALUES_AT(t) ((t) / VALUE_GROUP * VALUE_SCALES)
typedef uint8_t scale_type;
#else
#define TOGETHER KEY_GROUP
#define KEY_SCALES HEAD_DIM
#define VALUE_SCALES (HEAD_DIM / VALUE_GROUP)
#define KEYS_AT(t) ((t) / KEY_GROUP * KEY_SCALES)
#define VALUES_AT(t) ((t) * VALUE_SCALES)
typedef uint16_t scale_type;
#endif
#define BLOCK (256 / TOGETHER * TOGETHER ? 256 / TOGETHER * TOGETHER : TOGETHER) /* tokens at a time */

/* All bytes j of a token in all planes k, a vector at a time. */
#define EACH(role, k, j) \
    for (int k = 0; k < role##_PLANES; k++) \
        _Pragma("GCC unroll 8") \
        for (int k##j = 0; k##j < role##_WIDTH; k##j += STRIP(role##_WIDTH)) \
            for (int j = k##j; j < k##j + STRIP(role##_WIDTH); j++)

/* fp16 bits, finite: shifted into place, then the exponent corrected. */
static inline float half(uint16_t bits) {
    union { uint32_t u; float f; } x;
    x.u = (uint32_t)(bits & 0x7fff) << 13;
    x.f *= 5.192296858534828e33f; /* 2^112 */
    x.u |= (uint32_t)(bits & 0x8000) << 16;
    return x.f;
}

/* exp of x <= 0 to two units in the last place; 0 below -87. */
static inline float exponential(float x) {
    float kept = x < -87.0f ? -87.0f : x;
    float n = rintf(kept * 1.44269504f);
    float r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power;
    power.i = ((int32_t)n + 127) << 23;
    return x < -87.0f ? 0.0f : p * power.f;
}

#ifndef BLOCK_FLOAT

/* Scores of one block of tokens, already scaled. */
static void scores(
    const float (*restrict query)[HEAD_DIM], const uint8_t *restrict codes,
    const scale_type *restrict scale, const scale_type *restrict minimum, long tokens,
    float (*restrict out)[BLOCK]
) {
    float scaled[ROWS][HEAD_DIM], base[ROWS];
    for (long first = 0; first < tokens; first += KEY_GROUP) {
        long end = first + KEY_GROUP < tokens ? first + KEY_GROUP : tokens;
        for (int r = 0; r < ROWS; r++) {
            float total = 0;
            for (int c = 0; c < HEAD_DIM; c++) total += query[r][c] * half(minimum[c]);
            base[r] = total;
            for (int k = 0; k < KEY_PLANES; k++) {
                float shrink = 1.0f / (1 << (KEY_BITS * k)); /* bits are masked where they lie */
                for (int j = 0; j < KEY_WIDTH; j++) {
                    int c = k * KEY_WIDTH + j;
                    scaled[r][c] = query[r][c] * shrink * half(scale[c]);
                }
            }
        }
        for (long t = first; t < end; t++) {
            float plain[HEAD_DIM];
            EACH(KEY, k, j)
                plain[k * KEY_WIDTH + j] = (float)(codes[j] & (KEY_MASK << (KEY_BITS * k)));
            for (int r = 0; r < ROWS; r++) {
                float total = 0;
                for (int c = 0; c < HEAD_DIM; c++) total += scaled[r][c] * plain[c];
                out[r][t] = total + base[r];
            }
            codes += KEY_WIDTH;
        }
        scale += HEAD_DIM;
        minimum += HEAD_DIM;
    }
}

/* Values of one block of packed tokens, by weights, added to `out`. */
static void mix(
    const float (*restrict weights)[BLOCK], const uint8_t *restrict codes,
    const scale_type *restrict scale, const scale_type *restrict minimum, long tokens,
    float (*restrict out)[HEAD_DIM]
) {
    float sum[ROWS][HEAD_DIM], lowest[ROWS][VALUE_SCALES];
    memset(sum, 0, sizeof sum);
    memset(lowest, 0, sizeof lowest);
    for (long t = 0; t < tokens; t++) {
        float plain[HEAD_DIM];
        EACH(VALUE, k, j)
            plain[k * VALUE_WIDTH + j] = (float)(codes[j] & (VALUE_MASK << (VALUE_BITS * k)));
        for (int g = 0; g < VALUE_SCALES; g++) {
            float factor = half(scale[g]), low = half(minimum[g]);
            for (int r = 0; r < ROWS; r++) {
                float a = weights[r][t] * factor;
                lowest[r][g] += weights[r][t] * low;
                for (int i = 0; i < VALUE_GROUP; i++)
                    sum[r][g * VALUE_GROUP + i] += a * plain[g * VALUE_GROUP + i];
            }
        }
        codes += VALUE_WIDTH;
        scale += VALUE_SCALES;
        minimum += VALUE_SCALES;
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < HEAD_DIM; c++) {
            float shrink = 1.0f / (1 << (VALUE_BITS * (c / VALUE_WIDTH)));
            out[r][c] += sum[r][c] * shrink + lowest[r][c / VALUE_GROUP];
        }
}

#else

/* 2^e from a stored exponent: of a mantissa's last place, in the upper bits of a byte. */
static inline float power(uint8_t stored) {
    int e = (int)stored - 133; /* its bias, a mantissa's places, and those above a byte's */
    union { uint32_t u; float f; } x;
    x.u = e >= -126 ? (uint32_t)(e + 127) << 23 : e >= -149 ? 1u << (e + 149) : 0;
    return x.f;
}

/* A signed mantissa of plane k, in the upper bits of a byte and so 2^(8 - bits) too large. */
static inline float mantissa(uint8_t code, int bits, int k) {
    return (float)(int8_t)((code << (8 - bits - bits * k)) & (256 - (1 << (8 - bits))));
}

/* Scores of one block of tokens, already scaled. minimum: none. */
static void scores(
    const float (*restrict query)[HEAD_DIM], const uint8_t *restrict codes,
    const scale_type *restrict scale, const scale_type *restrict minimum, long tokens,
    float (*restrict out)[BLOCK]
) {
    (void)minimum;
    for (long t = 0; t < tokens; t++, codes += KEY_WIDTH, scale += KEY_SCALES) {
        float plain[HEAD_DIM], step[HEAD_DIM];
        for (int g = 0; g < KEY_SCALES; g++)
            for (int i = 0; i < KEY_GROUP; i++) step[g * KEY_GROUP + i] = power(scale[g]);
        EACH(KEY, k, j) plain[k * KEY_WIDTH + j] = mantissa(codes[j], KEY_BITS, k);
        for (int r = 0; r < ROWS; r++) {
            float total = 0;
            for (int c = 0; c < HEAD_DIM; c++) total += query[r][c] * plain[c] * step[c];
            out[r][t] = total;
        }
    }
}

/* Values of one block of packed tokens, by weights, added to `out`. minimum: none. */
static void mix(
    const float (*restrict weights)[BLOCK], const uint8_t *restrict codes,
    const scale_type *restrict scale, const scale_type *restrict minimum, long tokens,
    float (*restrict out)[HEAD_DIM]
) {
    (void)minimum;
    for (long first = 0; first < tokens; first += VALUE_GROUP, scale += VALUE_SCALES) {
        long end = first + VALUE_GROUP < tokens ? first + VALUE_GROUP : tokens;
        float sum[ROWS][HEAD_DIM];
        memset(sum, 0, sizeof sum);
        for (long t = first; t < end; t++, codes += VALUE_WIDTH) {
            float plain[HEAD_DIM];
            EACH(VALUE, k, j) plain[k * VALUE_WIDTH + j] = mantissa(codes[j], VALUE_BITS, k);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < HEAD_DIM; c++) sum[r][c] += weights[r][t] * plain[c];
        }
        for (int c = 0; c < HEAD_DIM; c++) {
            float step = power(scale[c]);
            for (int r = 0; r < ROWS; r++) out[r][c] += sum[r][c] * step;
        }
    }
}
#endif

/* Scores of tokens `from` to `end` of a block, in full precision. */
static void scores_plain(
    const float (*restrict query)[HEAD_DIM], const float *restrict keys, long from, long end,
    float (*restrict out)[BLOCK]
) {
    for (long t = from; t < end; t++, keys += HEAD_DIM)
        for (int r = 0; r < ROWS; r++) {
            float total = 0;
            for (int c = 0; c < HEAD_DIM; c++) total += query[r][c] * keys[c];
            out[r][t] = total;
        }
}

/* Values of tokens `from` to `end` of a block, in full precision, added to `out`. */
static void mix_plain(
    const float (*restrict weights)[BLOCK], const float *restrict values, long from, long end,
    float (*restrict out)[HEAD_DIM]
) {
    for (long t = from; t < end; t++, values += HEAD_DIM)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < HEAD_DIM; c++) out[r][c] += weights[r][t] * values[c];
}

/* What a head has gathered so far: values by weights that `high` is the largest score of. */
struct state {
    float made[ROWS][HEAD_DIM], high[ROWS], sum[ROWS];
};

static inline float largest(const float *x, long count, float high) {
    float lane[LANES];
    for (int l = 0; l < LANES; l++) lane[l] = high;
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (; i < count; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int l = 0; l < LANES; l++) high = lane[l] > high ? lane[l] : high;
    return high;
}

/* Scores of a block to weights, in place; what was gathered is brought to the same footing. */
static void weigh(
    struct state *restrict s, float (*restrict weights)[BLOCK], long count,
    const float *restrict bias, long bias_row
) {
    for (int r = 0; r < ROWS; r++) {
        if (bias)
            for (long i = 0; i < count; i++) weights[r][i] += bias[r * bias_row + i];
        float high = largest(weights[r], count, s->high[r]);
        if (high < -1e30f) { /* nothing visible yet */
            for (long i = 0; i < count; i++) weights[r][i] = 0;
            continue;
        }
        if (high > s->high[r]) {
            float shrink = s->high[r] < -1e30f ? 0.0f : exponential(s->high[r] - high);
            for (int c = 0; c < HEAD_DIM; c++) s->made[r][c] *= shrink;
            s->sum[r] *= shrink;
            s->high[r] = high;
        }
        float more = 0;
        for (long i = 0; i < count; i++) {
            weights[r][i] = exponential(weights[r][i] - high);
            more += weights[r][i];
        }
        s->sum[r] += more;
    }
}

/* Where a tensor of (batch, heads, ...) begins, and bytes from one to the next of either. */
struct place {
    const char *at;
    long batch, head;
};

struct job {
    struct place query, key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum;
    struct place keys, values, bias; /* recent tokens in full; bias may be null */
    float *out, *total;
    long batch, heads;
    long tokens;                     /* all */
    long packed_keys, packed_values; /* of which the first so many are packed */
    long parts, each;                /* they are divided in so many parts of so many */
    long bias_row;                   /* numbers from one row of the bias to the next */
    float scaling;
};

static inline const void *of(struct place p, long b, long h) {
    return p.at ? p.at + b * p.batch + h * p.head : 0;
}

static inline long within(long x, long most) { return x < 0 ? 0 : x > most ? most : x; }

/* Attention of tasks first to last; task number: ((part * batch) + b) * heads + h.

   query: (ROWS, HEAD_DIM) each; out alike by task, the softmax of what the part sees; total:
   (ROWS) log of the sum of exp, -inf where all is hidden, and `out` is zero there. Parts begin at
   edges of groups of tokens. */
void attend(const struct job *job, long first, long last) {
    for (long task = first; task < last; task++) {
        long part = task / (job->batch * job->heads);
        long b = task / job->heads % job->batch, h = task % job->heads;
        const float *query = of(job->query, b, h), *bias = of(job->bias, b, h);
        const uint8_t *key_codes = of(job->key_codes, b, h);
        const scale_type *key_scale = of(job->key_scale, b, h);
        const scale_type *key_minimum = of(job->key_minimum, b, h);
        const uint8_t *value_codes = of(job->value_codes, b, h);
        const scale_type *value_scale = of(job->value_scale, b, h);
        const scale_type *value_minimum = of(job->value_minimum, b, h);
        float asked[ROWS][HEAD_DIM], weights[ROWS][BLOCK];
        struct state s;
        for (int r = 0; r < ROWS; r++) {
            s.high[r] = -INFINITY;
            s.sum[r] = 0;
            for (int c = 0; c < HEAD_DIM; c++) {
                asked[r][c] = query[r * HEAD_DIM + c] * job->scaling;
                s.made[r][c] = 0;
            }
        }
        const float *keys = of(job->keys, b, h), *values = of(job->values, b, h);
        long end = part + 1 < job->parts ? (part + 1) * job->each : job->tokens;
        for (long t = part * job->each; t < end; t += BLOCK) {
            long count = end - t < BLOCK ? end - t : BLOCK;
            long key = KEYS_AT(t), value = VALUES_AT(t);
            long coded = within(job->packed_keys - t, count);
            if (coded)
                scores((const float (*)[HEAD_DIM])asked, key_codes + t * KEY_WIDTH,
                       key_scale + key, key_minimum + key, coded, weights);
            if (coded < count)
                scores_plain((const float (*)[HEAD_DIM])asked,
                             keys + (t + coded - job->packed_keys) * HEAD_DIM, coded, count,
                             weights);
            weigh(&s, weights, count, bias ? bias + t : 0, job->bias_row);
            coded = within(job->packed_values - t, count);
            if (coded)
                mix((const float (*)[BLOCK])weights, value_codes + t * VALUE_WIDTH,
                    value_scale + value, value_minimum + value, coded, s.made);
            if (coded < count)
                mix_plain((const float (*)[BLOCK])weights,
                          values + (t + coded - job->packed_values) * HEAD_DIM, coded, count,
                          s.made);
        }
        float *out = job->out + task * ROWS * HEAD_DIM, *total = job->total + task * ROWS;
        for (int r = 0; r < ROWS; r++) {
            total[r] = s.sum[r] > 0 ? s.high[r] + logf(s.sum[r]) : -INFINITY;
            for (int c = 0; c < HEAD_DIM; c++)
                out[r * HEAD_DIM + c] = s.sum[r] > 0 ? s.made[r][c] / s.sum[r] : 0;
        }
    }
}
