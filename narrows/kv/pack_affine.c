/* Affine codes of a few bits, packed for one KV head at a time. See narrows/kv/codec.py for the
   layout and the rule; results are bit for bit those of its plain form.

   Sizes come from the command line: HEAD_DIM, BITS, GROUP, and BY_TOKEN (1: GROUP channels of a
   token share a scale; 0: GROUP tokens of a channel). */

#include <math.h>
#include <stdint.h>

#define PLANES (8 / BITS)
#define WIDTH (HEAD_DIM * BITS / 8)
#define LEVELS ((1 << BITS) - 1)
#define GROUPS (HEAD_DIM / GROUP)

static inline uint32_t bits_of(float x) {
    union { float f; uint32_t u; } both = {x};
    return both.u;
}

static inline float float_of(uint32_t u) {
    union { uint32_t u; float f; } both = {u};
    return both.f;
}

/* The nearest fp16, ties to even; infinite beyond its range. */
static inline uint16_t to_half(float x) {
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
    if (size >= 0x47800000) /* 65536 and up, infinities, not a number */
        return sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (size < 0x38800000) { /* below 2^-14: adding 0.5 leaves what a subnormal holds */
        uint32_t kept = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
        return sign | kept;
    }
    size += 0xc8000fff + (size >> 13 & 1); /* exponent from 127 to 15, and half a last place */
    return sign | size >> 13;
}

static inline float from_half(uint16_t h) {
    float x = float_of((uint32_t)(h & 0x7fff) << 13) * 5.192296858534828e33f; /* 2^112 */
    return float_of(bits_of(x) | (uint32_t)(h & 0x8000) << 16);
}

/* The largest fp16 that is not above x. */
static inline uint16_t half_below(float x) {
    uint16_t near = to_half(x);
    if ((near & 0x7c00) == 0x7c00) /* too large for fp16, or infinite itself */
        return near == 0x7c00 && x <= 3.4028234664e38f ? 0x7bff : near;
    if (!(from_half(near) > x)) return near;
    if (!(near & 0x7fff)) return 0x8001; /* below zero comes the least negative number */
    return near & 0x8000 ? near + 1 : near - 1;
}

/* Scale and minimum of a group; 1 where fp16 cannot hold them. */
static inline int ends(float low, float high, uint16_t *scale, uint16_t *minimum) {
    *minimum = half_below(low);
    *scale = to_half((high - from_half(*minimum)) / LEVELS);
    return (*minimum & 0x7c00) == 0x7c00 || (*scale & 0x7c00) == 0x7c00;
}

static inline uint8_t code_of(float x, float minimum, float step) {
    float code = (x - minimum) / step;
    code = code < 0 ? 0 : code > LEVELS ? LEVELS : code;
    return (uint8_t)rintf(code);
}

static void fold(const uint8_t *restrict plain, uint8_t *restrict out) {
    for (int j = 0; j < WIDTH; j++) {
        uint8_t byte = 0;
        for (int k = 0; k < PLANES; k++) byte |= plain[k * WIDTH + j] << (BITS * k);
        out[j] = byte;
    }
}

/* x: heads * tokens * HEAD_DIM, a head at every by_head numbers and by_batch, tokens one behind
   the other. codes, scale, minimum: contiguous. Returns 1 where something does not fit fp16. */
int pack(
    const float *restrict x, long by_batch, long by_head, long heads, long tokens, long first,
    long last, uint8_t *restrict codes, uint16_t *restrict scale, uint16_t *restrict minimum
) {
    int wrong = 0;
    uint8_t plain[HEAD_DIM];
    for (long at = first; at < last; at++) {
        const float *head = x + at / heads * by_batch + at % heads * by_head;
        uint8_t *out = codes + at * tokens * WIDTH;
#if BY_TOKEN
        uint16_t *steps = scale + at * tokens * GROUPS, *lows = minimum + at * tokens * GROUPS;
        for (long t = 0; t < tokens; t++, head += HEAD_DIM, out += WIDTH) {
            for (int g = 0; g < GROUPS; g++) {
                const float *some = head + g * GROUP;
                float low = some[0], high = some[0];
                int bad = 0;
                for (int i = 0; i < GROUP; i++) {
                    low = some[i] < low ? some[i] : low;
                    high = some[i] > high ? some[i] : high;
                    bad |= some[i] != some[i];
                }
                wrong |= bad | ends(low, high, steps, lows);
                float from = from_half(*lows++), step = from_half(*steps++);
                for (int i = 0; i < GROUP; i++)
                    plain[g * GROUP + i] = step > 0 ? code_of(some[i], from, step) : 0;
            }
            fold(plain, out);
        }
#else
        uint16_t *steps = scale + at * (tokens / GROUP) * HEAD_DIM;
        uint16_t *lows = minimum + at * (tokens / GROUP) * HEAD_DIM;
        for (long t = 0; t < tokens; t += GROUP, steps += HEAD_DIM, lows += HEAD_DIM) {
            float low[HEAD_DIM], high[HEAD_DIM], from[HEAD_DIM], step[HEAD_DIM];
            int bad[HEAD_DIM];
            for (int c = 0; c < HEAD_DIM; c++) low[c] = high[c] = head[c], bad[c] = 0;
            for (int i = 0; i < GROUP; i++)
                for (int c = 0; c < HEAD_DIM; c++) {
                    float value = head[i * HEAD_DIM + c];
                    low[c] = value < low[c] ? value : low[c];
                    high[c] = value > high[c] ? value : high[c];
                    bad[c] |= value != value;
                }
            for (int c = 0; c < HEAD_DIM; c++) {
                wrong |= bad[c] | ends(low[c], high[c], steps + c, lows + c);
                from[c] = from_half(lows[c]);
                step[c] = from_half(steps[c]);
            }
            for (int i = 0; i < GROUP; i++, head += HEAD_DIM, out += WIDTH) {
                for (int c = 0; c < HEAD_DIM; c++)
                    plain[c] = step[c] > 0 ? code_of(head[c], from[c], step[c]) : 0;
                fold(plain, out);
            }
        }
#endif
    }
    return wrong;
}
