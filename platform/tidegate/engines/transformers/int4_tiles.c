/* Products with 4-bit weights on processors with tiles for bfloat16 (AMX), as an operator of PyTorch. It is called
 * by int4_tiles.py, which sees to it that it gets what is asked for here.
 *
 * The weights lie as `_convert_weight_to_int4pack_for_cpu` packs them with AVX-512: blocks of 64 outputs, in each
 * input by input 32 bytes, whose low halves are the codes of the first 32 outputs and whose high halves those of
 * the others. Codes less 8 are whole numbers, which bfloat16 holds exactly: a group's sum of products is as
 * exact as in float32, and is multiplied by the group's scale afterwards.
 *
 * Few rows are computed without tiles, with the sums in the order that the processor's manual gives for
 * TDPBF16PS: so a row gets the same bits whatever rows are beside it, but for inputs so small (under 1e-38) that
 * tiles take them for 0.
 */
#include <immintrin.h>
#include "native.h"

enum {
    BLOCK = 64,      /* outputs that are packed together */
    TILE = 16,       /* rows of a tile, and outputs */
    DEPTH = 32,      /* inputs of a tile */
    ROWS = 64,       /* that share unpacked weights */
    MOST_GROUP = 128, /* inputs */
    FEW = 2          /* rows that are computed without tiles */
};

typedef struct {
    const uint16_t *inputs; /* [rows, depth] bfloat16 */
    const uint8_t *packed;  /* [outputs / BLOCK, depth, BLOCK / 2] */
    const uint16_t *scales; /* [groups, outputs, 2] bfloat16: scale, and what is added to each weight */
    float *sums;            /* room for those of inputs, [rows, groups]; NULL where nothing is added */
    uint16_t *found;        /* [rows, outputs] bfloat16 */
    uint16_t *tiled;        /* room for the inputs in the order of `tile` */
    int64_t rows, depth, outputs, size;
} Product;

static inline __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* The scales of 16 outputs, and what is added. */
static inline void scales_of(const uint16_t *pairs, __m512 *scale, __m512 *added) {
    __m512i both = _mm512_loadu_si512(pairs);
    *scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *added = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

static inline void store(uint16_t *to, __m512 values) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values));
}

static const float CODES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

/* One block of outputs for `count` rows, one or two, without tiles. */
static inline __attribute__((always_inline)) void without_tiles(const Product *its, int64_t block, int64_t row, const int count) {
    const uint8_t *packed = its->packed + block * its->depth * (BLOCK / 2);
    const __m512 codes = _mm512_loadu_ps(CODES);
    __m512 result[2][4], group[2][4];
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) result[r][c] = _mm512_setzero_ps();
    for (int64_t begin = 0, at = 0; begin < its->depth; begin += its->size, at++) {
        for (int r = 0; r < count; r++)
            for (int c = 0; c < 4; c++) group[r][c] = _mm512_setzero_ps();
        for (int64_t k = begin; k < begin + its->size; k += DEPTH) {
            __m512 even[2][4], odd[2][4];
            for (int r = 0; r < count; r++)
                for (int c = 0; c < 4; c++) even[r][c] = odd[r][c] = _mm512_setzero_ps();
            for (int64_t pair = k; pair < k + DEPTH; pair += 2) {
                for (int side = 0; side < 2; side++) {
                    __m256i bytes = _mm256_loadu_si256((const __m256i *)(packed + (pair + side) * (BLOCK / 2)));
                    __m512i one = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
                    __m512i other = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
                    __m512 weights[4] = {
                        _mm512_permutexvar_ps(one, codes),
                        _mm512_permutexvar_ps(other, codes),
                        _mm512_permutexvar_ps(_mm512_srli_epi32(one, 4), codes),
                        _mm512_permutexvar_ps(_mm512_srli_epi32(other, 4), codes),
                    };
                    for (int r = 0; r < count; r++) {
                        uint32_t bits = (uint32_t)its->inputs[(row + r) * its->depth + pair + side] << 16;
                        __m512 input = _mm512_castsi512_ps(_mm512_set1_epi32((int)bits));
                        for (int c = 0; c < 4; c++) {
                            if (side) odd[r][c] = _mm512_fmadd_ps(input, weights[c], odd[r][c]);
                            else even[r][c] = _mm512_fmadd_ps(input, weights[c], even[r][c]);
                        }
                    }
                }
                _mm_prefetch((const char *)(packed + (pair + 2 * DEPTH) * (BLOCK / 2)), _MM_HINT_T0);
            }
            for (int r = 0; r < count; r++)
                for (int c = 0; c < 4; c++) {
                    __m512 sum = _mm512_add_ps(even[r][c], odd[r][c]);
                    group[r][c] = _mm512_add_ps(group[r][c], sum);
                }
        }
        const uint16_t *pairs = its->scales + (at * its->outputs + block * BLOCK) * 2;
        for (int c = 0; c < 4; c++) {
            __m512 scale, added;
            scales_of(pairs + c * TILE * 2, &scale, &added);
            for (int r = 0; r < count; r++) {
                result[r][c] = _mm512_fmadd_ps(group[r][c], scale, result[r][c]);
                if (its->sums) {
                    __m512 sum = _mm512_set1_ps(its->sums[(row + r) * (its->depth / its->size) + at]);
                    result[r][c] = _mm512_fmadd_ps(sum, added, result[r][c]);
                }
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int c = 0; c < 4; c++) store(its->found + (row + r) * its->outputs + block * BLOCK + c * TILE, result[r][c]);
}

/* DEPTH inputs of a block as four tiles: each row two inputs, one beside the other, of 16 outputs. */
static inline void unpack(const uint8_t *packed, uint16_t tiles[4][DEPTH / 2][2 * TILE], __m512i codes) {
    const __m512i low = _mm512_set1_epi16(15);
    for (int pair = 0; pair < DEPTH / 2; pair++) {
        __m256i one = _mm256_loadu_si256((const __m256i *)(packed + pair * BLOCK));
        __m256i other = _mm256_loadu_si256((const __m256i *)(packed + pair * BLOCK + BLOCK / 2));
        __m256i front = _mm256_unpacklo_epi8(one, other), back = _mm256_unpackhi_epi8(one, other);
        __m512i first = _mm512_cvtepu8_epi16(_mm256_permute2x128_si256(front, back, 0x20));
        __m512i second = _mm512_cvtepu8_epi16(_mm256_permute2x128_si256(front, back, 0x31));
        _mm512_store_si512(tiles[0][pair], _mm512_permutexvar_epi16(_mm512_and_si512(first, low), codes));
        _mm512_store_si512(tiles[1][pair], _mm512_permutexvar_epi16(_mm512_and_si512(second, low), codes));
        _mm512_store_si512(tiles[2][pair], _mm512_permutexvar_epi16(_mm512_srli_epi16(first, 4), codes));
        _mm512_store_si512(tiles[3][pair], _mm512_permutexvar_epi16(_mm512_srli_epi16(second, 4), codes));
    }
}

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t width[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) Shape;

/* Tiles 0 to 3 are sums, of the last of which `last` rows count; 4 and 5 inputs, of 16 and of `last` rows; 6 weights. */
static void shape_tiles(int tiles, int last) {
    Shape shape = {.palette = 1};
    for (int at = 0; at < 7; at++) shape.width[at] = 64, shape.rows[at] = TILE;
    shape.rows[tiles - 1] = shape.rows[5] = (uint8_t)last;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape)); /* gcc's own tells the compiler of its first bytes only */
}

