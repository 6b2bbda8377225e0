"""The C++ on PyTorch's tensors: it serves the common case, and where it does not the way through Python
gives what it always gave, errors included."""

import gc
import itertools
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast import backends, functional
from gpt2fast.ops.linear import cpu as linear_cpu

OPS = (
    "layer_norm",
    "gelu",
    "gelu_mlp",
    "attention",
    "cross_entropy",
    "linear_cross_entropy",
    "embedding",
)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products are ours on every machine, of any size but none."""
    monkeypatch.setenv("GPT2FAST_CPU_MATMUL", "kernel")
    monkeypatch.setattr(linear_cpu, "WORK", 1)
    linear_cpu.preferred.cache_clear()
    yield
    linear_cpu.preferred.cache_clear()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def targets(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape)


F = functional
#: What users do: an op's call and its arguments.
COMMON: dict[str, tuple[Callable[..., Any], Callable[[torch.dtype], list[Any]]]] = {
    "layer_norm": (F.layer_norm, lambda d: [leaf(2, 5, 24, dtype=d), leaf(24), leaf(24)]),
    "layer_norm, plain": (F.layer_norm, lambda d: [leaf(2, 5, 24, dtype=d)]),
    "add_layer_norm": (
        F.add_layer_norm,
        lambda d: [leaf(2, 5, 24, dtype=d), leaf(2, 5, 24, dtype=d), leaf(24), leaf(24)],
    ),
    "gelu": (F.gelu, lambda d: [leaf(2, 5, 24, dtype=d), leaf(24)]),
    "gelu, plain": (F.gelu, lambda d: [leaf(7, 24, dtype=d)]),
    "attention": (
        F.flash_attn_func,
        lambda d: [*(leaf(2, 5, 3, 8, dtype=d) for _ in range(3)), 0.0, None, True],
    ),
    "sdpa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda d: [leaf(2, 3, 5, 8, dtype=d) for _ in range(3)],
    ),
    "packed attention": (
        F.flash_attn_qkvpacked_func,
        lambda d: [leaf(2, 5, 3, 3, 8, dtype=d), 0.0, 0.3, True],
    ),
    "embedding": (
        F.embedding,
        lambda d: [targets(9, 2, 5), leaf(9, 24, dtype=d), leaf(6, 24, dtype=d)],
    ),
    "cross_entropy": (
        F.cross_entropy,
        lambda d: [leaf(2, 5, 9, dtype=d), targets(9, 2, 5)],
    ),
}
#: The same for ops that are in fp32 only.
COMMON_FP32: dict[str, tuple[Callable[..., Any], Callable[[torch.dtype], list[Any]]]] = {
    "linear": (F.linear, lambda d: [leaf(2, 5, 24), leaf(7, 24), leaf(7)]),
    "linear, no bias": (F.linear, lambda d: [leaf(5, 24), leaf(7, 24)]),
    "gelu_mlp": (
        F.gelu_mlp,
        lambda d: [leaf(2, 5, 24), leaf(32, 24), leaf(32), leaf(7, 32), leaf(7)],
    ),
    "linear_cross_entropy": (
        F.linear_cross_entropy,
        lambda d: [leaf(2, 5, 24), leaf(9, 24), targets(9, 2, 5)],
    ),
}
CASES = [
    pytest.param(*case, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
    for name, case, dtype in [
        *(
            (n, c, d)
            for n, c in COMMON.items()
            for d in (torch.float32, torch.bfloat16, torch.float16)
        ),
        *((n, c, torch.float32) for n, c in COMMON_FP32.items()),
    ]
]


def run(function: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    """Outputs and gradients."""
    out = function(*arguments)
    outs = [out] if isinstance(out, Tensor) else list(out)
    results = [o.detach() for o in outs]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    if leaves and torch.is_grad_enabled():
        upstream = [torch.linspace(1, -2, o.numel()).view(o.shape).to(o.dtype) for o in outs]
        results += [
            g
            for g in torch.autograd.grad(outs, leaves, upstream, allow_unused=True)
            if g is not None
        ]
    return results


@pytest.mark.parametrize(("function", "make", "dtype"), CASES)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_common_case_goes_through_no_python(
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Any],
    make: Callable[[torch.dtype], list[Any]],
    dtype: torch.dtype,
    gradients: bool,
) -> None:
    arguments = make(dtype)
    with torch.set_grad_enabled(gradients):
        expected = run(function, arguments)
        assert backends.tensor_kernels() is not None

        def python(*_: Any) -> Any:
            raise AssertionError("through Python")

        for op in OPS:
            room = sys.modules[f"gpt2fast.ops.{op}.autograd"]
            if op != "embedding" or not gradients:  # whose backward is Python
                monkeypatch.setattr(room, "load", python)
        for name in ("matmul", "column_sum", "forward", "backward"):
            monkeypatch.setattr(linear_cpu, name, python)
        for first, second in zip(run(function, arguments), expected, strict=True):
            assert torch.equal(first, second)


def answer(function: Callable[..., Any], arguments: list[Any]) -> Any:
    """The results, or what was raised."""
    torch.manual_seed(7)  # of dropout
    try:
        return run(function, arguments)
    except Exception as error:
        return type(error), str(error)


def assert_same_without_cpp(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], arguments: list[Any], what: str
) -> None:
    found = answer(function, arguments)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "tensor_kernels", lambda: None)
        expected = answer(function, arguments)
    if isinstance(expected, tuple):
        assert found == expected, what
        return
    assert not isinstance(found, tuple), f"{what}: {found}"
    for first, second in zip(found, expected, strict=True):
        assert first.shape == second.shape, what
        assert first.dtype == second.dtype, what
        assert first.stride() == second.stride(), what
        torch.testing.assert_close(first, second, equal_nan=True, msg=lambda m: f"{what}: {m}")


def views(x: Tensor) -> dict[str, Any]:
    """What may come instead of a tensor."""
    wide = (
        torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(x.dtype) if x.is_floating_point() else None
    )
    found: dict[str, Any] = {
        "none": None,
        "a list": x.tolist(),
        "a number": 3.0,
        "numpy": x.detach().float().numpy(),
        "fp64": x.detach().double(),
        "int64": x.detach().long(),
        "int32": x.detach().int(),
        "empty": x.detach()[:0],
        "one dimension more": x.detach()[None],
        "one less": x.detach()[0],
        "a row less": x.detach()[:-1],
        "narrower": x.detach()[..., :-1],
        "a scalar": x.detach().flatten()[0],
        "transposed": x.detach().transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": x.detach()[:1].expand(x.shape),
        "sparse": x.detach().to_sparse(),
        "meta": x.detach().to("meta"),
        "a subclass": x.detach().as_subclass(Sub),
        "a parameter": torch.nn.Parameter(x.detach().clone(), requires_grad=x.is_floating_point()),
        "negative": -x.detach(),
    }
    if wide is not None:
        found["columns of a wider one"] = wide[..., : x.shape[-1]]
        found["every other column"] = wide[..., ::2]
        found["bf16"] = x.detach().bfloat16()
        found["nan"] = torch.full_like(x.detach(), float("nan"))
        found["contiguous leaf"] = x.detach().clone().requires_grad_()
    return found


class Sub(Tensor):
    pass


@pytest.mark.parametrize(
    "name", [*COMMON, *COMMON_FP32], ids=lambda name: name.replace(", ", "-").replace(" ", "_")
)
def test_every_other_argument_is_as_without_cpp(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One argument at a time is replaced: results, gradients, layouts and errors are the same."""
    function, make = {**COMMON, **COMMON_FP32}[name]
    arguments = make(torch.float32)
    for place, argument in enumerate(arguments):
        others = views(argument) if isinstance(argument, Tensor) else numbers(argument)
        for what, other in others.items():
            if function is F.linear and what == "meta":
                continue  # PyTorch's own, which multiplies by memory that is not there
            changed = [*arguments[:place], other, *arguments[place + 1 :]]
            assert_same_without_cpp(monkeypatch, function, changed, f"argument {place}: {what}")


