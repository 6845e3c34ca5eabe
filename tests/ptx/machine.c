/* A GPU for one launch of a kernel: carries out decoded PTX on the memory of this process. machine.py says what it
   promises, ptx.py decodes. A register is a row of 32 numbers, one a thread of the warp; constants are rows, too. */

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef unsigned __int128 u128;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64; typedef __int128 s128;

/* As in ptx.py and machine.py: an instruction and its kind, the first rows, a launch. */
typedef struct {
    s32 operation, kind, line, begins, guard, negated, size, count, is_signed, strong, fences, offset, target, to[4], from[5];
} Instruction;
enum { ALU, CONTROL, GLOBAL, SHARED, SYNC, BARRIER };
enum { TID_X, LANEID, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, NTID_X, ZERO, CONSTANTS };
typedef struct {
    const Instruction *code; const u64 *constants, *allocations; u64 *counts; char *text;
    u64 seed, budget;
    u32 instructions, num_constants, rows, num_allocations, grid[3], warps, shared_bytes;
    u32 stale, late, policy, resident, split, noise, evict;
} Launch;
/* Of counts. Instructions are those of warps; sectors, of 32 bytes, what accesses to global memory touch. */
enum { STALE, LATE, SWITCHES, INSTRUCTIONS, SECTORS_TOUCHED, ATOMICS, LONGEST_WARP };
enum { BLOCKED = 16, DONE };    /* states of warps, besides the kind of what one did last */

typedef struct Warp Warp;
/* Of shared memory: who wrote and read a byte last, and how many barriers they had passed by then. */
typedef struct { u32 warp, thread, bars, syncs, readers, reader, read_bars, read_syncs; } Byte;
typedef struct { u32 sm, bars, waiting, done; u8 *shared; Byte *bytes; Warp *warps; } Block;
struct Warp { u32 pc[32], live, id, state, syncs; u64 issued, priority; u64 (*reg)[32]; Block *block; };
enum { SECTORS = 4096, SMS = 4, STORES = 48 };
typedef struct { u64 tag; u8 data[32]; } Sector;     /* of an SM's L1 */
typedef struct { u64 a; u32 n; u8 data[16]; } Store; /* that has not reached memory yet */
static struct { u64 random; int failed; u32 recent, stores[SMS]; Sector (*l1)[SECTORS]; Store store[SMS][STORES]; } G;
static Launch L;

#define EACH(mask) for (u32 l = 0; l < 32; l++) if ((mask) >> l & 1)

static u64 draw(void) {
    G.random ^= G.random >> 12; G.random ^= G.random << 25; G.random ^= G.random >> 27;
    return (G.random * 0x2545F4914F6CDD1Dull) >> 16;
}

static void fail(Warp *w, u32 l, u32 line, const char *format, ...) {
    if (G.failed++) return;
    int n = sprintf(L.text, "%u\n", line);
    va_list rest;
    va_start(rest, format);
    n += vsnprintf(L.text + n, 700, format, rest);
    va_end(rest);
    sprintf(L.text + n, " [block (%u, %u, %u), warp %u, lane %u]",
            (u32)w->reg[CTAID_X][l], (u32)w->reg[CTAID_Y][l], (u32)w->reg[CTAID_Z][l], w->id, l);
}

/* ---- what instructions compute */

static inline float f32_(u64 x) { u32 low = x; float v; memcpy(&v, &low, 4); return v; }
static inline double f64_(u64 x) { double v; memcpy(&v, &x, 8); return v; }
static inline u64 bits_f32(float x) { u32 v; memcpy(&v, &x, 4); return v; }
static inline u64 bits_f64(double x) { u64 v; memcpy(&v, &x, 8); return v; }
static inline float fma_f32(float x, float y, float z) { return fmaf(x, y, z); }
static inline double fma_f64(double x, double y, double z) { return fma(x, y, z); }
static inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline float noisy(float x, int exact) {
    if (!L.noise || exact || x == 0 || !isfinite(x)) return x;
    u32 step = draw() % 3;
    return step == 0 ? x : nextafterf(x, step == 1 ? INFINITY : -INFINITY);
}
static inline float quotient(float x, float y) { float q = x / y; return noisy(q, fmaf(q, y, -x) == 0); }
static inline float power(float x) { return noisy((float)exp2((double)x), x == rintf(x)); }
#define EXTREME(name, C, op) static inline C name(C x, C y, int keep) { \
    if (isnan(x) || isnan(y)) return keep ? NAN : isnan(x) ? y : x; \
    if (x == y) return (signbit(x) != 0) op (signbit(y) != 0) ? y : x; \
    return x op y ? x : y; }
