/* Attention of a few queries over packed keys and values; nothing is unpacked to memory.

   Keys: q.k = sum_c (q_c scale_gc) code_tc + sum_c q_c min_gc, so a group of tokens scales the
   query once. Values: sum_t w_t v_tc. Sizes come from the command line, so loops have known ends:
   HEAD_DIM, ROWS (queries that share a KV head), KEY_BITS, VALUE_BITS, KEY_GROUP (tokens),
   VALUE_GROUP (channels). See narrows/kv/codec.py for the layout. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define KEY_PLANES (8 / KEY_BITS)
#define KEY_WIDTH (HEAD_DIM * KEY_BITS / 8)
#define KEY_MASK ((1 << KEY_BITS) - 1)
#define VALUE_PLANES (8 / VALUE_BITS)
#define VALUE_WIDTH (HEAD_DIM * VALUE_BITS / 8)
#define VALUE_MASK ((1 << VALUE_BITS) - 1)
#define VALUE_GROUPS (HEAD_DIM / VALUE_GROUP)
#define BLOCK (256 / KEY_GROUP * KEY_GROUP ? 256 / KEY_GROUP * KEY_GROUP : KEY_GROUP) /* tokens at a time */

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

/* Scores of one block of tokens, already scaled. */
static void scores(
    const float (*restrict query)[HEAD_DIM], const uint8_t *restrict codes,
    const uint16_t *restrict scale, const uint16_t *restrict minimum, long tokens,
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
            for (int k = 0; k < KEY_PLANES; k++)
                for (int j = 0; j < KEY_WIDTH; j++)
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

/* Values of one block of tokens, by weights, added to `out`. */
static void mix(
    const float (*restrict weights)[BLOCK], const uint8_t *restrict codes,
    const uint16_t *restrict scale, const uint16_t *restrict minimum, long tokens,
    float (*restrict out)[HEAD_DIM]
) {
    float sum[ROWS][HEAD_DIM], lowest[ROWS][VALUE_GROUPS];
    memset(sum, 0, sizeof sum);
    memset(lowest, 0, sizeof lowest);
    for (long t = 0; t < tokens; t++) {
        float plain[HEAD_DIM];
        for (int k = 0; k < VALUE_PLANES; k++)
            for (int j = 0; j < VALUE_WIDTH; j++)
                plain[k * VALUE_WIDTH + j] =
                    (float)((codes[j] >> (VALUE_BITS * k)) & VALUE_MASK);
        for (int g = 0; g < VALUE_GROUPS; g++) {
            float factor = half(scale[g]), low = half(minimum[g]);
            for (int r = 0; r < ROWS; r++) {
                float a = weights[r][t] * factor;
                lowest[r][g] += weights[r][t] * low;
                for (int i = 0; i < VALUE_GROUP; i++)
                    sum[r][g * VALUE_GROUP + i] += a * plain[g * VALUE_GROUP + i];
            }
        }
        codes += VALUE_WIDTH;
        scale += VALUE_GROUPS;
        minimum += VALUE_GROUPS;
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < HEAD_DIM; c++) out[r][c] += sum[r][c] + lowest[r][c / VALUE_GROUP];
}

/* One KV head over tokens `begin` to `end` (begin at the edge of a key group).

   query, out: (ROWS, HEAD_DIM). bias: added to the scores, row r at bias + r * bias_row, or null.
   total: (ROWS) log of the sum of exp; -inf where all is hidden, and `out` is zero there. */
void attend(
    const float *restrict query, const uint8_t *restrict key_codes,
    const uint16_t *restrict key_scale, const uint16_t *restrict key_minimum,
    const uint8_t *restrict value_codes, const uint16_t *restrict value_scale,
    const uint16_t *restrict value_minimum, const float *restrict bias, long bias_row,
    float scaling, long begin, long end, float *restrict out, float *restrict total
) {
    float asked[ROWS][HEAD_DIM], made[ROWS][HEAD_DIM], weights[ROWS][BLOCK];
    float largest[ROWS], sum[ROWS];
    for (int r = 0; r < ROWS; r++) {
        largest[r] = -INFINITY;
        sum[r] = 0;
        for (int c = 0; c < HEAD_DIM; c++) {
            asked[r][c] = query[r * HEAD_DIM + c] * scaling;
            made[r][c] = 0;
        }
    }
    for (long t = begin; t < end; t += BLOCK) {
        long count = end - t < BLOCK ? end - t : BLOCK;
        long group = t / KEY_GROUP;
        scores((const float (*)[HEAD_DIM])asked, key_codes + t * KEY_WIDTH,
               key_scale + group * HEAD_DIM, key_minimum + group * HEAD_DIM, count, weights);
        for (int r = 0; r < ROWS; r++) {
            if (bias)
                for (long i = 0; i < count; i++) weights[r][i] += bias[r * bias_row + t + i];
            float high = largest[r];
            for (long i = 0; i < count; i++) high = weights[r][i] > high ? weights[r][i] : high;
            if (high < -1e30f) { /* nothing visible yet */
                for (long i = 0; i < count; i++) weights[r][i] = 0;
                continue;
            }
            if (high > largest[r]) {
                float shrink = largest[r] < -1e30f ? 0.0f : exponential(largest[r] - high);
                for (int c = 0; c < HEAD_DIM; c++) made[r][c] *= shrink;
                sum[r] *= shrink;
                largest[r] = high;
            }
            float more = 0;
            for (long i = 0; i < count; i++) {
                weights[r][i] = exponential(weights[r][i] - high);
                more += weights[r][i];
            }
            sum[r] += more;
        }
        mix((const float (*)[BLOCK])weights, value_codes + t * VALUE_WIDTH,
            value_scale + t * VALUE_GROUPS, value_minimum + t * VALUE_GROUPS, count, made);
    }
    for (int r = 0; r < ROWS; r++) {
        total[r] = sum[r] > 0 ? largest[r] + logf(sum[r]) : -INFINITY;
        for (int c = 0; c < HEAD_DIM; c++)
            out[r * HEAD_DIM + c] = sum[r] > 0 ? made[r][c] / sum[r] : 0;
    }
}