#define ADD(at)                                                        \
    if (at < tiles) {                                                  \
        if (at < tiles - 1) {                                          \
            _tile_loadd(4, inputs + (step * tiles + at) * TILE * DEPTH, 64); \
            _tile_dpbf16ps(at, 4, 6);                                  \
        } else {                                                       \
            _tile_loadd(5, inputs + (step * tiles + at) * TILE * DEPTH, 64); \
            _tile_dpbf16ps(at, 5, 6);                                  \
        }                                                              \
    }

/* One block of outputs for the rows from `row` on, ROWS at most, whose inputs are `tiled`. */
static void with_tiles(const Product *its, int64_t block, int64_t row, int rows, const uint16_t *tiled) {
    __attribute__((aligned(64))) uint16_t weights[MOST_GROUP / DEPTH][4][DEPTH / 2][2 * TILE];
    __attribute__((aligned(64))) float result[4][ROWS][TILE], group[ROWS][TILE];
    const int tiles = (rows + TILE - 1) / TILE, steps = (int)(its->size / DEPTH);
    const uint8_t *packed = its->packed + block * its->depth * (BLOCK / 2);
    const int64_t groups = its->depth / its->size;
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(CODES));
    const __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(halves), halves, 1);
    for (int column = 0; column < 4; column++)
        for (int r = 0; r < rows; r++) _mm512_store_ps(result[column][r], _mm512_setzero_ps());
    for (int64_t begin = 0, at = 0; begin < its->depth; begin += its->size, at++) {
        const uint16_t *inputs = tiled + begin * tiles * TILE;
        for (int step = 0; step < steps; step++) unpack(packed + (begin + step * DEPTH) * (BLOCK / 2), weights[step], codes);
        __asm__ volatile("" ::"r"(weights) : "memory"); /* nor does it know what tiles are loaded from */
        for (int column = 0; column < 4; column++) {
            _tile_zero(0);
            if (tiles > 1) _tile_zero(1);
            if (tiles > 2) _tile_zero(2);
            if (tiles > 3) _tile_zero(3);
            for (int step = 0; step < steps; step++) {
                _tile_loadd(6, weights[step][column], 64);
                ADD(0) ADD(1) ADD(2) ADD(3)
            }
            _tile_stored(0, group[0], 64);
            if (tiles > 1) _tile_stored(1, group[TILE], 64);
            if (tiles > 2) _tile_stored(2, group[2 * TILE], 64);
            if (tiles > 3) _tile_stored(3, group[3 * TILE], 64);
            __m512 scale, added;
            scales_of(its->scales + (at * its->outputs + block * BLOCK + column * TILE) * 2, &scale, &added);
            for (int r = 0; r < rows; r++) {
                __m512 sum = _mm512_fmadd_ps(_mm512_load_ps(group[r]), scale, _mm512_load_ps(result[column][r]));
                if (its->sums) sum = _mm512_fmadd_ps(_mm512_set1_ps(its->sums[(row + r) * groups + at]), added, sum);
                _mm512_store_ps(result[column][r], sum);
            }
        }
    }
    for (int column = 0; column < 4; column++)
        for (int r = 0; r < rows; r++)
            store(its->found + (row + r) * its->outputs + block * BLOCK + column * TILE, _mm512_load_ps(result[column][r]));
}

