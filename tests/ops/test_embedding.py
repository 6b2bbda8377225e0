"""embedding: the fp64 rule for values and gradients, index errors, layouts, torch.compile."""

import pytest
import torch

import gpt2fast
from gpt2fast.functional import embedding
from gpt2fast.ops.embedding import autograd, cpu
from tests.ops.numerics import DTYPES, assert_accurate, assert_compiles, assert_deterministic


def inputs(
    batch: int, length: int, width: int, vocabulary: int = 101, positions: int | None = None
) -> dict[str, torch.Tensor]:
    return {
        "idx": torch.randint(vocabulary, (batch, length)),
        "wte": torch.randn(vocabulary, width),
        "wpe": torch.randn(positions or length, width),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1600, 80, 5, 1])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 97), (2, 513)])
def test_embedding(isa: str, batch: int, length: int, width: int, dtype: torch.dtype) -> None:
    assert_accurate(embedding, inputs(batch, length, width), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_one_token_many_times(isa: str, tokens: int, dtype: torch.dtype) -> None:
    """Long sums: several levels of partial sums, for tokens and for positions."""
    given = inputs(300, 5, 80)
    given["idx"] = given["idx"] % tokens
    assert_accurate(embedding, given, dtype=dtype)


def test_sums_stay_accurate_in_half() -> None:
    """4096 ones in bf16: a sum rounded at each step would stop at 256."""
    idx = torch.zeros(64, 64, dtype=torch.int64)
    wte = torch.zeros(3, 80, dtype=torch.bfloat16, requires_grad=True)
    wpe = torch.zeros(64, 80, dtype=torch.bfloat16, requires_grad=True)
    embedding(idx, wte, wpe).sum().backward()
    expected = torch.zeros_like(wte)
    expected[0] = 4096
    assert torch.equal(wte.grad, expected)
    assert torch.equal(wpe.grad, torch.full_like(wpe, 64))


@pytest.mark.parametrize("position", [0, 1, 7, 11])
def test_position(isa: str, position: int) -> None:
    assert_accurate(embedding, {**inputs(2, 9, 80, positions=20), "position": position})


def test_int32() -> None:
    given = inputs(3, 7, 80)
    expected = embedding(**given)
    assert torch.equal(embedding(**{**given, "idx": given["idx"].int()}), expected)


@pytest.mark.parametrize("wanted", [["wte"], ["wpe"]])
def test_only_some_inputs_require_gradients(wanted: list[str]) -> None:
    assert_accurate(embedding, inputs(2, 9, 80), wanted=wanted)


def test_strided_arguments() -> None:
    given = inputs(5, 7, 80)
    given["idx"] = given["idx"].t().contiguous().t()
    given["wpe"] = given["wpe"].t().contiguous().t()
    assert_accurate(embedding, given)
    assert_accurate(
        lambda packed, **rest: embedding(wte=packed[:, 5:85], **rest),
        {"packed": torch.randn(101, 90), "idx": given["idx"], "wpe": given["wpe"]},
    )
    shifted = torch.randint(101, (4, 9))[:, 1:]
    assert_accurate(embedding, {**inputs(4, 8, 80), "idx": shifted})


def test_zero_stride_upstream_gradient() -> None:
    assert_accurate(lambda **given: embedding(**given).sum(), inputs(2, 9, 80))
    assert_accurate(lambda **given: embedding(**given).sum((0, 1)), inputs(2, 9, 80))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    given = inputs(*shape, width=80, positions=9)
    leaves = {n: given[n].requires_grad_() for n in ("wte", "wpe")}
    out = embedding(given["idx"], **leaves)
    assert out.shape == (*shape, 80)
    out.sum().backward()
    for leaf in leaves.values():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("bad", [101, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("place", [(0, 0), (1, 300), (3, 511)])
def test_index_outside_of_the_table(isa: str, bad: int, place: tuple[int, int]) -> None:
    given = inputs(4, 512, 80)
    given["idx"][place] = bad
    given["idx"][3, 511] = bad  # a later one: the first is named
    message = rf"idx\[{place[0]}, {place[1]}\] is {bad}, but wte has rows 0 to 100"
    with pytest.raises(IndexError, match=message):
        embedding(**given)


def test_the_number_of_threads_does_not_change_bits() -> None:
    given, dy = inputs(3, 97, 400), torch.randn(3, 97, 400)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.backward(dy, given["idx"], 101, 97, 0, True, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_deterministic() -> None:
    given, dy = inputs(3, 513, 80), torch.randn(3, 513, 80)

    def run() -> list[torch.Tensor]:
        leaves = [given[n].clone().requires_grad_() for n in ("wte", "wpe")]
        out = embedding(given["idx"], *leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dy)]

    assert_deterministic(run)


def test_gradient_accumulation_over_two_backwards() -> None:
    """PyTorch may take our gradient as .grad and add the next one in place: memory must be ours."""
    given = inputs(2, 9, 80)
    leaf = given["wte"].requires_grad_()
    embedding(given["idx"], leaf, given["wpe"]).sum().backward()
    once = leaf.grad.clone()
    embedding(given["idx"], leaf, given["wpe"]).sum().backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_compiles() -> None:
    assert_compiles(embedding, inputs(3, 6, 80), "cpu")
    assert_compiles(
        lambda idx, wte, wpe: embedding(idx, wte, wpe, 2), inputs(3, 6, 80, positions=9), "cpu"
    )


def test_opcheck() -> None:
    idx, wte, wpe = inputs(3, 6, 80, positions=9).values()
    torch.library.opcheck(autograd.embedding_forward, (idx, wte, wpe, 2, "cpu"))
    for need in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn(3, 6, 80), idx, 101, 9, 2, *need, "cpu")
        torch.library.opcheck(autograd.embedding_backward, arguments)


def test_autocast_keeps_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(**inputs(2, 3, 80)).dtype == torch.float32


IDX, WTE, WPE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], WTE, WPE), TypeError, r"idx must be a torch\.Tensor, got list"),
        ((IDX.float(), WTE, WPE), TypeError, r"idx must be int64 or int32, got torch\.float32"),
        ((IDX[0], WTE, WPE), ValueError, r"idx must have shape \(B, T\), got \(3,\)"),
        ((IDX, WTE.long(), WPE), TypeError, "wte must be floating point"),
        ((IDX, WTE[0], WPE), ValueError, r"wte must have shape \(rows, C\)"),
        ((IDX, WTE, WPE[:, :2]), ValueError, "wpe has 2 columns but wte has 4"),
        ((IDX, WTE, WPE.half()), TypeError, r"wpe is torch\.float16 but wte is torch\.float32"),
        ((IDX, WTE, WPE.to("meta")), ValueError, "wpe is on meta but wte is on cpu"),
        ((IDX, WTE, WPE, 1), ValueError, "position 1 and 3 tokens need rows 1 to 3 of wpe"),
        ((IDX, WTE, WPE, -1), ValueError, "position -1 and 3 tokens"),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embedding(*arguments)


def test_use_backend_switches_the_code() -> None:
    """Guards the tests themselves: only the kernel's error names the place."""
    given = inputs(2, 3, 80)
    given["idx"][1, 1] = 101
    with gpt2fast.use_backend("reference"), pytest.raises(IndexError, match="out of range"):
        embedding(**given)
    with gpt2fast.use_backend("cpu"), pytest.raises(IndexError, match="but wte has rows"):
        embedding(**given)
