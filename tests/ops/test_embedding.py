"""embedding: the fp64 rule for values and gradients, index errors, layouts, torch.compile."""

import pytest
import torch

import gpt2fast
from gpt2fast.backends import interpreted, status
from gpt2fast.functional import embedding
from gpt2fast.ops.embedding import autograd, cpu
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    device_of,
)


def inputs(
    batch: int, length: int, width: int, vocabulary: int = 101, positions: int | None = None
) -> dict[str, torch.Tensor]:
    return {
        "idx": torch.randint(vocabulary, (batch, length)),
        "wte": torch.randn(vocabulary, width),
        "wpe": torch.randn(positions or length, width),
    }


def slow(backend: str) -> bool:
    """Whether the backend is Triton's interpreter, which gets fewer rows."""
    return backend == "triton" and interpreted()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1600, 80, 5, 1])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 97), (2, 513)])
def test_embedding(backend: str, batch: int, length: int, width: int, dtype: torch.dtype) -> None:
    if slow(backend):
        length = min(length, 41)
    assert_accurate(embedding, inputs(batch, length, width), dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_one_token_many_times(backend: str, tokens: int, dtype: torch.dtype) -> None:
    """Long sums: several levels of partial sums, for tokens and for positions."""
    given = inputs(300, 1 if slow(backend) else 5, 80)
    given["idx"] = given["idx"] % tokens
    assert_accurate(embedding, given, dtype=dtype, backend=backend)


RUNS = [
    [32, 32],
    [31, 2, 31, 64],
    [33, 95, 1, 31],
    [5, 27, 64, 32, 1],
    *([3, rest] for rest in (2, 3, 4, 5, 30, 31, 32, 33)),
    [7, 200, 3],
]


@pytest.mark.parametrize("counts", RUNS)
def test_runs_that_end_at_the_edge_of_a_tile(backend: str, counts: list[int]) -> None:
    """Triton sums tiles of 32 sorted rows: runs that end with a tile, fill it, begin with it."""
    tokens = [token for token, count in enumerate(counts) for _ in range(count)]
    given = inputs(1, len(tokens), 80)
    given["idx"] = torch.tensor(tokens)[torch.randperm(len(tokens))][None] * 3 + 1
    assert_accurate(embedding, given, backend=backend)


@pytest.mark.parametrize("vocabulary", [65534, 65535, 65536, 70_001])
def test_large_vocabularies(backend: str, vocabulary: int) -> None:
    """Beyond 16 bits, and at their edge."""
    given = inputs(2, 5, 5, vocabulary)
    given["idx"][0, :4] = torch.tensor([0, vocabulary - 1, vocabulary - 2, vocabulary - 1])
    assert_accurate(embedding, given, backend=backend)


def test_sums_stay_accurate_in_half(backend: str) -> None:
    """Thousands of ones in bf16: a sum rounded at each step would stop at 256."""
    batch, length = (64, 8) if slow(backend) else (64, 64)
    device = device_of(backend)
    idx = torch.zeros(batch, length, dtype=torch.int64, device=device)
    half = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    wte, wpe = torch.zeros(3, 80, **half), torch.zeros(length, 80, **half)
    with gpt2fast.use_backend(backend):
        embedding(idx, wte, wpe).sum().backward()
    expected = torch.zeros_like(wte)
    expected[0] = batch * length
    assert torch.equal(wte.grad, expected)
    assert torch.equal(wpe.grad, torch.full_like(wpe, batch))


@pytest.mark.parametrize("position", [0, 1, 7, 11])
def test_position(backend: str, position: int) -> None:
    given = {**inputs(2, 9, 80, positions=20), "position": position}
    assert_accurate(embedding, given, backend=backend)


def test_int32(backend: str) -> None:
    with device_of(backend), gpt2fast.use_backend(backend):
        given = inputs(3, 7, 80)
        expected = embedding(**given)
        assert torch.equal(embedding(**{**given, "idx": given["idx"].int()}), expected)


@pytest.mark.parametrize("wanted", [["wte"], ["wpe"]])
def test_only_some_inputs_require_gradients(backend: str, wanted: list[str]) -> None:
    assert_accurate(embedding, inputs(2, 9, 80), wanted=wanted, backend=backend)


def test_strided_arguments(backend: str) -> None:
    given = inputs(5, 7, 80)
    given["idx"] = given["idx"].t().contiguous().t()
    given["wpe"] = given["wpe"].t().contiguous().t()
    assert_accurate(embedding, given, backend=backend)
    assert_accurate(
        lambda packed, **rest: embedding(wte=packed[:, 5:85], **rest),
        {"packed": torch.randn(101, 90), "idx": given["idx"], "wpe": given["wpe"]},
        backend=backend,
    )
    shifted = torch.randint(101, (4, 9))[:, 1:]
    assert_accurate(embedding, {**inputs(4, 8, 80), "idx": shifted}, backend=backend)


def test_zero_stride_upstream_gradient(backend: str) -> None:
    given = inputs(2, 9, 80)
    assert_accurate(lambda **given: embedding(**given).sum(), given, backend=backend)
    assert_accurate(lambda **given: embedding(**given).sum((0, 1)), given, backend=backend)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    with device_of(backend):
        given = inputs(*shape, width=80, positions=9)
    leaves = {n: given[n].requires_grad_() for n in ("wte", "wpe")}
    with gpt2fast.use_backend(backend):
        out = embedding(given["idx"], **leaves)
    assert out.shape == (*shape, 80)
    out.sum().backward()
    for leaf in leaves.values():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("vocabulary", [101, 70_000])
def test_on_a_gpu_an_index_outside_of_the_table_harms_its_own_row_only(vocabulary: int) -> None:
    """Contract broken: NaN out, no gradient, nothing read or written out of bounds."""
    if not (found := status("triton")).available:
        pytest.skip(found.detail)
    device = device_of("triton")
    given = inputs(3, 20, 80, vocabulary)
    bad = torch.zeros(3, 20, dtype=torch.bool)
    places = [(0, 0, vocabulary), (0, 5, -1), (1, 3, 2**40), (2, 19, -(2**63)), (2, 7, 2**32 + 1)]
    for b, t, value in places:
        given["idx"][b, t] = value
        bad[b, t] = True
    leaves = {n: given[n].to(device).requires_grad_() for n in ("wte", "wpe")}
    with gpt2fast.use_backend("triton"):
        out = embedding(given["idx"].to(device), **leaves)
    dy = torch.randn(3, 20, 80)
    out.backward(dy.to(device))
    out, dwte, dwpe = (t.detach().cpu() for t in (out, leaves["wte"].grad, leaves["wpe"].grad))
    assert out[bad].isnan().all()
    rest = given["idx"][~bad]
    assert torch.equal(
        out[~bad], (given["wte"][rest] + given["wpe"][bad.logical_not().nonzero()[:, 1]])
    )
    expected = torch.zeros_like(dwte).index_add(0, rest, dy[~bad])
    torch.testing.assert_close(dwte, expected)
    torch.testing.assert_close(dwpe, dy.sum(0))


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


def test_deterministic(backend: str) -> None:
    with device_of(backend):
        given, dy = inputs(3, 65, 80, 7), torch.randn(3, 65, 80)

    def run() -> list[torch.Tensor]:
        leaves = [given[n].clone().requires_grad_() for n in ("wte", "wpe")]
        with gpt2fast.use_backend(backend):
            out = embedding(given["idx"], *leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dy)]

    assert_deterministic(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 21), (0, 5), (3, 0)])
