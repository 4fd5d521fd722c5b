"""Causal language models: loaded from the hub, a folder or a GGUF file, new from a config, and compared."""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from logitcask.cache.errors import LogitcaskError, shown, shown_reason
from logitcask.pipeline.gguf import parsed_once
from logitcask.pipeline.machine import out_of_memory
from logitcask.pipeline.models.adapters import adapted, adapter_differences, base_of, is_adapter
from logitcask.pipeline.models.head import keep_as_loaded, vocabulary_size
from logitcask.pipeline.settings.base import config_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLED = 4096  # entries of each parameter in the weights fingerprint
# Weights that checkpoints of causal language models hold beside those of the language model: constants, which each
# version computes itself, towers for images and sound, and heads that predict several tokens.
NOT_OF_THE_LM = re.compile(
    r"(^|[._])(inv_freq|masked_bias|attn\.bias|attention\.bias|mtp|vision|visual|image|audio|multi_modal)([._]|$)"
)


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of a model."""

    total: int
    without_embeddings: int


def load_causal_lm(
    source: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a causal language model; the folder of an adapter gives its base, merged with it.

    Its weights are plain floats unless a config of ``quantization`` is given; an adapter then stays beside its base.
    Raises LogitcaskError if it cannot be loaded.
    """
    if is_adapter(source):
        return _load_adapted(source, dtype=dtype, trust_remote_code=trust_remote_code, quantization=quantization)
    folder = source
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # reported, then refused
    if quantization is not None:
        options["quantization_config"] = quantization
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LogitcaskError(f"{source}: no such GGUF file: give the path of one, or a model's folder or hub id")
        folder, options["gguf_file"] = str(path.parent), path.name
    try:
        with parsed_once() if path.suffix == ".gguf" else contextlib.nullcontext():
            model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # each format and architecture refuses a damaged model in its own way
        if out_of_memory(error):
            raise
        code = ": if you trust it, give --trust-remote-code" if "trust_remote_code=True" in str(error) else ""
        reason = f"{shown_reason(error)}{code}"
        raise LogitcaskError(f"{source}: no causal language model could be loaded: {reason}") from error
    _require_all_weights(source, report)
    if path.suffix == ".gguf":
        forget_quantization(model)
    if quantization is not None:
        keep_as_loaded(model)
    loaded: PreTrainedModel = model
    return loaded


def _load_adapted(source: str, **options: Any) -> PreTrainedModel:
    base, revision = base_of(Path(source))
    if is_adapter(base):
        raise LogitcaskError(f"{source}: is an adapter of {base}, which is an adapter itself: merge that one first")
    try:
        model = load_causal_lm(base, revision=revision, **options)
    except LogitcaskError as error:
        raise LogitcaskError(
            f"{source}: is an adapter, and its base cannot be loaded: {error}: write the base's place as "
            "base_model_name_or_path into adapter_config.json"
        ) from error
    return adapted(model, Path(source), merge=options["quantization"] is None)


def _require_all_weights(source: str, report: dict[str, Any]) -> None:
    """Raise LogitcaskError if weights of a model are missing, which leaves random ones, of other shapes, or unused."""
    unused = {name for name in report["unexpected_keys"] if not NOT_OF_THE_LM.search(name)}
    kinds = {"are missing": report["missing_keys"], "have other shapes": report["mismatched_keys"]}
    for kind, keys in {**kinds, "are of another architecture": unused}.items():
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
        if names:
            raise LogitcaskError(
                f"{source}: must hold all weights of its config's model and no others, but {len(names)} {kind}, the "
                f"first is {names[0]}: copy the whole model again, or save it with save_pretrained"
            )


def require_plain_weights(source: str) -> None:
    """Raise LogitcaskError if a model to train is an adapter or quantised, by its config."""
    if Path(source, "adapter_config.json").is_file():
        raise LogitcaskError(
            f"{source}: is an adapter (adapter_config.json), but a student must be a whole model: merge it first, with "
            f"peft.AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload().save_pretrained(FOLDER)"
        )
    try:
        quantised: Any = PreTrainedConfig.get_config_dict(source)[0].get("quantization_config")
    except Exception:  # no config, or not a sound one: loading says what is wrong with it
        return
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LogitcaskError(
            f"{source}: its weights are quantised ({shown(method)}), but a student needs float weights: take the model "
            "it was quantised from, or save it dequantised"
        )


