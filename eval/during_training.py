"""Numbers of the EMA weights while a stage trains, as the evaluation programs give them.

All processes take part. Captions, images and reference are read once; networks and sums are made
anew each time, so that nothing passes from one evaluation to the next. No number of torch's global
generator is used up.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from eval.evaluation import REPORT, EvaluationSetup, evaluate_images
from eval.feature_nets import WeightsFiles, load_networks
from eval.features import load_reference
from eval.images import ImageSet, Reading
from eval.protocol import Protocol, read_captions
from eval.reconstruction import Reconstructor, measure_reconstructions
from modeling.flow_model import FlowModel
from modeling.image_tokenizer import ImageTokenizer
from modeling.pipeline import ImageGenerator, SamplingConfig
from modeling.text_encoder import TextEncoder, TextEncoderConfig, load_text_encoder
from training.loading import load_tokenizer

NUM_WORKERS = 2  # reading processes of each process
RECONSTRUCTION_BATCH = 32  # images


@dataclass
class EvaluationConfig:
    """Generation metrics while stage 3 trains."""

    # as often, and at the end; 0: never. One evaluation must end within training.timeout_minutes
    every_steps: int = 0
    protocol: str = ""  # a name among eval/protocols, or a YAML file
    overrides: list[str] = field(default_factory=list)  # key=value: changes of the protocol
    batch_size: int = 64  # images that a feature network sees at once
    inception_weights: str = ""  # path; empty: torch's cache
    dinov2_weights: str = ""  # path of DINOv2 ViT-L/14, for features=dinov2

    def __post_init__(self):
        if self.every_steps < 0:
            raise ValueError(f"every_steps must be at least 0, got {self.every_steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.every_steps and not self.protocol:
            raise ValueError("every_steps needs protocol: a name among eval/protocols, or a YAML")


@dataclass
class ReconstructionEvaluationConfig:
    """PSNR and SSIM while stage 1 trains."""

    # as often, and at the end; 0: never. One evaluation must end within training.timeout_minutes
    every_steps: int = 0
    shards: list[str] = field(default_factory=list)  # or folders; empty: pictures.shards
    num_images: int = 256  # the first ones; 0: all

    def __post_init__(self):
        for name in ("every_steps", "num_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without touching training's random numbers, and without its lossy speed settings."""
    convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.random.fork_rng(devices=[]), convolutions:
            yield
    finally:
        torch.set_float32_matmul_precision(products)


class FlowEvaluation:
    """(EMA weights, step) -> metrics of a protocol; the report is in RUN/evaluation/step_*."""

    def __init__(
        self,
        config: EvaluationConfig,
        protocol: Protocol,
        run_dir: Path,
        tokenizer_run: str,
        text_encoder: TextEncoderConfig,
        sampling: SamplingConfig,
    ):
        """Read and measure what stays the same.

        Raises:
            ValueError: captions, reference or weights that are absent or can't serve.
        """
        self.config, self.protocol, self.run_dir = config, protocol, run_dir
        self.tokenizer_run, self.text_encoder, self.sampling = tokenizer_run, text_encoder, sampling
        self.reading = Reading(config.batch_size, NUM_WORKERS, PartialState())
        protocol.sampling(sampling)
        if not protocol.metrics:
            raise ValueError(f"protocol {config.protocol} measures nothing: its metrics are empty")
        self.captions, self.reference = read_captions(protocol), None
        with undisturbed():
            setup = self._prepare(None, "")
            if setup.networks.absent:
                reasons = "; ".join(setup.networks.absent.values())
                raise ValueError(f"protocol {config.protocol}: {reasons}")
            net, size = setup.networks.features, protocol.feature_size(setup.image_size)
            self.reference = load_reference(protocol, self.captions, net, size, self.reading)

    def __call__(self, model: FlowModel, step: int) -> dict[str, float]:
        """{"eval/fid": ...} on the main process, {} on the others; null metrics are left out."""
        state = self.reading.state
        folder = self.run_dir / "evaluation" / f"step_{step:08d}"
        # What is there is of a killed process, or of steps that are done again
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        state.wait_for_everyone()
        with undisturbed():
            report = evaluate_images(self._prepare(model, folder.name), self.protocol, folder)
        if state.is_main_process:
            only_keep(folder / REPORT)
        metrics = report.get("metrics", {}).items()
        return {f"eval/{name}": value for name, value in metrics if value is not None}

    def _prepare(self, model: FlowModel | None, checkpoint: str) -> EvaluationSetup:
        """The networks, made anew, and what stays the same. Without a model it can't generate."""
        device = self.reading.state.device
        generator = ImageGenerator(
            text_encoder=load_text_encoder(self.text_encoder).to(device),
            tokenizer=load_tokenizer(self.tokenizer_run).to(device),
            flow=model,
        )
        files = WeightsFiles(self.config.inception_weights, self.config.dinov2_weights)
        return EvaluationSetup(
            captions=self.captions,
            generator=generator,
            default=self.sampling,
            model={"checkpoint": checkpoint},
            networks=load_networks(self.protocol, generator, files, self.reading.state),
            reference=self.reference,
            reading=self.reading,
        )


def only_keep(file: Path) -> None:
    """Remove all that lies beside a file."""
    for path in file.parent.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != file:
            path.unlink()


@dataclass
class ReconstructionEvaluation:
    """(EMA weights, step) -> PSNR and SSIM of a set of images."""

    images: ImageSet
    text_encoder: TextEncoder
    bf16: bool  # autocast

    def __call__(self, model: ImageTokenizer, step: int) -> dict[str, float]:
        """{"eval/psnr_db": ..., "eval/ssim": ...} on every process."""
        reconstruct = Reconstructor(model, self.text_encoder, self.bf16)
        reading = Reading(RECONSTRUCTION_BATCH, NUM_WORKERS, PartialState())
        with undisturbed():
            measured = measure_reconstructions(self.images, reconstruct, reading)
        values = measured.metrics.items()
        return {f"eval/{name}": value for name, value in values if value is not None}