EXTREME(min_f32, float, <) EXTREME(max_f32, float, >) EXTREME(min_f64, double, <) EXTREME(max_f64, double, >)
#define WHOLE(T, low, high, least, most) static inline T whole_##T(double x) { \
    return isnan(x) ? 0 : x <= low ? least : x >= high ? most : (T)x; }
WHOLE(s32, -0x1p31, 0x1p31, INT32_MIN, INT32_MAX) WHOLE(u32, 0, 0x1p32, 0, UINT32_MAX)
WHOLE(s64, -0x1p63, 0x1p63, INT64_MIN, INT64_MAX) WHOLE(u64, 0, 0x1p64, 0, UINT64_MAX)
static inline u64 div_u(u64 x, u64 y) { return y ? x / y : ~0ull; }
static inline u64 rem_u(u64 x, u64 y) { return y ? x % y : x; }
static inline s64 div_s(s64 x, s64 y) { return y == -1 ? (s64)(0 - (u64)x) : y ? x / y : -1; }
static inline s64 rem_s(s64 x, s64 y) { return y == -1 ? 0 : y ? x % y : x; }
static inline u64 bfe_u(u64 x, u32 at, u32 n, u32 width) {
    return at >= width || !n ? 0 : n >= 64 ? (u32)x >> at : ((u32)x >> at) & ((1ull << n) - 1);
}
static inline s64 bfe_s(s64 x, u32 at, u32 n, u32 width) {
    if (!n) return 0;
    u32 top = at + n - 1 < width - 1 ? at + n - 1 : width - 1, got = at >= width ? 0 : width - at < n ? width - at : n;
    u64 mask = got >= 64 ? ~0ull : (1ull << got) - 1, sign = -(u64)(x >> top & 1);
    return got ? (s64)(((u64)x >> at & mask) | (sign & ~mask)) : (s64)sign;
}
static inline u32 prmt(u32 x, u32 y, u32 picks) {
    u64 both = x | (u64)y << 32;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 pick = picks >> 4 * i & 15;
        u8 byte = both >> 8 * (pick & 7);
        result |= (u32)(pick & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return result;
}

#define OTHER(name) I_##name,
#define OP(name, result) I_##name,
#define ATOMIC(name, result) I_atomic_##name,
#define SHUFFLE(name, lane, inside) I_shfl_sync_##name##_b32,
#define REDUCE(name, type, result) I_redux_sync_##name,
enum {
#include "instructions.h"
};
#define OTHER(name) #name,
#define OP(name, result) #name,
#define ATOMIC(name, result) "atomic_" #name,
#define SHUFFLE(name, lane, inside) "shfl_sync_" #name "_b32",
#define REDUCE(name, type, result) "redux_sync_" #name,
const char *const operations[] = {
#include "instructions.h"
    0
};

static void compute(Warp *w, const Instruction *i, u32 q) {
    const u64 *x = w->reg[i->from[0]], *y = w->reg[i->from[1]], *z = w->reg[i->from[2]];
    u64 *to = w->reg[i->to[0]], *upper = w->reg[i->to[1]];
    switch (i->operation) {
#define OP(name, result) case I_##name: EACH(q) { u64 a = x[l], b = y[l], c = z[l]; to[l] = (u64)(result); } break;
#include "instructions.h"
    case I_unpack_b32: EACH(q) { u64 whole = x[l]; to[l] = (u16)whole; upper[l] = (u16)(whole >> 16); } break;
    case I_unpack_b64: EACH(q) { u64 whole = x[l]; to[l] = (u32)whole; upper[l] = whole >> 32; } break;
    case I_trap: EACH(q) fail(w, l, i->line, "trap"); break;
    case I_call_uni: EACH(q) fail(w, l, i->line, "device_assert: %s", (const char *)x[l]); break;
    }
}

/* ---- global memory */

static int allocated(Warp *w, u32 l, u64 a, u32 n, u32 line, const char *what) {
    if (a % n) { fail(w, l, line, "%s of %u bytes at 0x%lx is not aligned", what, n, a); return 0; }
    const u64 *s = L.allocations + 2 * G.recent; /* first byte, and the one after the last */
    if (L.num_allocations && a >= s[0] && a + n <= s[1]) return 1;
    u64 near = ~0ull;
    u32 nearest = 0;
    for (u32 i = 0; i < L.num_allocations; i++) {
        s = L.allocations + 2 * i;
        if (a >= s[0] && a + n <= s[1]) { G.recent = i; return 1; }
        u64 d = a < s[0] ? s[0] - a : a - s[1];
        if (d < near) near = d, nearest = i;
    }
    s = L.allocations + 2 * nearest;
    fail(w, l, line, "%s of %u bytes is outside of all arguments; nearest is one of %lu bytes,"
         " from whose start it is %ld", what, n, s[1] - s[0], (s64)(a - s[0]));
    return 0;
}

static void arrive(u32 sm, u32 i) { /* at memory: the oldest store to the place of store i */
    Store *q = G.store[sm], s = q[i];
    for (u32 k = 0; k < i; k++) if (q[k].a < s.a + s.n && s.a < q[k].a + q[k].n) { i = k; s = q[k]; break; }
    memcpy((void *)s.a, s.data, s.n);
    Sector *c = G.l1[sm] + (s.a >> 5) % SECTORS;
    if (c->tag == s.a >> 5) memcpy(c->data + (s.a & 31), s.data, s.n);
    memmove(q + i, q + i + 1, (--G.stores[sm] - i) * sizeof *q);
}

static void some_arrive(void) {
    if (!L.late) return;
    for (u32 sm = 0; sm < SMS; sm++) if (G.stores[sm] && draw() % 16 == 0) arrive(sm, draw() % G.stores[sm]);
}

static void fence(Warp *w) {
    u32 sm = w->block->sm;
    while (G.stores[sm]) arrive(sm, 0);
    if (L.stale) memset(G.l1[sm], 0, sizeof G.l1[sm]);
}

static void global_load(Warp *w, u32 l, u64 a, u32 n, const Instruction *i, u8 *out) {
    if (!allocated(w, l, a, n, i->line, "load")) { memset(out, 0, n); return; }
    u32 sm = w->block->sm;
    const u8 *from = (const u8 *)a;
    if (L.stale && !i->strong) {
        Sector *c = G.l1[sm] + (a >> 5) % SECTORS;
        if (c->tag != a >> 5 || L.evict && draw() % L.evict == 0) {
            c->tag = a >> 5;
            memcpy(c->data, (void *)(a >> 5 << 5), 32);
        }
        from = c->data + (a & 31);
    }
    memcpy(out, from, n);
    for (Store *s = G.store[sm]; s < G.store[sm] + G.stores[sm]; s++) /* its own ones an SM sees at once */
        for (u32 k = 0; k < s->n; k++) if (s->a + k >= a && s->a + k < a + n) out[s->a + k - a] = s->data[k];
    if (L.stale && memcmp(out, (void *)a, n)) L.counts[STALE]++;
}

static void global_store(Warp *w, u32 l, u64 a, u32 n, const Instruction *i, const u8 *in) {
    if (!allocated(w, l, a, n, i->line, "store")) return;
    u32 sm = w->block->sm;
    Sector *c = G.l1[sm] + (a >> 5) % SECTORS;
    if (c->tag == a >> 5) memcpy(c->data + (a & 31), in, n);
    if (!L.late) { memcpy((void *)a, in, n); return; }
    if (G.stores[sm] == STORES) arrive(sm, draw() % STORES);
    Store *s = G.store[sm] + G.stores[sm]++;
    s->a = a; s->n = n;
    memcpy(s->data, in, n);
    L.counts[LATE]++;
}

static u64 changed(const Instruction *i, u64 old, u64 v, u64 u) {
    switch (i->operation) {
#define ATOMIC(name, result) case I_atomic_##name: return result;
#include "instructions.h"
    }
    return 0;
}

static void global_atomic(Warp *w, u32 l, u64 a, const Instruction *i) {
    if (!allocated(w, l, a, i->size, i->line, "atomic")) return;
    u32 sm = w->block->sm;
    if (i->fences) fence(w);
    for (u32 k = 0; k < G.stores[sm];) {
        Store *s = G.store[sm] + k++;
        if (s->a < a + i->size && a < s->a + s->n) { arrive(sm, k - 1); k = 0; }
    }
    Sector *c = G.l1[sm] + (a >> 5) % SECTORS;
    if (c->tag == a >> 5) c->tag = 0;
    u64 old = 0;
    memcpy(&old, (void *)a, i->size);
    if (i->size == 4 && i->is_signed) old = (s64)(s32)old;
    u64 new = changed(i, old, w->reg[i->from[1]][l], w->reg[i->from[2]][l]);
    memcpy((void *)a, &new, i->size);
    w->reg[i->to[0]][l] = old;
}

/* ---- shared memory: bounds, and nobody uses a byte without a barrier after another, unless both read */

static int fits(Warp *w, u32 l, u64 a, u32 n, u32 line, const u8 *writes) {
    if (a % n || a + n > L.shared_bytes) {
        fail(w, l, line, "%s of %u bytes at shared address %lu of %u", writes ? "store" : "load", n, a, L.shared_bytes);
        return 0;
    }
    for (u32 k = 0; k < n; k++) {
        Byte *b = w->block->bytes + a + k;
        u32 now = w->block->bars + 1;
        if (writes && w->block->shared[a + k] == writes[k]) continue; /* what is there already */
        if (b->bars == now && (b->warp != w->id || b->thread != l && b->syncs == w->syncs))
            fail(w, l, line, "shared byte %lu: lane %u of warp %u wrote it since the last barrier",
                 a + k, b->thread, b->warp);
        int others = b->readers & ~(1u << w->id) || b->reader != l && b->read_syncs == w->syncs;
        if (writes && b->read_bars == now && others)
            fail(w, l, line, "shared byte %lu: another thread read it since the last barrier", a + k);
        if (writes) { b->bars = now; b->warp = w->id; b->thread = l; b->syncs = w->syncs; continue; }
        if (b->read_bars != now) b->readers = 0;
        b->reader = b->readers >> w->id & 1 && b->read_syncs == w->syncs && b->reader != l ? 32 : l;
        b->read_bars = now; b->readers |= 1u << w->id; b->read_syncs = w->syncs;
    }
    return 1;
}

/* Matrices of 8 x 8 of 16 bits; the lanes from 8 k on say where the rows of matrix k are. */
static void load_matrices(Warp *w, const Instruction *i, const u64 *a) {
    for (u32 k = 0; k < (u32)i->count; k++) for (u32 l = 0; l < 32; l++) {
        u16 halves[2] = { 0, 0 };
        for (u32 h = 0; h < 2; h++) {
            u64 at = a[8 * k + l / 4];
            if (at % 16) fail(w, 8 * k + l / 4, i->line, "row of a matrix at shared address %lu", at);
            at += 2 * (2 * (l % 4) + h);
            if (fits(w, l, at, 2, i->line, 0)) memcpy(halves + h, w->block->shared + at, 2);
        }
        w->reg[i->to[k]][l] = halves[0] | (u64)halves[1] << 16;
    }
}

/* Sectors that the lanes q touch. (An access is aligned and of at most 16 bytes, and so in one of them.) */
static u32 touched(Warp *w, const Instruction *i, u32 q) {
    u64 seen[32];
    u32 count = 0;
    EACH(q) {
        u64 sector = (w->reg[i->from[0]][l] + (s64)i->offset) >> 5;
        u32 k = count;
        while (k && seen[k - 1] != sector) k--;
        if (!k) seen[count++] = sector;
    }
    return count;
}

/* An access to memory by the lanes q, in any order where blocks do not run one after the other. */
static void access(Warp *w, const Instruction *i, u32 q) {
    if (i->operation == I_fence) { fence(w); return; }
    int global = i->kind == GLOBAL;
    u32 n = i->size * i->count, turn = L.policy ? draw() & 31 : 0;
    if (global && q) {
        some_arrive();
        L.counts[SECTORS_TOUCHED] += touched(w, i, q);
        if (i->operation != I_load && i->operation != I_store) L.counts[ATOMICS] += __builtin_popcount(q);
    }
    for (u32 k = 0; k < 32; k++) {
        u32 l = (k + turn) & 31;
        if (!(q >> l & 1)) continue;
        u64 a = w->reg[i->from[0]][l] + (s64)i->offset;
        u8 data[16];
        if (i->operation == I_load) {
            if (global) global_load(w, l, a, n, i, data);
            else if (fits(w, l, a, n, i->line, 0)) memcpy(data, w->block->shared + a, n);
            for (u32 r = 0; r < (u32)i->count; r++) {
                u64 v = 0;
                memcpy(&v, data + r * i->size, i->size);
                if (i->is_signed) v = (s64)(v << (64 - 8 * i->size)) >> (64 - 8 * i->size);
                w->reg[i->to[r]][l] = v;
            }
        } else if (i->operation == I_store) {
            for (u32 r = 0; r < (u32)i->count; r++) memcpy(data + r * i->size, &w->reg[i->from[1 + r]][l], i->size);
            if (global) global_store(w, l, a, n, i, data);
            else if (fits(w, l, a, n, i->line, data)) memcpy(w->block->shared + a, data, n);
        } else global_atomic(w, l, a, i);
    }
}

/* ---- what the threads m of a warp do together */

static u32 source(Warp *w, u32 m, u32 l, u32 from, int inside, u32 line) {
    if (!inside) return l;
    if (!(m >> from & 1)) { fail(w, l, line, "shuffle reads lane %u, which takes no part", from); return l; }
    return from;
}

static void together(Warp *w, const Instruction *i, u32 m) {
    u64 *to = w->reg[i->to[0]], *values = w->reg[i->from[0]], given[32];
    memcpy(given, values, sizeof given);
    switch (i->operation) {
    case I_bar_warp_sync: w->syncs++; break;
    case I_ldmatrix: EACH(m) given[l] += (s64)i->offset; load_matrices(w, i, given); break;
#define SHUFFLE(name, lane_, inside) case I_shfl_sync_##name##_b32: EACH(m) { \
        s32 lane = l, by = w->reg[i->from[1]][l] & 31, clamp = w->reg[i->from[2]][l], segment = clamp >> 8 & 31; \
        s32 most = (lane & segment) | (clamp & 31 & ~segment), least = lane & segment, from = lane_; \
        to[l] = given[source(w, m, l, from, inside, i->line)]; } break;
#define REDUCE(name, T, result) case I_redux_sync_##name: { \
        T all = given[__builtin_ctz(m)]; \
        EACH(m & (m - 1)) { T x = all, y = given[l]; all = result; } \
        EACH(m) to[l] = all; } break;
#include "instructions.h"
    }
}

