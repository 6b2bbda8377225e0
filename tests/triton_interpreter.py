"""Importing this makes Triton kernels run in its CPU interpreter, with mends.

It must come before the first import of triton, whose own functions are decorated there.

bf16 (upstream: triton issue 11584): the interpreter keeps its 16 bits in unsigned integers. Some
operations compute with those integers, others cut instead of rounding. Here every operation on bf16
values widens them to fp32, computes, and rounds the result to nearest even, as a GPU does.

Loop bounds: Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses.

Masks: a scalar condition that is spread over a block becomes integers, which loads and stores refuse;
here they are made booleans again.
"""

import os
import warnings
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32 values, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _fp32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _mend_casts() -> None:
    original = InterpreterBuilder.cast_impl
    original_rounding = InterpreterBuilder.create_fp_to_fp

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == target.scalar:
            return source
        source = _fp32(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        if target.scalar == source.dtype.scalar:
            return source
        return original(self, source, target)

    def cast_rounding(self: Any, source: TensorHandle, target: Any, mode: Any) -> TensorHandle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            assert mode is None or "RTNE" in str(mode), mode
            return cast(self, source, target)
        return original_rounding(self, source, target, mode)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = cast_rounding
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(InterpreterBuilder, f"create_{name}", cast)


def _mend_arithmetic() -> None:
    def lifted(original: Any) -> Any:
        def operation(self: Any, *arguments: Any) -> TensorHandle:
            *handles, function = arguments
            if not any(_is_bf16(h) for h in handles):
                return original(self, *arguments)
            result = original(self, *(_fp32(h) for h in handles), function)
            if result.data.dtype != np.float32:  # a comparison
                return result
            return TensorHandle(narrow(result.data), tl.bfloat16)

        return operation

    for name in ("unary_op", "binary_op", "ternary_op"):
        if hasattr(InterpreterBuilder, name):
            setattr(InterpreterBuilder, name, lifted(getattr(InterpreterBuilder, name)))


def _mend_dot() -> None:
    original = InterpreterBuilder.create_dot

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _fp32(a), _fp32(b), *rest)

    InterpreterBuilder.create_dot = dot


def _mend_splat() -> None:
    original = InterpreterBuilder.create_splat

    def splat(self: Any, target: Any, source: TensorHandle) -> TensorHandle:
        result = original(self, target, source)
        if source.data.dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result

    InterpreterBuilder.create_splat = splat


def _mend_index() -> None:
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _quieten() -> None:
    """A GPU computes with infinities and NaN without a word, and so does the interpreter now."""
    original = GridExecutor.__call__

    def run(self: Any, *arguments: Any, **keywords: Any) -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of numpy's maximum of nothing but NaN
            original(self, *arguments, **keywords)

    GridExecutor.__call__ = run


_quieten()
_mend_casts()
_mend_arithmetic()
_mend_dot()
_mend_splat()
_mend_index()
