/* Attention of one token of each row to its keys and values, in bfloat16 with sums in float32, as an operator of
 * PyTorch for processors with products of bfloat16 (AVX512_BF16). It is called by attention.py, which sees to it
 * that it gets what is asked for here.
 *
 * Keys and values are read once, where they lie; values of columns that a row does not see not at all, nor keys of 16
 * columns of which it sees none.
 */
#include <immintrin.h>
#include <math.h>
#include "native.h"

enum {
    LANES = 16,  /* numbers of a vector in float32 */
    PAIRS = 32,  /* numbers of a vector in bfloat16 */
    TOGETHER = 4, /* queries that share what is read, at most */
    PART = 256   /* columns whose scores are held */
};

typedef struct {
    uint16_t *found;         /* [rows, shared x group x size] */
    const uint16_t *queries; /* [rows, shared x group, size] */
    const uint16_t *keys;    /* [rows, shared, columns, size] */
    const uint16_t *values;
    const uint8_t *seen; /* [rows, columns] */
    int64_t rows, shared, group, columns, size;
    int64_t query_row, key_row, key_head, key_column, value_row, value_head, value_column, seen_row;
    float scale;
} Attention;

/* e to the power of values of 0 or less; of those under -87 it is 0. */
static inline __m512 exponential(__m512 values) {
    const __m512 least = _mm512_set1_ps(-87.0f);
    const __m512 held = _mm512_max_ps(least, values); /* in this order what is no number stays that */
    const __m512 whole = _mm512_roundscale_ps(
        _mm512_mul_ps(held, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), held); /* the logarithm of 2, in two parts */
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
    const float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.0f, 1.0f}; /* Taylor's: rest is 0.35 at most */
    __m512 sum = _mm512_set1_ps(1.f / 5040);
    for (int at = 0; at < 7; at++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(terms[at]));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(values, least, _CMP_NLT_UQ), sum, whole);
}

/* The sums of the lanes of 16 vectors, as the lanes of one. */
static inline __m512 sums_of(const __m512 vectors[LANES]) {
    __m512 halves[8], quarters[4], eighths[2];
    for (int at = 0; at < 8; at++) {
        __m512 one = vectors[2 * at], other = vectors[2 * at + 1];
        halves[at] = _mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
    }
    for (int at = 0; at < 4; at++) {
        __m512d one = _mm512_castps_pd(halves[2 * at]), other = _mm512_castps_pd(halves[2 * at + 1]);
        quarters[at] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(one, other)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
    }
    for (int at = 0; at < 2; at++) {
        __m512 one = quarters[2 * at], other = quarters[2 * at + 1];
        eighths[at] = _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88), _mm512_shuffle_f32x4(one, other, 0xdd));
    }
    return _mm512_add_ps(
        _mm512_shuffle_f32x4(eighths[0], eighths[1], 0x88), _mm512_shuffle_f32x4(eighths[0], eighths[1], 0xdd));
}

