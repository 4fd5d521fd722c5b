"""Selective activation recomputation: on a CPU, a student's layers take less memory for a little more work.

On a CPU, matrix products are expensive and everything between them is cheap. So a layer saves its input and the
results of its products for the backward pass, which recomputes norms, rotary embeddings, activations and sums from the
same numbers by the same operations. Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost, section 3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError

_aten = torch.ops.aten
PRODUCTS = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten._grouped_mm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
Product = tuple[tuple[Tensor, ...], list[int]]  # its results, and their autograd versions


def keep_products_only(model: PreTrainedModel) -> bool:
    """Make a model's layers save only the results of products while training; return False if its class cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "context_fn": _contexts})
    except ValueError:  # the class does not support checkpointing
        return False
    return True


def require_checkpointing(model: PreTrainedModel) -> None:
    """Raise LogitcaskError if a model's class cannot recompute activations."""
    if not model.supports_gradient_checkpointing:
        raise LogitcaskError(
            f"--use-gradient-checkpointing: {type(model).__name__} does not support it: leave it out, or choose "
            "another student"
        )


def _contexts() -> tuple[Any, Any]:
    """Return the contexts of a layer's forward pass and of its recomputation."""
    saved: list[Product | None] = []
    return _SaveProducts(saved), _ReuseProducts(saved)


class _SaveProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Saves the results of all products but the last, which nothing in the layer needs again."""

    def __init__(self, saved: list[Product | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved = saved
        self._last: Product | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        if self._last is not None:
            self._saved.append(self._last)
        output = func(*args, **(kwargs or {}))
        results = output if isinstance(output, tuple) else (output,)
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # share versions
            self._last = tuple(result.detach() for result in results), [result._version for result in results]
        return output

    def __exit__(self, *error: Any) -> None:
        self._last = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class _ReuseProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Returns each saved result once instead of its product; recomputes those not saved or overwritten since."""

    def __init__(self, saved: list[Product | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved, self._next = saved, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and self._next < len(self._saved):
            product, self._saved[self._next] = self._saved[self._next], None
            self._next += 1
            if product is not None:
                results, versions = product
                if [result._version for result in results] == versions:
                    return results if len(results) > 1 else results[0]
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._next = 0
        return super().__enter__()  # type: ignore[no-untyped-call]
