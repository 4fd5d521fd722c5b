"""A model of some of a teacher's layers, which computes what they computed, and is built again from its own config."""

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from logitcask.cache.errors import LogitcaskError, shown_reason
from logitcask.pipeline.models.load import probe_ids

# Lists in a config that may happen to have as many entries as the model has layers.
NOT_PER_LAYER = re.compile(r"token_id|architectures|limit|section|label")
LAYER_NUMBER = re.compile(r"(layer|block)_?(idx|id|index|number|num)$|^layer$")
PLAIN = (bool, int, float, str, type(None))
# Settings that say by a rule which layers are of which kind.
LAYER_RULES = (
    *(("first_k_dense_replace",), ("num_dense_layers",), ("decoder_sparse_step",), ("interleave_moe_layer_step",)),
    *(("moe_layer_freq",), ("moe_layer_interval",), ("full_attention_interval",), ("sliding_window_pattern",)),
    *(("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset")),
    ("moe_layer_start_index", "moe_layer_end_index"),
)


def keep_layers(model: PreTrainedModel, chosen: str) -> PreTrainedModel:
    """Return a model of the chosen layers, such as ``"0,9,19,29"``, that its own config builds again.

    Every setting that belongs to a layer moves with it. Raises LogitcaskError if a layer does not exist, or what it
    does depends on its place in a way that no config of the architecture states.
    """
    prefix, layers = layers_of(model)
    indices = [int(part) for part in chosen.split(",")]
    out_of_range = [index for index in indices if not 0 <= index < len(layers)]
    if out_of_range or len(set(indices)) < len(indices):
        raise LogitcaskError(f"--init-from-teacher-layers: layers are 0 to {len(layers) - 1}, each once; got {chosen}")
    renamed = {}
    for name, tensor in model.state_dict().items():
        place = name.removeprefix(f"{prefix}.").split(".")[0] if name.startswith(f"{prefix}.") else ""
        if not place:
            renamed[name] = tensor
        elif int(place) in indices:
            renamed[f"{prefix}.{indices.index(int(place))}{name[len(prefix) + 1 + len(place) :]}"] = tensor
    config = _fit_rules(model, _config_of_layers(model.config, len(layers), indices), renamed)
    try:
        student: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
        student.load_state_dict(renamed)
    except Exception as error:  # each architecture checks its config in its own way
        raise LogitcaskError(_refusal(model, chosen, shown_reason(error))) from error
    student.generation_config = model.generation_config
    _require_same_layers(model, student, indices, chosen)
    return student


def _refusal(model: PreTrainedModel, chosen: str, reason: str) -> str:
    return (
        f"--init-from-teacher-layers: layers {chosen} of {type(model).__name__} cannot be a model of their own: "
        f"{reason}: choose other layers (a prefix, or layers of the same kinds in the same rhythm), or another student"
    )