def numbers(value: Any) -> dict[str, Any]:
    found = {"none": None, "text": "1", "negative": -1, "two": 2, "numpy": np.float32(0.25)}
    return {
        **found,
        "a tensor": torch.tensor(0.25),
        "true": True,
        "a half": 0.5,
        "nan": float("nan"),
    }


OPTIONS: list[tuple[str, Callable[..., Any], list[Any], dict[str, list[Any]]]] = [
    (
        "cross_entropy",
        F.cross_entropy,
        [leaf(6, 9), torch.tensor([0, 8, -100, 3, 3, -1])],
        {
            "ignore_index": [-1, -100, 3, 2.0, "x"],
            "label_smoothing": [0.0, 0.1, 1, -0.1, 1.5, float("nan"), None],
            "z_loss": [0.0, 1e-3, -1.0],
            "reduction": ["mean", "sum", "none", "median", None],
            "vocab_size": [None, 9, 4, 0, 10, 3.0],
            "inplace_backward": [False, True],
        },
    ),
    (
        "linear_cross_entropy",
        F.linear_cross_entropy,
        [leaf(6, 8), leaf(9, 8), torch.tensor([0, 8, -100, 3, 3, -1])],
        {
            "ignore_index": [-1, -100, 3, "x"],
            "label_smoothing": [0.0, 0.1, 1.5],
            "z_loss": [0.0, 1e-3, -1.0],
            "reduction": ["mean", "sum", "none", "median"],
            "vocab_size": [None, 9, 4, 0],
            "return_logprobs": [False, True],
            "chunk_bytes": [None, 64, 0],
        },
    ),
    (
        "layer_norm",
        F.layer_norm,
        [leaf(3, 8)],
        {"eps": [1e-5, 0, 1, 1e5, "x", None, np.float64(0.1)]},
    ),
    (
        "add_layer_norm",
        F.add_layer_norm,
        [leaf(3, 8), leaf(3, 8)],
        {"eps": [1e-5, 0], "dropout_p": [0.0, 0, 1.5, "x", None]},
    ),
    (
        "attention",
        F.flash_attn_func,
        [leaf(2, 5, 3, 8), leaf(2, 7, 3, 8), leaf(2, 7, 3, 8)],
        {
            "dropout_p": [0.0, 0, -1.0, 2.0, "x"],
            "softmax_scale": [None, 0.5, 0, -1.0, "x", np.float32(0.5)],
            "causal": [True, False, 1, 0],
        },
    ),
    (
        "embedding",
        F.embedding,
        [torch.tensor([[0, 8, 3]]), leaf(9, 8), leaf(5, 8)],
        {"position": [0, 2, 3, -1, True, 1.0], "sparse": [False]},
    ),
]


