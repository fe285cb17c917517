"""Convert the released FlowTok weights into run folders that sample.py, evaluation and fine-tuning (init_from) read.

    python scripts/convert_checkpoint.py FlowTok-XL.pth FlowTiTok_512.bin --run runs/released_xl
    python sample.py --run runs/released_xl --prompts "a corgi in the snow" --sampler euler_release
    python scripts/convert_checkpoint.py FlowTiTok_512.bin runs/released_tokenizer      (one file: its own run folder)

In: a flow file or a tokenizer file, recognised by its tensors: torch.save with or without data parallel's "module.", in
a dict under state_dict, model or nnet_ema or not; or safetensors. Nothing in a file is executed: a pickle that needs
more than tensors and plain containers is refused. What is converted and how strictly: modeling/released.py.
Out: OUT/config.yaml and OUT/checkpoints/step_00000000/ with ema.safetensors, float32; with --run, OUT/flowtok and
OUT/tokenizer of these. Written aside and renamed: a folder that is there is whole. The text tower is not part of the
files: its name goes into the config, and it is loaded when it is used.
"""

import argparse
import math
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

# Run as a file, Python looks into scripts/ only
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling.clip_weights import check_clip
from modeling.flow import FlowConfig
from modeling.pipeline import SamplingConfig
from modeling.released import LATENT_SCALE, TEMPERATURE, Converted, convert, printable
from modeling.text_encoder import TextEncoderConfig
from training.checkpoint import EMA_FILE, begin_checkpoint, commit_checkpoint, flush
from training.errors import exit_on_error
from training.run import CONFIG_FILE

