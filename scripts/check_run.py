"""Verify a run folder, or all stages of an experiment folder, and print what is there.

    python scripts/check_run.py runs/demo
    python scripts/check_run.py runs/demo/flowtok --quick      names, sizes and shapes only: no weight is read

A line per stage, then a line per problem. Exit status: 0 no problem, 1 problems, 2 no run in the folder.

Every checkpoint: its manifest, and size and sha256 of each file. The newest whole one: config.yaml rebuilds the network
and all its weights fit; weights, EMA and the optimiser's moments are finite; the EMA has followed every step and is
near the weights; each process's data position is there. metrics.jsonl rises without repeats up to that checkpoint.
Token shards: all that tokens.json lists are there with so many samples. A converted run has EMA weights only.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a file, Python looks into scripts/ only

from configs.load import escape, exit_on_error, load_config, one_line
from configs.schema import (
    STAGES,
    FlowTokStage,
    StageConfig,
    TextDecoderStage,
    TextEncoderStage,
    TextProjectorStage,
    TokenizerStage,
)
from data.tar import count_samples
from modeling.adversarial import Adversary
from modeling.flow_model import FlowModel
from modeling.image_tokenizer import ImageTokenizer
from modeling.released import check_shapes
from modeling.text_decoder import TextAutoencoder
from modeling.text_projector import TextProjector
from scripts.train_text_encoder import ClipPair, open_clip_config
from training import checkpoint as ckpt
from training.metrics import step_of
from training.run import CONFIG_FILE
from training.tokens_info import TOKENS_INFO_FILE, TokensInfo

METRICS_FILE, CHECKPOINTS = "metrics.jsonl", "checkpoints"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA_TOO_FAR = 1.0  # |EMA - weights| / |weights| over all tensors; unrelated weights have 1.4
COLUMNS = ("stage", "steps", "size", "checkpoints", "last losses")


@dataclass
class Report:
    """What there is to say about one run."""

    name: str
    steps: str = "-"
    size: int = 0  # bytes
    checkpoints: str = "-"
    losses: str = "-"
    problems: list[str] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        """The cells of its line."""
        return self.name, self.steps, f"{self.size / 1e6:.1f} MB", self.checkpoints, self.losses


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="run folder, or experiment folder with run folders in it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="compare names, sizes and shapes, read no weights"
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> int:
    """Check all runs, print, and return the number of problems."""
    reports = [check_folder(run, args.quick) for run in find_runs(args.run)]
    table = [COLUMNS, *(report.row() for report in reports)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    problems = [f"problem: {report.name}: {text}" for report in reports for text in report.problems]
    print("\n".join(escape(line) for line in problems) or "no problem")
    return len(problems)


def find_runs(folder: Path) -> list[Path]:
    """The folder itself, or the runs in it in the order of the stages.

    Raises:
        ValueError: there is none.
    """
    if is_run(folder):
        return [folder]
    runs = sorted(path for path in folder.glob("*") if is_run(path)) if folder.is_dir() else []
    if not runs:
        found = (
            ", ".join(sorted(path.name for path in folder.glob("*"))[:10])
            if folder.is_dir()
            else ""
        )
        raise ValueError(f"{folder} is no run folder and holds none; in it: {found or 'nothing'}")
    order = list(STAGES)
    return sorted(
        runs,
        key=lambda run: next(
            (i for i, stage in enumerate(order) if run.name.startswith(stage)), 99
        ),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is meant to be a run or tokens, be they whole or not."""
    return any(
        (folder / name).exists()
        for name in (CONFIG_FILE, CHECKPOINTS, METRICS_FILE, TOKENS_INFO_FILE)
    )


def check_folder(folder: Path, quick: bool) -> Report:
    """Check one run or token folder."""
    report = Report(folder.resolve().name)
    report.size = sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    check = check_tokens if (folder / TOKENS_INFO_FILE).exists() else check_run
    report.problems += check(folder, quick, report)
    return report