/* ---- the schedule */

/* Carry out the instruction at pc, or as many as only compute, for the threads m; how many there were. */
static u32 execute(Warp *w, u32 pc, u32 m) {
    u32 done = 0;
    for (const Instruction *i = L.code + pc;; i++) {
        u32 q = m;
        if (i->guard >= 0) { q = 0; EACH(m) q |= (u32)((w->reg[i->guard][l] & 1) ^ i->negated) << l; }
        done++; pc++;
        if (i->kind == CONTROL) {
            if (i->operation == I_ret || i->operation == I_exit) w->live &= ~q;
            EACH(m) w->pc[l] = i->target >= 0 && q >> l & 1 ? (u32)i->target : pc;
            return done;
        }
        if (i->kind == ALU) compute(w, i, q);
        else if (i->kind == SYNC) together(w, i, m);
        else access(w, i, q);
        if (i->kind == ALU && (i[1].kind == ALU || i[1].kind == CONTROL) && !i[1].begins) continue;
        EACH(m) w->pc[l] = pc;
        return done;
    }
}

/* Run threads of a warp that are at the same place: those that are farthest behind, or any. */
static int step(Warp *w) {
    const Instruction *best = 0;
    u32 mask = 0, choices = 0, rest = w->live;
    int any = L.split && draw() % 2;
    if (!rest) return DONE;
    while (rest) {
        u32 first = __builtin_ctz(rest), pc = w->pc[first], group = 0;
        const Instruction *i = L.code + pc;
        EACH(rest) group |= (u32)(w->pc[l] == pc) << l;
        if (pc >= L.instructions) { fail(w, first, L.code[L.instructions - 1].line, "ran past the end"); return DONE; }
        if (i->kind == SYNC) { /* which waits for the threads that it names */
            const u64 *names = w->reg[i->from[4]];
            u32 named = names[first];
            if (!(named >> first & 1) || named & ~w->live) {
                fail(w, first, i->line, "sync names lanes %08x, of which %08x are here", named, w->live);
                return DONE;
            }
            rest &= ~(group & named);
            if ((group & named) != named) continue;
            EACH(named) if ((u32)names[l] != named) { fail(w, l, i->line, "lanes name other lanes"); return DONE; }
            group = named;
        } else rest &= ~group;
        if (i->kind == BARRIER) continue;
        if (any ? draw() % ++choices == 0 : !best || i < best) best = i, mask = group;
    }
    if (!mask) {
        EACH(w->live)
            if (L.code[w->pc[l]].kind != BARRIER) fail(w, l, L.code[w->pc[l]].line, "lanes wait for each other");
        return G.failed ? DONE : BLOCKED;
    }
    if (best->kind == GLOBAL && L.split && draw() % 4 == 0) { u32 some = mask & (u32)draw(); if (some) mask = some; }
    w->issued += execute(w, best - L.code, mask);
    if (w->issued > L.budget) {
        fail(w, __builtin_ctz(mask), best->line, "no end after %lu instructions of a warp", w->issued);
        return DONE;
    }
    return w->live ? best->kind : DONE;
}

