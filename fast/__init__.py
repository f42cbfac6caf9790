"""The maths of model.py and of torch.optim, computed sooner; tests hold each pair equal.

With ENABLED = False, or MODERN_LLM_FAST=0 in the environment, the model runs by plain maths alone.
"""

import os
from collections.abc import Callable

from torch.library import custom_op

ENABLED = os.environ.get("MODERN_LLM_FAST", "1") != "0"


def one_operator(function: Callable) -> Callable:
    """Return a function as one operator, which torch.compile cannot compute anew in every layer."""
    operator = custom_op(f"modern_llm::{function.__name__}", function, mutates_args=())
    operator.register_fake(function)
    return operator
