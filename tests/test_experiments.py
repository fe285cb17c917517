"""Every shipped YAML loads, can be planned, and is run by its header's commands; weight counts."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from shipped import FILES, ROOT, load
from tiny_experiment import reset_accelerate

from modeling.flow_model import build_flow
from modeling.image_tokenizer import ImageTokenizer
from scripts.plan import GPUS, RESERVE, batch_sizes
from scripts.run_experiment.stages import program_of, read_stages
from scripts.workload.fake import measure_step
from scripts.workload.sizes import read_stage
from training.stage import TrainedStage

# No network; those of fine-tuning and of 512 px have the networks of the round before.
ROUNDS_BEFORE = ("scenes", "report", "flowtok_finetune", "flowtok_512", "tokens_finetune")
PLANNED = [file for file in FILES if Path(file).stem not in ROUNDS_BEFORE]
COMMAND = re.compile(r"^# ((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:bash|accelerate launch|python) .*)$")
NUM_GPUS = 8


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    reset_accelerate()


def test_the_experiments_of_the_paper_are_there():
    sizes = ("xl", "h")
    rounds = [
        f"flowtok_{size}/flowtok{which}" for size in sizes for which in ("", "_finetune", "_512")
    ]
    ablations = ("average_pool", "cosine_margin", "alignment_2")
    rounds += [f"flowtok_b_{ablation}/flowtok" for ablation in ablations]
    rounds += [f"tokenizer_bl77_{pixels}/tokenizer" for pixels in (256, 512)]
    assert {f"configs/{name}.yaml" for name in [*rounds, "flowtok_b/flowtok"]} <= {*FILES}


@pytest.mark.parametrize("file", FILES)
def test_it_loads_and_is_named_after_its_stage(file):
    config = load(file)
    assert Path(file).stem.startswith(config.stage)
    assert Path(config.run_dir).name == Path(file).stem


@pytest.mark.parametrize("file", PLANNED)
def test_its_step_runs_on_shapes_alone_and_fits_8_a100_of_80_gb(file):
    if "_t5/" in file:
        pytest.importorskip("transformers", reason="requirements-text.txt is not installed")
    stage = read_stage(ROOT / file)
    config, tokens = stage.config, stage.tokenizer
    _, batch = batch_sizes(stage, NUM_GPUS)
    cost = measure_step(stage, NUM_GPUS, batch)
    usable = GPUS["a100-80g"][0] * (1 - RESERVE)
    resident = cost.resident_gib["weights"] + cost.resident_gib["frozen"]
    assert resident < cost.peak_gib < usable
    assert cost.flops > 0
    if isinstance(config, TrainedStage) and config.stage not in ("text_encoder", "tokenizer"):
        sizes = config.projector
        assert (sizes.text_tokens, sizes.text_width) == (tokens.text_tokens, tokens.text_width)
        latents = (sizes.input_shape[0], sizes.token_channels)
        assert (tokens.num_tokens, tokens.token_channels) == latents


# Commands in the headers


def header_commands(file):
    return [
        match[1] for match in map(COMMAND.match, (ROOT / file).read_text().splitlines()) if match
    ]


def check_command(command, file):
    """AssertionError or ValueError: the command does not run this file."""
    words = shlex.split(command)
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
    words = words[len(variables) :]
    if "train_flowtok.sh" in words:
        wanted = [word.removeprefix("STAGES=") for word in variables]
        stages = read_stages(words[2:], *(wanted or [""]), ROOT / "configs")
        assert ROOT / file in [stage.file for stage in stages]
        return
    assert not variables
    config = words.index("--config") + 1
    program = words[config - 2].removesuffix(".py")
    assert (words[config], program) == (file, program_of(Path(file).stem)[0])
    load(file, *words[config + 1 :])


@pytest.mark.parametrize("file", FILES)
def test_the_commands_of_its_header_run_it_and_name_what_exists(file):
    text = (ROOT / file).read_text()
    for mentioned in re.findall(r"\b(?:scripts|configs)/[\w/.]+\.(?:py|yaml|sh)\b", text):
        assert (ROOT / mentioned).is_file(), mentioned
    commands = [command for command in header_commands(file) if "make_shards" not in command]
    assert commands
    for command in commands:
        check_command(command, file)


@pytest.mark.parametrize(
    "command",
    [
        "bash train_flowtok.sh flowtok_x",
        "bash train_flowtok.sh flowtok_xl data_dirr=/data",
        "STAGES=flowtok_512 bash train_flowtok.sh flowtok_xl",
        "accelerate launch train_flowtok.py --config configs/flowtok_h/flowtok.yaml",
        "accelerate launch train_tokenizer.py --config configs/flowtok_xl/flowtok.yaml",
    ],
)
def test_a_command_that_does_not_run_the_file_is_found(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(command, "configs/flowtok_xl/flowtok.yaml")


# Weight counts of the paper, in millions


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(("size", "published"), [("b", 153.93), ("xl", 698.08), ("h", 1092.10)])
def test_flow_weights_are_the_papers_with_the_fixed_position_table(size, published):
    config = read_stage(ROOT / f"configs/flowtok_{size}/flowtok.yaml").config
    with torch.device("meta"):
        flow = build_flow(config.projector, config.flowtok, config.flow)
    assert round(millions(flow) + flow.flowtok.positions.numel() / 1e6, 2) == published


def test_tokenizer_weights_are_the_papers_without_latent_tokens_and_rope_tables():
    stage = read_stage(ROOT / "configs/tokenizer_bl77_256/tokenizer.yaml")
    with torch.device("meta"):
        tokenizer = ImageTokenizer(stage.tokenizer)
    # TA-TiTok's latent tokens, 77 x 768, lie outside its encoder.
    assert round(millions(tokenizer.encoder) - 77 * 768 / 1e6, 2) == 85.74
    assert round(millions(tokenizer.decoder), 2) == 304.05
