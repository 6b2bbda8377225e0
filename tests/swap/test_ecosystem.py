"""Other packages' names: their meaning, on our kernels, and clear refusals."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast.ecosystem import cut_cross_entropy, flash_attn, liger
from tests.ops.numerics import assert_accurate, compare


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Attention on (B, T, H, D), causal from the end, by definition."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[2] - q.shape[2])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2)


def test_argument_orders() -> None:
    orders = {
        flash_attn.flash_attn_func: "q k v dropout_p softmax_scale causal window_size softcap"
        " alibi_slopes deterministic return_attn_probs",
        flash_attn.flash_attn_with_kvcache: "q k_cache v_cache k v rotary_cos rotary_sin"
        " cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal window_size"
        " softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
        flash_attn.cross_entropy_loss: "logits labels precomputed_lse label_smoothing logit_scale"
        " lse_square_scale ignore_index inplace_backward process_group",
        liger.LigerFusedLinearCrossEntropyLoss.forward: "self lin_weight _input target bias",
        liger.LigerLayerNorm: "hidden_size eps bias init_fn",
    }
    for function, order in orders.items():
        assert list(inspect.signature(function).parameters) == order.split(), function


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 8)
    expected = attend(q, k, v, causal, 0.3)
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": causal, "deterministic": True}
    torch.testing.assert_close(flash_attn.flash_attn_func(q, k, v, **options), expected)
    packed = flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options)
    torch.testing.assert_close(packed, expected)
    qkv = torch.stack([k, k, v], 2)
    packed = flash_attn.flash_attn_qkvpacked_func(qkv, **options)
    torch.testing.assert_close(packed, attend(k, k, v, causal, 0.3))


REFUSED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (function, args, {name: value})
    for function, args, names in [
        (
            flash_attn.flash_attn_func,
            (torch.ones(1, 2, 2, 8),) * 3,
            {
                "window_size": (4, 0),
                "softcap": 30.0,
                "alibi_slopes": torch.ones(2),
            },
        ),
        (
            flash_attn.flash_attn_with_kvcache,
            (torch.ones(1, 2, 2, 8),) * 3,
            {
                "rotary_cos": torch.ones(2, 4),
                "block_table": torch.ones(1, 1),
                "window_size": (1, 1),
                "return_softmax_lse": True,
            },
        ),
        (
            flash_attn.layer_norm_fn,
            (torch.ones(2, 8), torch.ones(8), None),
            {
                "x1": torch.ones(2, 8),
                "weight1": torch.ones(8),
                "is_rms_norm": True,
                "out": torch.ones(2, 8),
            },
        ),
        (
            flash_attn.cross_entropy_loss,
            (torch.ones(2, 8), torch.tensor([1, 2])),
            {"precomputed_lse": torch.ones(2), "process_group": "world"},
        ),
        (flash_attn.FusedMLP, (8,), {"activation": "relu", "checkpoint_lvl": 3}),
        (
            liger.LigerCrossEntropyLoss,
            (),
            {
                "weight": torch.ones(3),
                "return_token_accuracy": True,
                "softcap": -1.0,
                "reduction": "max",
                "label_smoothing": 2.0,
            },
        ),
        (
            liger.LigerFusedLinearCrossEntropyLoss,
            (),
            {"ce_weight": torch.ones(3), "softcap": 30.0, "use_token_scaling": True},
        ),
        (
            cut_cross_entropy.linear_cross_entropy,
            (torch.ones(2, 8), torch.ones(9, 8), torch.tensor([1, 2])),
            {"bias": torch.ones(9), "softcap": 30.0, "return_lse": True, "shift": -1},
        ),
    ]
    for name, value in names.items()
]


@pytest.mark.parametrize(
    ("function", "args", "wrong"),
    REFUSED,
    ids=[f"{f.__name__}-{next(iter(w))}" for f, _, w in REFUSED],
)
def test_refusals_name_the_argument(function: Any, args: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"\b{next(iter(wrong))}\b"):
        function(*args, **wrong)


def test_grouped_queries_are_refused() -> None:
    q, k = torch.ones(1, 2, 6, 8), torch.ones(1, 2, 3, 8)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    lengths = (starts, starts, 2, 2)
    for call in (
        lambda: flash_attn.flash_attn_func(q, k, k),
        lambda: flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, k], 2)),
        lambda: flash_attn.flash_attn_varlen_func(q[0], k[0], k[0], *lengths),
        lambda: flash_attn.flash_attn_with_kvcache(q, k, k),
    ):
        with pytest.raises(ValueError, match=r"k with 3 heads for q's 6 is not supported"):
            call()


X, WEIGHT, LABELS = torch.ones(6, 16), torch.ones(37, 16), torch.zeros(6, dtype=torch.int64)
FUSED = liger.liger_fused_linear_cross_entropy
MISTAKES: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (cut_cross_entropy.linear_cross_entropy, (WEIGHT, X, LABELS), {}, "targets must have shape"),
    (cut_cross_entropy.linear_cross_entropy, (X, WEIGHT[:, :8], LABELS), {}, "c must have shape"),
    (cut_cross_entropy.linear_cross_entropy, (X, WEIGHT, LABELS), {"shift": 6}, "shift must be"),
    (FUSED, (WEIGHT, X, LABELS), {}, "target must have shape"),
    (FUSED, (X, WEIGHT.t(), LABELS), {}, "weight must have shape"),
    (liger.liger_cross_entropy, (X[None], LABELS[None]), {}, "input must have shape"),
    (liger.liger_cross_entropy, (X, LABELS[:3]), {}, "target must have shape"),
    (flash_attn.cross_entropy_loss, (X, LABELS[:3]), {}, "labels must have shape"),
    (flash_attn.FusedMLP(8), (X,), {}, "x must have shape"),
]


@pytest.mark.parametrize(("function", "args", "options", "message"), MISTAKES)
def test_mistakes_are_told_in_the_names_of_the_package(
    function: Any, args: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        function(*args, **options)
    with pytest.raises(TypeError, match="out_dtype must be"):
        flash_attn.layer_norm_fn(X, X[0], None, out_dtype="bf16")


Q, QKV = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 3, 2, 8)
STARTS, LONGEST = torch.tensor([0, 4], dtype=torch.int32), (4, 4)
#: How every function with a number among its arguments is called; modules are called, too.
CALLS: dict[Any, tuple[tuple[Any, ...], tuple[Any, ...] | None]] = {
    flash_attn.flash_attn_func: ((Q, Q, Q), None),
    flash_attn.flash_attn_qkvpacked_func: ((QKV,), None),
    flash_attn.flash_attn_kvpacked_func: ((Q, QKV[:, :, :2]), None),
    flash_attn.flash_attn_varlen_func: ((Q[0], Q[0], Q[0], STARTS, STARTS, *LONGEST), None),
    flash_attn.flash_attn_varlen_qkvpacked_func: ((QKV[0], STARTS, 4), None),
    flash_attn.flash_attn_varlen_kvpacked_func: (
        (Q[0], QKV[0, :, :2], STARTS, STARTS, *LONGEST),
        None,
    ),
    flash_attn.flash_attn_with_kvcache: ((Q, Q, Q), None),
    flash_attn.layer_norm_fn: ((X, X[0], None), None),
    flash_attn.cross_entropy_loss: ((X, LABELS), None),
    flash_attn.CrossEntropyLoss: ((), (X, LABELS)),
    flash_attn.FusedMLP: ((16,), (X,)),
    liger.liger_layer_norm: ((X, X[0], X[0], 1e-5), None),
    liger.LigerLayerNorm: ((16,), (X,)),
    liger.liger_cross_entropy: ((X, LABELS), None),
    liger.LigerCrossEntropyLoss: ((), (X, LABELS)),
    FUSED: ((X, WEIGHT, LABELS), None),
    liger.LigerFusedLinearCrossEntropyLoss: ((), (WEIGHT, X, LABELS)),
    cut_cross_entropy.linear_cross_entropy: ((X, WEIGHT, LABELS), None),
}
#: Hints that have no meaning here: any value.
HINTS = ("num_splits", "heuristic", "filter_eps")


def call(function: Any, given: dict[str, Any], then: tuple[Any, ...] | None) -> None:
    made = function(**given)
    if then is not None:
        made(*then)


def test_what_is_no_number_is_told_by_name() -> None:
    public = {
        f for m in (flash_attn, liger, cut_cross_entropy) for f in map(vars(m).get, m.__all__)
    }
    assert public == {*CALLS, liger.CrossEntropyOutput}
    seen = set()
    for function, (args, then) in CALLS.items():
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            kinds = str(parameter.annotation).split(" | ")
            if name in HINTS or not {"int", "float"}.intersection(kinds):
                continue
            given = dict(zip(parameters, args, strict=False))
            for wrong in ("0.1", [1], object()):
                # a function refuses any other value of what it does not support with a ValueError
                with pytest.raises((TypeError, ValueError), match=rf"^{name}\b") as raised:
                    call(function, given | {name: wrong}, then)
                assert raised.type is TypeError or name in ("softcap", "checkpoint_lvl"), name
            seen.add(name)
            if "None" in kinds:
                call(function, given | {name: None}, then)
    assert {"softmax_scale", "dropout_p", "eps", "max_seqlen", "label_smoothing", "shift"} <= seen


def test_numbers_of_other_kinds_are_taken() -> None:
    """As torch takes them: numpy's, and tensors of one element."""
    expected = flash_attn.flash_attn_func(Q, Q, Q, softmax_scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        found = flash_attn.flash_attn_func(Q, Q, Q, softmax_scale=scale)  # type: ignore[arg-type]
        assert torch.equal(found, expected)
    assert torch.equal(
        flash_attn.flash_attn_func(Q, Q, Q, softmax_scale=1),
        flash_attn.flash_attn_func(Q, Q, Q, softmax_scale=1.0),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention_probabilities(causal: bool, dropout: float) -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 8)
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": causal, "dropout_p": dropout}
    square = torch.stack([k, k, v], 2)
    ends = torch.tensor([0, 5, 10]).int(), torch.tensor([0, 9, 18]).int()
    rows = [t.flatten(0, 1) for t in (q, k, v)]

    cases: list[tuple[Any, Any, tuple[Tensor, Tensor]]] = [
        (flash_attn.flash_attn_func, (q, k, v), (q, k)),
        (flash_attn.flash_attn_kvpacked_func, (q, torch.stack([k, v], 2)), (q, k)),
        (flash_attn.flash_attn_qkvpacked_func, (square,), (k, k)),
        (flash_attn.flash_attn_varlen_func, (*rows, *ends, 6, 10), (q, k)),
    ]
    for function, args, (a, b) in cases:
        torch.manual_seed(3)
        expected = function(*args, **options)
        torch.manual_seed(3)
        out, lse, seen = function(*args, **options, return_attn_probs=True)
        assert torch.equal(out, expected)
        scores = 0.3 * torch.einsum("bihd,bjhd->bhij", a, b)
        if causal:
            hidden = ~torch.ones(a.shape[1], 9, dtype=torch.bool).tril(9 - a.shape[1])
            scores = scores.masked_fill(hidden, -torch.inf)
        if function is flash_attn.flash_attn_varlen_func:
            assert lse.shape == (3, 10)
            assert seen.shape == (2, 3, 6, 10)
            assert not seen[:, :, 5:].any()
            assert not seen[..., 9:].any()
            lse = lse.unflatten(1, (2, 5)).transpose(0, 1)
            seen, out = seen[:, :, :5, :9], out.unflatten(0, (2, 5))
        torch.testing.assert_close(lse, scores.logsumexp(-1))
        torch.testing.assert_close(seen.abs(), scores.softmax(-1))
        assert (seen.signbit().float().mean() > 0.2) == (dropout > 0)
        kept = seen.masked_fill(seen.signbit(), 0) / (1 - dropout)
        torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", ["int", "alike", "different", "rows", "leftpad", "none"])
def test_cache(causal: bool, lengths: str) -> None:
    batch, capacity, new = 3, 12, 2
    k_cache, v_cache = torch.randn(2, 5, capacity, 2, 8)
    if lengths != "rows":
        k_cache, v_cache = k_cache[:batch].clone(), v_cache[:batch].clone()
    q, k, v = torch.randn(3, batch, new, 2, 8).requires_grad_()
    filled = {"different": [4, 7, 0], "rows": [4, 7, 9], "leftpad": [6, 6, 6], "none": [0] * 3}.get(
        lengths, [5, 5, 5]
    )
    rows = [4, 0, 2] if lengths == "rows" else [0, 1, 2]
    begins = [2, 0, 5] if lengths == "leftpad" else [0, 0, 0]
    options: dict[str, Any] = {"causal": causal, "softmax_scale": 0.4}
    if lengths != "none":
        options["cache_seqlens"] = 5 if lengths == "int" else torch.tensor(filled).int()
    if lengths == "rows":
        options["cache_batch_idx"] = torch.tensor(rows).int()
    if lengths == "leftpad":
        options["cache_leftpad"] = torch.tensor(begins).int()
    before = k_cache.clone(), v_cache.clone()
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    assert not out.requires_grad
    for i, (row, length, begin) in enumerate(zip(rows, filled, begins, strict=True)):
        keys, values = (c[row].clone() for c in before)
        keys[length : length + new], values[length : length + new] = k[i].detach(), v[i].detach()
        assert torch.equal(k_cache[row], keys)
        assert torch.equal(v_cache[row], values)
        seen = slice(begin, length + new)
        expected = attend(q[i : i + 1].detach(), keys[None, seen], values[None, seen], causal, 0.4)
        torch.testing.assert_close(out[i : i + 1], expected)


def test_cache_without_new_keys_and_wrong_lengths() -> None:
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 6, 2, 8)
    with_cache = flash_attn.flash_attn_with_kvcache
    torch.testing.assert_close(with_cache(q, cache, cache), attend(q, cache, cache, False))
    some = with_cache(q, cache, cache, cache_seqlens=4)
    torch.testing.assert_close(some, attend(q, cache[:, :4], cache[:, :4], False))
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("cache_seqlens", {"cache_seqlens": 7}),
        ("cache_seqlens", {"cache_seqlens": 6, "k": q, "v": q}),
        ("cache_leftpad", {"cache_seqlens": 2, "cache_leftpad": torch.tensor([3, 0])}),
        ("cache_batch_idx", {"cache_batch_idx": torch.tensor([0, 2])}),
        ("k and v", {"k": q}),
        ("v must", {"k": q, "v": q[:, :, :1]}),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            with_cache(q, cache, cache, **options)
    with pytest.raises(TypeError, match="cache_seqlens"):
        with_cache(q, cache, cache, cache_seqlens=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_layer_norm(dtype: torch.dtype, residual: bool, centred: bool) -> None:
    inputs = {"x": torch.randn(3, 5, 24), "weight": torch.randn(24), "bias": torch.randn(24)}
    if residual:
        inputs["residual"] = torch.randn(3, 5, 24)

    def both(**given: Any) -> Any:
        return flash_attn.layer_norm_fn(**given, prenorm=True, zero_centered_weight=centred)

    assert_accurate(both, inputs, dtype=dtype)
    y, total = both(**inputs)
    expected = inputs["x"] + inputs.get("residual", 0)
    torch.testing.assert_close(total, expected)
    weight = inputs["weight"] + (1 if centred else 0)
    torch.testing.assert_close(y, F.layer_norm(expected, (24,), weight, inputs["bias"], 1e-6))


def test_layer_norm_dtypes_rowscale_and_dropout() -> None:
    x, ones = torch.randn(4, 24).bfloat16(), torch.ones(24)
    for residual, fp32, wanted in (
        (None, False, torch.bfloat16),
        (None, True, torch.float32),
        (torch.randn(4, 24), False, torch.float32),
        (torch.randn(4, 24).bfloat16(), True, torch.bfloat16),
    ):
        y, total = flash_attn.layer_norm_fn(
            x, ones, None, residual, prenorm=True, residual_in_fp32=fp32
        )
        assert (y.dtype, total.dtype) == (torch.bfloat16, wanted)
    wide = flash_attn.layer_norm_fn(x, ones, None, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    scale = torch.tensor([0.0, 1.0, 2.0, -1.0])
    _, total = flash_attn.layer_norm_fn(x.float(), ones, None, rowscale=scale, prenorm=True)
    torch.testing.assert_close(total, x.float() * scale[:, None])
    _, total = flash_attn.layer_norm_fn(torch.ones(50, 24), ones, None, dropout_p=0.5, prenorm=True)
    assert set(total.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("rowscale", [False, True])
@pytest.mark.parametrize("residual", ["none", "fp32", "given"])
@pytest.mark.parametrize("dropout", [0.0, 0.27, 1.0])
def test_layer_norm_gives_its_dropout_mask(
    dropout: float, residual: str, rowscale: bool, prenorm: bool
) -> None:
    x, weight, bias = torch.randn(3, 50, 24), torch.randn(24), torch.randn(24)
    inputs = {"x": x, "weight": weight, "bias": bias}
    if residual == "given":
        inputs["residual"] = torch.randn(3, 50, 24)
    for tensor in inputs.values():
        tensor.requires_grad_()
    scale = torch.randn(3, 50) if rowscale else None
    options: dict[str, Any] = {"rowscale": scale, "dropout_p": dropout, "prenorm": prenorm}
    options["residual_in_fp32"] = residual == "fp32"
    torch.manual_seed(3)
    without = flash_attn.layer_norm_fn(**inputs, **options)
    torch.manual_seed(3)
    *found, mask, other = flash_attn.layer_norm_fn(**inputs, **options, return_dropout_mask=True)
    assert other is None
    assert len(found) == 1 + prenorm
    assert all(map(torch.equal, found, without if prenorm else [without]))
    if dropout:
        assert (mask.shape, mask.dtype) == (x.shape, torch.bool)
        # four standard deviations of the mean of 3600 throws
        assert (
            abs(mask.double().mean() - (1 - dropout)) <= 4 * (dropout * (1 - dropout) / 3600) ** 0.5
        )
    else:
        assert mask is None

    def plain(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and the gradients of all inputs, with the mask that was thrown."""
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        kept = leaves["x"] if scale is None else leaves["x"] * scale[..., None].to(dtype)
        if dropout:
            kept = kept.masked_fill(~mask, 0.0) / (1 - dropout) if dropout < 1 else 0 * kept
        total = kept + leaves["residual"] if residual == "given" else kept
        y = F.layer_norm(total, (24,), leaves["weight"], leaves["bias"], 1e-6)
        outputs = [y, total][: len(found)]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), [part.to(dtype) for part in upstream]
        )
        return outputs, list(gradients)

    upstream = [torch.randn(3, 50, 24) for _ in found]
    ours = found, list(torch.autograd.grad(found, list(inputs.values()), upstream))
    # rows of zeros have the gradient 0 times 1 / sqrt(eps): there only the outputs are compared
    kinds = 1 if dropout == 1.0 and residual != "given" else 2
    for measured, expected, truth in list(
        zip(ours, plain(torch.float32), plain(torch.float64), strict=True)
    )[:kinds]:
        for place, parts in enumerate(zip(measured, expected, truth, strict=True)):
            compare(f"{residual}, {place}", *parts)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("square", [0.0, 0.02])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_cross_entropy(smoothing: float, square: float, scale: float) -> None:
    logits = (4 * torch.randn(6, 37)).requires_grad_()
    labels = torch.tensor([0, 5, -100, 36, 7, -100])
    losses, z = flash_attn.cross_entropy_loss(
        logits, labels, None, smoothing, scale, square, inplace_backward=False
    )
    lse_square = square * (logits * scale).logsumexp(-1).square() * (labels != -100)
    expected = lse_square + F.cross_entropy(
        logits * scale, labels, reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(z, lse_square.detach())
    assert not z.requires_grad
    torch.testing.assert_close(
        *(torch.autograd.grad(each.sum(), logits)[0] for each in (losses, expected))
    )
    for reduction in ("mean", "sum", "none"):
        module = flash_attn.CrossEntropyLoss(
            reduction=reduction,
            label_smoothing=smoothing,
            logit_scale=scale,
            lse_square_scale=square,
            return_z_loss=True,
        )
        pair = module(logits, labels)
        for ours, rows in zip(pair, (expected, lse_square), strict=True):
            wanted = {"mean": rows.sum() / 4, "sum": rows.sum(), "none": rows}[reduction]
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scaled_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = (4 * torch.randn(6, 37)).to(dtype), torch.tensor([0, 5, -100, 36, 7, -100])
    losses, z = flash_attn.cross_entropy_loss(
        logits, labels, logit_scale=0.7, lse_square_scale=1e-2
    )
    wide = 0.7 * logits.double()
    square = 1e-2 * wide.logsumexp(-1).square() * (labels != -100)
    truth = F.cross_entropy(wide, labels, reduction="none") + square
    for found, true in ((losses, truth), (z, square)):
        # eight roundings of fp32 at the size of the largest logit, 16
        torch.testing.assert_close(found.double(), true, rtol=0, atol=8 * 2**-20)


@pytest.mark.parametrize("view", [False, True])
def test_a_leaf_is_not_overwritten(view: bool) -> None:
    leaf = torch.randn(6, 37).requires_grad_()
    before, labels = leaf.detach().clone(), torch.randint(37, (6,))
    logits = leaf.view(6, 37) if view else leaf
    losses, _ = flash_attn.cross_entropy_loss(logits, labels, inplace_backward=True)
    losses.sum().backward()
    assert torch.equal(leaf.detach(), before)
    inner = before.clone().requires_grad_()
    F.cross_entropy(inner, labels, reduction="sum").backward()
    torch.testing.assert_close(leaf.grad, inner.grad)
    logits = leaf * 1
    flash_attn.cross_entropy_loss(logits, labels, inplace_backward=True)[0].sum().backward()
    torch.testing.assert_close(logits.detach(), inner.grad)  # which is what it is for


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("square", [0.0, 0.02])
def test_liger_losses(reduction: str, square: float) -> None:
    x, weight = torch.randn(6, 16).requires_grad_(), torch.randn(37, 16).requires_grad_()
    labels = torch.tensor([0, 5, -100, 36, 7, -100])
    logits = x @ weight.t()
    lse_square = square * logits.logsumexp(-1).square() * (labels != -100)
    rows = lse_square + F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    reduce = {"mean": lambda r: r.sum() / 4, "sum": lambda r: r.sum(), "none": lambda r: r}
    options: dict[str, Any] = {
        "lse_square_scale": square,
        "label_smoothing": 0.1,
        "reduction": reduction,
        "return_z_loss": True,
    }
    expected = reduce[reduction](rows)
    gradients = torch.autograd.grad(expected.sum(), [x, weight], retain_graph=True)
    plain = liger.LigerCrossEntropyLoss(**options)(logits, labels)
    fused = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, x, labels)
    for output in (plain, fused):
        assert output.token_accuracy is output.predicted_tokens is None
        loss, z = output.loss, output.z_loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(z, reduce[reduction](lse_square).detach())
        found = torch.autograd.grad(loss.sum(), [x, weight], retain_graph=True)
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_liger_loss_has_the_dtype_of_the_logits(softcap: float | None) -> None:
    logits = 3 * torch.randn(6, 37).bfloat16()
    labels = torch.tensor([0, 5, -100, 36, 7, -100])
    wide = logits.double()
    if softcap:
        wide = softcap * torch.tanh(wide / softcap)
    for reduction in ("mean", "sum", "none"):
        output = liger.LigerCrossEntropyLoss(
            reduction=reduction, softcap=softcap, lse_square_scale=1e-3, return_z_loss=True
        )(logits, labels)
        loss, z = output.loss, output.z_loss
        assert loss.dtype == z.dtype == torch.bfloat16
        square = 1e-3 * wide.logsumexp(-1).square() * (labels != -100)
        rows = F.cross_entropy(wide, labels, reduction="none") + square
        for found, parts in ((loss, rows), (z, square)):
            truth = {"mean": parts.sum() / 4, "sum": parts.sum(), "none": parts}[reduction]
            # bf16's numbers stand 2^-7 apart: half of it; before, 8 roundings of fp32 up to 8.
            torch.testing.assert_close(found.double(), truth, rtol=2**-8, atol=64 * 2**-24)


def test_liger_softcap_and_norm() -> None:
    logits, labels = 40 * torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    capped = liger.LigerCrossEntropyLoss(softcap=30.0)(logits, labels)
    torch.testing.assert_close(capped, F.cross_entropy(30 * torch.tanh(logits / 30), labels))
    norm = liger.LigerLayerNorm(24, bias=True)
    assert list(norm.state_dict()) == ["weight", "bias"]
    x = torch.randn(3, 24)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (24,), norm.weight, norm.bias, 1e-6))
    assert liger.LigerLayerNorm(4, init_fn="zeros").weight.sum() == 0
    with pytest.raises(ValueError, match="init_fn"):
        liger.LigerLayerNorm(4, init_fn="twos")


@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cut_cross_entropy(shift: bool | int, reduction: str) -> None:
    e, c, labels = torch.randn(2, 7, 16), torch.randn(37, 16), torch.randint(37, (2, 7))
    ours = cut_cross_entropy.linear_cross_entropy(e, c, labels, reduction=reduction, shift=shift)
    n = int(shift)
    logits = (e[:, : 7 - n] @ c.t()).transpose(1, 2)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels[:, n:], reduction=reduction))


def test_fused_mlp() -> None:
    mlp = flash_attn.FusedMLP(12, 40, 20, bias1=False, return_residual=True)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc2.weight", "fc2.bias"]
    x = torch.randn(2, 3, 12)
    y, kept = mlp(x)
    assert kept is x
    torch.testing.assert_close(y, mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))
    assert isinstance(flash_attn.FusedMLP(8).fc1, nn.Linear)
    assert flash_attn.FusedMLP(8, dtype=torch.bfloat16).fc2.weight.shape == (8, 32)