@pytest.mark.parametrize(
    ("function", "arguments", "options"), [c[1:] for c in OPTIONS], ids=[c[0] for c in OPTIONS]
)
def test_options_are_as_without_cpp(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Any],
    arguments: list[Any],
    options: dict[str, list[Any]],
) -> None:
    """Two at a time."""
    pairs = itertools.combinations(options, 2) if len(options) > 1 else [(next(iter(options)),) * 2]
    for first, second in pairs:
        for a, b in itertools.product(options[first], options[second]):
            chosen = {first: a, second: b}
            given = [
                g.detach().clone().requires_grad_() if g.is_floating_point() else g
                for g in arguments
            ]

            def call(*tensors: Tensor, chosen: dict[str, Any] = chosen) -> Any:
                if chosen.get("inplace_backward"):
                    tensors = (tensors[0] * 1, *tensors[1:])
                return function(*tensors, **chosen)

            assert_same_without_cpp(monkeypatch, call, given, str(chosen))


def test_wrong_classes_and_tokens_are_named(isa: str) -> None:
    logits, weight = leaf(2, 3, 9), leaf(9, 4)
    wrong = torch.tensor([[0, 1, 2], [3, 9, 4]])
    with pytest.raises(IndexError, match="9 at row 4"):
        F.cross_entropy(logits, wrong)
    with pytest.raises(IndexError, match="9 at row 4"):
        F.linear_cross_entropy(leaf(2, 3, 4), weight, wrong)
    with pytest.raises(IndexError, match=r"idx\[1, 1\] is 9"):
        F.embedding(wrong, weight, leaf(3, 4))


@pytest.mark.parametrize("name", ["portable", "cpu", "reference"])
def test_a_forced_backend_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kernels = backends.tensor_kernels()

    class Watched:
        def __getattr__(self, what: str) -> Any:
            seen.append(what)
            return getattr(kernels, what)

    monkeypatch.setattr(backends, "tensor_kernels", Watched)
    x = torch.randn(300, 768)
    with gpt2fast.use_backend(None if name == "portable" else name):
        F.layer_norm(x)
    assert bool(seen) == (name != "reference")


def test_without_the_interface_everything_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    backends.tensor_kernels.cache_clear()
    assert backends.tensor_kernels() is None
    x = leaf(2, 5, 24)
    F.layer_norm(x).sum().backward()
    monkeypatch.undo()
    backends.tensor_kernels.cache_clear()
    assert backends.tensor_kernels() is not None


def test_nothing_leaks() -> None:
    """References to arguments and results come back, and so does memory."""
    for name, (function, make) in {**COMMON, **COMMON_FP32}.items():
        arguments = make(torch.float32)
        wrong = [
            a.detach().double() if isinstance(a, Tensor) and a.requires_grad else a
            for a in arguments
        ]
        run(function, arguments)
        before = [sys.getrefcount(a) for a in arguments if isinstance(a, Tensor)]
        for _ in range(50):
            run(function, arguments)
            answer(function, wrong[:1])
        gc.collect()
        after = [sys.getrefcount(a) for a in arguments if isinstance(a, Tensor)]
        assert before == after, name
    big = leaf(64, 4096)
    for _ in range(20):
        run(F.layer_norm, [big])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        run(F.layer_norm, [big])  # one result is a megabyte
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * unit < 32 << 20


def test_threads_share_nothing() -> None:
    function, make = COMMON_FP32["gelu_mlp"]
    arguments = make(torch.float32)
    expected = run(function, arguments)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(100):
            for first, second in zip(run(function, arguments), expected, strict=True):
                if not torch.equal(first, second):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("function", "make", "dtype"), CASES)
def test_results_are_ordinary_tensors(
    function: Callable[..., Any], make: Callable[[torch.dtype], list[Any]], dtype: torch.dtype
) -> None:
    """On which everything works that works on PyTorch's own."""
    arguments = make(dtype)
    for result in run(function, arguments):
        assert type(result) is Tensor
        assert result.device == torch.device("cpu")
        assert result.is_contiguous() or function is COMMON["sdpa"][0]
        copy = result.clone()
        assert torch.equal(result.share_memory_(), copy)
        assert torch.equal(result.add(1).sub_(1).to(copy.dtype), copy.add(1).sub_(1))
        assert result.untyped_storage().nbytes() >= result.numel() * result.element_size()
    with torch.inference_mode():
        out = function(*arguments)
        out = out if isinstance(out, Tensor) else out[0]
        assert torch.isfinite(out.float()).all()
