"""scripts/benchmark.py sample, tokenizer and text: what only runs forward, on made-up data, with random weights.

The code is that of sample.py and scripts/encode_tokens.py.
"""

from functools import partial
from pathlib import Path

import torch
from configs.schema import FlowTokStage, StageConfig, TokenizerStage

from modeling.flow_model import FlowModel
from modeling.image_tokenizer import ImageTokenizer
from modeling.pipeline import ImageGenerator, SamplingConfig
from scripts.benchmark_flops import transport_gflop
from scripts.benchmark_plain import PlainFlowTok, plain_transport
from scripts.benchmark_timing import Memory, alternate
from scripts.benchmark_training import (
    DTYPES,
    MAX_TOKEN_ID,
    fill_zeros,
    make_tower,
    measure_training,
    measures,
)
from scripts.plan_costs import gflop
from scripts.plan_stages import (
    Sizes,
    build_decoding,
    build_encoding,
    build_projection,
    build_tower_alone,
    find_sizes,
)
from training.run import start_accelerator

DECODED_ON_CPU = 8  # images at a time, as in part tokenizer: 16 take half a minute


def build_pipeline(config: FlowTokStage, sizes: Sizes, device: torch.device) -> ImageGenerator:
    """All that makes images of text states, with random weights."""
    flow, tokenizer = FlowModel(config.projector, config.flowtok), ImageTokenizer(sizes.tokenizer)
    for module in (flow, tokenizer):
        fill_zeros(module)
        module.requires_grad_(False).eval().to(device)
    return ImageGenerator(None, None, tokenizer, flow)


def measure_sampling(config: StageConfig, path: Path, args) -> dict:
    """The part `sample`; `args` has batch_size, seconds, repeats and baseline. A batch of 1 gives the latency.

    Raises:
        ValueError: a config of another stage than 3.
    """
    if not isinstance(config, FlowTokStage):
        raise ValueError(f"{path}: sampling needs a config of stage flowtok, got {config.stage!r}")
    sampling: SamplingConfig = config.sampling
    net, sizes, count = config.projector, find_sizes(config, path), args.batch_size
    device = start_accelerator(sampling.precision).device
    memory = Memory(device)
    parts = build_pipeline(config, sizes, device)
    states = torch.randn(count, net.text_tokens, net.text_width, device=device)
    ways, work = {}, {}
    ways["projector"] = partial(parts.source, states, sampling, 0, list(range(count)))
    work["projector"] = count, gflop(build_projection, net)
    start = ways["projector"]()
    flows = {"flow": count} | ({"flow_batch_1": 1} if count > 1 else {})
    for name, size in flows.items():
        ways[name] = partial(parts.transport, start[:size], sampling)
        work[name] = size, transport_gflop(config, size)
    latents, few = ways["flow"](), count if device.type == "cuda" else min(count, DECODED_ON_CPU)
    ways["decode"] = partial(parts.decode, latents[:few], states[:few], sampling.precision)
    work["decode"] = few, gflop(build_decoding, sizes)
    ways["decode"]()
    peak = memory.peak_gib()
    if args.baseline:
        plain = PlainFlowTok(config.flowtok).to(device).eval()
        plain.load_state_dict(parts.flow.flowtok.state_dict())
        for name, size in flows.items():
            ways[f"plain_{name}"] = partial(plain_transport, plain, start[:size], sampling, 1.0)
            work[f"plain_{name}"] = work[name]
    is_warm = {"flow", "decode"}
    timing = alternate(
        ways, device, DTYPES[sampling.precision], args.seconds, args.repeats, is_warm
    )
    result = measures(timing, work)
    each = {
        name: result[name]["seconds_per_sample"]["median"]
        for name in ("projector", "flow", "decode")
    }
    return {
        "batch_size": count,
        "precision": sampling.precision,
        "sampler": f"{sampling.steps} {sampling.sampler} steps, guidance {sampling.guidance:g}",
        "measures": result,
        "peak_memory_gib": peak,
        "seconds_by_part": {"image": each},
        "images_per_second": 1 / sum(each.values()),  # of text states
    }


def measure_tokenizer(config: StageConfig, path: Path, args) -> dict:
    """The part `tokenizer`: encoding, decoding and training of stage 1, with the losses of its first step.

    Raises:
        ValueError: a config of another stage.
    """
    if not isinstance(config, TokenizerStage):
        raise ValueError(f"{path}: this needs a config of stage tokenizer, got {config.stage!r}")
    result = measure_training(config, path, args)
    net, sizes, count = config.tokenizer, find_sizes(config, path), config.training.batch_size
    precision = config.training.precision
    device = start_accelerator(precision).device
    network = ImageTokenizer(net).requires_grad_(False).eval().to(device)
    images = torch.rand(count, 3, net.image_size, net.image_size, device=device)
    latents = torch.randn(count, net.num_tokens, net.token_channels, device=device)
    states = (
        torch.randn(count, net.text_tokens, net.text_width, device=device)
        if net.text_guidance
        else None
    )

    def run(function, *inputs) -> None:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            function(*inputs)

    ways = {
        "encode": partial(run, network.encode, images),
        "decode": partial(run, network.decode, latents, states),
    }
    timing = alternate(ways, device, DTYPES[precision], args.seconds, args.repeats)
    encoding, decoding = gflop(build_encoding, sizes, False), gflop(build_decoding, sizes)
    return result | {
        "measures": measures(timing, {"encode": (count, encoding), "decode": (count, decoding)})
        | result["measures"]
    }


def measure_text(config: StageConfig, path: Path, args) -> dict:
    """The part `text`: captions' token ids to text states, in the run's precision.

    Raises:
        ValueError: a stage without a text tower, or one of unknown size.
    """
    if not hasattr(config, "text_encoder"):
        raise ValueError(f"{path}: stage {config.stage!r} has no frozen text tower")
    precision, sizes, count = config.training.precision, find_sizes(config, path), args.batch_size
    device = start_accelerator(precision).device
    memory = Memory(device)
    tower = make_tower(sizes, device)
    ids = torch.randint(MAX_TOKEN_ID, (count, sizes.text_shape[0]), device=device)

    def encode() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            tower(ids)

    encode()
    peak = memory.peak_gib()
    timing = alternate({"text": encode}, device, DTYPES[precision], args.seconds, args.repeats)
    return {
        "batch_size": count,
        "precision": precision,
        "measures": measures(timing, {"text": (count, gflop(build_tower_alone, sizes))}),
        "peak_memory_gib": peak,
        "tower": sizes.text_encoder.model,
    }
