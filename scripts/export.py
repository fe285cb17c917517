"""Pack a trained run to pass it on: a folder of safetensors, config.json and a model card.

    python scripts/export.py runs/emoji --output exported/emoji
    python scripts/export.py runs/emoji --output exported/emoji --push USER/NAME
    python sample.py --run exported/emoji --prompts "pineapple, food fruit"

RUN is an experiment, or one of its stage-3 runs. EMA weights of the tokenizer, of the flow with its
projector and, where the run has one, of the flow to captions with its text decoder. A text tower
that was trained here, or read from a file, goes into text_encoder/; one of a hub is named. The card
(README.md) has the figures of report.json and the newest picture of the run.
FlowTokPipeline.from_pretrained reads the folder, or the id to which --push uploads it (after
`hf auth login`). Written aside and renamed: a folder that is there is whole.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import huggingface_hub
import torch
from torch import nn

from data.files import check_new_folder, folder_written_whole, user_path, write_json, write_text
from eval.programs import build_parser
from modeling.clip_weights import load_clip, model_config, save_clip, why_hub_is_silent
from modeling.layers import fingerprint, save_weights
from modeling.pipeline import DirectionConfig, PipelineConfig
from modeling.pretrained import CONFIG_FILE, HUB_ID, TOWER_FOLDER
from modeling.text_encoder import TextEncoderConfig
from training import pipelines
from training.checkpoint import latest_checkpoint
from training.errors import ROOT, exit_on_error
from training.loading import read_run_config, read_section
from training.pictures import sample_path

SAMPLES_FILE = "samples.png"
CARD = """---
library_name: flowtok
pipeline_tag: {tag}
---
# {name}

