"""The output head of a causal language model, hidden states to logits, separated so that it can run on chosen rows.

What a model does beside its head's product is measured, not read from its config: Granite divides logits by
``logits_scaling``, HyperCLOVA X multiplies them by it, MiniCPM3 divides hidden states by it; MPT ignores its
``logit_scale``.
Hidden states and raw logits of our choice are put in place of the model's own, in float32 whatever its dtype, up to
values that saturate any soft-cap; what arrives at the head and what comes out show the function itself.

Legend: N rows of hidden states, L probed tokens, H width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.long_rope import short_and_long_apart, short_length

SLICE_LOGITS = 1 << 24  # per matrix product: enough rows to run at full speed, 64 MiB in float32
CACHED_LOGITS = 1 << 19  # per chunk of a slice on a CPU: what its cache holds
EXACT = 1e-5  # relative difference allowed of what is measured in float32
PROBED = 8  # tokens
PACKED = (5, 9)  # tokens of two examples in a row
SAMPLED_ROWS = 512  # of the head, compared with the model's own logits


@dataclass(frozen=True)
class LMHead:
    """logits = cap * tanh(scale * (h W' + b) / cap), or scale * (h W' + b) without a soft-cap."""

    weight: Tensor  # (V, width)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """Return the logits (N, V) of hidden states (N, width), in the dtype of the weights.

        Those that are scaled or capped are in at least float32: near the cap, bfloat16 would round them to 1/8.
        If ``room`` is given, they are written to its first N rows: on a CPU, page faults in fresh memory, one per
        4 kB, would cost a tenth of the product's time.
        """
        out = None if room is None else room[: len(hidden)]
        if self.bias is None:
            raw = torch.mm(hidden, self.weight.t(), out=out)
        else:
            raw = torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.scale == 1.0 and self.softcap is None:
            return raw
        raw = raw if raw.dtype == torch.float64 else raw.float()
        if self.scale != 1.0:
            raw = raw.mul_(self.scale)
        if self.softcap is None:
            return raw
        capped = raw.div_(self.softcap).tanh_()
        return capped * self.softcap if capped.requires_grad else capped.mul_(self.softcap)  # autograd saves the tanh


def last_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Return the hidden states that a causal LM's head reads, shape (batch, length, width).

    ``position_ids`` has the shape of ``input_ids`` and restarts at 0 with each example packed in a row; see
    ``keeps_apart``. Given the ``lengths`` (batch,) of rows of one example each, whatever the model, a row's hidden
    states do not depend on how long the others are.
    """
    short = None if lengths is None else short_length(model)
    if lengths is not None and short is not None and input_ids.shape[1] > short:
        return short_and_long_apart(partial(last_hidden_states, model), input_ids, lengths, short)
    positions = {} if position_ids is None else {"position_ids": position_ids}
    hidden: Tensor = _body(model)(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
    return hidden


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many tokens a model takes. The embedding inside an adapter has no ``num_embeddings``."""
    return int(model.get_input_embeddings().weight.shape[0])


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative difference allowed of what a model computes in a dtype, or in autocast's."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _close(hidden: Tensor, expected: Tensor) -> bool:
    """Return whether hidden states are those expected, up to rounding."""
    allowed = _rounding(expected.dtype, expected.device)
    most = float(expected.abs().nan_to_num(0.0, posinf=0.0).max())
    return torch.allclose(hidden, expected, rtol=allowed, atol=allowed * most, equal_nan=True)


def _body(model: PreTrainedModel) -> torch.nn.Module:
    """Return a causal LM without its head. Llama 4's ``base_model`` is the whole model, for want of its prefix."""
    body: torch.nn.Module = model.base_model if model.base_model is not model else getattr(model, "model", model)
    if body is model:
        raise _not_supported(model, "its body and its head are one module")
    return body


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Return whether examples packed in one row, separated by position_ids, get the hidden states they get alone.

    Found by trying: it depends on the architecture, its attention kernel and the version of transformers. In two rows,
    because transformers' flash attention takes the examples of a single row apart, but not those of more.
    """
    device = next(model.parameters()).device
    ids = torch.arange(max(PACKED), device=device) * 7 % vocabulary_size(model)
    rows = PACKED, PACKED[::-1]
    positions = torch.stack([torch.cat([torch.arange(length, device=device) for length in row]) for row in rows])
    try:
        with _evaluating(model):
            alone = {length: last_hidden_states(model, ids[None, :length])[0] for length in PACKED}
            expected = torch.stack([torch.cat([alone[length] for length in row]) for row in rows])
            packed = last_hidden_states(model, ids[positions], positions)
    except (TypeError, ValueError):  # the model takes no position_ids
        return False
    return _close(packed, expected)


@torch.no_grad()
def read_head(model: PreTrainedModel) -> LMHead:
    """Return a model's head, its scale and soft-cap measured, and checked against the model's own logits.

    Raises LogitcaskError if the architecture does anything else between hidden states and logits, or if no logits are
    finite.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise LogitcaskError(f"{type(model).__name__}: has no language-model head: choose a causal language model")
    head = trained_head(module)
    bias = getattr(head, "bias", None)
    own_parameters = sorted({name for name, _ in head.named_parameters()} - {"weight", "bias"})
    if hasattr(head, "base_layer"):
        raise LogitcaskError(
            f"{type(model).__name__}: its head has an adapter, which a loss from hidden states cannot train: take "
            "lm_head out of target_modules, or train all of it with modules_to_save=['lm_head']"
        )
    if own_parameters:
        raise _not_supported(model, f"its head has parameters of its own, {', '.join(own_parameters)}")
    with _evaluating(model):
        ids = torch.arange(1, 1 + PROBED, device=head.weight.device)[None] % head.weight.shape[0]
        hidden = last_hidden_states(model, ids)
        probe, raw = _probe_hidden(hidden), _probe_raw(head.weight)
        given, logits = _run_with(model, module, ids, probe, raw)
        before = _factor_before(model, given, probe)
        if before != 1.0 and bias is not None:
            raise _not_supported(model, f"it multiplies hidden states by {before:g} before a head with a bias")
        scale, cap = _scale_and_cap(model, raw, logits)
        config = model.config.get_text_config()
        read = LMHead(head.weight, bias, _as_configured(before * scale, config), cap and _as_configured(cap, config))
        _compare(model, read, hidden[0], model(input_ids=ids, use_cache=False).logits[0])
        _require_causal(model, ids, hidden)
    return read


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, and back."""
    keep_as_loaded(model)
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def keep_as_loaded(model: torch.nn.Module) -> None:
    """Keep weights in 4 bits as they are, for training.

    On a CPU with AVX-512 BF16, bitsandbytes packs those of a layer anew when it is first evaluated: scales lose digits,
    and from then on no gradient passes through the layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 -- bitsandbytes has no types


def trained_head(module: Any) -> Any:
    """Return the head that runs: peft's modules_to_save keeps a copy of it beside the original."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    active = module.active_adapters
    if module.disable_adapters or not active or any(adapter not in copies for adapter in active):
        return module.original_module
    return copies[active[0]]


def non_finite_remedy(dtype: str) -> str:
    """Return what to do about a model whose numbers are not finite in a dtype."""
    if dtype == "float16":
        return "float16 overflows above 65,504: use bfloat16 or float32"
    return "use float32, or another model if that is no better" if dtype != "float32" else "its weights are damaged"


def _not_supported(model: PreTrainedModel, reason: str) -> LogitcaskError:
    return LogitcaskError(
        f"{type(model).__name__}: not supported: its logits must be scale * (h W' + b), soft-capped or not, but "
        f"{reason}: choose another architecture"
    )


def _probe_hidden(like: Tensor) -> Tensor:
    """Return hidden states of a shape and device that differ by known factors, each exact in 16 bits, in float32."""
    places = torch.arange(like.numel()).view(like.shape)
    values = (1 - 2 * (places % 2)) * (1 + places % 7 / 4) * 2.0 ** (places % 5 - 2)
    return values.to(like.device)


def _probe_raw(weight: Tensor) -> Tensor:
    """Return raw logits (1, L, V) in float32 from 2 ** -10, where a cap changes nothing, to what saturates any cap."""
    magnitudes = torch.tensor([m * 2.0**k for k in range(-10, 16) for m in (1.0, 1.3, 1.7)])
    grid = torch.cat([magnitudes, -magnitudes])
    return grid[torch.arange(PROBED * len(weight)) % len(grid)].view(1, PROBED, -1).to(weight.device)


def _run_with(
    model: PreTrainedModel, head: torch.nn.Module, ids: Tensor, hidden: Tensor, raw: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Run a model with ``hidden`` and ``raw`` in place of its own hidden states and of what its head returns.

    Return what its head was given, call by call, and the model's logits. OPT's forward passes by its ``base_model``.
    """
    given: list[Tensor] = []

    def replace_hidden(module: torch.nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    def record(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(args[0])
        return (args[0].to(next(head.parameters()).dtype),)

    hooks = [
        *(body.register_forward_hook(replace_hidden) for body in {_body(model), model.get_decoder()} - {model}),
        head.register_forward_pre_hook(record),
        head.register_forward_hook(lambda module, args, output: raw),
    ]
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return given, logits


def _require_causal(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> None:
    """Raise LogitcaskError if another last token changes the hidden states (1, L, H) of those before it."""
    other = ids.clone()
    other[0, -1] = 0  # not among the probed ones
    if not _close(last_hidden_states(model, other)[:, :-1], hidden[:, :-1]):
        raise LogitcaskError(
            f"{type(model).__name__}: not supported: its tokens see those that follow, so its logits would be of text "
            "that they know: set use_bidirectional_attention to false in its config, or choose a causal language model"
        )


def _factor_before(model: PreTrainedModel, given: list[Tensor], hidden: Tensor) -> float:
    """Return by what a model multiplies hidden states before its head. Raises LogitcaskError if it does more."""
    if len(given) != 1 or given[0].shape != hidden.shape:
        raise _not_supported(model, "its head does not get the hidden states of its body")
    ratio = given[0].cpu().double() / hidden.cpu().double()
    factor = float(ratio.mean())
    if not ((ratio - factor).abs() <= EXACT * abs(factor)).all():
        raise _not_supported(model, "it changes hidden states before its head by more than a factor")
    return factor


def _scale_and_cap(model: PreTrainedModel, raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Return the scale and the soft-cap that a model applies to raw logits. Raises LogitcaskError if it does more."""
    if logits.shape != raw.shape:
        raise _not_supported(model, f"it gives {logits.shape[-1]} logits and its head {raw.shape[-1]}")
    x, y = raw.cpu().double().flatten(), logits.cpu().double().flatten()
    least, most = int(x.abs().argmin()), int(x.argmax())
    scale = float(y[least] / x[least])  # tanh(u) = u so near 0; exact without a cap, since x is a power of 2
    cap = float(y[most]) if float(y[most]) < 0.99 * scale * float(x[most]) else None
    expected = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
    difference = ((y - expected) / expected).abs().nan_to_num(torch.inf)
    worst = int(difference.argmax())
    if float(difference[worst]) > EXACT:
        raise _not_supported(
            model,
            f"a raw logit of {float(x[worst]):.5g} becomes {float(y[worst]):.5g}, not {float(expected[worst]):.5g}",
        )
    return scale, cap


def _as_configured(value: float, config: Any) -> float:
    """Return the number of a config, or its inverse, that a measured value is up to rounding; itself if it is none."""
    numbers = [float(n) for n in vars(config).values() if isinstance(n, int | float) and n and not isinstance(n, bool)]
    choices = (1.0, *numbers, *(1 / n for n in numbers))
    return next((choice for choice in choices if abs(value / choice - 1.0) < EXACT / 10), value)


def _compare(model: PreTrainedModel, read: LMHead, hidden_LH: Tensor, own_LV: Tensor) -> None:
    """Raise LogitcaskError if a model's own logits are not those of the head that was read, on finite hidden states."""
    dtype = read.weight.dtype
    finite = (own_LV.isfinite().all(1) & hidden_LH.isfinite().all(1)).nonzero().flatten()
    if not len(finite):
        name = str(dtype).removeprefix("torch.")
        raise LogitcaskError(
            f"{type(model).__name__}: no finite logits from its first {PROBED} tokens in {name}: "
            f"{non_finite_remedy(name)}"
        )
    ids = torch.linspace(0, len(read.weight) - 1, min(SAMPLED_ROWS, len(read.weight)), dtype=torch.float64).long()
    ids = ids.to(read.weight.device)
    bias = None if read.bias is None else read.bias[ids].cpu().double()
    sampled = LMHead(read.weight[ids].cpu().double(), bias, read.scale, read.softcap)
    expected = sampled.logits(hidden_LH[finite].cpu().double())
    own = own_LV[finite][:, ids].cpu().double()
    allowed = _rounding(dtype, read.weight.device) * float(expected.abs().max())
    difference = float((own - expected).abs().max())
    if not difference <= allowed:
        raise _not_supported(
            model, f"they differ by {difference:.3g} from those of its head, {allowed:.3g} is expected in {dtype}"
        )
