"""AdamW for a whole model in one kernel call, with gradient clipping fused in."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from gpt2fast.functional import global_norm
from gpt2fast.ops.adamw.functional import check_adamw, run_adamw, run_global_norm
from gpt2fast.ops.adamw.reference import moment_dtype
from gpt2fast.ops.registry import PLAIN_TYPES

MOMENTS = ("exp_avg", "exp_avg_sq")
HALF = (torch.bfloat16, torch.float16)


class AdamW(torch.optim.Optimizer):
    """AdamW as torch.optim.AdamW, with clipping by the global norm.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
    https://arxiv.org/abs/1711.05101.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups. float32, bfloat16, float16.
        lr: a float or a one-element tensor.
        betas, eps, weight_decay: as for torch.optim.AdamW.
        max_norm: clip the gradient's global norm to this, as torch.nn.utils.clip_grad_norm_ over
            all parameters before the step would, but within the update: gradients are read, not
            written. ``float("inf")`` measures the norm without clipping; None does neither.
        master_weights: keep an fp32 copy of each half-precision parameter, ``state["master"]``, on
            which steps are taken; the parameter is the copy rounded. Without it bfloat16 loses
            updates below 1/256 of a value. A parameter that is written from outside after the
            first step is overwritten by its master at the next.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that the mean is the
            exact value and small updates add up without the memory of a master. The random bits
            depend on the step, the parameter's place among those of its group that have a gradient,
            and the element within this process's part: a resumed run repeats them, and processes
            that hold the same parameters agree. float32 parameters are as without.
        capturable: nothing is read on the host, so that a step can be captured in a CUDA graph
            (take one before): ``state["step"]`` lies on the parameter's device, and `lr` may be a
            scalar tensor there, to be changed between replays.

    Moments are fp32 beside half-precision parameters and have the parameters' dtype otherwise.
    ``state_dict`` has the layout of torch.optim.AdamW: either can load the other's. Masters that a
    loaded state lacks are made from the parameters at the next step.

    Parameters, gradients and state may be DTensors, as under FSDP2 (``fully_shard``): each process
    updates its own part, and the norm is that of the whole, the same on all.

    A gradient that is not finite is treated as torch does: it spreads into the parameters. Look at
    :attr:`grad_norm` where that must not go unseen; it is not finite then.

    Raises:
        ValueError: an option out of its range.
        RuntimeError: at a step: a sparse gradient, or a CUDA graph captured without `capturable`.

    >>> model = torch.nn.Linear(4, 4)
    >>> optimizer = gpt2fast.optim.AdamW(model.parameters(), lr=6e-4, max_norm=1.0)
    >>> model(torch.ones(4)).sum().backward()
    >>> optimizer.step()
    >>> f"{optimizer.grad_norm.item():.4f}"  # sqrt(20): 16 weights and 4 biases with gradient 1
    '4.4721'
    """

    #: The global norm of the last step's gradients before clipping, an fp32 scalar tensor; None
    #: before the first step and where max_norm is None.
    grad_norm: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        if master_weights and stochastic_rounding:
            raise ValueError("master_weights lose nothing that stochastic_rounding could keep")
        self.max_norm = max_norm
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.capturable = capturable
        self.grad_norm = None
        self._counters: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._seeds: dict[tuple[int, torch.device], Tensor] = {}
        self._checked: dict[tuple[int, bool], list[list[Tensor]]] = {}
        self._measured: list[Tensor] = []
        self._known_norm = False
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_norm", "master_weights", "stochastic_rounding", "capturable", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("stochastic_rounding", False)  # in pickles there may be none
        self.__dict__.setdefault("_seeds", {})
        super().__setstate__(state)
        self._counters, self._checked, self._measured = {}, {}, []
        self._known_norm = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options are checked.

        Raises:
            ValueError: an option is out of range.
            TypeError: a parameter is complex, or float16 beside stochastic rounding.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], self.stochastic_rounding)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def measure(self) -> Tensor | None:
        """:attr:`grad_norm` of the gradients as they are, for a look before the update.

        The next step does not measure again. To skip it call `zero_grad` and nothing else: the
        parameters and their state are untouched. None where max_norm is None.
        """
        if self.max_norm is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            self._measure([p for p in params if p.grad is not None])
            self._known_norm = True
        return self.grad_norm

    def _measure(self, params: list[Tensor]) -> None:
        grads = [g for p in params if (g := p.grad) is not None]
        measure = run_global_norm if grads and _identical(self._measured, params) else global_norm
        self.grad_norm = (
            measure(grads) if PLAIN_TYPES.issuperset(map(type, grads)) else _norm(grads)
        )
        self._measured = params

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch's."""
        self._known_norm = False
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients in ``.grad``; parameters without one are skipped.

        Args:
            closure: evaluates the model again and returns the loss, which this function returns.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        grads = [g for params in found for p in params if (g := p.grad) is not None]
        if any(g.is_sparse for g in grads):
            raise RuntimeError("gpt2fast.optim.AdamW does not support sparse gradients")
        if grads and grads[0].is_cuda and torch.cuda.is_current_stream_capturing():
            self._check_capture(found)
        scale = None
        if self.max_norm is not None:
            if not self._known_norm or closure is not None:
                self._measure([p for params in found for p in params])
            self._known_norm = False
            assert self.grad_norm is not None
            scale = (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for index, params in enumerate(found):
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                self._complete(p, state)
            for number, chosen in self._count(index, states):
                self._update(
                    index,
                    params if chosen is None else [params[i] for i in chosen],
                    states if chosen is None else [states[i] for i in chosen],
                    number,
                    scale,
                )
        return loss

    def _complete(self, p: Tensor, state: dict[str, Any]) -> None:
        """Gives a parameter's state what it lacks."""
        if not state:
            device = p.device if self.capturable else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(p, dtype=moment_dtype(p))
        if self.master_weights and "master" not in state and p.dtype in HALF:
            state["master"] = p.detach().float()

    def _count(
        self, index: int, states: list[dict[str, Any]]
    ) -> list[tuple[float | None, list[int] | None]]:
        """Counts the step of a group's parameters. Returns, for each number, the places of the
        parameters at it (None: all); the number is None where it lies on the device."""
        if not states:
            return []
        steps = [state["step"] for state in states]
        if self.capturable:
            torch._foreach_add_(steps, 1)
            return [(None, None)]
        # The counters are views of one tensor: one addition for all, where the same count again.
        counter, views = self._counters.get(index, (None, []))
        if counter is None or not _identical(views, steps):
            counter = torch.stack(steps)
            views = list(counter.unbind())
            self._counters[index] = counter, views
            for state, view in zip(states, views, strict=True):
                state["step"] = view
        counter += 1
        numbers = counter.tolist()
        if len(set(numbers)) == 1:
            return [(numbers[0], None)]
        return [
            (number, [i for i, n in enumerate(numbers) if n == number])
            for number in dict.fromkeys(numbers)
        ]

    def _update(
        self,
        index: int,
        params: list[Tensor],
        states: list[dict[str, Any]],
        number: float | None,
        scale: Tensor | None,
    ) -> None:
        """Updates parameters of one group that are at one step; those with masters by themselves."""
        group = self.param_groups[index]
        lr = group["lr"] if self.capturable else float(group["lr"])
        if isinstance(lr, Tensor) and lr.dim():
            lr = lr.reshape(())
        scalars = (*map(float, group["betas"]), group["eps"], group["weight_decay"])
        with_master = [i for i, p in enumerate(params) if p.dtype in HALF]
        if not self.master_weights or not with_master:
            parts = [(params, states, False)]
        elif len(with_master) == len(params):
            parts = [(params, states, True)]
        else:
            rest = [i for i, p in enumerate(params) if p.dtype not in HALF]
            parts = [
                ([params[i] for i in of], [states[i] for i in of], mastered)
                for of, mastered in ((with_master, True), (rest, False))
            ]
        seed = None
        if self.stochastic_rounding:  # a fixed one: processes with the same parameters must agree
            device = params[0].device
            if (seed := self._seeds.get((index, device))) is None:
                seed = torch.full((), index, dtype=torch.int64, device=device)
                self._seeds[index, device] = seed
        for some, theirs, mastered in parts:
            grads = [g for p in some if (g := p.grad) is not None]
            first, second = ([state[name] for state in theirs] for name in MOMENTS)
            masters = [state["master"] for state in theirs] if mastered else None
            steps = [state["step"] for state in theirs] if number is None else number
            # What was right at the last step still is; gradients fit by PyTorch's own rules.
            some, grads, first, second = map(_local, (some, grads, first, second))
            masters = None if masters is None else _local(masters)
            lists = [some, first, second, masters or []]
            known = self._checked.get((index, mastered))
            if known is None or not all(map(_identical, known, lists)):
                check_adamw(some, grads, first, second, masters, steps, lr, scale, seed)
                self._checked[index, mastered] = lists
            run_adamw(some, grads, first, second, masters, steps, lr, scale, seed, scalars)

    def _check_capture(self, found: list[list[Tensor]]) -> None:
        if not self.capturable:
            raise RuntimeError("a step in a CUDA graph needs AdamW(..., capturable=True)")
        seeded = not self.stochastic_rounding or self._seeds
        if not seeded or not all(self.state[p] for params in found for p in params):
            raise RuntimeError(
                "take a step before capturing one in a CUDA graph: the state of parameters is made"
                " at their first step"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of torch.optim.AdamW.

        Raises:
            ValueError: the state does not fit, or was made with amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the state was made with {option}=True, which is not offered")
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params, strict=True):
            if saved := state_dict["state"].get(i):
                state = self.state[p]
                count = torch.as_tensor(saved["step"], dtype=torch.float32)
                count = count.to(p.device if self.capturable else "cpu", copy=True)
                state["step"] = count.reshape(())
                kept = self.master_weights and p.dtype in HALF and "master" in saved
                if not kept:
                    state.pop("master", None)
                for name in (*MOMENTS, *(["master"] if kept else [])):
                    if state[name].dtype != moment_dtype(p):  # PyTorch has rounded it
                        state[name] = saved[name].to(p.device, moment_dtype(p))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's part of tensors that are shared out; plain ones as they are."""
    if PLAIN_TYPES.issuperset(map(type, tensors)):
        return tensors
    return [t.to_local() if isinstance(t, _dtensor()) else t for t in tensors]


def _norm(grads: list[Tensor]) -> Tensor:
    """The norm over all parts of gradients that are shared out, each part counted once."""
    parts: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for g in grads:
        key: tuple[Any, tuple[int, ...]] = (None, ())
        if isinstance(g, _dtensor()):
            if any(p.is_partial() for p in g.placements):
                raise RuntimeError(f"a gradient is not yet summed over processes: {g.placements}")
            sharded = (i for i, p in enumerate(g.placements) if not p.is_replicate())
            key = g.device_mesh, tuple(sharded)
        parts.setdefault(key, []).append(g)
    squares = []
    for (mesh, dims), some in parts.items():
        square = global_norm(_local(some)).double().square()  # in fp64 no fp32 norm overflows
        for dim in dims:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return torch.stack(squares).sum().sqrt().float()


@functools.cache
def _dtensor() -> type[Any]:
    from torch.distributed.tensor import DTensor  # slow to import, and not in every build

    return DTensor


def _identical(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _check_group(group: dict[str, Any], stochastic_rounding: bool) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got {tuple(lr.shape)}")
    for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    for name, value in (("betas[0]", beta1), ("betas[1]", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"parameters must be floating point, got {p.dtype}")
        if stochastic_rounding and p.dtype == torch.float16:
            raise TypeError(f"stochastic_rounding is for bfloat16 parameters, got {p.dtype}")
