"""Our readers side by side with the plain ways, on made-up data, alternately in one process with one thread.

Images: JPEG bytes -> 256 px crop, against Pillow + torchvision (open, convert, Resize bicubic antialiased,
CenterCrop, ToTensor). Tokens: shards of 77 x 16 latents -> batches of 100, against webdataset (tarfile_to_samples,
decode, batched).
"""

import io
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from data.readers import TokenTextConfig, token_reader
from data.tar import write_shard
from data.transforms import Resize, center_crop, load_picture, open_image

IMAGE_SIZE, QUALITY = 256, 90
CONTENTS = {
    "smooth": 1.6,
    "photo-like": 1.0,
    "dense noise": 0.35,
}  # how fast the detail falls with its frequency
SAMPLES, SAMPLES_PER_SHARD, BATCH = 10_000, 1000, 100


def made_up_jpeg(seed: int, falloff: float) -> bytes:
    """JPEG of 900-1300 px whose noise at frequency f has an amplitude of f^(-falloff / 2)."""
    rng = np.random.default_rng(seed)
    width, height = map(int, rng.integers(900, 1301, 2))
    pixels = np.full((height, width, 3), 128, np.float32)
    for frequency in 4 * 2 ** np.arange(9):
        size = max(2, height * frequency // 1024), max(2, width * frequency // 1024)
        noise = rng.standard_normal((*size, 3)).astype(np.float32)
        channels = [
            Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        layer = np.stack(channels, axis=-1)
        pixels += (
            (0.3 * layer + layer.mean(-1, keepdims=True)) * 45 / (frequency / 4) ** (falloff / 2)
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def our_image(data: bytes, resize: Resize) -> np.ndarray:
    """3 x 256 x 256 uint8, as the readers make it without random crops."""
    picture = load_picture(open_image(data), (255, 255, 255), IMAGE_SIZE if resize == "fast" else 0)
    return center_crop(picture, IMAGE_SIZE, resize)


def compare_images(rounds: int = 5, count: int = 12) -> dict[str, dict[str, float]]:
    """Content -> images/s of both ways, their ratio, and the mean absolute difference of fast in 1/255."""
    from torchvision import transforms  # only the reference needs it

    steps = [transforms.Resize(IMAGE_SIZE, transforms.InterpolationMode.BICUBIC, antialias=True)]
    plain = transforms.Compose([*steps, transforms.CenterCrop(IMAGE_SIZE), transforms.ToTensor()])
    ways = {
        "plain": lambda data: plain(Image.open(io.BytesIO(data)).convert("RGB")),
        "fast": lambda data: our_image(data, "fast"),
        "exact": lambda data: our_image(data, "exact"),
    }
    results = {}
    for content, falloff in CONTENTS.items():
        images = [made_up_jpeg(seed, falloff) for seed in range(count)]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                for data in images:
                    way(data)
                seconds[name].append(time.perf_counter() - start)
        differences = [
            np.abs(ways["plain"](x).numpy() * 255 - ways["fast"](x)).mean() for x in images
        ]
        rates = {
            f"{name}_images_per_second": count / median(times) for name, times in seconds.items()
        }
        ratio = median(p / f for p, f in zip(seconds["plain"], seconds["fast"], strict=True))
        results[content] = rates | {
            "fast_over_plain": ratio,
            "mean_difference_255ths": float(np.mean(differences)),
        }
    return results


def write_token_shards(folder: Path) -> list[str]:
    """Made-up token shards with captions and JSON."""
    rng, paths = np.random.default_rng(0), []
    for shard in range(SAMPLES // SAMPLES_PER_SHARD):
        samples = (
            {
                "__key__": f"{shard * SAMPLES_PER_SHARD + i:09d}",
                "latent.npy": rng.standard_normal((2, 77, 16)).astype(np.float16),
                "txt": f"a photo of thing number {i} on a table",
                "json": {
                    "caption": f"a photo of thing {i}",
                    "width": 512,
                    "height": 384,
                    "url": "x" * 60,
                },
            }
            for i in range(SAMPLES_PER_SHARD)
        )
        paths.append(str(folder / f"{shard:03d}.tar"))
        write_shard(paths[-1], samples)
    return paths


def our_tokens_rate(shards: list[str]) -> float:
    """Samples/s of the training reader in this process, shuffled, without a tokenizer."""
    config = TokenTextConfig(shards=shards, num_workers=0, shuffle_buffer=2000)
    batches = iter(token_reader(config, 77, 16, None).stream(BATCH, seed=0))
    next(batches)
    start, count = time.perf_counter(), SAMPLES // BATCH - 1
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def webdataset_rate(shards: list[str]) -> float:
    """Samples/s of webdataset's stock pipeline in this process, in order."""
    import webdataset

    stages = webdataset.tarfile_to_samples(), webdataset.decode(), webdataset.batched(BATCH)
    batches = iter(webdataset.DataPipeline(webdataset.SimpleShardList(shards), *stages))
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["__key__"]) for batch in batches)
    return count / (time.perf_counter() - start)


def compare_tokens(rounds: int = 3) -> dict[str, float]:
    """Median samples/s of both, and their ratio."""
    with TemporaryDirectory() as folder:
        shards = write_token_shards(Path(folder))
        pairs = [(our_tokens_rate(shards), webdataset_rate(shards)) for _ in range(rounds)]
    ours, theirs = (median(rates) for rates in zip(*pairs, strict=True))
    ratio = median(own / other for own, other in pairs)
    return {
        "samples_per_second": ours,
        "webdataset_samples_per_second": theirs,
        "over_webdataset": ratio,
    }


def compare_readers() -> dict[str, dict]:
    """Both comparisons, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"images": compare_images(), "tokens": compare_tokens()}
    finally:
        torch.set_num_threads(threads)