static void start(Block *b, u32 id) {
    b->sm = L.policy ? draw() % SMS : 0;
    b->bars = b->waiting = b->done = 0;
    memset(b->shared, 0xA5, L.shared_bytes);
    memset(b->bytes, 0, L.shared_bytes * sizeof(Byte));
    for (u32 k = 0; k < L.warps; k++) {
        Warp *w = b->warps + k;
        memset(w->pc, 0, sizeof w->pc);
        w->live = ~0u; w->id = k; w->state = w->syncs = 0; w->issued = 0; w->block = b; w->priority = draw();
        u64 specials[CONSTANTS] = { 0, 0, id % L.grid[0], id / L.grid[0] % L.grid[1], id / L.grid[0] / L.grid[1],
                                    L.grid[0], L.grid[1], L.grid[2], 32 * L.warps, 0 };
        for (u32 l = 0; l < 32; l++) {
            for (u32 row = 0; row < CONSTANTS; row++) w->reg[row][l] = specials[row];
            w->reg[TID_X][l] = 32 * k + l;
            w->reg[LANEID][l] = l;
            for (u32 row = 0; row < L.num_constants; row++) w->reg[CONSTANTS + row][l] = L.constants[row];
        }
        u32 known = CONSTANTS + L.num_constants;
        memset(w->reg + known, 0xA5, (L.rows - known) * sizeof *w->reg);
    }
}

