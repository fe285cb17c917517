"""What a refactor must not change, as numbers: losses, weights, tokens, samples, data order.

    python research/record.py OUT.json                 # 2.5 minutes on one core
    python research/record.py --compare A.json B.json  # a line per part; status 1 if any differs

Runs every stage of the demo and of tiny copies of the full-size experiments for 20 steps at fixed
seeds, as programs of their own with one thread, then samples their checkpoints and reads their
data. Floats are recorded exactly, bytes as SHA-256. Two records of one tree are equal to the last
bit; those of two machines need not be (part "environment").
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from itertools import islice, product
from operator import itemgetter
from pathlib import Path
from typing import Any

# Before torch reads it, and for the programs that are started: sums depend on the threads
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import torch
from safetensors import deserialize

from data.captions import CaptionConfig
from data.config import ReaderConfig
from data.images import ImageTextConfig, image_reader
from data.readers import TokenTextConfig, caption_reader, token_reader
from data.tar import read_shard, write_shard
from eval.programs import build_parser
from modeling.text_encoder import TextEncoderConfig, TextTokenizer
from scripts.run_experiment.stages import program_of
from training.errors import ROOT
from training.pipelines import load_captioner, load_pipeline

EMOJI = "assets/noto_emoji"
LEFT_OUT = {"step", "samples_per_second", "data_wait_share"}  # of metrics.jsonl: times differ


def keys(group: str, **values) -> list[str]:
    return [f"{group}.{name}={value}" for name, value in values.items()]


STEPS = keys("training", max_steps=20, log_every_steps=1, checkpoint_every_steps=20)
FEW = [f"data.shards=[{EMOJI}/train-*-000003.tar.gz]"]

# Tiny sizes of the full-size experiments, with the text tower of the demo.
SMALL = {"width": 64, "depth": 2, "num_heads": 2}
TRAINING = [
    *keys("training", batch_size=8, precision="fp32", ema_decay=0.9),
    *keys("data", num_workers=1, shuffle_buffer=100),
    "optimizer.warmup_steps=5",
]
FILTERED = [*FEW, "data.filters.min_longer_side=64"]
TOKENIZER = [
    *TRAINING,
    *FILTERED,
    *keys("tokenizer", image_size=64, patch_size=16),
    *keys("tokenizer.encoder", **SMALL),
    *keys("tokenizer.decoder", width=96, depth=3, num_heads=3),
    "text_encoder.model=local-dir:{runs}/emoji/text_encoder/clip",
    "losses.perceptual_weight=0",
    "adversarial.start_step=5",
    "discriminator_optimizer.warmup_steps=5",
]
PROJECTOR = [*TRAINING, *keys("projector", **SMALL, mlp_width=128, alignment_width=64)]
SMALL_FLOW = [*TRAINING, *keys("flowtok", **SMALL)]
FLOW = [*PROJECTOR, *keys("flowtok", **SMALL)]  # its projector starts from random weights
BF16 = keys("training", precision="bf16", max_steps=5)
DECODER = [*PROJECTOR, *keys("text_decoder", **SMALL, mlp_width=128, vocabulary_size=512)]
STAGE2 = "projector_run={runs}/projector_clip_l/text_projector"
AVERAGE_POOL = "projector.alignment_target=average_pool"
COSINE_MARGIN = "losses.alignment_form=cosine_margin"
TOKENS = "data.shards=[{runs}/tokenizer_bl77_256/tokens/*.tar]"
CAPTIONED = "data_dir={runs}/data"

# Run -> (YAML under configs/, overrides), in the order in which they need each other
RUNS = {
    "emoji/text_encoder": ("emoji/text_encoder", ["training.batch_size=32"]),
    "emoji/tokenizer": ("emoji/tokenizer", []),
    "emoji/tokens": ("emoji/tokens", [*FEW, "batch_size=32"]),
    "emoji/text_projector": ("emoji/text_projector", []),
    "emoji/flowtok": ("emoji/flowtok", []),
    "emoji/text_decoder": ("emoji_caption/text_decoder", []),
    "emoji/flowtok_caption": ("emoji_caption/flowtok_caption", []),
    "tokenizer_bl77_256/tokenizer": ("tokenizer_bl77_256/tokenizer", TOKENIZER),
    "tokenizer_bl77_256/tokens": ("tokenizer_bl77_256/tokens", [*FILTERED, "data.num_workers=2"]),
    "projector_clip_l/text_projector": ("projector_clip_l/text_projector", PROJECTOR),
    "flowtok_b/flowtok": ("flowtok_b/flowtok", FLOW),
    "flowtok_b/projector_run": ("flowtok_b/flowtok", [*SMALL_FLOW, STAGE2]),
    "flowtok_b/bf16": ("flowtok_b/flowtok", [*FLOW, *BF16]),
    "flowtok_b/accumulation": ("flowtok_b/flowtok", [*FLOW, "training.gradient_accumulation=2"]),
    "flowtok_b/selective": ("flowtok_b/flowtok", [*FLOW, "activation_checkpointing=selective"]),
    "flowtok_b/flowtok_finetune": ("flowtok_b/flowtok_finetune", [*SMALL_FLOW, TOKENS]),
    "flowtok_b_average_pool/flowtok": ("flowtok_b/flowtok", [*FLOW, AVERAGE_POOL]),
    "flowtok_b_cosine_margin/flowtok": ("flowtok_b/flowtok", [*FLOW, COSINE_MARGIN]),
    "caption_xl/tokens": ("caption_xl/tokens", [CAPTIONED, "data.num_workers=1"]),
    "caption_xl/text_decoder": ("caption_xl/text_decoder", [*DECODER, CAPTIONED]),
    "caption_xl/flowtok_caption": ("caption_xl/flowtok_caption", [*SMALL_FLOW, CAPTIONED]),
}


# Making a record


def make_record(runs: Path) -> dict:
    """Run everything under a folder; name of a part -> nested values."""
    # Stages read what earlier ones wrote, so all lie under one folder
    record = {"environment": describe_environment()}
    write_captioned(runs / "data")
    for name, (config, overrides) in RUNS.items():
        start = time.perf_counter()
        record |= record_run(runs, name, config, overrides)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return record | record_samples(runs) | record_data(runs)


def describe_environment() -> dict:
    """What the last bit of a float may depend on beside the code."""
    versions = {name: version(name) for name in ("torch", "numpy", "pillow")}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return versions | {"cpu": sorted({x for x in lines if x.startswith(("model name", "flags"))})}


def write_captioned(folder: Path) -> None:
    """Held-out emoji with several captions each, as caption_xl has: karpathy_train, _val."""
    emoji = sorted(read_shard(ROOT / EMOJI / "heldout-000000.tar.gz"), key=itemgetter("__key__"))
    for sample in emoji:
        text = sample.pop("txt").decode()
        sample["json"] = {"captions": [text, f"a picture of {text}", f"an emoji: {text}"]}
    for split, part in (("karpathy_train", emoji[:120]), ("karpathy_val", emoji[120:])):
        (folder / split).mkdir(parents=True)
        write_shard(folder / split / "0000.tar", part)


def record_run(runs: Path, name: str, config: str, overrides: list[str]) -> dict:
    folder = runs / name
    module, _ = program_of(Path(config).stem)
    is_encoding = module == "scripts.encode_tokens"
    command = [sys.executable, "-m", module, "--config", f"configs/{config}.yaml"]
    command += [f"runs_dir={runs}", f"experiment_dir={folder.parent}", f"run_dir={folder}"]
    command += [] if is_encoding else STEPS
    command += [value.format(runs=runs) for value in overrides]
    # A process of its own: nothing passes from stage to stage but files
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if result.returncode:
        printed = f"{result.stdout}{result.stderr}"[-3000:]
        sys.exit(f"{' '.join(command)}\n{printed}\nstatus {result.returncode}")
    parts = token_parts(folder) if is_encoding else training_parts(folder)
    return {f"{name} {part}": value for part, value in parts.items()}


def training_parts(folder: Path) -> dict:
    """Logged values by step; tensors of each weights file; pictures, reports, the CLIP folder."""
    parts: dict[str, dict] = {"metrics": {}}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = {name: value for name, value in row.items() if name not in LEFT_OUT}
        parts["metrics"][f"step {row['step']}"] = values
    for path in sorted((folder / "checkpoints" / "latest").glob("*.safetensors")):
        tensors = sorted(deserialize(path.read_bytes()))
        hashes = {key: f"{x['dtype']} {x['shape']} {sha256(x['data'])}" for key, x in tensors}
        parts[path.stem] = hashes
    made = [*sorted((folder / "samples").glob("*")), *sorted((folder / "clip").glob("*"))]
    return parts | {"outputs": {path.name: sha256(path.read_bytes()) for path in made}}


def token_parts(folder: Path) -> dict:
    """Hash of each member of each token shard, and what the folder says about its latents."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members[path.name] = {x.name: sha256(tar.extractfile(x).read()) for x in tar}
    statistics = json.loads((folder / "latent_stats.json").read_text())
    return {"members": members, "latent_stats": statistics}


