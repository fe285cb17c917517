"""Numbers of the EMA weights while a stage trains: the functions of eval/generation.py and eval/reconstruction.py.

All processes take part. Captions, images and reference are read once; networks and sums are made anew each time, so
that nothing passes from one evaluation to the next. No number of torch's global generator is used up.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from eval.evaluation import Evaluation, evaluate, load_reference, read_captions, read_inputs
from eval.image_store import FEATURES
from eval.images import ImageSet
from eval.making import INPUTS
from eval.networks import MeasuringConfig, Networks, load_networks
from eval.protocol import Protocol
from eval.reconstruction_metrics import ReconstructionMetrics
from eval.reconstructor import Reconstructor, measure
from modeling.flow_model import FlowModel
from modeling.image_tokenizer import ImageTokenizer
from modeling.pipeline import ImageGenerator, SamplingConfig
from modeling.text_encoder import TextEncoder, TextEncoderConfig, TextTokenizer, load_text_encoder
from training.loading import load_tokenizer


@dataclass
class EvaluationConfig(MeasuringConfig):
    """Generation metrics while stage 3 trains."""

    every_steps: int = (
        0  # so often, and at the end; 0: never. It must end within training.timeout_minutes
    )
    protocol: str = ""  # a name among eval/protocols, or a YAML file
    overrides: list[str] = field(default_factory=list)  # key=value: changes of the protocol

    def __post_init__(self):
        super().__post_init__()
        if self.every_steps < 0:
            raise ValueError(f"evaluation.every_steps must not be negative, got {self.every_steps}")
        if self.every_steps and not self.protocol:
            raise ValueError(
                "evaluation.every_steps needs evaluation.protocol: a name among eval/protocols, or a YAML"
            )


@dataclass
class ReconstructionEvaluationConfig:
    """PSNR and SSIM while stage 1 trains."""

    every_steps: int = (
        0  # so often, and at the end; 0: never. It must end within training.timeout_minutes
    )
    shards: list[str] = field(default_factory=list)  # or folders; empty: pictures.shards
    num_images: int = 256  # the first ones; 0: all
    batch_size: int = 32
    num_workers: int = 2  # reading processes of each process

    def __post_init__(self):
        least = {"every_steps": 0, "num_images": 0, "batch_size": 1, "num_workers": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(
                    f"evaluation.{name} must be at least {smallest}, got {getattr(self, name)}"
                )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave training as it is: its random numbers, and its speed settings, which would change what is measured."""
    convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.random.fork_rng(devices=[]), convolutions:
            yield
    finally:
        torch.set_float32_matmul_precision(products)


class FlowEvaluation:
    """(EMA weights, step) -> metrics of a protocol. RUN/evaluation/step_*/evaluation.json has the report."""

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
        self.state = PartialState()
        protocol.sampling(sampling)
        if not protocol.metrics:
            raise ValueError(
                f"evaluation.protocol={config.protocol} measures nothing: its metrics are empty"
            )
        captions = read_captions(protocol)
        with undisturbed():
            tokenizer = self._load_tokenizer()
            self.inputs = read_inputs(protocol, captions, tokenizer.config)
            networks = self._load_networks(tokenizer)
            if networks.absent:
                raise ValueError(
                    f"evaluation.protocol={config.protocol}: {'; '.join(networks.absent.values())}"
                )
            self.reference = load_reference(self.inputs, networks.extractor, config, self.state)

    def _load_tokenizer(self) -> ImageTokenizer:
        return load_tokenizer(self.tokenizer_run).to(self.state.device)

    def _load_networks(self, tokenizer: ImageTokenizer) -> Networks:
        return load_networks(
            self.protocol, tokenizer, self.text_encoder, self.config, False, self.state
        )

    def __call__(self, model: FlowModel, step: int) -> dict[str, float]:
        """{"eval/fid": ...} on the main process, {} on the others; a metric that can't be computed is left out."""
        folder = self.run_dir / "evaluation" / f"step_{step:08d}"
        if self.state.is_main_process:
            shutil.rmtree(
                folder, ignore_errors=True
            )  # of a process that was killed, or of steps that are done again
        self.state.wait_for_everyone()
        with undisturbed():
            tokenizer, text_encoder = (
                self._load_tokenizer(),
                load_text_encoder(self.text_encoder).to(self.state.device),
            )
            parts = ImageGenerator(TextTokenizer(self.text_encoder), text_encoder, tokenizer, model)
            networks, origin = self._load_networks(tokenizer), {"checkpoint": folder.name}
            evaluation = Evaluation(
                self.inputs,
                parts,
                self.sampling,
                networks,
                self.reference,
                origin,
                self.config,
                False,
                self.state,
            )
            report = evaluate(evaluation, self.protocol, folder)
        if self.state.is_main_process:
            shutil.rmtree(folder / FEATURES)
            (folder / INPUTS).unlink()
        return {
            f"eval/{name}": value
            for name, value in report.get("metrics", {}).items()
            if value is not None
        }


class ReconstructionEvaluation:
    """(EMA weights, step) -> PSNR and SSIM of a set of images."""

    def __init__(
        self,
        config: ReconstructionEvaluationConfig,
        images: ImageSet,
        text_encoder: TextEncoder | None,
        tokenize: TextTokenizer | None,
        bf16: bool,
    ):
        """text_encoder, tokenize, bf16: as a Reconstructor has them."""
        self.config, self.images = config, images
        self.text_encoder, self.tokenize, self.bf16 = text_encoder, tokenize, bf16
        self.state = PartialState()

    def __call__(self, model: ImageTokenizer, step: int) -> dict[str, float]:
        """{"eval/psnr_db": ..., "eval/ssim": ...} on every process."""
        metrics = ReconstructionMetrics(None, None, self.state.device)
        reconstruct = Reconstructor(model, self.text_encoder, self.tokenize, self.bf16)
        with undisturbed():
            measure(
                self.images,
                reconstruct,
                metrics,
                self.config.batch_size,
                self.config.num_workers,
                self.state,
            )
            values, _ = metrics.over_processes().results()
        return {f"eval/{name}": value for name, value in values.items() if value is not None}
