"""A run of stage 2 and a batch of stage 1 on fake CUDA tensors: operations across devices raise, and waits are counted.

No GPU is needed, but a CUDA build of torch: ``just fake-gpu``. A fake tensor knows its shape, dtype and device and
nothing else. Autograd's engine asks the driver for its devices, so the backward pass is walked here, node by node; on
the CPU the walk gives the engine's gradients. Whatever makes the host wait for the GPU is counted, by line.

Legend: N positions, H width, V vocabulary.
"""

import itertools
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from logitcask.cache.labels import SoftLabels
from logitcask.pipeline.models.dense.rows import TeacherRows
from logitcask.pipeline.models.fused_loss import fused_loss
from logitcask.pipeline.models.head import LMHead
from logitcask.pipeline.models.losses import LossSettings
from logitcask.pipeline.teachers import transformers as engine
from logitcask.pipeline.train import loss as stage_2
from tests.benchmarks import loader as its_loader
from tests.gpu.correctness import TAILS, TEMPERATURES
from tests.support.exact import TRELLIS, random_head
from tests.support.tiny import make_cache

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
loader: Any = its_loader
STEPS = 3


def run_backward(
    outputs: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    *_: Any,
    **__: Any,
) -> tuple[Tensor | None, ...]:
    """Do in Python what autograd's engine does: leaves get gradients; those of ``inputs`` are returned."""
    root: Any = outputs[0].grad_fn
    nodes, waiting = [root], Counter[int]()
    known = {id(root)}
    for node in nodes:
        for child, _at in node.next_functions:
            waiting[id(child)] += 1
            if child is not None and id(child) not in known:
                known.add(id(child))
                nodes.append(child)
    sums = {id(root): {0: torch.ones_like(outputs[0]) if seeds[0] is None else seeds[0]}}
    leaves: dict[int, Tensor | None] = {}
    ready = [root]
    with torch.set_grad_enabled(create_graph):
        while ready:
            node = ready.pop()
            own: dict[int, Any] = sums.pop(id(node), {})
            if hasattr(node, "variable"):
                leaves[id(node.variable)] = own.get(0)
                if own and not inputs:
                    node.variable.grad = own[0] if node.variable.grad is None else node.variable.grad + own[0]
                continue
            for (child, at), grad in zip(node.next_functions, _apply(node, own), strict=False):
                if child is not None and grad is not None:
                    meta, at_child = child._input_metadata[at], sums.setdefault(id(child), {})
                    fitting = grad.sum_to_size(tuple(meta.shape)).to(meta.dtype)
                    at_child[at] = at_child[at] + fitting if at in at_child else fitting
                waiting[id(child)] -= 1
                if child is not None and not waiting[id(child)]:
                    ready.append(child)
    return tuple(leaves.get(id(tensor)) for tensor in inputs)


def _apply(node: Any, own: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of what went into a node, from those of what came out of it."""
    if not own:
        return [None] * len(node.next_functions)
    given = [own.get(i) for i in range(len(node._input_metadata))]
    found: Any = (node.apply if isinstance(node, BackwardCFunction) else node)(*given)
    return found if isinstance(found, tuple | list) else (found,)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, by line, what makes the host wait for the GPU, and gives numbers that nobody knows as 1."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func in (aten._local_scalar_dense.default, aten.item.default) and isinstance(first, FakeTensor):
            self._note("a number to the host", first.device == GPU)
            return True if first.dtype == torch.bool else 1.0 if first.is_floating_point() else 1
        if func is aten.nonzero.default and isinstance(first, FakeTensor):
            self._note("how many are true to the host", first.device == GPU)
            return torch.zeros(first.numel(), first.dim(), dtype=torch.int64, device=first.device)  # as if all were
        found = func(*args, **kwargs)
        if isinstance(found, Tensor) and first is not None and found.device != first.device:
            blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2] is True)
            self._note("a copy to the host" if first.device == GPU else "a blocking copy to the GPU", blocks)
        return found

    def _note(self, what: str, waits: bool) -> None:
        if not waits:
            return
        frames = traceback.extract_stack()
        ours = [f for f in frames if ROOT in Path(f.filename).parents and f.filename != __file__] or frames[-4:-3]
        place = Path(ours[-1].filename)
        where = place.relative_to(ROOT) if ROOT in place.parents else place.name
        self.counts[f"{where}:{ours[-1].lineno}: {what}"] += 1


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Within it, tensors are fake, the backward pass is walked, and waits are counted."""

    def numpy(tensor: Tensor, **_: Any) -> Any:
        with unset_fake_temporarily():
            return np.zeros(tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).numpy().dtype)

    def head_of(model: Any) -> LMHead:
        return LMHead(model.get_output_embeddings().weight, None, 1.0, None)  # read_head looks at numbers

    fakes: Any = (
        (FakeTensor, "numpy", numpy),
        (FakeTensor, "tolist", lambda tensor: numpy(tensor.cpu()).tolist()),
        (torch.autograd, "_engine_run_backward", run_backward),
        (stage_2, "read_head", head_of),
        (engine, "read_head", head_of),
        (transformers.PreTrainedModel, "to", lambda model, *given, **named: model),  # made on the GPU
        (transformers.TrainingArguments, "device", property(lambda arguments: (arguments._setup_devices, GPU)[1])),
    )
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in fakes]
    for owner, name, value in fakes:
        setattr(owner, name, value)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
            yield waits
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is None else setattr(owner, name, value)