/* `group` queries of a row, from `first` on, that attend to the same head; their size is that of `vectors`. */
static inline __attribute__((always_inline)) void attend(const Attention *its, int64_t row, int64_t head, int64_t first, const int group, const int vectors) {
    const uint16_t *keys = its->keys + row * its->key_row + head * its->key_head;
    const uint16_t *values = its->values + row * its->value_row + head * its->value_head;
    const uint8_t *seen = its->seen + row * its->seen_row;
    const int64_t size = its->size, query = head * its->group + first;
    __m512i queries[TOGETHER][vectors];
    __m512 sums[TOGETHER][2 * vectors];
    float scores[TOGETHER][PART], most[TOGETHER], total[TOGETHER];
    for (int g = 0; g < group; g++) {
        for (int v = 0; v < vectors; v++) queries[g][v] = _mm512_loadu_si512(its->queries + row * its->query_row + (query + g) * size + v * PAIRS);
        for (int v = 0; v < 2 * vectors; v++) sums[g][v] = _mm512_setzero_ps();
        most[g] = -INFINITY, total[g] = 0;
    }
    for (int64_t begin = 0; begin < its->columns; begin += PART) {
        const int columns = (int)(its->columns - begin < PART ? its->columns - begin : PART);
        int are_seen = 0;
        for (int at = 0; at < columns; at += LANES) {
            const int count = columns - at < LANES ? columns - at : LANES;
            const __mmask16 held = (__mmask16)((1u << count) - 1);
            const __m128i bytes = _mm_maskz_loadu_epi8(held, seen + begin + at);
            const __mmask16 mask = _mm_test_epi8_mask(bytes, bytes);
            are_seen |= mask;
            for (int g = 0; g < group; g++) {
                __m512 dots[LANES];
                if (!mask) {
                    _mm512_storeu_ps(scores[g] + at, _mm512_set1_ps(-INFINITY));
                    continue;
                }
                for (int c = 0; c < LANES; c++) {
                    const uint16_t *key = keys + (begin + at + (c < count ? c : 0)) * its->key_column;
                    dots[c] = _mm512_setzero_ps();
                    for (int v = 0; v < vectors; v++)
                        dots[c] = _mm512_dpbf16_ps(dots[c], (__m512bh)queries[g][v], (__m512bh)_mm512_loadu_si512(key + v * PAIRS));
                }
                __m512 score = _mm512_mul_ps(sums_of(dots), _mm512_set1_ps(its->scale));
                _mm512_storeu_ps(scores[g] + at, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, score));
            }
        }
        if (!are_seen) continue;
        for (int g = 0; g < group; g++) {
            __m512 high = _mm512_set1_ps(most[g]), all = _mm512_setzero_ps();
            for (int at = 0; at < columns; at += LANES) high = _mm512_max_ps(high, _mm512_loadu_ps(scores[g] + at));
            const float before = most[g];
            most[g] = _mm512_reduce_max_ps(high);
            if (before > -INFINITY) { /* what was added had a smaller share than it seemed */
                const __m512 share = exponential(_mm512_set1_ps(before - most[g]));
                for (int v = 0; v < 2 * vectors; v++) sums[g][v] = _mm512_mul_ps(sums[g][v], share);
                total[g] *= _mm512_cvtss_f32(share);
            }
            for (int at = 0; at < columns; at += LANES) {
                const __m512 share = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores[g] + at), _mm512_set1_ps(most[g])));
                all = _mm512_add_ps(all, share);
                _mm512_storeu_ps(scores[g] + at, share);
            }
            total[g] += _mm512_reduce_add_ps(all);
        }
        for (int at = 0; at < columns; at++) {
            if (!seen[begin + at]) continue;
            const uint16_t *value = values + (begin + at) * its->value_column;
            for (int v = 0; v < 2 * vectors; v++) {
                const __m256i halves = _mm256_loadu_si256((const __m256i *)(value + v * LANES));
                const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
                for (int g = 0; g < group; g++) sums[g][v] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g][at]), wide, sums[g][v]);
            }
        }
    }
    for (int g = 0; g < group; g++) {
        uint16_t *to = its->found + (row * its->shared * its->group + query + g) * size;
        const __m512 share = _mm512_set1_ps(1.0f / total[g]);
        for (int v = 0; v < 2 * vectors; v++)
            _mm256_storeu_si256((__m256i *)(to + v * LANES), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[g][v], share)));
    }
}

#define OF_SIZE(vectors)                                                   \
    static void of_size_##vectors(const Attention *its, int64_t row, int64_t head) { \
        int64_t first = 0;                                                 \
        for (; first + 4 <= its->group; first += 4) attend(its, row, head, first, 4, vectors); \
        if (its->group - first >= 2) attend(its, row, head, first, 2, vectors), first += 2;    \
        if (its->group > first) attend(its, row, head, first, 1, vectors); \
    }
OF_SIZE(1)
OF_SIZE(2)
OF_SIZE(3)
OF_SIZE(4)

static void heads(int64_t begin, int64_t end, void *context) {
    static void (*const of_size[])(const Attention *, int64_t, int64_t) = {of_size_1, of_size_2, of_size_3, of_size_4};
    const Attention *its = context;
    for (int64_t at = begin; at < end; at++) of_size[its->size / PAIRS - 1](its, at / its->shared, at % its->shared);
}

static void attention(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    const Value queries = stack[1], keys = stack[2], values = stack[3];
    double scale;
    __builtin_memcpy(&scale, &stack[5], sizeof scale);
    Attention its = {
        .found = data_of(stack[0]),
        .queries = data_of(queries),
        .keys = data_of(keys),
        .values = data_of(values),
        .seen = data_of(stack[4]),
        .rows = size_of(keys, 0),
        .shared = size_of(keys, 1),
        .group = size_of(queries, 1) / size_of(keys, 1),
        .columns = size_of(keys, 2),
        .size = size_of(keys, 3),
        .query_row = stride_of(queries, 0),
        .key_row = stride_of(keys, 0),
        .key_head = stride_of(keys, 1),
        .key_column = stride_of(keys, 2),
        .value_row = stride_of(values, 0),
        .value_head = stride_of(values, 1),
        .value_column = stride_of(values, 2),
        .seen_row = stride_of(stack[4], 0),
        .scale = (float)scale,
    };
    torch_parallel_for(0, its.rows * its.shared, 1, heads, &its);
    let_go(stack, 5);
}

__attribute__((constructor)) static void install(void) {
    install_as("attention", "attention(Tensor(a!) found, Tensor queries, Tensor keys, Tensor values, Tensor seen, float scale) -> ()", attention);
}
