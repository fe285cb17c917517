"""What a refactor must not change, as numbers: losses, weights, tokens, samples and data at fixed seeds.

    python research/record.py OUT.json                 # 2.5 minutes on one core; --folder DIR keeps the runs
    python research/record.py --compare A.json B.json  # a line a part; status 1 if anything differs

Runs every stage of the demo and of tiny copies of the full-size experiments for 20 steps, as programs of their own
with one thread, then samples their checkpoints and reads their data. Floats are recorded exactly, bytes as sha256. Two
records of one tree are equal to the last bit; those of two machines need not be (see their row "environment").
"""

import argparse
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path

TOWER = "text_encoder.model=local-dir:{runs}/demo/text_encoder/clip"

ROOT = Path(__file__).resolve().parents[1]
EMOJI = "assets/noto_emoji"
PROGRAMS = {
    "text_encoder": ["-m", "scripts.train_text_encoder"],
    "tokens": ["-m", "scripts.encode_tokens"],
}
PROGRAMS |= {
    stage: [f"train_{stage}.py"]
    for stage in ("tokenizer", "text_projector", "text_decoder", "flowtok")
}
TIMES = ("samples_per_second", "data_wait_share")  # of metrics.jsonl: differ between equal runs


def keys(group: str, **values) -> list[str]:
    """Overrides of one group of keys."""
    return [f"{group}.{name}={value}" for name, value in values.items()]


STEPS = keys("training", max_steps=20, log_every_steps=1, checkpoint_every_steps=20)
FEW = [f"data.shards=[{EMOJI}/train-*-000003.tar.gz]"]

# Tiny sizes of the full-size experiments; 32 tokens are the context length of the demo's text tower.
SMALL = {"width": 64, "depth": 2, "num_heads": 2}
TRAINING = keys("training", batch_size=8, precision="fp32", ema_decay=0.9) + keys(
    "optimizer", warmup_steps=5
)
TRAINING += keys("data", num_workers=1, shuffle_buffer=100)
FILTERED = [*FEW, "data.filters.min_longer_side=64"]
TOKENIZER = [*TRAINING, *FILTERED, TOWER, *keys("tokenizer", image_size=64, patch_size=16)]
TOKENIZER += keys("tokenizer.encoder", **SMALL) + keys(
    "tokenizer.decoder", width=96, depth=3, num_heads=3
)
TOKENIZER += ["losses.perceptual_weight=0", "adversarial.start_step=5"]
TOKENIZER += ["discriminator_optimizer.warmup_steps=5"]
PROJECTOR = [*TRAINING, *keys("projector", **SMALL, mlp_width=128, alignment_width=64)]
FLOW_SIZE = keys("flowtok", **SMALL)
FLOW = [*PROJECTOR, *FLOW_SIZE]  # of a flow whose projector starts from random weights
DECODER = [*PROJECTOR, *keys("text_decoder", **SMALL, mlp_width=128, vocabulary_size=512)]
CAPTIONED = ["data_dir={runs}/data"]
STAGE2 = ["projector_run={runs}/projector_clip_l/text_projector"]
TOKENS = ["data.shards=[{runs}/tokenizer_bl77_256/tokens/*.tar]"]

