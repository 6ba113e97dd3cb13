"""Vector registers for numba: one SIMD type and the few operations on it that the kernels here are made of.

    c[i, j] += sum over k of a[i, k] * b[k, j],    held in ROWS x (1 or 2) registers while k runs

numba's own loops over small tiles reach a fifth of the arithmetic peak: they test for overlap of every pair of arrays
and keep sums in memory. The instructions below are emitted as written, so a 64 x 64 x 64 product in cache runs at about
nine tenths of the peak. All arrays are flat, contiguous float32; positions are in elements; nothing is bounds-checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4
ROWS = 4 if LANES == 8 else 8  # AVX2 has 16 registers: 4 x 2 sums fit; the others have 32

intrinsic: Any = extending.intrinsic  # its type hints describe the code generator, not the calls that it generates
_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))

_FLOAT, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
_BYTES = ir.IntType(8).as_pointer()
_LOG2_E, _LOG2_E_REST = 1.44269502162933349609375, 1.925962991e-8  # the nearest float32, and what it lacks
_MAGIC = 1.5 * 2.0**23  # adding it to |z| < 2^22 rounds z to an integer, which then sits in the low bits of the sum
# 2^f on [-1/2, 1/2], lowest power first: least maximum relative error (9e-8 before rounding) at degree 5, 2^0 = 1
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)


class _Vector(types.Type):
    """numba's name for LANES float32 values in one register."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


_VEC = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _llvm(builder: Any, name: str, result: Any, *arguments: Any, fastmath: tuple[str, ...] = ()) -> Any:
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments, fastmath=fastmath)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _llvm(builder, f"llvm.fma.v{LANES}f32", _VECTOR, a, b, c)


def _splat(builder: Any, x: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, x, _I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * LANES))


def _read(builder: Any, pointer: Any) -> Any:
    value = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
    value.align = 4  # any position of a float32 array
    return value


def _write(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer())).align = 4


def _at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _elementwise(emit: Callable[..., Any]) -> Any:
    """Return the numba function of vectors only, whose instructions `emit(builder, *values)` writes."""
    count = emit.__code__.co_argcount - 1

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return emit(builder, *values)

    if count == 1:
        return intrinsic(lambda typing, a: (_VEC(_VEC), codegen))
    if count == 2:
        return intrinsic(lambda typing, a, b: (_VEC(_VEC, _VEC), codegen))
    return intrinsic(lambda typing, a, b, c: (_VEC(_VEC, _VEC, _VEC), codegen))


def _emit_power(builder: Any, shifted: Any, f: Any) -> tuple[Any, Any]:
    """Return 2^f and k 2^23, the k of `shifted` in the place of an exponent."""
    value = _constant(_EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        value = _fma(builder, value, f, _constant(coefficient))
    return value, builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))


def _emit_exp2(builder: Any, z: Any) -> Any:
    # Comparisons, not min and max, so that NaN stays NaN. Below 2^-126.5 the scale is 0, above 2^127.5 it is infinity.
    z = builder.select(builder.fcmp_ordered("<", z, _constant(-127.0)), _constant(-127.0), z)
    z = builder.select(builder.fcmp_ordered(">", z, _constant(128.0)), _constant(128.0), z)
    shifted = builder.fadd(z, _constant(_MAGIC))
    value, exponent = _emit_power(builder, shifted, builder.fsub(z, builder.fsub(shifted, _constant(_MAGIC))))
    scale = builder.add(exponent, ir.Constant(_INTS, [127 << 23] * LANES))
    return builder.fmul(value, builder.bitcast(scale, _VECTOR))


def _emit_exp2_pair(builder: Any, bounded: bool, *zs: Any) -> list[Any]:
    # step by step for all of them: a processor then finds instructions beside each other that wait for none of them
    if not bounded:
        zs = tuple(_emit_clamp(builder, z, _constant(-127.0), _constant(128.0)) for z in zs)
    shifted = [builder.fadd(z, _constant(_MAGIC)) for z in zs]
    whole = [builder.fsub(s, _constant(_MAGIC)) for s in shifted]
    f = [builder.fsub(z, k) for z, k in zip(zs, whole, strict=True)]
    values = [_constant(_EXP2[-1])] * len(zs)
    for coefficient in _EXP2[-2::-1]:
        values = [_fma(builder, v, x, _constant(coefficient)) for v, x in zip(values, f, strict=True)]
    exponents = [builder.shl(builder.bitcast(s, _INTS), ir.Constant(_INTS, [23] * LANES)) for s in shifted]
    if bounded:
        pairs = zip(values, exponents, strict=True)
        return [builder.bitcast(builder.add(builder.bitcast(v, _INTS), e), _VECTOR) for v, e in pairs]
    scales = [builder.bitcast(builder.add(e, ir.Constant(_INTS, [127 << 23] * LANES)), _VECTOR) for e in exponents]
    return [builder.fmul(v, scale) for v, scale in zip(values, scales, strict=True)]


