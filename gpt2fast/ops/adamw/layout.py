"""How tensors lie in memory: kernels take them as plain runs of elements, in any one order."""

from collections.abc import Sequence

from torch import Tensor


def same_order(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors' elements lie in memory without gaps and in one order."""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    return is_dense(first) and all(t.stride() == first.stride() for t in tensors)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie in memory without gaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(d for d in dimensions if d[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Aligned:
    """Lists of tensors, of which `written` ones are results, in one order without gaps.

    Tensors that already are (all, as a rule) are taken as they are; others are copied, and results
    copied back by :meth:`finish`. `row_major`: no other order is.
    """

    def __init__(
        self,
        lists: Sequence[Sequence[Tensor]],
        written: Sequence[bool],
        row_major: bool = False,
    ) -> None:
        self.lists = lists
        self._back: list[tuple[Tensor, Tensor]] = []
        if all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists):
            return
        found = []
        for tensors in zip(*lists, strict=True):
            used = tensors
            if row_major or not same_order(tensors):  # contiguous ones are not copied
                used = tuple(t.contiguous() for t in tensors)
                self._back += [
                    (old, new)
                    for old, new, back in zip(tensors, used, written, strict=True)
                    if back and old is not new
                ]
            found.append(used)
        self.lists = list(zip(*found, strict=True))

    def finish(self) -> None:
        """Copies results back."""
        for old, new in self._back:
            old.copy_(new)
