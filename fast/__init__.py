"""The maths of model.py and of torch.optim, computed sooner; tests hold each pair equal.

With ENABLED = False, or MODERN_LLM_FAST=0 in the environment, the model runs by plain maths alone.
"""

import os

ENABLED = os.environ.get("MODERN_LLM_FAST", "1") != "0"
