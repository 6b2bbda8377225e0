"""AdamW for a whole model in one kernel call, with gradient clipping fused in."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from gpt2fast.functional import adamw_, global_norm
from gpt2fast.ops.adamw.reference import moment_dtype

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) as torch.optim.AdamW, with clipping by the global norm.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups. float32, bfloat16, float16.
        lr: a float or a one-element tensor.
        betas, eps, weight_decay: as for torch.optim.AdamW.
        max_norm: clip the gradient's global norm to this, as torch.nn.utils.clip_grad_norm_ over
            all parameters before the step would, but within the update: gradients are read, not
            written. ``float("inf")`` measures the norm without clipping; None does neither.

    Moments are fp32 beside half-precision parameters and have the parameters' dtype otherwise.
    ``state_dict`` has the layout of torch.optim.AdamW: either can load the other's.

    A gradient that is not finite is treated as torch does: it spreads into the parameters. Look at
    :attr:`grad_norm` where that must not go unseen; it is not finite then.

    >>> import gpt2fast.optim, torch
    >>> model = torch.nn.Linear(4, 4)
    >>> optimizer = gpt2fast.optim.AdamW(model.parameters(), lr=6e-4, max_norm=1.0)
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
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        self.max_norm = max_norm
        self.grad_norm = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options are checked.

        Raises:
            ValueError: an option is out of range.
            TypeError: a parameter is complex.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

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
        groups = [
            (group, {p: p.grad for p in group["params"] if p.grad is not None})
            for group in self.param_groups
        ]
        grads = [g for _, found in groups for g in found.values()]
        if any(g.is_sparse for g in grads):
            raise RuntimeError("gpt2fast.optim.AdamW does not support sparse gradients")
        scale = None
        if self.max_norm is not None:
            self.grad_norm = global_norm(grads)
            scale = (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for group, found in groups:
            for number, same in self._by_step(found).items():
                states = [self.state[p] for p in same]
                adamw_(
                    same,
                    [found[p] for p in same],
                    *([state[name] for state in states] for name in MOMENTS),
                    step=number,
                    lr=float(group["lr"]),
                    beta1=float(group["betas"][0]),
                    beta2=float(group["betas"][1]),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=scale,
                )
        return loss

    def _by_step(self, params: Iterable[Tensor]) -> dict[float, list[Tensor]]:
        """Counts the step for each parameter; those at the same step are updated together."""
        found: dict[float, list[Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(p, dtype=moment_dtype(p))
            state["step"] += 1
            found.setdefault(float(state["step"]), []).append(p)
        return found

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
                state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).cpu().clone()
                for name in MOMENTS:  # PyTorch rounds them to the parameter's dtype
                    if state[name].dtype != moment_dtype(p):
                        state[name] = saved[name].to(p.device, moment_dtype(p))


def _check_group(group: dict[str, Any]) -> None:
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
