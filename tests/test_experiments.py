"""Every shipped YAML loads, builds, can be planned and has a header whose commands exist; the paper's weight counts."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from cached_plan import plan_of
from configs.schema import (
    STAGES,
    FlowTokStage,
    ReportStage,
    TextEncoderStage,
    TextProjectorStage,
    TokenizerStage,
    TokensStage,
)

from configs.load import load_config
from modeling.flow_model import FlowModel
from modeling.image_tokenizer import ImageTokenizer
from scripts.plan_stages import TRAINING_STEPS, build_encoding, find_sizes

ROOT = Path(__file__).parents[1]
LAUNCHER = (ROOT / "train_flowtok.sh").read_text()
LAUNCHER_STAGES = re.search(r"^ALL_STAGES=\((.*?)\)", LAUNCHER, flags=re.DOTALL | re.MULTILINE)[
    1
].split()


def read(path):
    """The file's own keys, without its base."""
    return yaml.safe_load(path.read_text()) or {}


def is_stage(path):
    """Whether the file, or a file it is based on, names its stage; others are only bases."""
    values = read(path)
    return "stage" in values or ("base" in values and is_stage(path.parent / values["base"]))


FILES = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/*.yaml") if is_stage(path)
)


def test_the_experiments_of_the_paper_are_there():
    names = {Path(file).parent.name for file in FILES}
    assert names >= {
        "demo",
        "flowtok_b",
        "flowtok_xl",
        "flowtok_h",
        "tokenizer_bl77_256",
        "tokenizer_bl77_512",
    }
    assert names >= {"flowtok_b_average_pool", "flowtok_b_cosine_margin", "flowtok_b_alignment_2"}
    for size in ("xl", "h"):
        for stage in ("flowtok", "flowtok_finetune", "flowtok_512", "tokenizer_512"):
            assert f"configs/flowtok_{size}/{stage}.yaml" in FILES


@pytest.mark.parametrize("file", FILES)
def test_it_loads_and_its_name_begins_with_its_stage(file):
    config = load_config(ROOT / file)
    assert Path(file).stem.startswith(config.stage)
    assert Path(file).stem in LAUNCHER_STAGES


@pytest.mark.parametrize("file", FILES)
def test_its_networks_build_on_the_meta_device_with_sizes_that_agree(file):
    config = load_config(ROOT / file)
    if isinstance(config, ReportStage):
        return
    sizes = None if isinstance(config, TextEncoderStage) else find_sizes(config, ROOT / file)
    with torch.device("meta"):
        if isinstance(config, TokensStage):
            work = build_encoding(sizes, config.store_text_states)
        else:
            work = TRAINING_STEPS[type(config)](
                config, sizes, "none", config.training.max_steps - 1
            )
    assert all(parameter.is_meta for parameter in work.model.parameters())
    if isinstance(config, FlowTokStage | TextProjectorStage):
        tokenizer, projector = sizes.tokenizer, config.projector
        assert "the paper's" not in sizes.notes[0]  # one of the shipped tokenizers makes its tokens
        assert (tokenizer.num_tokens, tokenizer.token_channels) == (
            projector.text_tokens,
            projector.token_channels,
        )
        assert (tokenizer.text_tokens, tokenizer.text_width) == (
            projector.text_tokens,
            projector.text_width,
        )


@pytest.mark.parametrize("file", FILES)
def test_it_can_be_planned(file):
    plan = plan_of(file.removeprefix("configs/"))
    assert plan["stage"] in STAGES
    if plan["stage"] == "report":
        return
    assert all(number > 0 for number in plan["weights"].values())
    assert plan["memory_gib"]["peak"] > plan["memory_gib"]["weights"] > 0
    if plan["stage"] == "tokens":
        assert plan["largest_batch_per_gpu"] >= plan["run"]["batch_per_gpu_and_pass"]
        return
    assert plan["time"]["days"] > 0 and plan["disk"]["checkpoint_gib"] > 0
    chosen = plan["activation_checkpointing"][plan["run"]["activation_checkpointing"]]
    assert chosen["peak_gib"] == plan["memory_gib"]["peak"]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("configs/demo/")])
def test_as_shipped_it_fits_8_a100_of_80_gb(file):
    plan = plan_of(file.removeprefix("configs/"))
    assert plan["memory_gib"]["peak"] <= plan["memory_gib"]["limit"]


# --- Headers ---


def header(path):
    """Comment lines at the top of a file, without their #."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def whole_header(path):
    """The file's header, and its base's where a line ends with a reference to that (": base.")."""
    lines = header(path)
    refers = any(line.endswith(": base.") for line in lines)
    return " ".join(lines) + (
        " " + whole_header(path.parent / read(path)["base"]) if refers else ""
    )


COMMAND = re.compile(r"^((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:bash|accelerate launch|python) .*)$")


def header_commands(path):
    return [match[1] for match in map(COMMAND.match, header(path)) if match]


@pytest.mark.parametrize("file", FILES)
def test_its_header_has_command_hardware_time_and_expectation(file):
    path = ROOT / file
    text = whole_header(path)
    assert header_commands(path), "no line that is a command"
    assert re.search(r"\b(A100|H100|GPUs?|CPU)\b", text), "no hardware"
    time = r"\b\d+(\.\d+)? (s|min|minutes|h|hours|days)\b|scripts/plan\.py|[Tt]ime as \w+"
    assert re.search(time, text), "no time, and no word of where to get it"
    expected = r"[Ee]xpected|PSNR|no number|not published"
    assert re.search(expected, text), "no expected number, and no word that there is none"


@pytest.mark.parametrize("file", FILES)
def test_the_commands_of_its_header_name_what_exists(file):
    for command in header_commands(ROOT / file):
        check_command(command, ROOT / file)
    for mentioned in re.findall(
        r"\b(?:scripts|configs)/[\w/.]+\.(?:py|yaml|sh)\b", " ".join(header(ROOT / file))
    ):
        assert (ROOT / mentioned).is_file(), mentioned


def check_command(command, path):
    """AssertionError or ValueError: the command of a header is not one for this file."""
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
    words = words[len(variables) :]
    if words[:2] == ["bash", "train_flowtok.sh"]:
        check_launcher(words[2:], variables, path)
        return
    assert not variables
    file = (ROOT / words[words.index("--config") + 1]).resolve()
    assert file == path
    program = (
        words[words.index("-m" if "-m" in words else "--module") + 1]
        if {"-m", "--module"} & {*words}
        else None
    )
    program = (
        program.replace(".", "/") + ".py"
        if program
        else next(word for word in words if word.endswith(".py"))
    )
    stage = re.search(r'parse_stage_args\("(\w+)"', (ROOT / program).read_text())[1]
    load_config(file, words[words.index("--config") + 2 :], stage)


def check_launcher(arguments, variables, path):
    """`bash train_flowtok.sh EXPERIMENT key=value ...` runs this file."""
    experiment = arguments[0] if arguments and "=" not in arguments[0] else "demo"
    folder = ROOT / "configs" / experiment
    assert folder == path.parent
    assert variables.keys() <= {"STAGES"}
    stages = (
        variables["STAGES"].split()
        if variables
        else [file.stem for file in folder.glob("*.yaml") if is_stage(file)]
    )
    assert path.stem in stages and {*stages} <= {*LAUNCHER_STAGES}
    for stage in stages:
        load_config(folder / f"{stage}.yaml", [word for word in arguments if "=" in word])


@pytest.mark.parametrize(
    "command",
    [
        "bash train_flowtok.sh flowtok_x",
        "bash train_flowtok.sh flowtok_xl data_dirr=/data",
        "STAGES=tokens bash train_flowtok.sh flowtok_xl",
        "STAGES=flowtok_1024 bash train_flowtok.sh flowtok_xl",
        "NUM_GPUS=8 bash train_flowtok.sh flowtok_xl",
        "accelerate launch train_flowtok.py --config configs/flowtok_h/flowtok.yaml",
        "accelerate launch train_tokenizer.py --config configs/flowtok_xl/flowtok.yaml",
    ],
)
def test_a_command_that_does_not_run_the_file_is_found(command):
    with pytest.raises((AssertionError, ValueError, FileNotFoundError)):
        check_command(command, ROOT / "configs/flowtok_xl/flowtok.yaml")


def test_relative_commands_of_headers_start_at_the_repository():
    command = "accelerate launch train_flowtok.py --config configs/flowtok_xl/flowtok.yaml training.seed=1"
    check_command(command, ROOT / "configs/flowtok_xl/flowtok.yaml")


# --- Weight counts of the paper ---


def millions(module, with_buffers=()):
    """Weights of a module, and named buffers, in millions."""
    count = sum(parameter.numel() for parameter in module.parameters())
    return (count + sum(module.get_buffer(name).numel() for name in with_buffers)) / 1e6


@pytest.mark.parametrize(
    ("name", "published"), [("flowtok_b", 153.93), ("flowtok_xl", 698.08), ("flowtok_h", 1092.10)]
)
def test_flow_weights_are_the_papers_with_the_fixed_position_table(name, published):
    config = load_config(ROOT / f"configs/{name}/flowtok.yaml")
    with torch.device("meta"):
        flow = FlowModel(config.projector, config.flowtok)
    assert (
        round(millions(flow, ["flowtok.positions"]), 2) == published
    )  # projector, alignment, DiT, and 77 x W of table
    assert round(millions(flow), 2) != published


def test_tokenizer_weights_are_the_papers_without_latent_tokens_and_rope_tables():
    config = load_config(ROOT / "configs/tokenizer_bl77_256/tokenizer.yaml")
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config.tokenizer)
    # The encoder's 77 x 768 latent tokens are left out, as in TA-TiTok, where they lie outside the encoder.
    assert round(millions(tokenizer.encoder) - 77 * 768 / 1e6, 2) == 85.74
    assert round(millions(tokenizer.decoder), 2) == 304.05
    assert isinstance(config, TokenizerStage)
