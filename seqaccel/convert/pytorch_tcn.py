"""Checkpoints of the package ``pytorch-tcn`` (causal), which load into :class:`seqaccel.nn.TCN` as they are."""

import re
from typing import Any

from seqaccel import nn
from seqaccel.nn.checkpoints import loads


@loads(nn.TCN)
def drop_buffers(module: nn.TCN, state_dict: dict[str, Any], prefix: str) -> None:
    """Removes the package's stream buffers; the parameters have the names of the module at ``prefix``."""
    buffers = re.compile(re.escape(prefix) + r"network\.\d+\.conv[12]\.(padder\.)?buffer")
    for key in [key for key in state_dict if buffers.fullmatch(key)]:
        del state_dict[key]