# (experiment, name of the run, stage, YAML under configs/, overrides), in the order in which they need each other
RUNS = [
    ("demo", "text_encoder", "text_encoder", "demo/text_encoder", ["training.batch_size=32"]),
    ("demo", "tokenizer", "tokenizer", "demo/tokenizer", []),
    ("demo", "tokens", "tokens", "demo/tokens", [*FEW, "batch_size=32"]),
    ("demo", "text_projector", "text_projector", "demo/text_projector", []),
    ("demo", "flowtok", "flowtok", "demo/flowtok", []),
    ("demo", "text_decoder", "text_decoder", "demo_caption/text_decoder", []),
    ("demo", "flowtok_caption", "flowtok", "demo_caption/flowtok_caption", []),
    ("tokenizer_bl77_256", "tokenizer", "tokenizer", "tokenizer_bl77_256/tokenizer", TOKENIZER),
    (
        "tokenizer_bl77_256",
        "tokens",
        "tokens",
        "tokenizer_bl77_256/tokens",
        [*FILTERED, "data.num_workers=2"],
    ),
    (
        "projector_clip_l",
        "text_projector",
        "text_projector",
        "projector_clip_l/text_projector",
        PROJECTOR,
    ),
    ("flowtok_b", "flowtok", "flowtok", "flowtok_b/flowtok", FLOW),
    (
        "flowtok_b",
        "projector_run",
        "flowtok",
        "flowtok_b/flowtok",
        [*TRAINING, *FLOW_SIZE, *STAGE2],
    ),
    (
        "flowtok_b",
        "bf16",
        "flowtok",
        "flowtok_b/flowtok",
        [*FLOW, "training.precision=bf16", "training.max_steps=5"],
    ),
    (
        "flowtok_b",
        "accumulation",
        "flowtok",
        "flowtok_b/flowtok",
        [*FLOW, "training.gradient_accumulation=2"],
    ),
    (
        "flowtok_b",
        "selective",
        "flowtok",
        "flowtok_b/flowtok",
        [*FLOW, "activation_checkpointing=selective"],
    ),
    (
        "flowtok_b",
        "flowtok_finetune",
        "flowtok",
        "flowtok_b/flowtok_finetune",
        [*TRAINING, *FLOW_SIZE, *TOKENS],
    ),
    ("flowtok_b_average_pool", "flowtok", "flowtok", "flowtok_b_average_pool/flowtok", FLOW),
    ("flowtok_b_cosine_margin", "flowtok", "flowtok", "flowtok_b_cosine_margin/flowtok", FLOW),
    ("caption_xl", "tokens", "tokens", "caption_xl/tokens", [*CAPTIONED, "data.num_workers=1"]),
    (
        "caption_xl",
        "text_decoder",
        "text_decoder",
        "caption_xl/text_decoder",
        [*DECODER, *CAPTIONED],
    ),
    (
        "caption_xl",
        "flowtok_caption",
        "flowtok",
        "caption_xl/flowtok_caption",
        [*TRAINING, *FLOW_SIZE, *CAPTIONED],
    ),
]


def make_record(runs: Path) -> dict:
    """Run everything under a folder; name of a part -> nested values."""
    record = {"environment": describe_environment()}
    write_captioned(runs / "data")
    for run in RUNS:
        start = time.perf_counter()
        record |= record_run(runs, *run)
        print(f"{run[0]}/{run[1]}: {time.perf_counter() - start:.0f} s", flush=True)
    return record | record_samples(runs) | record_data(runs)


def describe_environment() -> dict:
    """What the last bit of a float may depend on beside the code."""
    versions = {name: version(name) for name in ("torch", "numpy", "pillow")}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return versions | {
        "cpu": sorted({line for line in lines if line.startswith(("model name", "flags"))})
    }


def write_captioned(folder: Path) -> None:
    """Held-out emoji with several captions in their JSON, as caption_xl has them: karpathy_train, karpathy_val."""
    with tarfile.open(ROOT / EMOJI / "heldout-000000.tar.gz") as source:
        members = {member.name: source.extractfile(member).read() for member in source}
    keys = sorted(name.removesuffix(".png") for name in members if name.endswith(".png"))
    for split, part in (("karpathy_train", keys[:120]), ("karpathy_val", keys[120:])):
        (folder / split).mkdir(parents=True)
        with tarfile.open(folder / split / "0000.tar", "w") as tar:
            for key in part:
                text = members[f"{key}.txt"].decode()
                captions = json.dumps(
                    {"captions": [text, f"a picture of {text}", f"an emoji: {text}"]}
                ).encode()
                for name, data in (
                    (f"{key}.png", members[f"{key}.png"]),
                    (f"{key}.json", captions),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def record_run(
    runs: Path, experiment: str, name: str, stage: str, config: str, overrides: list[str]
) -> dict:
    """Run one stage as a program and record what it left in its folder."""
    folder = runs / experiment / name
    values = [f"runs_dir={runs}", f"experiment_dir={folder.parent}", f"run_dir={folder}"]
    values += [] if stage == "tokens" else STEPS
    values += [value.format(runs=runs) for value in overrides]
    command = [sys.executable, *PROGRAMS[stage], "--config", f"configs/{config}.yaml", *values]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-3000:]}\nstatus {result.returncode}")
    parts = token_parts(folder) if stage == "tokens" else training_parts(folder)
    return {f"{experiment}/{name} {part}": value for part, value in parts.items()}