def _emit_exp(builder: Any, x: Any) -> Any:
    # k is close to x / ln 2, and f = x / ln 2 - k in two steps keeps its digits; clamped as in _emit_exp2
    x = _emit_clamp(builder, x, _constant(-88.0), _constant(88.722839))
    shifted = _fma(builder, x, _constant(_LOG2_E), _constant(_MAGIC))
    k = builder.fsub(shifted, _constant(_MAGIC))
    f = _fma(builder, x, _constant(_LOG2_E_REST), _fma(builder, x, _constant(_LOG2_E), builder.fneg(k)))
    value, exponent = _emit_power(builder, shifted, f)
    scale = builder.add(exponent, ir.Constant(_INTS, [127 << 23] * LANES))
    return builder.fmul(value, builder.bitcast(scale, _VECTOR))


def _emit_larger(builder: Any, a: Any, b: Any) -> Any:
    # the bits of numbers without a sign are ordered as the numbers are, NaN above all
    ints = builder.bitcast(a, _INTS), builder.bitcast(b, _INTS)
    return builder.select(builder.icmp_signed(">", *ints), a, b)


def _emit_clamp(builder: Any, v: Any, low: Any, high: Any) -> Any:
    v = builder.select(builder.fcmp_ordered("<", v, low), low, v)
    return builder.select(builder.fcmp_ordered(">", v, high), high, v)


def _emit_where_negative(builder: Any, v: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", v, _constant(0.0)), a, b)


def _emit_inside(builder: Any, v: Any, low: Any, high: Any) -> Any:
    inside = builder.and_(builder.fcmp_ordered(">=", v, low), builder.fcmp_ordered("<=", v, high))
    return builder.select(inside, _constant(1.0), _constant(0.0))


add = _elementwise(lambda builder, a, b: builder.fadd(a, b))
sub = _elementwise(lambda builder, a, b: builder.fsub(a, b))
mul = _elementwise(lambda builder, a, b: builder.fmul(a, b))
div = _elementwise(lambda builder, a, b: builder.fdiv(a, b))
fma = _elementwise(_fma)  # a * b + c
exp2 = _elementwise(_emit_exp2)
exp = _elementwise(_emit_exp)
larger = _elementwise(_emit_larger)  # of two that have no sign; NaN if one is NaN
absolute = _elementwise(lambda builder, a: _llvm(builder, f"llvm.fabs.v{LANES}f32", _VECTOR, a))
where_negative = _elementwise(_emit_where_negative)  # the second where the first is below 0, else the third
clamp = _elementwise(_emit_clamp)  # the first, no less than the second and no more than the third; NaN stays NaN
inside = _elementwise(_emit_inside)  # 1 where `clamp` changes nothing, else 0


def _of_pairs(emit: Callable[..., Any]) -> Any:
    """Return the numba function of two vectors to two, whose instructions `emit(builder, a, b)` writes."""
    pair = types.UniTuple(_VEC, 2)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return context.make_tuple(builder, pair, emit(builder, *values))

    return intrinsic(lambda typing, a, b: (pair(_VEC, _VEC), codegen))


exp2_pair = _of_pairs(lambda builder, a, b: _emit_exp2_pair(builder, False, a, b))
exp2_pair_bounded = _of_pairs(
    lambda builder, a, b: _emit_exp2_pair(builder, True, a, b)
)  # the same bits where -126 <= z <= 126, nonsense elsewhere


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Return array[index : index + LANES]."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _read(builder, _at(context, builder, signature.args[0], values[0], values[1]))

    return _VEC(array, types.int64), codegen


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Set array[index : index + LANES]."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _write(builder, values[2], _at(context, builder, signature.args[0], values[0], values[1]))
        return context.get_dummy_value()

    return types.void(array, types.int64, _VEC), codegen


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index], which need not exist."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.bitcast(_at(context, builder, signature.args[0], *values), _BYTES)
        _llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _I32(0), _I32(2), _I32(1))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """Return the vector whose lanes all equal the scalar `x`."""
    return _VEC(types.float32), lambda context, builder, signature, values: _splat(builder, values[0])


@intrinsic
def splat_at(typing: Any, array: Any, index: Any) -> Any:
    """Return the vector whose lanes all equal array[index], index >= 0."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _splat(builder, builder.load(_at(context, builder, signature.args[0], *values)))

    return _VEC(array, types.int64), codegen


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """Return the sum of the lanes, added pairwise."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        return _llvm(builder, name, _FLOAT, ir.Constant(_FLOAT, 0.0), values[0], fastmath=("reassoc",))

    return types.float32(_VEC), codegen


