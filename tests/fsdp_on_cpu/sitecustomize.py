"""On the path of a launch's ranks, lets accelerate shard among processors with gloo, which it does among GPUs alone.

torch itself can; accelerate's state keeps the settings for accelerators. Saving and measuring shards is tested so.
"""

from __future__ import annotations

import os
from typing import Any

if "RANK" in os.environ:
    from accelerate import state
    from accelerate.utils import DistributedType

    begin = state.AcceleratorState.__init__

    def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = begin_sharded  # type: ignore[method-assign]