def training_parts(folder: Path) -> dict:
    """Logged values by step; tensors of each weights file by name; pictures, reports, the CLIP folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = {"metrics": {f"step {line['step']}": without(line, *TIMES, "step") for line in lines}}
    for path in sorted((folder / "checkpoints" / "latest").glob("*.safetensors")):
        parts[path.stem] = tensor_hashes(path)
    made = [*sorted((folder / "samples").glob("*")), *sorted((folder / "clip").glob("*"))]
    return parts | {"outputs": {path.name: sha256(path.read_bytes()) for path in made}}


def without(values: dict, *names: str) -> dict:
    """A dict without some keys."""
    return {name: value for name, value in values.items() if name not in names}


def tensor_hashes(path: Path) -> dict[str, str]:
    """Name -> type, shape and sha256 of each tensor of a safetensors file, without torch."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = without(json.loads(data[8:start]), "__metadata__")
    return {
        name: f"{entry['dtype']} {entry['shape']} {sha256(data[slice(*(start + at for at in entry['data_offsets']))])}"
        for name, entry in sorted(header.items())
    }


def token_parts(folder: Path) -> dict:
    """sha256 of each member of each token shard, and what the folder says about its latents."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members[path.name] = {
                member.name: sha256(tar.extractfile(member).read()) for member in tar
            }
    return {
        "members": members,
        "latent_stats": json.loads((folder / "latent_stats.json").read_text()),
    }


def record_samples(runs: Path) -> dict:
    """Latents and images of two flows for each solver, the demo's captions of three held-out images."""
    import torch

    from data.images import ImageTextConfig, image_reader
    from training.pipelines import load_captioner, load_pipeline

    torch.set_num_threads(1)
    captions = [
        "pineapple, food fruit",
        "black cat, animal mammal",
        "rocket, transport air",
        "a blue heart",
    ]
    variants = {
        solver: {"sampler": solver} for solver in ("euler", "euler_release", "heun", "adams2")
    }
    variants |= {"interval": {"guidance_interval": [0.2, 0.8]}, "bf16": {"precision": "bf16"}}
    record = {}
    for experiment, (name, values) in product(("demo", "flowtok_b"), variants.items()):
        parts, sampling = load_pipeline(runs / experiment / "flowtok", torch.device("cpu"))
        for start in ("mean", "sampled"):
            config = replace(
                sampling, steps=20, guidance=1.5, sample_text_latent=start == "sampled", **values
            )
            images, latents = parts.generate(captions, config, seed=1)
            record[f"samples {experiment} {name} {start}"] = {
                "latents": describe(latents),
                "images": describe(images),
            }
    captioner, sampling = load_captioner(runs / "demo" / "flowtok_caption", torch.device("cpu"))
    heldout = ImageTextConfig(shards=[str(ROOT / EMOJI / "heldout-000000.tar.gz")])
    images = next(image_reader(heldout, 64, None).once(3, limit=3))["image"] / 255
    latents = captioner.transport(captioner.start(images), sampling)
    return record | {
        "samples captions": {
            "latents": describe(latents),
            "text": captioner.captions(images, sampling),
        }
    }