def record_samples(runs: Path) -> dict:
    """Latents and images of two flows for each solver, captions of three held-out images."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    captions = ["pineapple, food fruit", "black cat, animal mammal"]
    captions += ["rocket, transport air", "a blue heart"]
    solvers = ("euler", "euler_release", "heun", "adams2")
    variants: dict[str, dict] = {solver: {"sampler": solver} for solver in solvers}
    variants |= {"interval": {"guidance_interval": [0.2, 0.8]}, "bf16": {"precision": "bf16"}}
    # Text to image: every solver, each from z_T's mean and from a sample of it
    record = {}
    for experiment, (name, values) in product(("emoji", "flowtok_b"), variants.items()):
        parts, sampling = load_pipeline(runs / experiment / "flowtok", device)
        for start in ("mean", "sampled"):
            config = replace(
                sampling, steps=20, guidance=1.5, sample_text_latent=start == "sampled", **values
            )
            images, latents = parts.generate(captions, config, seed=1)
            part = {"latents": describe(latents), "images": describe(images)}
            record[f"samples {experiment} {name} {start}"] = part

    # Image to text
    captioner, sampling = load_captioner(runs / "emoji" / "flowtok_caption", device)
    heldout = ImageTextConfig(shards=[str(ROOT / EMOJI / "heldout-000000.tar.gz")])
    images = next(image_reader(heldout, 64, None).once(3, limit=3))["image"] / 255
    latents = captioner.transport(captioner.start(images), sampling)
    text = captioner.captions(images, sampling)
    return record | {"samples captions": {"latents": describe(latents), "text": text}}


def record_data(runs: Path) -> dict:
    """Keys and contents of batches: images, an epoch of the demo's tokens, captions."""
    clip = f"local-dir:{runs}/emoji/text_encoder/clip"
    tokenize = TextTokenizer(TextEncoderConfig(model=clip))
    images, tokens = [str(ROOT / EMOJI / "train-*.tar.gz")], [f"{runs}/emoji/tokens/*.tar"]
    captioned = [f"{runs}/data/karpathy_train/*.tar"]
    info = json.loads((runs / "emoji/tokens/tokens.json").read_text())
    epoch = math.ceil(info["num_samples"] / 16)
    # Shuffled streams, which must not depend on how many processes read
    record = {}
    for workers in (0, 2):
        reading = {"num_workers": workers, "shuffle_buffer": 200}
        reader = image_reader(ImageTextConfig(shards=images, **reading), 64, tokenize)
        batches = islice(reader.stream(8, seed=3, rank=0, num_processes=2), 30)
        record[f"data images, {workers} workers"] = describe_batches(batches)
        reader = token_reader(TokenTextConfig(shards=tokens, **reading), 32, 16, tokenize)
        batches = islice(reader.stream(16, seed=3), epoch)
        record[f"data tokens, {workers} workers"] = describe_batches(batches)
        several = CaptionConfig(keys=["json:captions"])
        config = ReaderConfig(shards=captioned, captions=several, **reading)
        batches = islice(caption_reader(config, tokenize, False).stream(16, seed=3), 30)
        record[f"data captions, {workers} workers"] = describe_batches(batches)
    # In the order of the shards
    ordered = token_reader(TokenTextConfig(shards=tokens), 32, 16, tokenize).once(100)
    record["data tokens in order"] = describe_batches(ordered)
    ordered = caption_reader(ReaderConfig(shards=tokens), tokenize, True).once(100)
    record["data captions in order"] = describe_batches(ordered)
    return record


