"""Plans of shipped configs for several test files: what two of them measure alike is measured once."""

from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from configs.schema import StageConfig, TokenizerStage
from modeling.adversarial import is_active

from eval import planning
from scripts import plan_costs, plan_stages

CONFIGS = Path(__file__).parents[1] / "configs"
# Keys of configs and sizes that no measured cost depends on.
NOT_MEASURED = (
    "run_dir",
    "experiment_dir",
    "data_dir",
    "data",
    "optimizer",
    "discriminator_optimizer",
    "training",
)
NOT_MEASURED += (
    "logging",
    "pictures",
    "sampling",
    "tokenizer_run",
    "projector_run",
    "init_from",
    "notes",
)
NOT_MEASURED += ("activation_checkpointing",)
measured = {}


def what_is_built(build):
    """Key of a workload: equal keys cost the same. `build` is a partial with configs, sizes and plain values."""
    arguments = list(build.args)
    if isinstance(arguments[0], StageConfig):  # (config, sizes, activation checkpointing, step)
        step, config = arguments.pop(), arguments[0]
        arguments.append(isinstance(config, TokenizerStage) and is_active(config.adversarial, step))
    plain = [asdict(argument) if is_dataclass(argument) else argument for argument in arguments]
    for values in plain:
        for name in NOT_MEASURED if isinstance(values, dict) else ():
            values.pop(name, None)
    if build.func is plan_stages.build_token_step:  # stored tokens: the tokenizer does not run
        plain[1].pop("tokenizer")
    return build.func.__name__, plain


def once(measure):
    """`measure`, which remembers."""

    def remembering(build, *settings):
        key = repr((measure.__name__, what_is_built(build), settings))
        if key not in measured:
            measured[key] = measure(build, *settings)
        return measured[key]

    return remembering


@cache
def plan_of(name, *overrides, gpu="a100-80g", num_gpus=8, share=0.4):
    """The plan of configs/NAME; a test must not change it."""
    functions = {
        name: once(getattr(planning, name)) for name in ("measure_step", "measure_forward")
    }
    with mock.patch.multiple(plan_costs, **functions):
        return plan_costs.make_plan(str(CONFIGS / name), list(overrides), gpu, num_gpus, share)
