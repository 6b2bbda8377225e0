"""The short way round PyTorch's dispatcher is for plain tensors only."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

import gpt2fast
from gpt2fast import backends, functional
from gpt2fast.ops import registry
from gpt2fast.ops.gelu import autograd as gelu


class Wrapper(Tensor):
    """A tensor whose data lies elsewhere, as DTensor's does: its own address is 0."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(
            lambda a: a.inner if isinstance(a, Wrapper) else a, (args, kwargs or {})
        )
        return function(*args, **kwargs)


def test_a_wrapper_beside_a_plain_tensor_reaches_the_kernel_with_its_data(isa: str) -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    with gpt2fast.use_backend("cpu"):
        expected = functional.layer_norm(x, weight, bias)
        assert torch.equal(functional.layer_norm(x, Wrapper(weight), bias), expected)
        assert torch.equal(functional.layer_norm(x, weight, Wrapper(bias)), expected)


def test_the_norm_of_wrapped_gradients(isa: str) -> None:
    tensors = [torch.randn(5), torch.randn(7)]
    with gpt2fast.use_backend("cpu"):
        expected = functional.global_norm(tensors)
        assert torch.equal(functional.global_norm([tensors[0], Wrapper(tensors[1])]), expected)


@pytest.mark.parametrize("forced", [None, "cpu"])
def test_a_compiled_function_is_compiled_once(
    forced: str | None, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_automatic", {})  # as in a new process
    monkeypatch.setattr(backends, "_checked_names", set())
    torch._dynamo.reset()
    compiled = torch.compile(functional.gelu, backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    with gpt2fast.use_backend(forced), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(x), functional.gelu(x))


@pytest.mark.parametrize("wanted", [False, True])
def test_forward_mode_is_refused(isa: str, wanted: bool) -> None:
    """Not answered without a tangent."""
    x = torch.randn(3, 8, requires_grad=wanted)
    with gpt2fast.use_backend("cpu"), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(3, 8))
        for function in (functional.layer_norm, functional.gelu):
            with pytest.raises(NotImplementedError, match="jvp"):
                function(dual)


def test_importing_the_model_does_not_import_the_compiler() -> None:
    code = "import sys, gpt2fast.functional, gpt2fast.swap; from gpt2fast import GPT; "
    code += "print([name for name in ('torch._dynamo', 'sympy', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_compiler_meets_the_op_and_not_the_way_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11's cannot follow the way by the op's id()."""
    x = torch.randn(3, 8)
    expected = registry.call(gelu.gelu_forward, x, None, "cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(registry, "_implementations", {})
    assert torch.equal(registry.call(gelu.gelu_forward, x, None, "cpu"), expected)


def test_the_mark_of_a_constant_is_torch_s() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    backends.constant_in_graphs(ours)
    torch.compiler.assume_constant_result(theirs)
    assert ours.__dict__ == theirs.__dict__ != {}