def check_tokens(folder: Path, quick: bool, report: Report) -> Iterator[str]:
    """Problems of a folder of token shards."""
    try:
        info = TokensInfo.load(folder)
        missing = [name for name in info.shards if not (folder / name).is_file()]
        report.checkpoints = f"{len(info.shards) - len(missing)} shards, {info.num_samples} samples"
        if missing:
            yield f"{len(missing)} shards are missing, the first: {missing[0]}"
        elif not quick:
            found = sum(count_samples(folder / name) for name in info.shards)
            if found != info.num_samples:
                yield f"{TOKENS_INFO_FILE} says {info.num_samples} samples, the shards hold {found}"
    except (ValueError, OSError) as error:
        yield one_line(error)


def check_run(run: Path, quick: bool, report: Report) -> Iterator[str]:
    """Problems of a run folder; fills in what the report shows."""
    config = None
    try:
        config = load_config(run / CONFIG_FILE)
    except (ValueError, OSError) as error:
        yield one_line(error)
    whole = {}
    folders = ckpt.checkpoint_folders(run)
    for step, folder in folders.items():
        if damage := ckpt.find_damage(folder, verify_contents=not quick):
            yield f"{folder.name} is damaged: {damage}"
        else:
            whole[step] = folder
    report.checkpoints = (
        " ".join(str(step) if step in whole else f"{step}(damaged)" for step in folders) or "none"
    )
    newest = max(whole, default=0)
    training = getattr(config, "training", None)
    report.steps = f"{newest}/{training.max_steps}" if training else str(newest)
    if not folders:
        yield "it has no checkpoint yet"
    is_trained = False
    if whole:
        is_trained = any(
            (whole[newest] / name).exists() for name in (ckpt.MODEL_FILE, ckpt.OPTIMIZER_FILE)
        )
        try:
            yield from check_checkpoint(whole[newest], newest, config, is_trained, quick)
        except (ValueError, OSError, SafetensorError) as error:
            yield f"{whole[newest].name}: {one_line(error)}"
    if is_trained or (run / METRICS_FILE).exists():
        yield from check_metrics(run, newest, training.log_every_steps if training else 1, report)


def check_checkpoint(
    folder: Path, step: int, config: StageConfig | None, is_trained: bool, quick: bool
) -> Iterator[str]:
    """Problems inside a checkpoint whose files are those that its manifest lists."""
    state = ckpt.read_state(folder, ("step", "ema_updates", "num_processes", "inputs"))
    if state["step"] != step:
        yield f"{folder.name}: {ckpt.STATE_FILE} says step {state['step']}"
    if state["ema_updates"] != step:
        yield f"{folder.name}: the EMA has followed {state['ema_updates']} of {step} steps"
    networks = build_networks(config) if config else {}
    for prefix, network in networks.items():
        expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
        for name in network_files(prefix, is_trained):
            try:
                check_shapes(shapes_of(folder / name), expected, optional=set())
            except ValueError as error:
                yield f"{folder.name}: {name} does not fit the network of {CONFIG_FILE}: {error}"
        if is_trained:
            sizes = {tuple(p.shape) for p in network.parameters()}
            yield from check_optimizer(folder / f"{prefix}{ckpt.OPTIMIZER_FILE}", sizes, quick)
    if is_trained:
        yield from check_positions(folder, state["num_processes"])
    if not quick:
        for path in sorted(folder.glob("*.safetensors")):
            yield from check_finite(path)
        if is_trained:
            yield from check_ema(folder)


def build_networks(config: StageConfig) -> dict[str, nn.Module]:
    """What a stage trains, by the prefix of its files, without memory for the weights."""
    with torch.device("meta"):
        if isinstance(config, TextEncoderStage):
            return {"": ClipPair(open_clip_config(config.clip))}
        if isinstance(config, TokenizerStage):
            networks = {"": ImageTokenizer(config.tokenizer)}
            if config.adversarial.weight:
                networks["discriminator_"] = Adversary(
                    config.discriminator, config.adversarial.lecam_decay
                )
            return networks
        if isinstance(config, TextProjectorStage):
            return {"": TextProjector(config.projector)}
        if isinstance(config, TextDecoderStage):
            return {"": TextAutoencoder(config.projector, config.text_decoder)}
        if isinstance(config, FlowTokStage):
            return {"": FlowModel(config.projector, config.flowtok)}
    raise ValueError(f"stage {config.stage} trains no network, but there are checkpoints")


