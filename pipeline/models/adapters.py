"""Low-rank adapters (LoRA) of a student, by peft: made, stored, loaded and merged. Hu et al. (2021), LoRA.

peft replaces linear layers of the model in place: y = W x + (alpha / rank) B A x, with only A and B trained. The model
keeps its class, so that whatever runs its layers runs the adapter's. A folder with an adapter holds A and B, and the
name of the model they belong to.
"""

import copy
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from logitcask.cache.errors import LogitcaskError, shown_reason

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's for the first adapter of a model
ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."  # of names in an adapter's file


def four_bits() -> Any:
    """Return the config of weights in 4 bits. Raises LogitcaskError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise LogitcaskError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def is_adapter(source: str | Path) -> bool:
    """Return whether a folder holds an adapter and no whole model."""
    return Path(source, CONFIG_FILE).is_file() and not Path(source, "config.json").exists()


def has_adapter(model: torch.nn.Module) -> bool:
    """Return whether a model in memory is trained by an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def add_lora(
    model: PreTrainedModel, base: str, *, rank: int, alpha: float, dropout: float, targets: str, revision: str | None
) -> None:
    """Freeze a model and give its layers an adapter, whose folder names ``base`` as the model that it belongs to.

    ``targets`` are names of layers, separated by commas, or ``all-linear``. Raises LogitcaskError if one of them is
    in no layer's name, or is the embedding or the head, or peft does not support the layers.
    """
    peft = _peft()
    names = [name.strip() for name in targets.split(",")]
    if names != [ALL_LINEAR]:
        _require_targets(model, names)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        peft.inject_adapter_in_model(config, model, NAME)
    except (ValueError, TypeError, RuntimeError) as error:  # peft knows which layers it supports
        raise LogitcaskError(
            f"--lora-target-modules {targets}: no adapter for {type(model).__name__}: {shown_reason(error)}: choose "
            f"among {', '.join(_linear_names(model))}"
        ) from error
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    model._hf_peft_config_loaded = True  # by this the Trainer knows that only an adapter is trained
    model.save_pretrained = partial(_save, model, config)


def _save(
    model: PreTrainedModel,
    config: Any,
    folder: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Save a model's adapter in place of the model; ``state_dict`` are the gathered weights of a sharded one."""
    if not is_main_process:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_weights(model, state_dict).items()}
    save_file(weights, Path(folder, WEIGHTS_FILE), metadata={"format": "pt"})
    stored = copy.copy(config)
    stored.inference_mode = True  # as peft stores it
    stored.save_pretrained(str(folder))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _require_targets(model: PreTrainedModel, names: list[str]) -> None:
    ends = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    for name in names:
        layers = [m for path, m in model.named_modules() if name and (path == name or path.endswith(f".{name}"))]
        if not layers:
            raise LogitcaskError(
                f"--lora-target-modules: no layer of {type(model).__name__} is called {name!r}: choose among "
                f"{', '.join(_linear_names(model))}, or {ALL_LINEAR}"
            )
        end = next((ends[id(module)] for module in layers if id(module) in ends), None)
        if end is not None:
            raise LogitcaskError(
                f"--lora-target-modules: {name} is the model's {end}, which an adapter here cannot train: choose among "
                f"{', '.join(_linear_names(model))}"
            )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of a model's linear layers, without its head."""
    head = model.get_output_embeddings()
    layers = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m) and m is not head}
    return sorted(layers)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the model that an adapter belongs to, and its revision. Raises LogitcaskError if it names none."""
    file = folder / CONFIG_FILE
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LogitcaskError(f"{file}: damaged: must name a base_model_name_or_path: copy the adapter again") from error
    if not isinstance(base, str) or not base:
        raise LogitcaskError(
            f"{folder}: is an adapter without its base: write the model it was trained from as base_model_name_or_path "
            f"into {CONFIG_FILE}"
        )
    return base, revision


def adapted(base: PreTrainedModel, folder: Path, *, merge: bool) -> PreTrainedModel:
    """Return a base with an adapter: its product added to the weights, or beside them.

    Raises LogitcaskError if they do not fit.
    """
    peft = _peft()
    try:
        whole = peft.PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=False)
        if (folder / WEIGHTS_FILE).is_file():  # peft would leave what is missing at random, with a warning
            _require_same(whole.get_base_model(), load_file(folder / WEIGHTS_FILE))
        model: PreTrainedModel = whole.merge_and_unload() if merge else whole.get_base_model()
    except Exception as error:  # each kind of adapter refuses a base in its own way
        raise LogitcaskError(
            f"{folder}: the adapter does not fit its base {base.name_or_path}: {shown_reason(error)}: give "
            "the model it was trained from, or copy the adapter again"
        ) from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_adapter_weights(folder: Path, model: PreTrainedModel) -> None:
    """Load an adapter's stored weights into a model that has one. Raises LogitcaskError if they do not fit."""
    peft = _peft()
    stored = load_file(folder / WEIGHTS_FILE)
    _require_same(model, stored)
    peft.set_peft_model_state_dict(model, {k.removeprefix(PREFIX): v for k, v in stored.items()}, adapter_name=NAME)


def adapter_differences(folder: Path, model: PreTrainedModel) -> list[str]:
    """Return the names of the adapter's weights in memory that a folder does not hold exactly."""
    stored, own = load_file(folder / WEIGHTS_FILE), _adapter_weights(model)
    return [name for name in own if name not in stored or not torch.equal(own[name].cpu(), stored[name])]


def _adapter_weights(model: PreTrainedModel, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the adapter's weights, in memory or among all ``weights`` of a model, by the names that its file has."""
    own: dict[str, Tensor] = _peft().get_peft_model_state_dict(model, weights, NAME)
    return {f"{PREFIX}{name}": tensor for name, tensor in own.items()}


def _require_same(model: PreTrainedModel, stored: dict[str, Tensor]) -> None:
    """Raise LogitcaskError if a weight of the adapter in memory is not among the stored ones, or of another shape."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    wrong = [name for name, tensor in _adapter_weights(model).items() if shapes.get(name) != tensor.shape]
    if wrong:
        raise LogitcaskError(f"does not fit the adapter of its config: {len(wrong)} weights, such as {wrong[0]}")


def _peft() -> Any:
    """Return the library. Raises LogitcaskError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise LogitcaskError("an adapter needs peft: pip install 'logitcask[lora]'") from error
    return peft