def loss_waits() -> Counter[str]:
    """Return the waits of the loss, forward and backward, over all it can be asked for."""
    n, vocab, width = 64, 300, 32
    with fake_gpu() as waits, torch.device(GPU):
        labels = SoftLabels(torch.randint(vocab, (n, 32)), torch.rand(n, 32), -torch.rand(n, 32), -torch.rand(n), 8)
        gold, teacher = torch.randint(vocab, (n,)), torch.randn(n, width)
        for (tail, divergence), t, dtype in itertools.product(TAILS, TEMPERATURES, (torch.float32, torch.bfloat16)):
            tensors = [
                torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((n, width), (vocab, width), (vocab,))
            ]
            head = LMHead(tensors[1], tensors[2], 0.5, 5.0)
            rows = TeacherRows(teacher.to(dtype), LMHead(tensors[1].detach(), None, 1.0, None), vocab)
            how = LossSettings(0.4, t, tail, divergence)
            for target in (labels, rows, None):
                torch.autograd.backward(fused_loss(tensors[0], head, gold, target, how).total)
            assert all(x.grad is not None and x.grad.device == GPU and x.grad.dtype == dtype for x in tensors)
    return waits.counts


def training_waits(cache: Path, folder: Path, steps: int) -> Counter[str]:
    """Return the waits of a run of the Trainer that ``logitcask train`` has, of some steps, which logs once."""
    make, loader.STEPS["tiny"] = loader.student_from_config, steps

    def student(*given: Any) -> Any:
        with torch.device(GPU):
            return make(*given)

    loader.student_from_config = student
    try:
        with fake_gpu() as waits:
            trainer, _ = loader.trainer_of("tiny", str(cache), str(folder), 0, kept=False)
            for state in (PartialState, AcceleratorState):
                state._shared_state["device"] = GPU
            trainer.args.dataloader_pin_memory = True  # as on a machine with a GPU
            waits.counts.clear()
            trainer.train()
            assert all(p.grad is None and p.device == GPU for p in trainer.model.parameters())
    finally:
        loader.student_from_config = make
    return waits.counts


def labelling_waits(*, exact: bool = False) -> Counter[str]:
    """Return the waits of a batch of stage 1, of sparse labels or of exact ones."""
    from tests.gpu.stages import as_teacher, label_settings, random_batch

    with fake_gpu() as waits:
        with torch.device(GPU):
            model = loader.student_from_config(Path("tiny"), 49_152)
        teacher = as_teacher(model, GPU, torch.float32)
        label = label_settings(49_152)
        if exact:
            width = model.config.hidden_size
            teacher.use_head(random_head(vocabulary=49_152, width=width))
            code = TRELLIS.model_copy(update={"width": width})
            label = label.model_copy(update={"exact": code})  # with draws: a fake tensor of none asks the driver
        waits.counts.clear()
        teacher.label(random_batch(2, 128, 49_152), label)
    return waits.counts


def main() -> None:
    """Print the waits of a loss, an optimizer step, and a batch of stage 1."""
    with tempfile.TemporaryDirectory() as place:
        cache = make_cache(Path(place))
        once, more = (training_waits(cache, Path(place, str(n)), n) for n in (STEPS, 2 * STEPS))
        per_step = Counter({line: (more[line] - once[line]) / STEPS for line in more if more[line] > once[line]})
        for title, counts in {
            "the loss, forward and backward, every tail": loss_waits(),
            "an optimizer step of the Trainer": per_step,
            "the rest of a run": once - Counter({line: round(STEPS * n) for line, n in per_step.items()}),
            "a batch of stage 1, 254 positions": labelling_waits(),
            "the same of exact labels": labelling_waits(exact=True),
        }.items():
            print(f"{title}: {sum(counts.values()):g} waits of the host for the GPU")
            for line, count in counts.most_common():
                print(f"  {count:g} x {line}")


if __name__ == "__main__":
    if torch.version.cuda is None:
        sys.exit("this needs a CUDA build of torch: just fake-gpu")
    main()