def network_files(prefix: str, is_trained: bool) -> list[str]:
    """The files with a network's weights."""
    if prefix:
        return [prefix + ckpt.MODEL_FILE] if is_trained else []
    return [ckpt.MODEL_FILE, ckpt.EMA_FILE] if is_trained else [ckpt.EMA_FILE]


def shapes_of(path: Path) -> dict[str, Tensor]:
    """Name -> meta tensor, from the header of a safetensors file.

    Raises:
        ValueError: missing or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"it cannot be read: {one_line(error)}") from error


def check_finite(path: Path) -> Iterator[str]:
    """Weights that are no numbers; one tensor in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                yield f"{path.parent.name}: {path.name}: {name} is not finite"


def check_ema(folder: Path) -> Iterator[str]:
    """An EMA that cannot be the average of these weights."""
    with (
        safe_open(folder / ckpt.MODEL_FILE, framework="pt") as model,
        safe_open(folder / ckpt.EMA_FILE, framework="pt") as ema,
    ):
        if set(model.keys()) != set(ema.keys()):
            yield f"{folder.name}: {ckpt.EMA_FILE} and {ckpt.MODEL_FILE} have tensors of different names"
            return
        difference = size = 0.0
        for name in model.keys():  # noqa: SIM118
            weight, average = model.get_tensor(name).double(), ema.get_tensor(name).double()
            if weight.shape != average.shape:
                yield f"{folder.name}: {name} is {list(weight.shape)} in the weights, {list(average.shape)} in the EMA"
                return
            difference += (average - weight).square().sum().item()
            size += weight.square().sum().item()
    if difference > EMA_TOO_FAR**2 * size:
        distance = (difference / size) ** 0.5 if size else float("inf")
        yield f"{folder.name}: the EMA is {distance:.2g} times the weights' norm away from them"


def check_optimizer(path: Path, sizes: set[tuple[int, ...]], quick: bool) -> Iterator[str]:
    """Problems of the optimiser's moments; `sizes` are those that the network's weights have."""
    name = f"{path.parent.name}: {path.name}"
    content = ckpt.load_plain(path, mmap=True)
    states = content.get("state") if isinstance(content, dict) else None
    if not isinstance(states, dict) or not states:
        yield f"{name} holds no moments"
        return
    for index, state in states.items():
        for moment in MOMENTS:
            tensor = state.get(moment) if isinstance(state, dict) else None
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) not in sizes:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else "missing"
                yield f"{name}: {moment} of weight {index} is {shape}, which fits no weight"
            elif not quick and not torch.isfinite(tensor).all():
                yield f"{name}: {moment} of weight {index} is not finite"


def check_positions(folder: Path, num_processes: int) -> Iterator[str]:
    """Data positions that are missing or broken."""
    for rank in range(num_processes):
        path = folder / ckpt.rank_file(rank)
        if not path.is_file():
            yield f"{folder.name}: {path.name}, the data position of process {rank} of {num_processes}, is missing"
            continue
        content = ckpt.load_plain(path)
        if not isinstance(content, dict) or not {"loader", "metrics"} <= content.keys():
            yield f"{folder.name}: {path.name} holds no data position"


def check_metrics(run: Path, newest: int, log_every: int, report: Report) -> Iterator[str]:
    """Problems of metrics.jsonl up to the newest whole checkpoint; fills in the report's losses."""
    path = run / METRICS_FILE
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    steps = [step_of(line) for line in lines]
    if None in steps:
        yield f"{METRICS_FILE}: line {steps.index(None) + 1} is no JSON object with a step"
    steps = [step for step in steps if step is not None]
    for before, after in pairwise(steps):
        if after <= before:
            yield f"{METRICS_FILE}: step {after} comes after step {before}"
            break
    last = max(steps, default=0)
    if last < newest // log_every * log_every:
        yield f"{METRICS_FILE} ends at step {last}, the newest whole checkpoint is of step {newest}"
    good = [line for line in lines if step_of(line) is not None]
    if good:
        values = json.loads(good[-1])
        names = ["loss", *(name for name in values if name.startswith("weighted/"))]
        losses = {name: values[name] for name in names if name in values}
        shown = (
            f"{name} {value:.4g}"
            for name, value in losses.items()
            if isinstance(value, int | float)
        )
        report.losses = escape("  ".join(shown)) or "-"


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(1 if exit_on_error(lambda: main(arguments)) else 0)
