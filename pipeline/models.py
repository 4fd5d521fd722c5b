"""Loading causal language models: by hub id, from a local folder, or from a GGUF file."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cache.errors import LogitcaskError


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
        reason = str(error).strip().splitlines()[0]
        raise LogitcaskError(f"{source}: no causal language model could be loaded: {reason}") from error
    found: PreTrainedModel = model
    return found


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the quantisation marks of a GGUF file: the weights are plain floats now, and saving refuses the marks."""
    for owner, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