[FlowTok](https://arxiv.org/abs/2503.10772): text tokens flow into image tokens. Images of {size} x
{size} pixels are {tokens} tokens of {channels} channels.
{picture}
## Use

With the code that wrote this folder{commit}, after `pip install .` in its folder:

```python
from flowtok.pipeline import FlowTokPipeline

pipeline = FlowTokPipeline.from_pretrained("{name}")
{calls}
```

## Training

| run | steps | batch size | data |
|---|---|---|---|
{runs}

The weights are averages over the training (EMA), float32.

## Figures

{figures}
"""
DRAW = 'pipeline({prompt!r}, steps={steps}, guidance={guidance:g}, seed=0)[0].save("image.png")'
CAPTION = """sampling = pipeline.direction("image_to_text").sampling
# images: B x 3 x {size} x {size} in [0, 1]
captions = pipeline.captioner.captions(images, sampling)"""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="experiment folder, or a stage-3 run folder")
    add("--output", type=user_path, required=True, metavar="FOLDER", help="a new folder")
    help_text = "then upload it to the hub; a repository that is not there yet is made private"
    add("--push", metavar="USER/NAME", help=help_text)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Check, collect, write, upload."""
    # Folder and hub are asked first: to read a run takes minutes, to upload it longer.
    target = args.output.resolve()
    check_new_folder(target)
    hub = huggingface_hub.HfApi()
    if args.push:
        if not HUB_ID.fullmatch(args.push):
            raise ValueError(f"--push {args.push}: expected USER/NAME")
        if silence := why_hub_is_silent():
            raise ValueError(f"--push {args.push}: {silence}")
        hub.whoami()

    # All is read before anything is written, and the card comes last: it says what is there
    runs, networks, config = collect(args.run)
    figures = describe_report(args.run, networks)
    with folder_written_whole(target) as folder:
        for part, network in networks.items():
            save_weights(network.state_dict(), folder / f"{part}.safetensors")
        config.text_encoder = pack_tower(config.text_encoder, folder / TOWER_FOLDER)
        write_json(asdict(config), folder / CONFIG_FILE)
        pictures = sorted(sample_path([*runs.values()][-1], 0).parent.glob("step_*.png"))
        if pictures:  # the newest that the run made of itself
            shutil.copyfile(pictures[-1], folder / SAMPLES_FILE)
        card = write_card(args.push or args.output.name, runs, config, bool(pictures), figures)
        write_text(card, folder / "README.md")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: written, {size / 1e6:.1f} MB")
    if args.push:
        hub.create_repo(args.push, private=True, exist_ok=True)
        print(hub.upload_folder(repo_id=args.push, folder_path=target).commit_url)
    print(f"python sample.py --run {args.push or args.output}")


def collect(run: Path) -> tuple[dict[str, Path], dict[str, nn.Module], PipelineConfig]:
    """(runs by what they made, networks by the file that they go to, config) of a run."""
    runs, networks, config = {}, {}, PipelineConfig(captions=[])
    cpu = torch.device("cpu")
    for direction in sorted(pipelines.directions_of(run)):
        if direction == "text_to_image":
            flow_dir = pipelines.flow_folder(run)
            parts, _ = pipelines.load_pipeline(run, cpu)
            config.text_encoder = parts.text_encoder.tokenize.config
            config.captions = pipelines.example_captions(run)
        else:
            flow_dir = pipelines.captioning_run(run)
            parts, _ = pipelines.load_captioner(run, cpu)
            config.text_encoder = parts.tokenize.config
            config.text_decoder = parts.decoder.config
            networks["text_decoder"] = parts.decoder
        # One folder has one tokenizer for both directions
        before = networks.setdefault("tokenizer", parts.tokenizer)
        if fingerprint(before) != fingerprint(parts.tokenizer):
            raise ValueError(f"{run} has another tokenizer for captions: export each run by itself")
        sections = {f.name: read_section(flow_dir, f.name, f.type) for f in fields(DirectionConfig)}
        setattr(config, direction, DirectionConfig(**sections))
        config.tokenizer = parts.tokenizer.config
        networks[direction] = parts.flow
        runs["tokenizer"] = pipelines.find_tokenizer(flow_dir)[0]
        runs[direction] = flow_dir
    return runs, networks, config


def pack_tower(config: TextEncoderConfig, folder: Path) -> TextEncoderConfig:
    """Copy a text tower of this machine into a folder; one of a hub stays a name."""
    # A path means nothing on another machine; a name on the hub does, and is a gigabyte less.
    named = config.model.removeprefix("local-dir:")
    is_path = named != config.model or config.family == "transformers"
    if is_path and Path(named).is_dir():
        shutil.copytree(named, folder)
    elif not config.names_its_weights and Path(config.pretrained).is_file():
        save_clip(load_clip(config), model_config(config), folder)
    else:
        return config
    # The folder's own config says which activation it has.
    return replace(config, model=folder.name, pretrained="", exact_gelu=False)


# The model card


def write_card(
    name: str, runs: dict[str, Path], config: PipelineConfig, has_picture: bool, figures: str
) -> str:
    """What it is, how to use it, what it was trained on, what was measured."""
    # A folder may have one direction or both: the card shows how to call what is there.
    calls = []
    tokenizer = config.tokenizer
    if draws := config.text_to_image:
        prompt = next(iter(config.captions), "a prompt")
        sampling = draws.sampling
        call = DRAW.format(prompt=prompt, steps=sampling.steps, guidance=sampling.guidance)
        calls.append(call)
    if config.image_to_text:
        calls.append(CAPTION.format(size=tokenizer.image_size))
    commit = find_commit()
    return CARD.format(
        tag="text-to-image" if draws else "image-to-text",
        name=name,
        size=tokenizer.image_size,
        tokens=tokenizer.num_tokens,
        channels=tokenizer.token_channels,
        picture=f"\n![samples]({SAMPLES_FILE})\n" if has_picture else "",
        commit=f" (commit {commit})" if commit else "",
        calls="\n".join(calls),
        runs="\n".join(describe_run(folder) for folder in runs.values()),
        figures=figures,
    )


def find_commit() -> str:
    """The commit of this code, with -dirty if files differ from it; "" outside a clone."""
    # Without tags: a release's name says less than the commit that was used.
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        return ""


def describe_run(folder: Path) -> str:
    """A row: name, steps, batch size and the names of the shards that a run was trained on."""
    config = read_run_config(folder)
    step, _ = latest_checkpoint(folder)
    # scripts/convert_checkpoint.py writes runs that were never trained here.
    if "training" not in config:
        return f"| {folder.name} | converted weights | | |"
    sources = [*config.data.get("sources", {}).values()] or [config.data]
    # Without the folders of this machine.
    shards = ["/".join(Path(shard).parts[-2:]) for one in sources for shard in one.shards]
    listed = ", ".join(f"`{shard}`" for shard in shards)
    return f"| {folder.name} | {step} | {config.training.batch_size} | {listed} |"


def describe_report(run: Path, networks: dict[str, nn.Module]) -> str:
    """The numbers of the report.json of an experiment as a table, if they are of this flow."""
    # Beside the experiment's runs, of which one alone may be exported.
    files = [folder / "report.json" for folder in (run, run.parent)]
    values = next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    flow = networks.get("text_to_image")
    inputs = values.pop("inputs", {})
    if flow is None or inputs.get("flow_fingerprint") != fingerprint(flow):
        return "None were measured (stage report)."
    rows = [f"| `{name}` | {value:.4g} |" for name, value in list_numbers(values)]
    return "\n".join(["| report.json | |", "|---|---|", *rows])


def list_numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dicts by their dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from list_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
