"""The GELU-MLP on cuBLASLt, whose products can end with the GELU; a candidate until it is measured.

forward   its epilogue GELU_AUX_BIAS writes gelu(x W^T + b) and, for the backward, h = x W^T + b
backward  DGELU_BGRAD writes dh = (dy V) gelu'(h) and db, its sum over the rows
saves     h, with its bias, unlike our own kernels.

PyTorch's own way to this library, torch._addmm_activation, does not tell h, so that it serves no
backward; and on a CPU it is the other GELU. The library that PyTorch has loaded is called through
ctypes. Biases are rounded to x's dtype, in which the library also gives db. Where it does not take the
operands (rows that are no multiple of 16 bytes, a batch of none), products are PyTorch's and the
GELU a pass of its own.

Source of names and numbers: the manual of cuBLASLt, sections "cublasLtEpilogue_t",
"cublasLtMatmulDescAttributes_t" and "cublasLtMatmul()"; the same in versions 12 and 13.
"""

import ctypes
import functools
import threading
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import cublaslt

WORKSPACE = 32 << 20  # bytes, as NVIDIA advises for Hopper
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
COMPUTE_32F = 68
GELU, BIAS, BGRAD, DGELU, AUX = 32, 4, 16, 64, 128  # bits of cublasLtEpilogue_t
# Attributes of a product, and of what is asked of an algorithm.
TRANSA, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 3, 7, 8, 11, 12
MAX_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, which begins with the algorithm."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(cublaslt(), name)(*arguments):
        raise RuntimeError(f"cuBLASLt: {name} returned status {status}")


def _set(function: str, of: c_void_p, attribute: int, value: Any) -> None:
    _call(f"cublasLt{function}SetAttribute", of, attribute, byref(value), c_size_t(sizeof(value)))


_lock = threading.Lock()  # a plan's pointers are set before each call


@functools.cache
def _handle(device: int | None) -> c_void_p:
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


@functools.lru_cache(256)
def _plan(
    device: int | None,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    strides: tuple[int, int],
    turned: bool,
    epilogue: int,
) -> tuple[c_void_p, list[c_void_p], _Heuristic] | None:
    """The product, its layouts and the algorithm for a (R, K) times b (K, H); None where there is no
    algorithm. The library's matrices lie by columns, so that it computes the transpose, b^T a^T."""
    rows, depth, columns = sizes
    product, preference = c_void_p(), c_void_p()
    _call("cublasLtMatmulDescCreate", byref(product), COMPUTE_32F, TYPES[torch.float32])
    _set("MatmulDesc", product, TRANSA, c_int(0 if turned else 1))
    _set("MatmulDesc", product, EPILOGUE, c_uint32(epilogue))
    if epilogue & AUX:
        _set("MatmulDesc", product, AUX_LD, c_int64(columns))
    shapes = (
        (columns, depth, strides[1]) if turned else (depth, columns, strides[1]),
        (depth, rows, strides[0]),
        (columns, rows, columns),
    )
    layouts = []
    for height, width, stride in shapes:
        layout = c_void_p()
        _call(
            "cublasLtMatrixLayoutCreate",
            byref(layout),
            TYPES[dtype],
            c_uint64(height),
            c_uint64(width),
            c_int64(stride),
        )
        layouts.append(layout)
    _call("cublasLtMatmulPreferenceCreate", byref(preference))
    _set("MatmulPreference", preference, MAX_WORKSPACE, c_size_t(WORKSPACE))
    for attribute in ALIGNMENTS:
        _set("MatmulPreference", preference, attribute, c_uint32(16))
    found, count = _Heuristic(), c_int()
    status = cublaslt().cublasLtMatmulAlgoGetHeuristic(
        _handle(device),
        product,
        *layouts,
        layouts[2],
        preference,
        1,
        byref(found),
        byref(count),
    )
    _call("cublasLtMatmulPreferenceDestroy", preference)
    return (product, layouts, found) if status == 0 and count.value else None


