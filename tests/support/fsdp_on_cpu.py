"""The command with FSDP enabled on the CPU too, as a module that a launcher can start.

accelerate 1.15 ignores FSDP's settings on machines without an accelerator. Beyond that check everything is real:
``fully_shard`` over gloo and the Trainer's own FSDP paths.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from logitcask.pipeline.cli import main

original_init = AcceleratorState.__init__


def init_with_fsdp(self: AcceleratorState, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    original_init(self, *given, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = init_with_fsdp
    main()
