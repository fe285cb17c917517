"""An experiment of tiny sizes: several test files run the real main() of its stages in-process."""

import json
from pathlib import Path

import torch
import yaml
from conftest import reset_accelerate
from safetensors.torch import load_file

import sample
import train_flowtok
import train_text_decoder
import train_text_projector
import train_tokenizer
from configs.load import load_config
from eval import report
from scripts import encode_tokens, train_text_encoder
from training import checkpoint as ckpt

PROGRAMS = {  # stage -> (dataclass, main), in the order of train_flowtok.sh
    "text_encoder": (train_text_encoder.TextEncoderStage, train_text_encoder.main),
    "tokenizer": (train_tokenizer.TokenizerStage, train_tokenizer.main),
    "tokens": (encode_tokens.TokensStage, encode_tokens.main),
    "text_projector": (train_text_projector.TextProjectorStage, train_text_projector.main),
    "text_decoder": (train_text_decoder.TextDecoderStage, train_text_decoder.main),
    "flowtok": (train_flowtok.FlowTokStage, train_flowtok.main),
    "report": (report.ReportStage, report.main),
}
TIMES = ("samples_per_second", "data_wait_share")  # of the metrics: differ between equal runs


def stage_configs(shards: Path) -> dict[str, dict]:
    """Configs of all stages on the images of a folder; 16 tokens of 4 channels, 4 steps."""
    size = {"width": 16, "depth": 1, "num_heads": 2}
    reading = {"num_workers": 0, "shuffle_buffer": 16}
    images, tokens = {"shards": [f"{shards}/*.tar"]}, {"shards": ["${experiment_dir}/tokens/*.tar"]}
    projector = {"mlp_width": 32, "alignment_width": 16, **size}
    clip = {"image_size": 32, "context_length": 16, "embed_dim": 24}
    tokenizer = {"image_size": 32, "patch_size": 8, "token_channels": 4, "init_std": 0}
    tokenizer |= {"encoder": size, "decoder": size}
    rhythm = ("log_every_steps", "checkpoint_every_steps", "sample_every_steps")
    training = {"max_steps": 4, "batch_size": 8, "ema_decay": 0.9} | dict.fromkeys(rhythm, 2)
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 1, "schedule": "cosine"}
    common = {"optimizer": optimizer, "training": training}
    text_encoder = {"model": "local-dir:${experiment_dir}/text_encoder/clip"}
    return {
        "text_encoder": {
            "clip": clip | {"width": 64, "depth": 1, "num_heads": 2},
            "data": images | reading,
            **common,
        },
        "tokenizer": {
            "tokenizer": tokenizer,
            "data": images | reading,
            "pictures": {"num_samples": 4},
            "text_encoder": text_encoder,
            **common,
        },
        "tokens": {"data": images, "batch_size": 10, "store_text_states": True},
        "text_projector": {
            "projector": projector,
            "data": tokens | reading,
            "losses": {"image_regression_weight": 1.0},
            **common,
        },
        "text_decoder": {
            "projector": projector,
            "text_decoder": size | {"mlp_width": 32, "vocabulary_size": 64},
            "data": tokens | reading,
            "heldout_shards": [f"{shards}/train-00001.tar"],
            **common,
        },
        "flowtok": {
            "flowtok": size,
            "sampling": {"steps": 3},
            "data": tokens | reading,
            "pictures": {"captions": ["a red circle", "a blue square"]},
            **common,
        },
        "report": {
            "train_shards": [f"{shards}/train-00000.tar"],
            "heldout_shards": [f"{shards}/train-00001.tar"],
            "num_train_captions": 6,
        },
    }


def training(**values) -> list[str]:
    """Overrides of training.*."""
    return [f"training.{name}={value}" for name, value in values.items()]


def to_text(experiment: Path, shards: Path) -> list[str]:
    """Overrides with which stage flowtok flows from image to text, for a text decoder's z_T."""
    run = f"{experiment}/text_decoder"
    decoder = [f"projector_run={run}", f"text_decoder_run={run}", "flow.projector=frozen"]
    losses = ["losses.alignment_weight=0", "losses.kl_weight=0"]
    pictures = [f"pictures.images=[{shards}/*.tar]", "pictures.num_images=3"]
    return ["flow.direction=image_to_text", *decoder, *losses, *pictures]


class Experiment:
    """A folder of configs and results."""

    programs = PROGRAMS

    def __init__(self, folder: Path, shards: Path):
        self.folder = folder
        (folder / "configs").mkdir()
        for stage, values in self.stage_configs(shards).items():
            text = yaml.safe_dump({"experiment_dir": str(folder), **values})
            self.config_file(stage).write_text(text)

    def stage_configs(self, shards: Path) -> dict[str, dict]:
        return stage_configs(shards)

    def config_file(self, stage: str) -> Path:
        return self.folder / "configs" / f"{stage}.yaml"

    def inputs(self, stage: str) -> list[str]:
        """Overrides with which a stage in another folder reads this experiment's earlier stages."""
        if stage == "text_encoder":
            return []
        if stage == "tokenizer":
            return [f"text_encoder.model=local-dir:{self.folder}/text_encoder/clip"]
        runs = [f"tokenizer_run={self.folder}/tokenizer"]
        if stage != "tokens":
            runs.append(f"data.shards=[{self.folder}/tokens/*.tar]")
        if stage == "flowtok":
            runs.append(f"projector_run={self.folder}/text_projector")
        return runs

    def config(self, stage: str, *overrides: str):
        return load_config(self.programs[stage][0], self.config_file(stage), list(overrides))

    def run(self, stage: str, *overrides: str) -> Path:
        """Run a stage as its script does; returns its folder."""
        reset_accelerate()
        config = self.config(stage, *overrides)
        self.programs[stage][1](config)
        return Path(config.run_dir)

    def run_in(self, folder: Path, stage: str, *overrides: str) -> Path:
        """Run a stage into another folder, on this experiment's earlier stages."""
        return self.run(stage, *self.inputs(stage), f"experiment_dir={folder}", *overrides)


def draw(run: Path, *arguments) -> None:
    """sample.py with arguments."""
    sample.main(sample.parse_args(["--run", str(run), "--device", "cpu", *map(str, arguments)]))


def metrics(run: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def weights(run: Path, file: str = ckpt.MODEL_FILE) -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint."""
    return load_file(ckpt.latest_checkpoint(run)[1] / file)


def last_weights(chain, folder, stage, options) -> dict[str, dict]:
    """Weights after a short run with each of several (groups of) overrides."""
    runs = {}
    for index, option in enumerate(options):
        quiet = "training.sample_every_steps=0"
        runs[option] = weights(chain.run_in(folder / str(index), stage, quiet, *option.split()))
    return runs


def all_different(runs: dict[str, dict]) -> bool:
    """Whether no two runs ended with the same weights."""
    values = list(runs.values())
    return not any(equal(a, b) for i, a in enumerate(values) for b in values[:i])


def equal(a, b) -> bool:
    """Whether nested dicts and lists of tensors and values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
