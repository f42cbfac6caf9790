"""The files in config/ are promises: each must load, and the large ones must run a step, small."""

import os
import re

import pytest
import torch
from helpers import ROOT

import align
import configurator
import train
from bench.__main__ import BenchConfig
from data import DataConfig
from evals.base import EvalConfig
from model import GPT, ModelConfig
from runtime.run_folder import read_state
from speedrun import SpeedrunConfig

RECIPES = sorted(str(path) for path in (ROOT / "config").glob("*.py"))
PRETRAINING = (ModelConfig, train.LoopConfig, train.PretrainConfig)
OTHERS = {"bench": BenchConfig, "data": DataConfig, "eval": EvalConfig, "speedrun": SpeedrunConfig}


def load(path: str):
    """Load a recipe as its program does."""
    name = os.path.basename(path).removesuffix(".py")
    name = re.sub("^(local|h100|smollm2)_", "", name)
    if name in OTHERS:
        return configurator.load([path], OTHERS[name])
    if name in ("pretrain", "smoke", "race_tiny", "race_small", "streaming", "gpu_24gb", "gpu_8gb"):
        return configurator.load([path], *PRETRAINING)
    parts = (train.LoopConfig, align.AlignConfig)
    return configurator.load([path], *parts, choose=("mode", align.MODES))


@pytest.mark.parametrize("path", RECIPES, ids=os.path.basename)
def test_every_recipe_loads_and_has_a_header(path):
    """A recipe with a misspelt key would only be noticed in the queue of a cluster."""
    load(path)
    with open(path) as f:
        assert f.read().startswith('"""') and RECIPES


def test_the_h100_recipe_has_253_million_parameters():
    """The size in its header is that of the shapes (on the meta device: nothing is allocated)."""
    shape, _, _ = load(str(ROOT / "config" / "h100_pretrain.py"))
    shape.vocab_size = 50262
    with torch.device("meta"):
        assert GPT(shape).num_params() == pytest.approx(252.8e6, rel=1e-3)


def test_the_h100_recipes_run_a_step_on_the_cpu_at_reduced_size(tmp_path):
    """Every key of the recipes but those of size, dtype and compile is used as it stands."""
    small = ["--data=toy", f"--data_dir={tmp_path}/data", "--device=cpu", "--dtype=float32"]
    small += ["--compile=False", "--max_steps=1", "--micro_batch=2", "--batch_tokens=512"]
    shape = ["--tokenizer=toy", "--n_layer=1", "--n_head=2", "--d_model=32", "--d_ff=64"]
    shape += ["--seq_len=256"]

    def flags(stage: str) -> list[str]:
        recipe = str(ROOT / "config" / f"h100_{stage}.py")
        return [recipe, f"--out_dir={tmp_path}/{stage}", "--eval_rows=2", *small]

    assert train.main([*flags("pretrain"), *shape]) == 0
    for card in ("24gb", "8gb"):
        recipe = str(ROOT / "config" / f"gpu_{card}.py")
        assert (
            train.main([recipe, f"--out_dir={tmp_path}/{card}", "--eval_rows=2", *small, *shape])
            == 0
        )
    for stage, start in (("sft", "pretrain"), ("dpo", "sft"), ("verifier", "dpo")):
        few = ["--n_problems=2", "--n_samples=1", "--max_new_tokens=8"]
        few = few if stage == "verifier" else []
        assert align.main([*flags(stage), f"--init_from={tmp_path}/{start}", *few]) == 0
        assert read_state(f"{tmp_path}/{stage}") == "done"
