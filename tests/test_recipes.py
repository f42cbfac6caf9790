"""The files in config/ are promises: each must load, and the large ones must run a step at reduced size."""

import glob
import os

import pytest

import align
import bench
import configurator
import data
import eval as evaluation
import speedrun
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPES = sorted(glob.glob(os.path.join(ROOT, "config", "*.py")))


def config_class(path: str):
    name = os.path.basename(path).removesuffix(".py").removeprefix("local_").removeprefix("h100_")
    return {
        "pretrain": train.TrainConfig,
        "smoke": train.TrainConfig,
        "race_tiny": train.TrainConfig,
        "race_small": train.TrainConfig,
        "streaming": train.TrainConfig,
        "bench": bench.BenchConfig,
        "data": data.DataConfig,
        "eval": evaluation.EvalConfig,
        "speedrun": speedrun.SpeedrunConfig,
    }.get(name, align.AlignConfig)


@pytest.mark.parametrize("path", RECIPES, ids=os.path.basename)
def test_every_recipe_loads_and_has_a_header(path):
    """A recipe with a misspelt key would only be noticed in the queue of a cluster."""
    configurator.load(config_class(path), [path])
    with open(path) as f:
        assert f.read().startswith('"""') and RECIPES


def test_the_h100_recipe_has_253_million_parameters():
    """The size in its header, from the shapes themselves (on the meta device: nothing is allocated)."""
    import torch

    cfg = configurator.load(train.TrainConfig, [os.path.join(ROOT, "config", "h100_pretrain.py")])
    with torch.device("meta"):
        assert train.GPT(train.model_config(cfg, 50262)).num_params() == pytest.approx(
            252.8e6, rel=1e-3
        )


def test_the_h100_recipes_run_a_step_on_the_cpu_at_reduced_size(tmp_path):
    """Every key of the recipes but those of size, dtype and compile is used as it stands."""
    small = [
        "--data=toy",
        f"--data_dir={tmp_path}/data",
        "--device=cpu",
        "--dtype=float32",
        "--compile=False",
        "--max_steps=1",
        "--micro_batch=2",
        "--batch_tokens=512",
    ]
    shape = [
        "--tokenizer=toy",
        "--n_layer=1",
        "--n_head=2",
        "--d_model=32",
        "--d_ff=64",
        "--seq_len=256",
        "--eval_rows=2",
    ]
    recipe = lambda stage: os.path.join(ROOT, "config", f"h100_{stage}.py")
    out = lambda stage: f"--out_dir={tmp_path}/{stage}"
    assert train.main([recipe("pretrain"), out("pretrain"), *small, *shape]) == 0
    for stage, start in (("sft", "pretrain"), ("dpo", "sft"), ("verifier", "dpo")):
        few = (
            ["--n_problems=2", "--n_samples=1", "--max_new_tokens=8"] if stage == "verifier" else []
        )
        assert (
            align.main(
                [
                    recipe(stage),
                    out(stage),
                    f"--init_from={tmp_path}/{start}",
                    "--eval_rows=2",
                    *small,
                    *few,
                ]
            )
            == 0
        )
        assert train.read_state(f"{tmp_path}/{stage}") == "done"
