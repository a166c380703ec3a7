"""Repair of Triton's interpreter for bfloat16.

TRITON_INTERPRET=1 runs kernels in numpy, which has no bfloat16: Triton 3.9 keeps the bits in uint16, computes with them
as if they were integers, truncates where a cast should round, and has no atomics for them. `repair()` makes casts round
to nearest even, arithmetic and matrix products go through float32 and round once, as a GPU does, and widens float16
matrices before the product (numpy multiplies those slowly, and sums them in float16).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits → float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 bits, to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > 0x7F800000, quiet, rounded).astype(np.uint16).reshape(x.shape)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def rounded(handle: TensorHandle) -> TensorHandle:
    """A float32 result as the bfloat16 that the operands were; what a comparison gave stays as it is."""
    return TensorHandle(handle.data if handle.data.dtype == np.bool_ else narrow(handle.data), tl.bfloat16)


def through_float32(method):
    """A method of tensors that computes in float32 and rounds its result, if any operand is a bfloat16."""

    def call(self, *args):
        if not any(isinstance(arg, TensorHandle) and is_bf16(arg) for arg in args):
            return method(self, *args)
        return rounded(method(self, *(wide(arg) if isinstance(arg, TensorHandle) else arg for arg in args)))

    return call


def repair() -> None:
    """Changes the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    InterpreterBuilder.repaired = True
    cast, fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    dot, atomic = InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw
    ternary, total = InterpreterBuilder.ternary_op, ReduceOps.sum

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else rounded(cast(self, src, tl.float32))
        return cast(self, wide(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where:  # a choice between bits
            return ternary(self, lhs, rhs, other, op)
        return through_float32(ternary)(self, lhs, rhs, other, op)

    def create_dot(self, a, b, d, *options):
        if not {a.dtype.scalar, b.dtype.scalar} <= {tl.float16, tl.bfloat16, tl.float32}:
            return dot(self, a, b, d, *options)
        # A BLAS adds in an order that depends on the shapes and the processor, so that q·k and k·q would differ in a
        # bit; the device has one order for both. In float64 and rounded once, they are the same number.
        exact = np.matmul(*(wide(x).data.astype(np.float64) for x in (a, b))) + wide(d).data
        result = TensorHandle(exact.astype(np.float32), tl.float32)
        return rounded(result) if is_bf16(d) else TensorHandle(result.data.astype(d.data.dtype), d.dtype.scalar)

    def create_atomic_rmw(self, operation, ptr, val, mask, sem, scope):
        if not is_bf16(val):
            return atomic(self, operation, ptr, val, mask, sem, scope)
        combine: Any = {"FADD": np.add, "MAX": np.maximum, "MIN": np.minimum, "XCHG": lambda old, new: new}[
            operation.name
        ]
        before = np.zeros(val.data.shape, np.uint16)
        for at in np.ndindex(val.data.shape):  # one after another: several may have one address
            if mask.data[at]:
                address = TensorHandle(ptr.data[at].reshape(1), ptr.dtype)
                old = self.create_load(address, None, True).data
                new = narrow(np.float32(combine(widen(old), widen(val.data[at].reshape(1)))))
                self.create_store(address, TensorHandle(new, tl.bfloat16), None)
                before[at] = old[0]
        return TensorHandle(before, tl.bfloat16)

    def reduce_sum(self, given):
        if given.dtype.scalar != tl.bfloat16:
            return total(self, given)
        wide_sum = np.sum(widen(given.handle.data), axis=self.axis, keepdims=self.keep_dims, dtype=np.float32)
        return self.to_tensor(narrow(np.asarray(wide_sum)), given.dtype)

    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(InterpreterBuilder, name, through_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast_impl, create_fp_to_fp
    InterpreterBuilder.ternary_op, InterpreterBuilder.create_dot = ternary_op, create_dot
    InterpreterBuilder.create_atomic_rmw, ReduceOps.sum = create_atomic_rmw, reduce_sum
    assert interpreter.interpreter_builder.binary_op.__func__ is InterpreterBuilder.binary_op
