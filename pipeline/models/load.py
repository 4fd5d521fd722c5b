"""Loading causal language models from the hub, a local folder or a GGUF file."""

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
    """Load a causal language model with plain float weights. Raises LogitcaskError if it cannot be loaded."""
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
    loaded: PreTrainedModel = model
    return loaded


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


def sampling(temperature: float) -> dict[str, Any]:
    """Return the arguments of ``generate`` for sampling at a temperature; 0 means greedy decoding."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the quantisation flags that a GGUF file leaves: saving refuses them, and the weights are plain floats."""
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