# Keys under which a file may have its tensors, the averaged ones first
WRAPPERS = ("nnet_ema", "state_dict", "model")
PREFIX = "module."
FIXED = re.compile(r"(^pos_embed|\.freqs_(cos|sin))$")  # tables that are computed here
ZIP_START = b"PK\x03\x04"
CAPTIONS = [  # of sample.py without prompts
    "a corgi running through fresh snow",
    "a red bicycle leaning against a white wall",
    "a bowl of fruit on a wooden table, oil painting",
    "a lighthouse on a cliff at sunset",
]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "released", type=Path, metavar="RELEASED_FILE", help="a flow or a tokenizer file"
    )
    parser.add_argument(
        "second",
        type=Path,
        metavar="OUT_DIR",
        help="run folder to write; with --run: the other file",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="OUT",
        help="experiment folder to write, from a flow and a tokenizer",
    )
    parser.add_argument("--num-heads", type=int, help="of a flow that is none of B, XL, H")
    parser.add_argument(
        "--latent-scale",
        type=float,
        default=LATENT_SCALE,
        help="of the flow (default: the release's)",
    )
    tower = TextEncoderConfig()
    parser.add_argument(
        "--text-encoder-model",
        default=tower.model,
        help="open_clip name, hf-hub:... or local-dir:...",
    )
    parser.add_argument(
        "--text-encoder-pretrained",
        default=tower.pretrained,
        help="open_clip tag or a weights file",
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Check, convert everything, then write."""
    target = (args.run or args.second).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: name a new folder")
    if not (math.isfinite(args.latent_scale) and args.latent_scale > 0):
        raise ValueError(f"--latent-scale must be positive, got {args.latent_scale}")
    text_encoder = text_encoder_of(args)
    files = [args.released, args.second] if args.run else [args.released]
    converted = [convert_file(file, args) for file in files]
    stages = [one.stage for one in converted]
    if args.run and sorted(stages) != ["flowtok", "tokenizer"]:
        kinds = " and ".join(
            f"{file} is a {stage} file" for file, stage in zip(files, stages, strict=True)
        )
        raise ValueError(f"--run needs a flow file and a tokenizer file, but {kinds}")
    if args.num_heads is not None and "flowtok" not in stages:
        raise ValueError(
            f"--num-heads is for a flow, but {args.released} is a tokenizer file, whose tables give the heads"
        )
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        for one in converted:
            run_dir = target / one.stage if args.run else target
            write_run(one, text_encoder, run_dir, partial / run_dir.relative_to(target))
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{target}: written")
    if args.run:
        print(f'python sample.py --run {args.run} --prompts "{CAPTIONS[0]}"')


def text_encoder_of(args: argparse.Namespace) -> TextEncoderConfig:
    """The text tower as the configs name it: local paths absolute.

    Raises:
        ValueError: it could never be loaded.
    """
    model, pretrained = args.text_encoder_model, args.text_encoder_pretrained
    if model.startswith("local-dir:"):
        model = f"local-dir:{Path(model.removeprefix('local-dir:')).resolve()}"
    if Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    config = TextEncoderConfig(model, pretrained)
    check_clip(config)
    return config


def convert_file(path: Path, args: argparse.Namespace) -> Converted:
    """Read and convert one released file; says what it is and what was done to it.

    Raises:
        ValueError: with the file's name; see read_tensors and modeling.released.convert.
    """
    tensors = read_tensors(path)
    try:
        converted = convert(tensors, args.num_heads, args.latent_scale)
        check_finite(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    millions = sum(tensor.numel() for tensor in converted.tensors.values()) / 1e6
    print(
        f"{path}: {converted.stage}, {len(tensors)} tensors, {millions:.2f}M weights, {sizes_text(converted)}"
    )
    other = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"}
    if other:
        print(f"  note: {' and '.join(sorted(other))} converted to float32")
    if converted.stage == "flowtok" and TEMPERATURE not in tensors:
        print(
            f"  note: {TEMPERATURE} is not in the file, log(1 / 0.07) is taken; only training reads it"
        )
    unfilled = [name for name, tensor in tensors.items() if FIXED.search(name) and not tensor.any()]
    if unfilled:
        print(f"  note: {' and '.join(unfilled)} all zero; computed here anyway")
    return converted


def sizes_text(converted: Converted) -> str:
    """The network's sizes on one line."""
    if converted.stage == "flowtok":
        size = converted.networks["flowtok"]
        return f"width {size.width}, depth {size.depth}, {size.num_heads} heads"
    size = converted.networks["tokenizer"]
    return f"{size.image_size} px, encoder width {size.encoder.width}, decoder width {size.decoder.width}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without wrappers and prefix; nothing in the file is executed.

    Raises:
        ValueError: no such file, one that can't be read, that needs more than tensors, or that holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{":
            content = load_file(path)
        else:
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP_START)
            )
    except Exception as error:  # torch, pickle, zip and safetensors raise their own types
        raise ValueError(f"{path}: {reading_problem(error)}") from error
    try:
        return check_content(unwrap(content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reading_problem(error: Exception) -> str:
    """One line on why a file was not read; without torch's advice to execute it."""
    needed = re.search(r"GLOBAL (\S+)", str(error))
    if needed:
        return f"refused: its pickle needs {needed[1]}, only tensors and plain containers are read"
    reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
    reason = f": {reason[:200]}" if reason and "weights_only" not in reason else ""
    return f"cannot be read, it is cut short or no checkpoint ({type(error).__name__}{reason})"


def unwrap(content: Any) -> Any:
    """What lies under the wrapping keys, with the prefix taken off all names."""
    for _ in WRAPPERS:
        wrapped = (
            [content[key] for key in WRAPPERS if key in content]
            if isinstance(content, dict)
            else []
        )
        content = next((inner for inner in wrapped if isinstance(inner, dict)), content)
    while (
        isinstance(content, dict)
        and content
        and all(str(name).startswith(PREFIX) for name in content)
    ):
        content = {str(name).removeprefix(PREFIX): value for name, value in content.items()}
    return content


def check_content(content: Any) -> dict[str, Tensor]:
    """Refuse everything but floating-point tensors by name.

    Raises:
        ValueError: naming what else is there.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(
                f"{printable(str(name))} is a {type(value).__name__}, expected a tensor"
            )
        if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
            raise ValueError(
                f"{printable(name)} is {value.dtype}, {value.layout}, on {value.device}; expected floats"
            )
    return content


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{name} has values that are not finite")


def run_config(converted: Converted, text_encoder: TextEncoderConfig, run_dir: Path) -> dict:
    """What training/loading.py and sample.py read of a run's config; nothing of its training."""
    sections = dict(converted.networks)
    paths = {"run_dir": str(run_dir)}
    if converted.stage == "flowtok":
        sections |= {"flow": FlowConfig(), "sampling": SamplingConfig()}
        paths["tokenizer_run"] = str(run_dir.parent / "tokenizer")
        paths["pictures"] = {"captions": CAPTIONS}
    else:
        sections["text_encoder"] = text_encoder
    values = {name: asdict(section) for name, section in sections.items()}
    return {"stage": converted.stage, **paths, **values}


def write_run(
    converted: Converted, text_encoder: TextEncoderConfig, run_dir: Path, folder: Path
) -> None:
    """Write what will be the run folder `run_dir` into `folder`.

    It has no inputs: a file does not say what it goes with.
    """
    folder.mkdir(parents=True)
    config = run_config(converted, text_encoder, run_dir)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False))
    checkpoint = begin_checkpoint(folder, step=0)
    save_file(converted.tensors, checkpoint / EMA_FILE)
    state = {"step": 0, "ema_updates": 0, "num_processes": 1, "inputs": {}}
    commit_checkpoint(checkpoint, state, keep=1)


if __name__ == "__main__":
    arguments = parse_args()
    exit_on_error(lambda: main(arguments))