def test_sparse_gradient(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The rows of the dense one, each once and in order; nothing for tokens that are not there."""
    with device_of(backend):
        given, dy = inputs(*shape, width=80, positions=30), torch.randn(*shape, 80)
    gradients = {}
    for sparse in (False, True):
        leaves = [given[n].to(dtype).requires_grad_() for n in ("wte", "wpe")]
        with gpt2fast.use_backend(backend):
            out = embedding(given["idx"], *leaves, sparse=sparse)
        gradients[sparse] = torch.autograd.grad(out, leaves, dy.to(dtype))
    (dense, dwpe), (found, other) = gradients[False], gradients[True]
    assert found.is_sparse
    assert found.is_coalesced()
    assert found.shape == dense.shape
    assert torch.equal(found.indices()[0], given["idx"].unique())
    assert torch.equal(found.to_dense(), dense)
    assert torch.equal(other, dwpe)


def test_gradient_accumulation_over_two_backwards(backend: str) -> None:
    """PyTorch may take our gradient as .grad and add the next one in place: memory must be ours."""
    with device_of(backend):
        given = inputs(2, 9, 80)
    leaf = given["wte"].requires_grad_()
    with gpt2fast.use_backend(backend):
        embedding(given["idx"], leaf, given["wpe"]).sum().backward()
        once = leaf.grad.clone()
        embedding(given["idx"], leaf, given["wpe"]).sum().backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_compiles(backend: str) -> None:
    assert_compiles(embedding, inputs(3, 6, 80), backend)
    assert_compiles(
        lambda idx, wte, wpe: embedding(idx, wte, wpe, 2), inputs(3, 6, 80, positions=9), backend
    )


def test_opcheck(backend: str) -> None:
    with device_of(backend):
        idx, wte, wpe = inputs(3, 6, 80, positions=9).values()
        dy = torch.randn(3, 6, 80)
    torch.library.opcheck(autograd.embedding_forward, (idx, wte, wpe, 2, backend))
    for need in ((True, True), (True, False), (False, True)):
        arguments = (dy, idx, 101, 9, 2, *need, backend)
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