def layers_of(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Return name and list of a model's layers. Raises LogitcaskError if it does not have exactly one list of them."""
    count = model.config.get_text_config().num_hidden_layers
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not inner:
            lists[name] = module
    if len(lists) != 1:
        raise LogitcaskError(
            f"--init-from-teacher-layers: {type(model).__name__} has no list of layers to take from"
            if not lists
            else f"--init-from-teacher-layers: {type(model).__name__} keeps its layers in several lists, "
            f"{', '.join(lists)}: not supported, choose another teacher"
        )
    return next(iter(lists.items()))


def _config_of_layers(config: PreTrainedConfig, count: int, indices: list[int]) -> dict[str, Any]:
    """Return a config of some of ``count`` layers: a list with one entry per layer, or of layers' numbers, follows."""
    values: dict[str, Any] = copy.deepcopy(config.to_dict())
    part, own = _text_part(config, values)
    for name, value in part.items():
        if not isinstance(value, list) or NOT_PER_LAYER.search(name):
            continue
        numbers = "layer" in name or "idx" in name
        numbers = numbers and all(type(v) is int and 0 <= v < count for v in value) and sorted(set(value)) == value
        if len(value) == count and not (numbers and value == list(range(count))):
            part[name] = [value[index] for index in indices]
        elif numbers:
            part[name] = [new for new, old in enumerate(indices) if old in value]
    if "attention_types" in part and "attention_layers" in part:  # GPT-Neo's short form of the same
        part["attention_types"] = [[part["attention_layers"], 1]]
    part[own.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(indices)
    return values


def _text_part(config: PreTrainedConfig, values: dict[str, Any]) -> tuple[dict[str, Any], PreTrainedConfig]:
    """Return the part of a config's values that describes the language model, and that part's own config."""
    own = config.get_text_config()
    names = [name for name in values if name.endswith("_config") and getattr(config, name, None) is own]
    return (values[names[0]] if names else values), own


def _fit_rules(model: PreTrainedModel, values: dict[str, Any], wanted: dict[str, Any]) -> PreTrainedConfig:
    """Return a config whose model has the wanted tensors, by trying the numbers of rules such as "every 2nd layer"."""
    config = type(model.config)
    shapes = {(name, tuple(tensor.shape)) for name, tensor in wanted.items()}

    def misfits() -> int:
        try:
            with torch.device("meta"):
                built = type(model)._from_config(config.from_dict(copy.deepcopy(values)))
        except Exception:  # not a config of the architecture
            return len(shapes) + 1
        return len(shapes ^ {(name, tuple(tensor.shape)) for name, tensor in built.state_dict().items()})

    part, own = _text_part(model.config, values)
    best, count = misfits(), int(part[own.attribute_map.get("num_hidden_layers", "num_hidden_layers")])
    for rule in LAYER_RULES:
        if not best or not all(type(part.get(name)) is int for name in rule):
            continue
        kept = [part[name] for name in rule]
        for numbers in itertools.product(range(count + 2), repeat=len(rule)):
            part.update(zip(rule, numbers, strict=True))
            if (score := misfits()) < best:
                best, kept = score, list(numbers)
            if not best:
                break
        part.update(zip(rule, kept, strict=True))
    return config.from_dict(values)


def _require_same_layers(model: PreTrainedModel, student: PreTrainedModel, indices: list[int], chosen: str) -> None:
    """Raise LogitcaskError if a student's layers have other settings than the teacher's, or do something else."""
    layers, own = layers_of(model)[1], layers_of(student)[1]
    model.eval()
    student.eval()
    for new, old in enumerate(indices):
        before, after = dict(_settings(layers[old])), dict(_settings(own[new]))
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                reason = (
                    f"{name} of layer {old} is {before.get(name)!r}, and becomes {after.get(name)!r} in place {new}"
                )
                raise LogitcaskError(_refusal(model, chosen, reason))
    probe = probe_ids(student)
    try:
        with torch.no_grad():
            expected = _logits_of_layers(model, layers, indices, probe)
            actual = student(input_ids=probe, use_cache=False).logits
    except Exception as error:  # layers that pass more between them than hidden states
        raise LogitcaskError(_refusal(model, chosen, shown_reason(error))) from error
    difference = float((actual - expected).abs().max())
    if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
        reason = f"built from a config, their logits differ by up to {difference:.3g} from those in the teacher"
        raise LogitcaskError(_refusal(model, chosen, reason))


def _settings(layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the plain values that a layer's modules hold, such as a window's size; not those that are its number."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and not LAYER_NUMBER.search(name) and isinstance(value, PLAIN):
                yield f"{path}.{name}".lstrip("."), value


def _logits_of_layers(model: PreTrainedModel, layers: torch.nn.ModuleList, indices: list[int], probe: Tensor) -> Tensor:
    """Return the logits (1, L, V) of a model with only the chosen layers, run one by one with what each one got."""
    got: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, named, i=i: got.setdefault(i, (args, named)) and None,
                                        with_kwargs=True)
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    model(input_ids=probe, use_cache=False)
    for hook in hooks:
        hook.remove()

    def first(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        hidden: Tensor = args[0] if args else named["hidden_states"]
        return hidden

    hidden = first(*got[0])
    for index in indices:
        args, named = got[index]
        out = layers[index](hidden, *args[1:], **{k: v for k, v in named.items() if k != "hidden_states"})
        hidden = out[0] if isinstance(out, tuple) else out
    last = layers[-1].register_forward_hook(
        lambda _, args, output: (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    )
    logits: Tensor = model(input_ids=probe, use_cache=False).logits
    last.remove()
    return logits
