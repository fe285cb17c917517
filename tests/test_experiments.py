"""The shipped experiments: those of the paper, their weight counts, their steps on shapes alone."""

import re
import shlex

import pytest
import torch
from shipped import FILES, ROOT
from test_readme import check_command

from modeling.flow_model import build_flow
from modeling.image_tokenizer import ImageTokenizer
from scripts.plan import GPUS, RESERVE
from scripts.workload.fake import measure_step
from scripts.workload.sizes import read_stage

# One of each kind of stage, and the largest networks: the others are made of the same parts.
PLANNED = [
    "caption_xl/text_decoder",
    "emoji/text_encoder",
    "emoji_caption/flowtok_caption",
    "flowtok_b_noise/flowtok",
    "flowtok_b_t5/flowtok",
    "flowtok_h/flowtok",
    "projector_clip_l/text_projector",
    "tokenizer_bl77_512/tokenizer",
    "tokenizer_bl77_512/tokens",
]
COMMAND = re.compile(
    r"(?m)^# ((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:bash|accelerate launch|python) .*)$"
)
NUM_GPUS = 8


def read(name):
    return read_stage(ROOT / f"configs/{name}.yaml")


def test_the_experiments_of_the_paper_are_there():
    rounds = [f"flowtok_{x}/flowtok{which}" for x in ["xl", "h"] for which in ("", "_512")]
    rounds += [f"flowtok_{x}/flowtok_finetune" for x in ["b", "xl", "h"]]
    rounds += [f"tokenizer_bl77_{pixels}/tokenizer" for pixels in (256, 512)]
    assert {f"configs/{name}.yaml" for name in [*rounds, "flowtok_b/flowtok"]} <= {*FILES}


@pytest.mark.parametrize("name", PLANNED)
def test_a_step_runs_on_shapes_alone_and_fits_8_a100_of_80_gb(name):
    if "_t5/" in name:
        pytest.importorskip("transformers", reason="requirements-text.txt is not installed")
    stage = read(name)
    cost = measure_step(stage, NUM_GPUS, stage.batch(NUM_GPUS))
    usable = GPUS["a100-80g"][0] * (1 - RESERVE)
    resident = cost.resident_gib["weights"] + cost.resident_gib["frozen"]
    assert resident < cost.peak_gib < usable
    assert cost.flops > 0


@pytest.mark.parametrize("file", FILES)
def test_the_commands_of_its_header_run_it_and_name_what_exists(file, monkeypatch):
    text = (ROOT / file).read_text()
    for mentioned in re.findall(r"\b(?:scripts|configs)/[\w/.]+\.(?:py|yaml|sh)\b", text):
        assert (ROOT / mentioned).is_file(), mentioned
    commands = [command for command in COMMAND.findall(text) if "make_shards" not in command]
    assert commands
    for command in commands:
        assert ROOT / file in check_command(shlex.split(command), monkeypatch), command


# Weight counts of the paper, in millions


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(("size", "published"), [("b", 153.93), ("xl", 698.08), ("h", 1092.10)])
def test_flow_weights_are_the_papers_with_the_fixed_position_table(size, published):
    config = read(f"flowtok_{size}/flowtok").config
    with torch.device("meta"):
        flow = build_flow(config.projector, config.flowtok, config.flow)
    assert round(millions(flow) + flow.flowtok.positions.numel() / 1e6, 2) == published


def test_tokenizer_weights_are_the_papers_without_latent_tokens_and_rope_tables():
    with torch.device("meta"):
        tokenizer = ImageTokenizer(read("tokenizer_bl77_256/tokenizer").tokenizer)
    # TA-TiTok's latent tokens, 77 x 768, lie outside its encoder.
    assert round(millions(tokenizer.encoder) - 77 * 768 / 1e6, 2) == 85.74
    assert round(millions(tokenizer.decoder), 2) == 304.05