@intrinsic
def drop_below(typing: Any, vector: Any, lane: Any) -> Any:
    """Return `vector` with 0 in the lanes whose number is below `lane` (any integer)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        ints = ir.VectorType(_I64, LANES)
        one = builder.insert_element(ir.Constant(ints, ir.Undefined), values[1], _I32(0))
        bound = builder.shuffle_vector(one, ir.Constant(ints, ir.Undefined), ir.Constant(_INTS, [0] * LANES))
        keep = builder.icmp_signed(">=", ir.Constant(ints, list(range(LANES))), bound)
        return builder.select(keep, values[0], ir.Constant(_VECTOR, None))

    return _VEC(_VEC, types.int64), codegen


@intrinsic
def transpose_block(typing: Any, array: Any, source: Any, source_ld: Any, target: Any, target_ld: Any) -> Any:
    """Write the transpose of the LANES x LANES block at `source` to `target`, both in `array`, rows `_ld` apart."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, source, source_ld, target, target_ld = values
        read = _at(context, builder, signature.args[0], values[0], source)
        rows = [_read(builder, builder.gep(read, [builder.mul(source_ld, _I64(r))])) for r in range(LANES)]
        bit = 1
        while bit < LANES:  # swap the off-diagonal halves of 2 x 2, then 4 x 4, ... blocks
            low = [lane if not lane & bit else lane - bit + LANES for lane in range(LANES)]
            high = [lane + bit if not lane & bit else lane + LANES for lane in range(LANES)]
            for r in range(LANES):
                if not r & bit:
                    pair = rows[r], rows[r + bit]
                    rows[r] = builder.shuffle_vector(*pair, ir.Constant(_INTS, low))
                    rows[r + bit] = builder.shuffle_vector(*pair, ir.Constant(_INTS, high))
            bit *= 2
        write = _at(context, builder, signature.args[0], values[0], target)
        for r in range(LANES):
            _write(builder, rows[r], builder.gep(write, [builder.mul(target_ld, _I64(r))]))
        return context.get_dummy_value()

    return types.void(array, *[types.int64] * 4), codegen


@intrinsic
def flush_denormals(typing: Any) -> Any:
    """Make this thread treat denormal numbers as 0 and return what to give to `restore_denormals` afterwards.

    Decayed values pass through them on the way to 0, and on x86 each operation on one costs a hundred others. Other
    machines take them in their stride; nothing is done there.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not _IS_X86:
            return _I32(0)
        cell = cgutils.alloca_once(builder, _I32)
        _llvm(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(cell, _BYTES))
        before = builder.load(cell)
        builder.store(builder.or_(before, _I32(0x8040)), cell)  # flush results to zero, read operands as zero
        _llvm(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(cell, _BYTES))
        return before

    return types.int32(), codegen


@intrinsic
def restore_denormals(typing: Any, before: Any) -> Any:
    """Undo `flush_denormals`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if _IS_X86:
            cell = cgutils.alloca_once(builder, _I32)
            builder.store(values[0], cell)
            _llvm(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(cell, _BYTES))
        return context.get_dummy_value()

    return types.void(types.int32), codegen


def _product_block(width: int) -> Any:
    """Return the numba function that multiplies into a block of ROWS rows and `width` registers."""

    @intrinsic
    def block(
        typing: Any, a: Any, oa: Any, ai: Any, ak: Any, b: Any, ob: Any, ldb: Any, oc: Any, ldc: Any, k0: Any, k1: Any,
        accumulate: Any,
    ) -> Any:  # fmt: skip
        """a[oc + i ldc + j] (+)= sum over k0 <= k < k1 of a[oa + i ai + k ak] * b[ob + k ldb + j]."""

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            a, oa, ai, ak, b, ob, ldb, oc, ldc, k0, k1, accumulate = values
            left = _at(context, builder, signature.args[0], a, oa)
            right = _at(context, builder, signature.args[4], b, ob)
            out = _at(context, builder, signature.args[0], a, oc)
            tiles = [(r, v) for r in range(ROWS) for v in range(width)]
            offsets = [builder.add(builder.mul(ldc, _I64(r)), _I64(v * LANES)) for r, v in tiles]
            targets = dict(zip(tiles, (builder.gep(out, [offset]) for offset in offsets), strict=True))
            sums = {tile: cgutils.alloca_once(builder, _VECTOR) for tile in tiles}
            with builder.if_else(builder.trunc(accumulate, ir.IntType(1))) as (then, otherwise):
                with then:
                    for tile in tiles:
                        builder.store(_read(builder, targets[tile]), sums[tile])
                with otherwise:
                    for tile in tiles:
                        builder.store(ir.Constant(_VECTOR, None), sums[tile])
            with cgutils.for_range_slice(builder, k0, k1, _I64(1)) as (k, _):
                row = builder.gep(right, [builder.mul(k, ldb)])
                b_values = [_read(builder, builder.gep(row, [_I64(v * LANES)])) for v in range(width)]
                column = builder.gep(left, [builder.mul(k, ak)])
                for r in range(ROWS):
                    a_value = _splat(builder, builder.load(builder.gep(column, [builder.mul(ai, _I64(r))])))
                    for v in range(width):
                        builder.store(_fma(builder, a_value, b_values[v], builder.load(sums[r, v])), sums[r, v])
            for tile in tiles:
                _write(builder, builder.load(sums[tile]), targets[tile])
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, i, b, i, i, i, i, i, i, types.boolean), codegen

    return block


product_block_1 = _product_block(1)
product_block_2 = _product_block(2)
