"""The facts of operators that only tests call."""

import math

import torch

from seqaccel.functional._registration import Operator, register

register(
    Operator(
        "elementwise",
        lambda input, function: torch.empty_like(input, memory_format=torch.contiguous_format),
        lambda input, function: math.prod(input),
        definition=lambda input, function: getattr(torch, function)(input),
        batch={"input": 0, 0: 0},
    )
)
