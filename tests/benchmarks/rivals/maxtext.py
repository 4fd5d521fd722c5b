"""MaxText by its own code: the loss of its offline distillation, compiled by JAX, whose gradient goes on in PyTorch.

Its loss is taken from its file without the imports of its trainer. It trains JAX models on accelerators: what a step of
it costs, and its store, which needs TensorFlow, are not measured here.
"""

import ast
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray
from tests.benchmarks.rivals.systems import Add, Batch, Loss, Read, System, Text, commit_of

TOP = 128
FILE = "src/maxtext/trainers/post_train/distillation/distillation_utils.py"
NEEDED = ("DistillationForwardOutput", "DistillationStrategy", "CombinedDistillationStrategy", "compute_schedule")
ValueAndGrad = Callable[..., tuple[Any, Any]]  # of logits (B, N, V)


def load(checkout: Path, text: Text) -> System:
    """Return MaxText with its defaults, and with its soft loss alone, at T=1."""
    parts, top = its_code(checkout / FILE), min(TOP, text.vocabulary)

    @contextmanager
    def write(place: Path) -> Iterator[Add]:
        found: list[tuple[IntArray, Any, Any]] = []

        def add(ids: IntArray, logits: Tensor) -> None:
            most = logits.topk(top, dim=1)
            found.append((ids, most.values.numpy(), most.indices.numpy().astype(np.int32)))

        yield add
        ids, values, indices = (np.stack(each) for each in zip(*found, strict=True))
        np.savez(place / "windows.npz", ids=ids, values=values, indices=indices)

    def loss(name: str, alpha: float) -> Loss:
        value_and_grad = compiled(parts, text.vocabulary, alpha)

        def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
            logits = student(input_ids=batch["input_ids"]).logits[:, :-1, : text.vocabulary]
            given = batch["values"], batch["indices"], batch["input_ids"][:, 1:].numpy()
            found: Tensor = _FromJax.apply(logits, value_and_grad, given)  # type: ignore[no-untyped-call]
            return found

        return Loss(name, mean)

    losses = (loss("0.5 cross-entropy + 0.5 KL", 0.5), loss("KL alone", 1.0))
    return System("MaxText", "main", commit_of(checkout), losses, write=write, read=read)


def read(place: Path) -> Read:
    """Return batches of what ``write`` stored."""
    arrays = dict(np.load(place / "windows.npz"))

    def batch(numbers: IntArray) -> Batch:
        part = {name: array[numbers] for name, array in arrays.items()}
        return {"input_ids": torch.from_numpy(part.pop("ids")), **part}

    return batch


def its_code(file: Path) -> dict[str, Any]:
    """Return the classes of its loss by name, and the constants that they read."""
    wanted: list[ast.stmt] = [
        node
        for node in ast.parse(file.read_text()).body
        if (isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in NEEDED)
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    ]
    names: dict[str, Any] = {name: import_module(name) for name in ("abc", "flax", "jax", "optax")}
    names |= {"jnp": names["jax"].numpy, "np": np}
    names |= {name: getattr(typing, name) for name in typing.__all__}
    names["__name__"] = "maxtext_distillation"
    exec(compile(ast.Module(wanted, []), str(file), "exec"), names)  # noqa: S102  the point is to run their code
    return names


def compiled(parts: dict[str, Any], vocabulary: int, alpha: float) -> ValueAndGrad:
    """Return its loss and the gradient with respect to the student's logits."""
    jax, output = parts["jax"], parts["DistillationForwardOutput"]
    strategy = parts["CombinedDistillationStrategy"](
        student_forward_fn=None,
        teacher_forward_fn=None,
        pad_id=-1,
        temperature=1.0,
        alpha=alpha,
        vocab_size=vocabulary,
    )

    def loss(logits: Any, values: Any, indices: Any, gold: Any) -> Any:
        teacher = output(logits=values, top_k_indices=indices)
        return strategy.compute_loss(output(logits=logits), teacher, strategy.create_labels(gold))[0]

    found: ValueAndGrad = jax.jit(jax.value_and_grad(loss))
    return found


class _FromJax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value_and_grad: ValueAndGrad, given: tuple[Any, ...]) -> Tensor:
        """Return the loss of logits (B, N, V)."""
        value, grad = value_and_grad(logits.detach().numpy(), *given)
        ctx.grad = torch.from_numpy(np.array(grad))
        return torch.tensor(float(value))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the logits."""
        return grad * ctx.grad, None, None
