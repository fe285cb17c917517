"""What test files share: one CPU thread, a tiny CLIP, shards of drawn shapes, weights files."""

import io
import math
import random
import resource
import shutil
import socket
import urllib.error
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.tar import write_shard
from modeling.clip_weights import build_clip, save_clip

torch.set_num_threads(1)
# Its vocabulary takes 0.2 s to read, and each stage reads it up to five times.
open_clip.factory.SimpleTokenizer = cache(open_clip.factory.SimpleTokenizer)
# Torch looks whether a data worker or its trainer lives, and waits for a dead one, 1 s instead of
# 5: also in the programs of tests/forks.py, whose server imports this file.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0
_MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (1.0,)

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "black")
NUM_SHARDS, SAMPLES_PER_SHARD, PIXELS = 2, 24, 32


@pytest.fixture(autouse=True)
def fresh() -> None:
    """A test's random numbers and accelerate's settings do not depend on the tests before it."""
    torch.manual_seed(0)
    reset_accelerate()


def reset_accelerate() -> None:
    """Let this process start another program: accelerate keeps its settings per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def refusal(*parts: object, kind: type[Exception] = ValueError):
    """The body ends with an error of one line that names all of these."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


@contextmanager
def full_disk(num_bytes: int):
    """In place of one: no file of this process may be longer than num_bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory) -> Path:
    """A CLIP with random weights for text_encoder.model=local-dir:PATH: states of 16 x 32."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_clip(build_clip(TINY_CLIP), TINY_CLIP, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """Folder with train-00000.tar and train-00001.tar, 24 samples each: PNG and caption."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(NUM_SHARDS):
        numbers = range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD)
        write_shard(folder / f"train-{shard:05d}.tar", [shape_sample(number) for number in numbers])
    return folder


@pytest.fixture
def empty_cache(monkeypatch, tmp_path_factory) -> None:
    """No weights that happen to be on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> Path:
    """An empty cache of torch's, and downloads that fail; the cache's folder."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror("no such host"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


def save_weights_file(tmp_path_factory, name, state) -> Path:
    file = tmp_path_factory.mktemp("weights") / f"{name}-made-up.pth"
    torch.save(state, file)
    return file


def views_of_one_storage(shapes, seed) -> dict[str, torch.Tensor]:
    """Random tensors of these shapes: as few bytes on disk as the largest."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(max(map(math.prod, shapes.values())), generator=generator)
    return {name: storage[: math.prod(shape)].view(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory) -> Path:
    """Random weights of VGG16's convs under torchvision's names, and one of its classifier's."""
    from torchvision import models

    with torch.device("meta"):
        features = models.vgg16().features
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for name, parameter in features.named_parameters(prefix="features"):
        fan_in = math.prod(parameter.shape[1:]) if parameter.ndim == 4 else 100
        state[name] = torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5
    return save_weights_file(tmp_path_factory, "vgg16", state)


@pytest.fixture(scope="session")
def convnext_file(tmp_path_factory) -> Path:
    """Random weights of ConvNeXt-Small under torchvision's names, 9 MB on disk instead of 200."""
    from torchvision import models

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in models.convnext_small().named_parameters()}
    state = views_of_one_storage(shapes, seed=1)
    # Scaled in place: the storage stays one.
    max(state.values(), key=torch.numel).mul_(0.1)
    return save_weights_file(tmp_path_factory, "convnext", state)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights of torch-fidelity's InceptionV3 under its names, 9 MB on disk instead of 95.

    Activations keep their size from layer to layer.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        net = Unfilled("made-up", ["2048"], nothing)
    shapes = {name: x.shape for name, x in net.state_dict().items()}
    state = views_of_one_storage(shapes, seed=2)
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
    return save_weights_file(tmp_path_factory, "inception", state)


@pytest.fixture(scope="session")
def chain(tmp_path_factory, tiny_shards):
    """A tiny experiment whose stages have all run, and samples; tests leave its folder alone."""
    # Here, because it imports every stage, which most tests do not need.
    from tiny_experiment import PROGRAMS, Experiment, draw

    experiment = Experiment(tmp_path_factory.mktemp("chain"), tiny_shards)
    for stage in PROGRAMS:
        experiment.run(stage)
    draw(experiment.folder, "--output", experiment.folder / "samples.png")
    return experiment


@pytest.fixture(scope="session")
def captioner(tmp_path_factory, chain, tiny_shards) -> Path:
    """A stage-3 run of the chain's parts, from image to text; tests leave its folder alone."""
    from tiny_experiment import to_text

    folder = tmp_path_factory.mktemp("captioner")
    run = f"run_dir={folder}/flowtok_caption"
    return chain.run_in(folder, "flowtok", run, *to_text(chain.folder, tiny_shards))


@pytest.fixture(scope="session")
def both_ways(tmp_path_factory, chain, captioner) -> Path:
    """An experiment from text to image and back, moved from where its configs say."""
    folder = tmp_path_factory.mktemp("both_ways") / "shapes"
    shutil.copytree(chain.folder, folder)
    shutil.copytree(captioner, folder / "flowtok_caption")
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_shards) -> Path:
    """Of an evaluation: 12 captions in groups of 5, against the first shard."""
    from evaluations import write_inputs

    return write_inputs(tmp_path_factory.mktemp("inputs"), tiny_shards)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with three images, 0.png to 2.png."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(shape_sample(number)["png"])
    return tmp_path / "pictures"


def shape_sample(number: int) -> dict:
    """One coloured shape on white, a function of its number; captions repeat, pictures do not."""
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


@pytest.fixture(scope="session")
def dual_chain(tiny_clip_dir, tiny_shards, tmp_path_factory):
    """The experiment with a dual tokenizer; it and its generator have run once."""
    from dual_experiment import DualExperiment

    experiment = DualExperiment(tmp_path_factory.mktemp("dual"), tiny_clip_dir, tiny_shards)
    for stage in ("tokenizer", "next_scale"):
        experiment.run(stage)
    return experiment
