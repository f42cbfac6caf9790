"""The maths of model.py and of torch.optim, computed sooner; tests hold each pair equal.

With ENABLED = False, or MODERN_LLM_FAST=0 in the environment, the model runs by plain maths alone.
"""

import functools
import os
from collections.abc import Callable

import torch
from torch.library import custom_op

ENABLED = os.environ.get("MODERN_LLM_FAST", "1") != "0"


def one_operator(function: Callable) -> Callable:
    """Let torch.compile see a function as one operator, which it cannot compute anew elsewhere."""
    operator = custom_op(f"modern_llm::{function.__name__}", function, mutates_args=())
    operator.register_fake(function)

    @functools.wraps(function)
    def call(*args: object) -> object:
        return (operator if torch.compiler.is_compiling() else function)(*args)

    return call