def student_from_config(path: Path, vocab_size: int) -> PreTrainedModel:
    """Build a new model in float32. Raises LogitcaskError if the file is not the config of a causal language model."""
    try:
        path = config_file("students", path)
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LogitcaskError(f"--student-config {path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LogitcaskError(f"--student-config {path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise LogitcaskError(f"--student-config {path}: must be a Hugging Face config: a JSON object with model_type")
    values.setdefault("vocab_size", vocab_size)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # configs are validated by each architecture in its own way
        raise LogitcaskError(
            f"--student-config {path}: no causal language model can be built from it: {shown_reason(error)}"
        ) from error
    return model


def stored_dtype(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype:
    """Return the float dtype in which a model is stored, float32 if its config names none."""
    try:
        config = PreTrainedConfig.get_config_dict(source, revision=revision, trust_remote_code=trust_remote_code)[0]
    except Exception:  # a GGUF file has no config of this kind; loading reports all else
        return torch.float32
    texts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    names = [str(part.get(key)).removeprefix("torch.") for part in texts for key in ("dtype", "torch_dtype")]
    return next((DTYPES[name] for name in names if name in DTYPES), torch.float32)


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Count parameters with and without the embedding matrices."""
    embeddings = {
        id(p): p.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCount(total, total - sum(embeddings.values()))


def trained_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def require_finite(model: torch.nn.Module, where: str) -> None:
    """Raise LogitcaskError if parameters hold non-finite values; it gives their number and the first one's name."""
    names = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if names:
        raise LogitcaskError(
            f"{where}: already has non-finite parameters: {len(names)}, the first is {names[0]}: start from another "
            "student or an older checkpoint"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model takes, None if its config sets no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Return a row of token ids (1, L) on which models are compared, on the model's device."""
    length = min(24, max_positions(model) or 24)
    device = next(model.parameters()).device
    ids: Tensor = torch.arange(length, device=device)[None] * 7 % vocabulary_size(model)
    return ids


@torch.no_grad()
def probe_logits(model: PreTrainedModel, *, sharded: bool = False) -> Tensor:
    """Return a model's logits (L, V) for ``probe_ids`` by its class's own forward, in float32 on the CPU.

    A ``sharded`` model must be called as it is wrapped, by all ranks.
    """
    was_training = model.training
    model.eval()
    forward = model if sharded else type(model).forward.__get__(model)  # an instance's may be another, or in 16 bits
    logits: Tensor = forward(input_ids=probe_ids(model)).logits
    model.train(was_training)
    return logits[0].float().cpu()


def require_saved(
    folder: Path,
    logits_LV: Tensor,
    model: PreTrainedModel | None,
    *,
    exact: bool,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> None:
    """Load a saved student as anybody would, and compare it with the one in memory, which gave ``logits_LV``.

    Weights are compared, too, if the ``model`` is given, up to rounding to ``dtype``. Unless ``exact``, another device
    or dtype computed the logits: half of the positions must agree to a few percent. Raises LogitcaskError with the
    difference.
    """
    saved = load_causal_lm(
        str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code, quantization=quantization
    )
    advice = "the checkpoints of this run hold what was trained; report this, with config.json"
    if model is not None:
        other = adapter_differences(folder, model) if is_adapter(folder) else _differences(model, saved, dtype)
        if other:
            raise LogitcaskError(
                f"{folder}: loaded by transformers, {len(other)} weights are not those in memory, the "
                f"first is {other[0]}: {advice}"
            )
    errors_L = (probe_logits(saved) - logits_LV).abs().amax(1)
    error = float(errors_L.max() if exact else errors_L.median())
    if not error <= (1e-4 if exact else 5e-2) * max(1.0, float(logits_LV.abs().max())):
        raise LogitcaskError(
            f"{folder}: loaded by transformers, it is another student than the one in memory: its logits differ by up "
            f"to {float(errors_L.max()):.3g}: {advice}"
        )


def _differences(model: PreTrainedModel, saved: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return the names of a model's weights that a saved one has neither exactly nor rounded to a dtype."""
    own, loaded = model.state_dict(), saved.state_dict()

    def is_saved(name: str) -> bool:
        weight, stored = own[name].cpu(), loaded[name].float()
        return torch.equal(weight.float(), stored) or torch.equal(weight.to(dtype).float(), stored)

    return [name for name in own if name not in loaded or not is_saved(name)]


def sampling(temperature: float) -> dict[str, Any]:
    """Return the arguments of ``generate`` for sampling at a temperature; 0 means greedy decoding."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks of quantisation that a GGUF file or 4 bits left, from a model whose weights are plain floats."""
    for owner, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return the SHA-256 of the name, shape, dtype and up to 4,096 evenly spaced entries of every parameter.

    Sampling makes it take about a second for a teacher of any size; it distinguishes models but does not prove that
    nobody tampered with them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].float().cpu().numpy().astype("<f4")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