def _product(
    a: Tensor, b: Tensor, epilogue: int, out: Tensor, bias: Tensor | None, aux: Tensor | None
) -> bool:
    """out (R, H) = epilogue of a (R, K) times b (K, H). False where the library does not take them."""
    turned = b.stride(1) == 1
    b = b if turned else b.t()
    b = b if b.stride(1) == 1 else b.contiguous()
    given = [t for t in (a, b, out, bias, aux) if t is not None]
    if out.numel() == 0 or any(t.data_ptr() % 16 for t in given):
        return False
    for t in (a, b, out):
        if t.stride(0) < t.shape[1] or t.stride(1) != 1 or t.stride(0) * t.element_size() % 16:
            return False
    sizes = (a.shape[0], a.shape[1], out.shape[1])
    with _lock, torch.cuda.device_of(a):
        plan = _plan(a.device.index, a.dtype, sizes, (a.stride(0), b.stride(0)), turned, epilogue)
        if plan is None:
            return False
        product, layouts, found = plan
        if bias is not None:
            _set("MatmulDesc", product, BIAS_POINTER, c_void_p(bias.data_ptr()))
        if aux is not None:
            _set("MatmulDesc", product, AUX_POINTER, c_void_p(aux.data_ptr()))
        room = a.new_empty((found.workspace,), dtype=torch.uint8)
        stream = torch.cuda.current_stream(a.device).cuda_stream if a.is_cuda else 0
        left, right, to = (c_void_p(t.data_ptr()) for t in (b, a, out))
        _call(
            "cublasLtMatmul",
            _handle(a.device.index),
            product,
            byref(c_float(1)),
            left,
            layouts[0],
            right,
            layouts[1],
            byref(c_float(0)),
            to,
            layouts[2],
            to,
            layouts[2],
            byref(found),
            c_void_p(room.data_ptr()),
            c_size_t(room.numel()),
            c_void_p(stream),
        )
    return True


def _gelu(h: Tensor) -> Tensor:
    return torch.nn.functional.gelu(h, approximate="tanh")


def forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """On rows x (R, C): y (R, D), and where `save` h = x fc_weight^T + fc_bias (R, H)."""
    activation = x.new_empty((x.shape[0], fc_weight.shape[0]))
    h = torch.empty_like(activation) if save else None
    bias = None if fc_bias is None else fc_bias.to(x.dtype)
    epilogue = GELU | (0 if bias is None else BIAS) | (AUX if save else 0)
    if not _product(x, fc_weight.t(), epilogue, activation, bias, h):
        h = torch.mm(x, fc_weight.t()) if bias is None else torch.addmm(bias, x, fc_weight.t())
        activation = _gelu(h)
    h = h if save else None
    if proj_bias is None:
        return torch.mm(activation, proj_weight.t()), h
    return torch.addmm(proj_bias.to(x.dtype), activation, proj_weight.t()), h


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, fc_weight, fc_bias (fp32), proj_weight, proj_bias (fp32) where needed."""
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = need
    dx = dfc_weight = dfc_bias = None
    if need_x or need_fc_weight or need_fc_bias:
        dh = torch.empty_like(h)
        summed = h.new_empty((h.shape[1],)) if need_fc_bias else None
        epilogue = DGELU | AUX | (BGRAD if need_fc_bias else 0)
        if not _product(dy, proj_weight, epilogue, dh, summed, h):
            dact = torch.mm(dy, proj_weight)
            dh = torch.ops.aten.gelu_backward(dact, h, approximate="tanh")
            summed = dh.sum(0, dtype=torch.float32)
        dx = torch.mm(dh, fc_weight) if need_x else None
        dfc_weight = torch.mm(dh.t(), x) if need_fc_weight else None
        dfc_bias = summed.float() if need_fc_bias and summed is not None else None
    dproj_weight = torch.mm(dy.t(), _gelu(h)) if need_proj_weight else None
    dproj_bias = dy.sum(0, dtype=torch.float32) if need_proj_bias else None
    return dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias
