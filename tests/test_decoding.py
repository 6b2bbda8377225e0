"""Decoding with fp32, bf16 and int8 weights: products against fp64, the decoder against the model."""

import copy
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt2fast
from gpt2fast import backends
from gpt2fast.decoding import WEIGHTS, Decoder, PackedWeight, Weights, pack, suits
from gpt2fast.generation import _decoder, generate
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops.gelu_mlp import reference as gelu_mlp_reference
from tests.ops.numerics import compare

EPS = torch.finfo(torch.float32).eps
LONG = 8192 + 7  # columns: more than one chunk of any instruction set, and a tail
SHAPES = [(1, 5), (7, 33), (50, 80), (65, 768), (4, LONG)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 13, 64])
@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_products_of_fp32_and_bf16(isa: str, rows: int, outputs: int, columns: int) -> None:
    """By the fp64 rule, on the weights as stored."""
    x, weight, bias = (
        torch.randn(rows, columns),
        torch.randn(outputs, columns),
        torch.randn(outputs),
    )
    for weights in ("float32", "bfloat16"):
        packed = pack(weight, weights)
        stored = packed.dequantize()
        truth = F.linear(x.double(), stored.double(), bias.double())
        compare(weights, packed.linear(x, bias), F.linear(x, stored, bias), truth)
    assert ((stored - weight).abs() <= 2**-8 * weight.abs()).all()  # 8 significant bits, to nearest


def int8_bounds(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Bounds of |y - x (q s)^T| and of |y - x w^T| that follow from the scales, fp64 (M, N).

    Inputs are rounded by at most half a step, max|x| / 32767 / 2. Sums of integers are exact; what
    fp32 adds are the roundings of a lane's sum, of the sums of lanes (log2 16 + 1) and of chunks
    (at most 5), and of two scales: less than 16, relative to the sum of absolute products.
    """
    x, w = x.double(), packed.dequantize().double()
    assert packed.scale is not None
    step = x.abs().amax(1, keepdim=True) / 32767
    inputs = (step / 2) * w.abs().sum(1)
    rounding = 16 * EPS * ((x.abs() + step) @ w.abs().T)
    weights = x.abs().sum(1, keepdim=True) * (packed.scale.double() / 2 * (1 + 4 * EPS))
    return inputs + rounding, inputs + rounding + weights


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 13, 64])
@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_products_of_int8(isa: str, rows: int, outputs: int, columns: int) -> None:
    x, weight = torch.randn(rows, columns), torch.randn(outputs, columns)
    x[0, 0] = 50.0  # an outlier, as GPT-2 has
    packed = pack(weight, "int8")
    assert packed.scale is not None
    error = (packed.dequantize() - weight).abs()
    assert (
        error <= packed.scale[:, None] / 2 * (1 + 4 * EPS) + 127 * EPS * packed.scale[:, None]
    ).all()
    y = packed.linear(x).double()
    near, far = int8_bounds(x, packed)
    assert ((y - x.double() @ packed.dequantize().double().T).abs() <= near).all()
    assert ((y - x.double() @ weight.double().T).abs() <= far).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_any_layout(weights: Weights) -> None:
    """Transposed, as Hugging Face's Conv1D has them, and with a step."""
    weight = torch.randn(40, 33)
    x = torch.randn(2, 33)
    expected = pack(weight, weights).linear(x)
    for view in (weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(pack(view, weights).linear(x), expected)


def test_int8_sums_do_not_overflow(isa: str) -> None:
    """The largest inputs and weights, all of one sign, over whole chunks."""
    weight = torch.stack([torch.ones(LONG), -torch.ones(LONG), torch.zeros(LONG)])
    y = pack(weight, "int8").linear(torch.full((1, LONG), 3.0))
    torch.testing.assert_close(y, torch.tensor([[3.0 * LONG, -3.0 * LONG, 0.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_int8_does_not_hide_what_is_not_finite(isa: str, bad: float) -> None:
    x = torch.randn(3, 40)
    x[1, 39] = bad
    y = pack(torch.randn(9, 40), "int8").linear(x)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()
    assert (pack(torch.randn(9, 40), "int8").linear(torch.zeros(2, 40)) == 0).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_depend_on_neither_rows_nor_threads(isa: str, weights: Weights) -> None:
    packed, x, bias = pack(torch.randn(1001, 200), weights), torch.randn(13, 200), torch.randn(1001)
    whole = packed.linear(x, bias)
    for rows in (1, 2, 3, 5, 12):
        assert torch.equal(packed.linear(x[:rows], bias), whole[:rows])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(packed.linear(x, bias), whole)
        assert torch.equal(packed.linear(x[:2], bias), whole[:2])


@pytest.fixture(scope="module")
def vnni(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """AVX-VNNI's instruction by a signal handler where the CPU lacks it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    extension = backends.cpu_extension()
    if "avx2" not in extension.runnable or sys.platform != "linux" or not compiler:
        pytest.skip("needs AVX2, Linux and a C compiler")
    if not extension.vnni:
        pytest.skip("built by an assembler without AVX-VNNI")
    library = tmp_path_factory.mktemp("vnni") / "emulator.so"
    source = Path(__file__).with_name("vnni_emulator.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_vnni_gives_the_same_bits(vnni: ctypes.CDLL, rows: int) -> None:
    """The kernel that CPUs with AVX-VNNI choose; each register, each number of inputs, a tail."""
    kernels = backends.cpu_extension().avx2
    outputs, columns = 8, 80 + 5
    x, packed = torch.randn(rows, columns), pack(torch.randn(outputs, columns), "int8")
    x[0, 0] = 50.0
    assert packed.scale is not None
    workspace = torch.empty(kernels.few_rows_workspace(rows, columns))
    found = []
    count = ctypes.c_long.in_dll(vnni, "vnni_count")
    for weights in (2, 3):
        y = torch.full((rows, outputs), float("nan"))
        pointers = [t.data_ptr() for t in (x, packed.data, packed.scale)]
        count.value = 0
        assert vnni.vnni_start() == 0
        kernels.few_rows_linear(
            *pointers, 0, y.data_ptr(), workspace.data_ptr(), rows, columns, outputs, weights, 1
        )
        vnni.vnni_stop()
        found.append(y)
    cpu = Path("/proc/cpuinfo").read_text()
    assert "avx_vnni" in cpu or count.value == outputs * rows * -(-columns // 16)
    assert torch.equal(*found)


# ---- the model -------------------------------------------------------------------------------------


def gpt(**shape: Any) -> GPT:
    """Weights that make logits of some units, a bias and a norm that matter."""
    wanted = {"n_layer": 2, "n_head": 3, "n_embd": 48, "vocab_size": 101, "block_size": 160}
    model = GPT(GPTConfig(**(wanted | shape)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def stored(model: GPT, weights: Weights) -> GPT:
    """The model with its matrices as `weights` keep them, in fp32."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.dim() == 2 and "wpe" not in name:
                parameter.copy_(pack(parameter, weights).dequantize())
    return rounded


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return gpt()


def all_logits(model: GPT, idx: Tensor) -> Tensor:
    with torch.no_grad(), gpt2fast.use_backend("reference"):
        return model(idx)


def last_logits(model: GPT, idx: Tensor) -> Tensor:
    return all_logits(model, idx)[:, -1]


@contextmanager
def rounded_inputs(weights: Weights) -> Iterator[None]:
    """With int8 weights every product's inputs are 16-bit integers times a scale a row, as in C++.

    So plain PyTorch is the fp64 rule's reference for that precision; truth rounds no inputs.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True) / 32767).clamp_min(torch.finfo(x.dtype).tiny)
        return exact((x / step).round() * step, weight, bias)

    exact = F.linear
    with pytest.MonkeyPatch.context() as patch:
        if weights == "int8":
            patch.setattr(F, "linear", linear)
            patch.setattr(gelu_mlp_reference, "linear", linear)
        yield


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("batch", "parts"),
    [(1, [1, 1, 1]), (3, [5, 1, 1, 2]), (2, [70, 1, 1]), (70, [2, 1]), (1, [130, 1, 29])],
)
def test_decoder_is_the_model(
    isa: str, model: GPT, weights: Weights, batch: int, parts: list[int]
) -> None:
    """Logits of prompts and of single tokens, by the fp64 rule on the weights as stored."""
    idx = torch.randint(0, 101, (batch, sum(parts)))
    rounded = stored(model, weights)
    decoder = Decoder(model, weights)
    cache = decoder.new_cache(batch)
    end = 0
    for part in parts:
        logits = decoder.forward_cached(idx[:, end : end + part], cache)
        end += part
        assert cache.length == end
        with rounded_inputs(weights):
            expected = last_logits(rounded, idx[:, :end])
        truth = last_logits(copy.deepcopy(rounded).double(), idx[:, :end])
        compare(f"logits at {end}", logits, expected, truth)


@pytest.mark.parametrize("shape", [{"n_head": 1, "n_embd": 20}, {"n_head": 2, "n_embd": 160}])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_widths(isa: str, shape: dict[str, int], weights: Weights) -> None:
    """That are no multiple of a vector, and larger heads."""
    model = gpt(n_layer=1, vocab_size=67, **shape)
    rounded, decoder = stored(model, weights), Decoder(model, weights)
    idx = torch.randint(0, 67, (2, 9))
    decoder.forward_cached(idx[:, :-1], cache := decoder.new_cache(2))
    truth = last_logits(copy.deepcopy(rounded).double(), idx)
    logits = decoder.forward_cached(idx[:, -1:], cache)
    compare("logits", logits, last_logits(rounded, idx), truth)


@pytest.mark.parametrize("shape", [{"n_head": 1, "n_embd": 20}, {"n_head": 2, "n_embd": 160}])
@pytest.mark.parametrize("length", [64, 65, 131, 150])
@pytest.mark.parametrize("peak", [1.0, 4.0])
def test_attention_of_one_query(isa: str, shape: dict[str, int], length: int, peak: float) -> None:
    """One token after prompts around the runs of keys that are summed; scores that differ much."""
    model = gpt(n_layer=1, vocab_size=67, **shape)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(peak)
    decoder, idx = Decoder(model), torch.randint(0, 67, (1, length + 1))
    decoder.forward_cached(idx[:, :-1], cache := decoder.new_cache(1))
    truth = last_logits(copy.deepcopy(model).double(), idx)
    logits = decoder.forward_cached(idx[:, -1:], cache)
    compare("logits", logits, last_logits(model, idx), truth)


@pytest.mark.parametrize("length", [5, 65, 150])
def test_scores_beyond_the_range_of_exp(isa: str, length: int) -> None:
    """Their differences decide; so large they amplify rounding, and the bound is a hundredth part."""
    model = gpt(n_layer=1, vocab_size=67, n_head=2, n_embd=160)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(16)
    decoder, idx = Decoder(model), torch.randint(0, 67, (1, length + 1))
    decoder.forward_cached(idx[:, :-1], cache := decoder.new_cache(1))
    truth = last_logits(copy.deepcopy(model).double(), idx)
    logits = decoder.forward_cached(idx[:, -1:], cache)
    assert (logits - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_depend_on_neither_batch_nor_threads(isa: str, weights: Weights) -> None:
    """Two layers wide enough that threads share all their phases."""
    model = gpt(n_layer=2, n_head=4, n_embd=256, vocab_size=999)
    decoder, idx = Decoder(model, weights), torch.randint(0, 999, (5, 3))

    def logits(rows: slice) -> Tensor:
        cache = decoder.new_cache(len(idx[rows]))
        for t in range(3):
            found = decoder.forward_cached(idx[rows, t : t + 1], cache)
        return found

    whole = logits(slice(0, 5))
    for row in range(5):
        assert torch.equal(logits(slice(row, row + 1)), whole[row : row + 1])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert torch.equal(logits(slice(0, 5)), whole)
            assert torch.equal(
                logits(slice(0, 1)), whole[:1]
            )  # each thread prepares its own inputs


@pytest.mark.parametrize("weights", WEIGHTS)
def test_called_as_a_model(model: GPT, weights: Weights) -> None:
    """All logits, and the loss with targets left out."""
    decoder, rounded = Decoder(model, weights), stored(model, weights)
    idx = torch.randint(0, 101, (3, 100))
    targets = torch.randint(0, 101, (3, 100))
    targets[1, 20:60] = -100
    with rounded_inputs(weights):
        expected = all_logits(rounded, idx)
    truth = all_logits(copy.deepcopy(rounded).double(), idx)
    found = decoder(idx)
    compare("logits", found, expected, truth)
    mean, true = (F.cross_entropy(logits.mT, targets) for logits in (found, found.double()))
    compare("loss", decoder(idx, targets)[1], mean, true)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("length", [1, 150, 170])
def test_greedy_text_is_the_uncached_models(model: GPT, weights: Weights, length: int) -> None:
    """Also past block_size; with int8 the text of the model with the rounded weights."""
    idx = torch.randint(0, 101, (2, length))
    wanted = generate(stored(model, weights), idx, 24, temperature=0, use_cache=False)
    assert torch.equal(generate(model, idx, 24, temperature=0, weights=weights), wanted)
    decoder = Decoder(model, weights)
    assert torch.equal(generate(decoder, idx, 9, temperature=0), wanted[:, : length + 9])


def test_memory_follows_the_weights(model: GPT) -> None:
    sizes = [Decoder(model, weights).nbytes for weights in WEIGHTS]
    assert sizes[0] == 4 * model.num_parameters()
    assert sizes[0] > 1.7 * sizes[1] > 1.5 * 1.7 * sizes[2]
    wte = Decoder(model, "float32")._tensors[-3]
    assert wte is not None
    assert wte.data_ptr() == model.transformer.wte.weight.data_ptr()  # shared, not copied


def test_where_a_decoder_does_not_suit() -> None:
    model = gpt()
    assert isinstance(_decoder(model, None), Decoder)
    with gpt2fast.use_backend("reference"):
        assert _decoder(model, None) is model
    assert _decoder(copy.deepcopy(model).bfloat16(), None) is not model
    assert isinstance(_decoder(copy.deepcopy(model).bfloat16(), None), GPT)
    hook = model.transformer.h[0].register_forward_hook(lambda *_: None)
    assert _decoder(model, None) is model
    with pytest.raises(ValueError, match="no hooks"):
        Decoder(model)
    hook.remove()
    assert suits(model)
    model.transformer.h[0].mlp.c_fc = nn.utils.parametrizations.weight_norm(nn.Linear(48, 192))
    assert _decoder(model, None) is model


def test_wrong_arguments(model: GPT) -> None:
    decoder = Decoder(model, "int8")
    cache = decoder.new_cache(2)
    with pytest.raises(IndexError, match="holds 101, not in 0 to 100"):
        decoder.forward_cached(torch.tensor([[1], [101]]), cache)
    with pytest.raises(IndexError, match="holds -1"):
        decoder.forward_cached(torch.tensor([[-1], [1]]), cache)
    for idx in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"idx must be int64 \(B, T\)"):
            decoder.forward_cached(idx, cache)
    with pytest.raises(ValueError, match="cache of 2 rows"):
        decoder.forward_cached(torch.zeros(3, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="0 of 160 positions"):
        decoder.forward_cached(torch.zeros(2, 161, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="fp32 on the CPU"):
        decoder.forward_cached(
            torch.zeros(2, 1, dtype=torch.int64), copy.deepcopy(model).bfloat16().new_cache(2)
        )
    assert cache.length == 0
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        Decoder(model, "of gold")  # type: ignore[arg-type]
    idx = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the decoder has int8"):
        generate(decoder, idx, 1, weights="float32")
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(decoder, idx, 1, use_cache=False)
    packed = pack(torch.randn(5, 4), "float32")
    with pytest.raises(TypeError, match="x must be fp32"):
        packed.linear(torch.zeros(1, 4).double())
    with pytest.raises(ValueError, match=r"x must have shape \(M, 4\)"):
        packed.linear(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
        packed.linear(torch.zeros(1, 4), torch.zeros(4))
