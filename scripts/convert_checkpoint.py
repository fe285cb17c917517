"""Convert released FlowTok and TokenFlow weights into run folders to sample, measure and fine-tune.

    python scripts/convert_checkpoint.py FlowTok-XL.pth FlowTiTok_512.bin --run runs/released_xl
    python sample.py --run runs/released_xl --prompts "a corgi in the snow" --sampler euler_release
    python scripts/convert_checkpoint.py FlowTiTok_512.bin runs/released_tokenizer
    python scripts/convert_checkpoint.py tokenflow_clipb_32k_enhanced.pt runs/released_dual

The last two: one file, its own run folder. In: a flow file or a tokenizer file, recognised by its
tensors, with or without data parallel's "module.", in a dict under ema, state_dict, model or
nnet_ema or not. Nothing in a file is executed: a pickle that needs more than tensors and plain
containers is refused. What is checked: modeling/released.py, modeling/released_dual.py.
Out: OUT/config.yaml and OUT/checkpoints/step_00000000/ with ema.safetensors, float32; with --run,
OUT/flowtok and OUT/tokenizer of these. Written aside and renamed: a folder that is there is whole.
The text tower is not in the files: the config names it, and it is loaded when it is used.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import torch
import yaml
from torch import Tensor

from data.files import check_new_folder, folder_written_whole, user_path
from eval.programs import build_parser
from modeling.clip_weights import check_clip
from modeling.flow import FlowConfig
from modeling.layers import save_weights
from modeling.pipeline import SamplingConfig
from modeling.released import Converted, convert
from modeling.released_dual import convert_dual, is_dual
from modeling.text_encoder import TextEncoderConfig
from training.checkpoint import EMA_FILE, begin_checkpoint, commit_checkpoint, load_plain
from training.errors import exit_on_error
from training.run import CONFIG_FILE

WRAPPERS = ("ema", "nnet_ema", "state_dict", "model")  # keys of tensors, averaged ones first
PREFIX = "module."
CAPTIONS = [  # of sample.py without prompts
    "a corgi running through fresh snow",
    "a red bicycle leaning against a white wall",
    "a bowl of fruit on a wooden table, oil painting",
    "a lighthouse on a cliff at sunset",
]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    tower = TextEncoderConfig()
    add("released", type=user_path, metavar="RELEASED_FILE", help="a flow or a tokenizer file")
    help_text = "run folder to write; with --run: the other file"
    add("second", type=user_path, metavar="OUT_DIR", help=help_text)
    help_text = "experiment folder to write, from a flow and a tokenizer"
    add("--run", type=user_path, metavar="OUT", help=help_text)
    add("--num-heads", type=int, help="of a flow that is none of B, XL, H")
    help_text = "open_clip name, hf-hub:... or local-dir:..."
    add("--text-encoder-model", default=tower.model, help=help_text)
    help_text = "open_clip tag or a weights file"
    add("--text-encoder-pretrained", default=tower.pretrained, help=help_text)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Check, convert everything, then write."""
    # What needs no file is checked first: a file has gigabytes
    target = (args.run or args.second).resolve()
    check_new_folder(target)
    model = args.text_encoder_model
    # Absolute, since the run is read from other folders than this one.
    if model.startswith("local-dir:"):
        model = f"local-dir:{Path(model.removeprefix('local-dir:')).resolve()}"
    pretrained = args.text_encoder_pretrained
    if Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    text_encoder = TextEncoderConfig(model, pretrained)
    check_clip(text_encoder)

    # What the files are shows once they are converted.
    files = [args.released, args.second] if args.run else [args.released]
    converted = [convert_file(file, args.num_heads) for file in files]
    stages = [one.stage for one in converted]
    if args.run and sorted(stages) != ["flowtok", "tokenizer"]:
        pairs = zip(files, stages, strict=True)
        kinds = " and ".join(f"{file} is a {stage} file" for file, stage in pairs)
        raise ValueError(f"--run needs a flow file and a tokenizer file, but {kinds}")
    if args.run and any("dual" in one.networks for one in converted):
        raise ValueError("--run: a flow makes latents, which a dual tokenizer does not have")
    if args.num_heads is not None and "flowtok" not in stages:
        raise ValueError(f"--num-heads is for a flow, but {args.released} is a tokenizer file")

    with folder_written_whole(target) as partial:
        for one in converted:
            stage = one.stage if args.run else ""
            write_run(one, text_encoder, target / stage, partial / stage)
    print(f"{target}: written")
    if args.run:
        print(f'python sample.py --run {args.run} --prompts "{CAPTIONS[0]}"')


def convert_file(path: Path, num_heads: int | None) -> Converted:
    """Read and convert one released file; says what it is. ValueError names the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    # Mapped, so that a file of gigabytes is not copied; the older form can't be
    content = load_plain(path, mmap=is_zipfile(path))
    try:
        tensors = unwrap(content)
        if is_dual(tensors):
            converted = convert_dual(tensors)
        else:
            converted = convert(tensors, num_heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    millions = sum(tensor.numel() for tensor in converted.tensors.values()) / 1e6
    print(f"{path}: {converted.stage}, {len(tensors)} tensors, {millions:.2f}M weights")
    return converted


def unwrap(content: Any) -> dict[str, Tensor]:
    """The finite floats, by name, that lie under wrapping keys and prefixes; else ValueError."""
    # Wrappers lie inside wrappers, as in {"state_dict": {"nnet_ema": ...}}.
    for _ in WRAPPERS:
        if isinstance(content, dict):
            inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
            content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected tensors by name")
    # Twice where data parallel was wrapped twice.
    while content and all(str(name).startswith(PREFIX) for name in content):
        content = {str(name).removeprefix(PREFIX): value for name, value in content.items()}

    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise ValueError(f"{name} is {kind}; expected floats")
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"{name} has values that are not finite")
    return content


def write_run(
    converted: Converted, text_encoder: TextEncoderConfig, run_dir: Path, folder: Path
) -> None:
    """Write what will be the run folder `run_dir` into `folder`."""
    # The config has what loading reads, and nothing of the training.
    config: dict[str, Any] = {"stage": converted.stage, "run_dir": str(run_dir)}
    sections = dict(converted.networks)
    if converted.stage == "flowtok":
        config["tokenizer_run"] = str(run_dir.parent / "tokenizer")
        config["pictures"] = {"captions": CAPTIONS}
        sections |= {"flow": FlowConfig(), "sampling": SamplingConfig()}
    else:
        sections["text_encoder"] = text_encoder
    config |= {name: asdict(section) for name, section in sections.items()}
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False))

    # No inputs: a file does not say what it goes with.
    checkpoint = begin_checkpoint(folder, step=0)
    save_weights(converted.tensors, checkpoint / EMA_FILE)
    state = {"step": 0, "ema_updates": 0, "num_processes": 1, "inputs": {}}
    commit_checkpoint(checkpoint, state, keep=1)


if __name__ == "__main__":
    exit_on_error(lambda: main(parse_args()))
