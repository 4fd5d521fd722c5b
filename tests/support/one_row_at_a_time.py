"""``logitcask``, of which a step on a CPU takes one row after the other; ends with an error if it takes no part alone.

With two ranks gradients are averaged with the last part of a batch only.
"""

from typing import Any

from accelerate import Accelerator

from logitcask.pipeline import cli
from logitcask.pipeline.train import trainer

setattr(trainer, "CPU_PART", 1)  # noqa: B010 -- a name that the module imports
alone, no_sync = list[None](), Accelerator.no_sync


def counted(accelerator: Accelerator, model: Any) -> Any:
    """Note that a part's gradients stay on this rank."""
    alone.append(None)
    return no_sync(accelerator, model)


Accelerator.no_sync = counted
try:
    cli.main()
finally:
    assert alone, "no batch was divided"