/* Put the inputs of `rows` rows, ROWS at most, in the order in which tiles take them: [depth / DEPTH, tiles, TILE,
 * DEPTH]. Loaded from where they come from, a row at a time, 64 rows take a quarter longer. */
static void tile(const Product *its, int64_t row, int rows, uint16_t *tiled) {
    const int tiles = (rows + TILE - 1) / TILE;
    for (int r = 0; r < rows; r++) {
        const uint16_t *from = its->inputs + (row + r) * its->depth;
        uint16_t *to = tiled + r * DEPTH;
        for (int64_t at = 0; at < its->depth; at += DEPTH, to += tiles * TILE * DEPTH) _mm512_store_si512(to, _mm512_loadu_si512(from + at));
    }
}

static inline int rows_from(const Product *its, int64_t row) {
    return (int)(its->rows - row < ROWS ? its->rows - row : ROWS);
}

static void tile_rows(int64_t begin, int64_t end, void *context) {
    const Product *its = context;
    for (int64_t row = begin * ROWS; row < end * ROWS && row < its->rows; row += ROWS)
        tile(its, row, rows_from(its, row), its->tiled + row * its->depth);
}

static void blocks(int64_t begin, int64_t end, void *context) {
    const Product *its = context;
    if (its->rows <= FEW) {
        for (int64_t block = begin; block < end; block++) {
            int64_t row = 0;
            for (; row + 2 <= its->rows; row += 2) without_tiles(its, block, row, 2);
            if (row < its->rows) without_tiles(its, block, row, 1);
        }
        return;
    }
    for (int64_t row = 0; row < its->rows; row += ROWS) {
        const int rows = rows_from(its, row), tiles = (rows + TILE - 1) / TILE;
        shape_tiles(tiles, rows - (tiles - 1) * TILE);
        for (int64_t block = begin; block < end; block++) with_tiles(its, block, row, rows, its->tiled + row * its->depth);
    }
    _tile_release();
}

static void sum_rows(int64_t begin, int64_t end, void *context) {
    const Product *its = context;
    const uint16_t *inputs = its->inputs + begin * its->depth;
    float *sums = its->sums + begin * (its->depth / its->size);
    for (const uint16_t *last = its->inputs + end * its->depth; inputs < last; inputs += its->size) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < its->size; at += TILE) sum = _mm512_add_ps(sum, widened(_mm256_loadu_si256((const __m256i *)(inputs + at))));
        *sums++ = _mm512_reduce_add_ps(sum);
    }
}

static void product(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    Product its = {
        .found = data_of(stack[0]),
        .inputs = data_of(stack[1]),
        .packed = data_of(stack[2]),
        .scales = data_of(stack[3]),
        .sums = size_of(stack[4], 0) ? data_of(stack[4]) : 0,
        .tiled = data_of(stack[5]),
        .depth = size_of(stack[1], 1),
        .outputs = size_of(stack[0], 1),
        .size = (int64_t)stack[6],
    };
    const int64_t rows = size_of(stack[1], 0), most = size_of(stack[5], 0) / TILE * TILE;
    for (int64_t left = most > 0 ? rows : 0; left > 0; left -= most) { /* as many rows as there is room for */
        its.rows = left < most ? left : most;
        if (its.sums) torch_parallel_for(0, its.rows, ROWS, sum_rows, &its);
        if (its.rows > FEW) torch_parallel_for(0, (its.rows + ROWS - 1) / ROWS, 1, tile_rows, &its);
        torch_parallel_for(0, its.outputs / BLOCK, 1, blocks, &its);
        its.inputs += its.rows * its.depth;
        its.found += its.rows * its.outputs;
    }
    let_go(stack, 6);
}

__attribute__((constructor)) static void install(void) {
    install_as("int4_product", "int4_product(Tensor(a!) found, Tensor inputs, Tensor packed, Tensor scales, Tensor(b!) sums, Tensor(c!) tiled, int size) -> ()", product);
}
