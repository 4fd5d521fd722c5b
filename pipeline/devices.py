"""Devices by name."""

import torch

from logitcask.cache.errors import LogitcaskError


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator if there is one. Raises LogitcaskError for none such."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LogitcaskError(f"--device {name}: no such device here: use auto or cpu") from error
    return device
