"""Less memory for what a student's layers keep for the backward pass, on a CPU, for a little more work.

There a matrix product costs much and everything between two of them little. So a layer keeps its input and the
results of its products; norms, rotary embeddings, activations and sums are computed again in the backward pass, from
the same numbers by the same operations. Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost, section 3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

_aten = torch.ops.aten
PRODUCTS = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten._grouped_mm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
Product = tuple[tuple[Tensor, ...], list[int]]  # its results, and their versions


def keep_products_only(model: PreTrainedModel) -> bool:
    """Have the layers of a model in training keep the results of products only. False where its class cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "context_fn": _contexts})
    except ValueError:  # the class does not support checkpointing
        return False
    return True


def _contexts() -> tuple[Any, Any]:
    """What a layer's forward pass and its repetition run under."""
    kept: list[Product | None] = []
    return _Keep(kept), _Return(kept)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the results of all products but the last, which nothing in the layer needs again."""

    def __init__(self, kept: list[Product | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._last: Product | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        if self._last is not None:
            self._kept.append(self._last)
        found = func(*args, **(kwargs or {}))
        results = found if isinstance(found, tuple) else (found,)
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # one version for both
            self._last = tuple(result.detach() for result in results), [result._version for result in results]
        return found

    def __exit__(self, *error: Any) -> None:
        self._last = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class _Return(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the kept results, each once, in place of the products; computes those that were not kept or overwritten."""

    def __init__(self, kept: list[Product | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._next = kept, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and self._next < len(self._kept):
            kept, self._kept[self._next] = self._kept[self._next], None
            self._next += 1
            if kept is not None and [result._version for result in kept[0]] == kept[1]:
                return kept[0] if len(kept[0]) > 1 else kept[0][0]
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._next = 0
        return super().__enter__()  # type: ignore[no-untyped-call]
