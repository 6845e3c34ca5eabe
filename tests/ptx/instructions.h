/* PTX instructions by name, '.' and ':' written as '_'.

   OP(name, result): for each thread, from the bits a, b, c of its operands; whoever reads a register takes the lowest
   bits of the width it wants, so the higher ones may hold anything.
    ATOMIC(name, result): of what memory held, `old`, and the
   operands v, u. SHUFFLE(name, lane, inside): from which lane a thread reads, unless that lies outside of its segment.
   REDUCE(name, type, result): of two threads' x, y. OTHER(name): known to machine.c itself.

   Whoever includes this defines those that it wants to see; they are undefined again at the end. */

#ifdef OTHER
OTHER(bra) OTHER(bra_uni) OTHER(ret) OTHER(exit) OTHER(trap) OTHER(call_uni)
OTHER(load) OTHER(store) OTHER(fence) OTHER(bar_sync) OTHER(bar_warp_sync) OTHER(ldmatrix)
OTHER(unpack_b32) OTHER(unpack_b64)
#undef OTHER
#endif

#ifdef OP
/* ---- integers whose lowest bits depend on the lowest bits alone */
#define ANY_SIGN(T) OP(add_##T, a + b) OP(sub_##T, a - b) OP(neg_##T, -a) OP(mul_lo_##T, a * b) \
    OP(mad_lo_##T, a * b + c)
ANY_SIGN(s16) ANY_SIGN(u16) ANY_SIGN(s32) ANY_SIGN(u32) ANY_SIGN(s64) ANY_SIGN(u64)
#define BITS(W) OP(and_b##W, a & b) OP(or_b##W, a | b) OP(xor_b##W, a ^ b) OP(not_b##W, ~a) \
    OP(shl_b##W, (u32)b < W ? a << (u32)b : 0) OP(shr_b##W, (u32)b < W ? (u##W)a >> (u32)b : 0) \
    OP(shr_u##W, (u32)b < W ? (u##W)a >> (u32)b : 0) OP(shr_s##W, (s##W)a >> ((u32)b < W ? (u32)b : W - 1)) \
    OP(popc_b##W, __builtin_popcountll((u##W)a)) OP(selp_b##W, c & 1 ? a : b) OP(mov_b##W, a) OP(mov_u##W, a) \
    OP(mov_s##W, a) \
    OP(setp_eq_b##W, (u##W)a == (u##W)b) OP(setp_ne_b##W, (u##W)a != (u##W)b) \
    OP(ld_param_b##W, (u##W)a) OP(ld_param_u##W, (u##W)a) OP(ld_param_s##W, (s##W)a) OP(st_param_b##W, (u##W)a)
BITS(16) BITS(32) BITS(64)
OP(and_pred, a & b) OP(or_pred, a | b) OP(xor_pred, a ^ b) OP(not_pred, ~a) OP(mov_pred, a)
OP(cvta_global_u64, a) OP(mov_f32, a) OP(mov_f64, a) OP(selp_f32, c & 1 ? a : b) OP(selp_f64, c & 1 ? a : b)
OP(pack_b32, (u16)a | (u64)(u16)b << 16) OP(pack_b64, (u32)a | (u64)(u32)b << 32)
OP(prmt_b32, prmt(a, b, c)) OP(bfe_u32, bfe_u(a, b & 255, c & 255, 32)) OP(bfe_s32, bfe_s((s32)a, b & 255, c & 255, 32))
OP(add_s16x2, (u16)(a + b) | (u64)(u16)((a >> 16) + (b >> 16)) << 16)

/* ---- integers with a sign, or none */
#define ORDERED(T) OP(min_##T, (T)a < (T)b ? (T)a : (T)b) OP(max_##T, (T)a > (T)b ? (T)a : (T)b) \
    OP(setp_eq_##T, (T)a == (T)b) OP(setp_ne_##T, (T)a != (T)b) OP(setp_lt_##T, (T)a < (T)b) \
    OP(setp_le_##T, (T)a <= (T)b) \
    OP(setp_gt_##T, (T)a > (T)b) OP(setp_ge_##T, (T)a >= (T)b)
ORDERED(s16) ORDERED(u16) ORDERED(s32) ORDERED(u32) ORDERED(s64) ORDERED(u64)
#define DIVIDED(W) OP(div_s##W, div_s((s##W)a, (s##W)b)) OP(rem_s##W, rem_s((s##W)a, (s##W)b)) \
    OP(div_u##W, div_u((u##W)a, (u##W)b)) OP(rem_u##W, rem_u((u##W)a, (u##W)b)) OP(abs_s##W, (s##W)a < 0 ? -a : a)
DIVIDED(16) DIVIDED(32) DIVIDED(64)
#define WIDENED(T, WIDE) OP(mul_wide_##T, (WIDE)(T)a * (WIDE)(T)b) OP(mad_wide_##T, (WIDE)(T)a * (WIDE)(T)b + (WIDE)c)
WIDENED(s16, s32) WIDENED(u16, u32) WIDENED(s32, s64) WIDENED(u32, u64)
#define UPPER(T, WIDE, W) OP(mul_hi_##T, (T)((WIDE)(T)a * (WIDE)(T)b >> W))
UPPER(s16, s32, 16) UPPER(u16, u32, 16) UPPER(s32, s64, 32) UPPER(u32, u64, 32)
UPPER(s64, s128, 64) UPPER(u64, u128, 64)
#define CONVERTED(TO, T) OP(cvt_##TO##_##T, (TO)(T)a)
#define CONVERTED_TO(TO) CONVERTED(TO, s8) CONVERTED(TO, u8) CONVERTED(TO, s16) CONVERTED(TO, u16) \
    CONVERTED(TO, s32) CONVERTED(TO, u32) CONVERTED(TO, s64) CONVERTED(TO, u64)
CONVERTED_TO(s8) CONVERTED_TO(u8) CONVERTED_TO(s16) CONVERTED_TO(u16)
CONVERTED_TO(s32) CONVERTED_TO(u32) CONVERTED_TO(s64) CONVERTED_TO(u64)

/* ---- floating point numbers; z is what is done with each number: flush it to zero, or nothing */
#define FLOAT(form, T, z) OP(add##form##_##T, bits_##T(z(z(T##_(a)) + z(T##_(b))))) \
    OP(sub##form##_##T, bits_##T(z(z(T##_(a)) - z(T##_(b))))) \
    OP(mul##form##_##T, bits_##T(z(z(T##_(a)) * z(T##_(b)))))
#define ROUNDED(form, T, z) OP(div_rn##form##_##T, bits_##T(z(z(T##_(a)) / z(T##_(b))))) \
    OP(rcp_rn##form##_##T, bits_##T(z(1 / z(T##_(a))))) \
    OP(fma_rn##form##_##T, bits_##T(z(fma_##T(z(T##_(a)), z(T##_(b)), z(T##_(c))))))
#define COMPARED(form, T, z) \
    OP(abs##form##_##T, bits_##T(fabs(z(T##_(a))))) OP(neg##form##_##T, bits_##T(-z(T##_(a)))) \
    OP(min##form##_##T, bits_##T(min_##T(z(T##_(a)), z(T##_(b)), 0))) \
    OP(max##form##_##T, bits_##T(max_##T(z(T##_(a)), z(T##_(b)), 0))) \
    OP(min##form##_NaN_##T, bits_##T(min_##T(z(T##_(a)), z(T##_(b)), 1))) \
    OP(max##form##_NaN_##T, bits_##T(max_##T(z(T##_(a)), z(T##_(b)), 1))) \
    COMPARE(form, T, z, eq, ==) COMPARE(form, T, z, lt, <) COMPARE(form, T, z, le, <=) COMPARE(form, T, z, gt, >) \
    COMPARE(form, T, z, ge, >=) \
    OP(setp_ne##form##_##T, !isunordered(T##_(a), T##_(b)) && z(T##_(a)) != z(T##_(b))) \
    OP(setp_neu##form##_##T, z(T##_(a)) != z(T##_(b))) \
    OP(setp_num##form##_##T, !isunordered(T##_(a), T##_(b))) OP(setp_nan##form##_##T, isunordered(T##_(a), T##_(b)))
#define COMPARE(form, T, z, name, op) OP(setp_##name##form##_##T, z(T##_(a)) op z(T##_(b))) \
    OP(setp_##name##u##form##_##T, isunordered(T##_(a), T##_(b)) || z(T##_(a)) op z(T##_(b)))
FLOAT(, f32, ) FLOAT(_rn, f32, ) FLOAT(_ftz, f32, flush) FLOAT(_rn_ftz, f32, flush) FLOAT(, f64, ) FLOAT(_rn, f64, )
ROUNDED(, f32, ) ROUNDED(_ftz, f32, flush) ROUNDED(, f64, )
COMPARED(, f32, ) COMPARED(_ftz, f32, flush) COMPARED(, f64, )
OP(div_full_f32, bits_f32(quotient(f32_(a), f32_(b))))
    OP(div_full_ftz_f32, bits_f32(flush(quotient(flush(f32_(a)), flush(f32_(b))))))
OP(ex2_approx_f32, bits_f32(power(f32_(a)))) OP(ex2_approx_ftz_f32, bits_f32(flush(power(flush(f32_(a))))))
OP(rcp_approx_ftz_f64, bits_f64(1 / f64_(a >> 32 << 32)) >> 32 << 32) /* of the upper half, to the upper half */
#define FROM_INTEGER(T) OP(cvt_rn_f32_##T, bits_f32((T)a)) OP(cvt_rn_f64_##T, bits_f64((T)a))
FROM_INTEGER(s8) FROM_INTEGER(u8) FROM_INTEGER(s16) FROM_INTEGER(u16) FROM_INTEGER(s32) FROM_INTEGER(u32)
    FROM_INTEGER(s64) FROM_INTEGER(u64)
OP(cvt_rn_f32_f64, bits_f32(f64_(a))) OP(cvt_rn_ftz_f32_f64, bits_f32(flush(f64_(a))))
OP(cvt_f64_f32, bits_f64(f32_(a))) OP(cvt_ftz_f64_f32, bits_f64(flush(f32_(a))))
#define TO_INTEGER(name, function) TO_INTEGER_OF(name, function, f32) TO_INTEGER_OF(name, function, f64)
#define TO_INTEGER_OF(name, function, T) OP(cvt_##name##_##T##_##T, bits_##T(function(T##_(a)))) \
    OP(cvt_##name##_s32_##T, whole_s32(function(T##_(a)))) OP(cvt_##name##_u32_##T, whole_u32(function(T##_(a)))) \
    OP(cvt_##name##_s64_##T, whole_s64(function(T##_(a)))) OP(cvt_##name##_u64_##T, whole_u64(function(T##_(a))))
TO_INTEGER(rni, rint) TO_INTEGER(rzi, trunc) TO_INTEGER(rmi, floor) TO_INTEGER(rpi, ceil)
#undef OP
#endif

#ifdef ATOMIC
#define ATOMIC_OF(T) ATOMIC(add_##T, old + v) ATOMIC(min_##T, (T)v < (T)old ? v : old) \
    ATOMIC(max_##T, (T)v > (T)old ? v : old)
ATOMIC_OF(s32) ATOMIC_OF(u32) ATOMIC_OF(s64) ATOMIC_OF(u64)
#define ATOMIC_BITS(W) ATOMIC(and_b##W, old & v) ATOMIC(or_b##W, old | v) ATOMIC(xor_b##W, old ^ v) \
    ATOMIC(exch_b##W, v) \
    ATOMIC(cas_b##W, (u##W)old == (u##W)v ? u : old)
ATOMIC_BITS(32) ATOMIC_BITS(64)
ATOMIC(add_f32, bits_f32(f32_(old) + f32_(v))) ATOMIC(add_f64, bits_f64(f64_(old) + f64_(v)))
#undef ATOMIC
#endif

#ifdef SHUFFLE
SHUFFLE(up, lane - by, from >= most) SHUFFLE(down, lane + by, from <= most)
SHUFFLE(bfly, lane ^ by, from <= most) SHUFFLE(idx, least | (by & ~segment), from <= most)
#undef SHUFFLE
#endif

#ifdef REDUCE
#define REDUCE_OF(T) REDUCE(add_##T, T, x + y) REDUCE(min_##T, T, y < x ? y : x) REDUCE(max_##T, T, y > x ? y : x)
REDUCE_OF(s32) REDUCE_OF(u32) REDUCE(and_b32, u32, x & y) REDUCE(or_b32, u32, x | y) REDUCE(xor_b32, u32, x ^ y)
#undef REDUCE
#endif