def record_data(runs: Path) -> dict:
    """Keys and contents of batches: images, an epoch of the demo's tokens, captions."""
    from data.captions import CaptionConfig
    from data.config import ReaderConfig
    from data.images import ImageTextConfig, image_reader
    from data.readers import TokenTextConfig, caption_reader, token_reader
    from modeling.text_encoder import TextEncoderConfig, TextTokenizer

    clip = f"local-dir:{runs}/demo/text_encoder/clip"
    tokenize = TextTokenizer(TextEncoderConfig(model=clip))
    images, tokens = [str(ROOT / EMOJI / "train-*.tar.gz")], [f"{runs}/demo/tokens/*.tar"]
    captioned = [f"{runs}/data/karpathy_train/*.tar"]
    info = json.loads((runs / "demo/tokens/tokens.json").read_text())
    epoch = math.ceil(info["num_samples"] / 16)
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
    ordered = token_reader(TokenTextConfig(shards=tokens), 32, 16, tokenize).once(100)
    record["data tokens in order"] = describe_batches(ordered)
    ordered = caption_reader(ReaderConfig(shards=tokens), tokenize, True).once(100)
    record["data captions in order"] = describe_batches(ordered)
    return record


def describe(tensor) -> dict:
    """sha256 of a tensor's bytes and its first values."""
    values = tensor.detach().cpu().contiguous()
    return {
        "sha256": sha256(values.numpy().tobytes()),
        "first": [repr(v) for v in values.flatten()[:8].tolist()],
    }


def describe_batches(batches) -> dict[str, list]:
    """Field -> its keys, or the sha256 of its contents, batch by batch."""
    fields = defaultdict(list)
    for batch in batches:
        for name, value in batch.items():
            content = (
                value.numpy().tobytes() if hasattr(value, "numpy") else json.dumps(value).encode()
            )
            fields[name].append(value if name == "key" else sha256(content))
    return dict(fields)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def differences(a, b, place: str = "") -> tuple[list[str], list[str]]:
    """(what differs, what only has another name) in nested values, in order. Floats count as equal by their repr.

    In a dict, an entry that only one side has is renamed if the other has an equal one under a name of its own.
    """
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{place}[{index}]", *pair) for index, pair in enumerate(zip(a, b))]
    elif isinstance(a, dict) and isinstance(b, dict):
        pairs = [(f"{place}/{key}", a[key], b[key]) for key in a if key in b]
    else:
        return ([] if repr(a) == repr(b) else [f"{place}: {str(a)[:40]} -> {str(b)[:40]}"]), []
    differing, renamed = [], []
    for pair in pairs:
        inner = differences(*pair[1:], pair[0])
        differing, renamed = differing + inner[0], renamed + inner[1]
    if isinstance(a, dict):
        left = [key for key in b if key not in a]
        for key in (key for key in a if key not in b):
            twin = next((other for other in left if repr(b[other]) == repr(a[key])), None)
            left = [other for other in left if other != twin]
            (differing if twin is None else renamed).append(
                f"{place}/{key} -> {twin or 'nothing equal'}"
            )
        differing += [f"{place}: nothing equal -> {key}" for key in left]
    return differing, renamed


def compare(a: dict, b: dict) -> bool:
    """Print a line for each part; whether all are equal."""
    is_equal = True
    for name in {**a, **b}:
        differing, renamed = differences(a.get(name, "absent"), b.get(name, "absent"))
        is_equal &= not differing
        result = f"DIFFERS in {len(differing)}, first {differing[0]}" if differing else "equal"
        print(
            f"{name:45} {result}"
            + (f"; {len(renamed)} renamed: {', '.join(renamed[:3])}" if renamed else "")
        )
    print("all equal" if is_equal else "NOT equal")
    return is_equal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument(
        "--folder", type=Path, help="new folder for the runs; default: a temporary one"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="records to compare"
    )
    args = parser.parse_args()
    if args.compare:
        sys.exit(not compare(*(json.loads(path.read_text()) for path in args.compare)))
    if args.out is None:
        parser.error("name the file to write, or two with --compare")
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        record = make_record((args.folder or Path(temporary)).resolve())
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{args.out}: {len(record)} parts")


if __name__ == "__main__":
    main()