def describe(tensor: torch.Tensor) -> dict:
    """Hash of a tensor's bytes and its first values."""
    values = tensor.detach().cpu().contiguous()
    first = [repr(value) for value in values.flatten()[:8].tolist()]
    return {"sha256": sha256(values.numpy().tobytes()), "first": first}


def describe_batches(batches: Iterable[dict]) -> dict[str, list]:
    """Field -> its keys, or the hash of its contents, batch by batch."""
    fields = defaultdict(list)
    for batch in batches:
        for name, value in batch.items():
            is_array = hasattr(value, "numpy")
            content = value.numpy().tobytes() if is_array else json.dumps(value).encode()
            fields[name].append(value if name == "key" else sha256(content))
    return dict(fields)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Comparing records


def flatten(values: Any, place: str = "") -> dict[str, str]:
    """The repr of each single one of nested values, by its place; of floats it has every bit."""
    if not isinstance(values, dict | list):
        return {place: repr(values)}
    found = {}
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in pairs:
        found |= flatten(value, f"{place}/{name}")
    return found


def compare(a: dict, b: dict) -> bool:
    """Print a line for each part; whether all are equal."""
    is_equal = True
    for name in {**a, **b}:
        first, second = (flatten(record.get(name, "absent")) for record in (a, b))
        # What only one of them has differs, too: a tensor that was renamed counts twice
        differing = [x for x in {**first, **second} if first.get(x) != second.get(x)]
        line = "equal"
        if differing:
            x = differing[0]
            line = f"DIFFERS in {len(differing)}, first {x}: {first.get(x)} -> {second.get(x)}"
        print(f"{name:45} {line}")
        is_equal &= not differing
    print("all equal" if is_equal else "NOT equal")
    return is_equal


def main() -> None:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("out", type=Path, nargs="?", help="JSON file to write")
    add("--folder", type=Path, help="new folder for the runs; default: a temporary one")
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="records to compare")
    args = parser.parse_args()
    if args.compare:
        sys.exit(not compare(*(json.loads(path.read_text()) for path in args.compare)))
    if args.out is None:
        parser.error("name the file to write, or two with --compare")
    with tempfile.TemporaryDirectory() as temporary:
        record = make_record((args.folder or Path(temporary)).resolve())
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{args.out}: {len(record)} parts")


if __name__ == "__main__":
    main()
