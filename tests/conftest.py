"""What several test files share: one CPU thread, a tiny CLIP on disk, shards of drawn shapes with captions, weights."""

import io
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from data.tar import write_shard
from modeling.clip_weights import build_clip, save_clip

torch.set_num_threads(1)

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "black")
NUM_SHARDS, SAMPLES_PER_SHARD, PIXELS = 2, 24, 32


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory) -> Path:
    """A CLIP with random weights: text_encoder.model=local-dir:PATH gives text states of 16 tokens x 32 channels."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_clip(build_clip(TINY_CLIP), TINY_CLIP, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """Folder with train-00000.tar and train-00001.tar, 24 samples each: 32 x 32 PNG and its caption in .txt."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(NUM_SHARDS):
        numbers = range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD)
        write_shard(folder / f"train-{shard:05d}.tar", [shape_sample(number) for number in numbers])
    return folder


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory) -> Path:
    """Random weights of VGG16's convs under torchvision's names, and one of its classifier's."""
    from torchvision import models

    with torch.device("meta"):
        shapes = {
            name: p.shape for name, p in models.vgg16().features.named_parameters(prefix="features")
        }
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) == 4 else 100
        state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    file = tmp_path_factory.mktemp("weights") / "vgg16-made-up.pth"
    torch.save(state, file)
    return file


@pytest.fixture(scope="session")
def convnext_file(tmp_path_factory) -> Path:
    """Random weights of ConvNeXt-Small under torchvision's names, views of one storage: 9 MB on disk, not 200."""
    from torchvision import models

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in models.convnext_small().named_parameters()}
    longest = max(shape.numel() for shape in shapes.values())
    storage = torch.randn(longest, generator=torch.Generator().manual_seed(1)) * 0.1
    file = tmp_path_factory.mktemp("weights") / "convnext-made-up.pth"
    torch.save({name: storage[: shape.numel()].view(shape) for name, shape in shapes.items()}, file)
    return file


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights of torch-fidelity's InceptionV3 under its names; activations keep their size from layer to layer.

    All convs are views of one storage: 9 MB on disk instead of 95.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        shapes = {
            name: x.shape for name, x in Unfilled("made-up", ["2048"], nothing).state_dict().items()
        }
    storage = torch.randn(
        max(map(math.prod, shapes.values())), generator=torch.Generator().manual_seed(2)
    )
    state = {name: storage[: shape.numel()].view(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("bn.weight"):
            fan_in = math.prod(shapes[name.replace("bn.weight", "conv.weight")][1:])
            state[name] = torch.full(shape, (2 / fan_in) ** 0.5)
        elif name.endswith(("bn.bias", "running_mean")):
            state[name] = state[name] / 10
        elif name.endswith("running_var"):
            state[name] = torch.ones(shape)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
    file = tmp_path_factory.mktemp("weights") / "inception-made-up.pth"
    torch.save(state, file)
    return file


@pytest.fixture(scope="session")
def chain(tmp_path_factory, tiny_shards):
    """A tiny experiment whose stages have all run, and its samples; tests leave its folder as it is."""
    from tiny_experiment import (
        PROGRAMS,
        Experiment,
        draw,
    )  # imports every stage: not for the tests that need none

    experiment = Experiment(tmp_path_factory.mktemp("chain"), tiny_shards)
    for stage in PROGRAMS:
        experiment.run(stage)
    draw(experiment.folder, "--output", experiment.folder / "samples.png")
    return experiment


@pytest.fixture(scope="session")
def captioner(tmp_path_factory, chain, tiny_shards) -> Path:
    """A stage-3 run of the chain's parts, from image to text; tests leave its folder as it is."""
    from tiny_experiment import to_text

    folder = tmp_path_factory.mktemp("captioner")
    run = f"run_dir={folder}/flowtok_caption"
    return chain.run_in(folder, "flowtok", run, *to_text(chain.folder, tiny_shards))


def shape_sample(number: int) -> dict:
    """Raw sample of one coloured shape on white, a function of its number; captions repeat, pictures do not."""
    colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
    draw_random = random.Random(number)
    x, y, size = draw_random.randint(1, 9), draw_random.randint(1, 9), draw_random.randint(12, 20)
    image = Image.new("RGB", (PIXELS, PIXELS), "white")
    draw, box = ImageDraw.Draw(image), [x, y, x + size, y + size]
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"__key__": f"{number:05d}", "png": buffer.getvalue(), "txt": f"a {colour} {shape}"}