static int release(Block *b) { /* the threads at a barrier, if all are there */
    if (!b->waiting || b->waiting + b->done < L.warps) return 0;
    if (b->done) { fail(b->warps, 0, 0, "warps wait at a barrier, and others have ended"); return 0; }
    for (u32 k = 0; k < L.warps; k++) {
        Warp *w = b->warps + k;
        w->state = 0; w->syncs++; w->issued++;
        for (u32 l = 0; l < 32; l++) w->pc[l]++;
    }
    b->waiting = 0; b->bars++;
    return 1;
}

/* Which warp goes on, by one of the policies of machine.py. */
static u32 chosen(Warp **ready, u32 runnable, Warp *now) {
    u32 at = 0;
    switch (L.policy) {
    case 0: return 0;
    case 3:
        while (draw() % 8 && at < runnable) if (ready[at++] == now) return at - 1;
        return draw() % runnable;
    case 4:
        for (u32 i = 1; i < runnable; i++) if (ready[i]->priority > ready[at]->priority) at = i;
        if (draw() % 48 == 0) ready[at]->priority = draw() >> draw() % 16;
        return at;
    }
    return draw() % runnable;
}

static void run(void) {
    u32 total = L.grid[0] * L.grid[1] * L.grid[2], n = L.resident < total ? L.resident : total;
    u32 begun = 0, ended = 0, runnable = 0, *order = malloc(total * sizeof *order);
    for (u32 i = 0; i < total; i++) order[i] = i;
    for (u32 i = L.policy > 1 ? total : 0; i > 1; i--) {
        u32 k = draw() % i, last = order[i - 1];
        order[i - 1] = order[k];
        order[k] = last;
    }
    Block *blocks = calloc(n, sizeof *blocks);
    Warp *warps = calloc((u64)n * L.warps, sizeof *warps), **ready = malloc((u64)n * L.warps * sizeof *ready), *now = 0;
    for (u32 i = 0; i < n; i++) {
        Block *b = blocks + i;
        b->warps = warps + (u64)i * L.warps;
        b->shared = malloc(L.shared_bytes + 1);
        b->bytes = malloc((L.shared_bytes + 1) * sizeof(Byte));
        for (u32 k = 0; k < L.warps; k++) b->warps[k].reg = malloc(L.rows * sizeof *b->warps[k].reg);
        start(b, order[begun++]);
        for (u32 k = 0; k < L.warps; k++) ready[runnable++] = b->warps + k;
    }
    while (runnable && !G.failed) {
        u32 at = chosen(ready, runnable, now);
        int state;
        L.counts[SWITCHES] += now != ready[at];
        now = ready[at];
        int goes_on; /* until it comes to memory, or in order until it has to wait */
        do {
            state = step(now);
            goes_on = L.policy ? state == ALU || state == CONTROL || state == SYNC : state < BLOCKED;
        } while (goes_on && !G.failed);
        if (state < BLOCKED) continue;
        Block *b = now->block;
        ready[at] = ready[--runnable];
        if (state == BLOCKED) b->waiting++;
        else {
            b->done++;
            L.counts[INSTRUCTIONS] += now->issued;
            if (now->issued > L.counts[LONGEST_WARP]) L.counts[LONGEST_WARP] = now->issued;
        }
        if (release(b)) for (u32 k = 0; k < L.warps; k++) ready[runnable++] = b->warps + k;
        if (b->done < L.warps) continue;
        ended++;
        if (begun == total) continue;
        start(b, order[begun++]);
        for (u32 k = 0; k < L.warps; k++) ready[runnable++] = b->warps + k;
    }
    if (!G.failed && ended < total) fail(warps, 0, 0, "the launch does not end");
    for (u32 sm = 0; sm < SMS; sm++) while (G.stores[sm]) arrive(sm, draw() % G.stores[sm]);
    for (u32 i = 0; i < n * L.warps; i++) free(warps[i].reg);
    for (u32 i = 0; i < n; i++) { free(blocks[i].shared); free(blocks[i].bytes); }
    free(blocks); free(warps); free(ready); free(order);
}

int launch(const Launch *given) {
    L = *given;
    memset(&G, 0, sizeof G);
    G.random = L.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
    L.text[0] = 0;
    G.l1 = calloc(SMS, sizeof *G.l1);
    run();
    free(G.l1);
    return G.failed;
}
