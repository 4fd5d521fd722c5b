"""Loading causal language models: by hub id, from a local folder, or from a GGUF file."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError, first_line

SAMPLED = 4096  # entries of each parameter in the weights fingerprint


def load_causal_lm(
    source: str, *, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model with plain float weights. Raises LogitcaskError where it cannot be loaded."""
    path = Path(source)
    try:
        if source.endswith(".gguf"):
            if not path.is_file():
                raise LogitcaskError(f"{source}: no such GGUF file")
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
            _forget_gguf(model)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise LogitcaskError(f"{source}: no causal language model could be loaded: {reason}") from error
    found: PreTrainedModel = model
    return found


def require_finite(model: torch.nn.Module, where: str) -> None:
    """Raise LogitcaskError if a parameter is not finite, naming the first and their number."""
    names = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if names:
        raise LogitcaskError(
            f"{where}: {len(names)} parameters are already not finite, the first is {names[0]}: start from another "
            "student or an older checkpoint"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model takes, None where its config sets no limit."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments of ``generate`` that draw at a temperature; 0 takes the likeliest token."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the quantisation marks of a GGUF file: the weights are plain floats now, and saving refuses the marks."""
    for owner, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the name, shape, dtype and up to 4,096 evenly spaced entries of every parameter.

    A sample, so that a teacher of any size is told from its neighbours in a second; it is no proof against tampering.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].float().cpu().numpy().astype("<f4")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
