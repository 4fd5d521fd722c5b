"""The command with accelerate's gate to FSDP open for the CPU too; apart from the tests, for a launcher to start it.

accelerate 1.15 takes no heed of FSDP's settings where there is no accelerator. Everything behind the gate is real:
``fully_shard`` over gloo, the Trainer's own FSDP paths.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from logitcask.pipeline.cli import main

begin = AcceleratorState.__init__


def open_gate(self: AcceleratorState, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    begin(self, *given, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = open_gate
    main()
