"""Loaded parts -> images or captions: the one generation path of sample.py, eval and training.

ImageGenerator: captions -> z_T -> flow -> image latents -> images (paper, Sec. 3.1). The randomness
of an image is a function of (seed, its index), not of the batch it was made in.
Captioner: images -> z_I -> flow -> z_T -> text decoder -> captions (Sec. 4.1). Nothing is drawn: an
image has one caption.
FlowTokPipeline: both of a folder that scripts/export.py wrote; prompts -> PIL images.
Images are B x 3 x R x R in [0, 1], latents B x K x C.
"""

import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .dual_tokenizer import DualTokenizer
from .flow import FlowConfig, check_guidance, guided_velocity
from .flow_model import FlowModel, build_flow
from .flowtok import FlowTokConfig
from .image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from .layers import load_weights, to_pil
from .pretrained import TOWER_FOLDER, find_folder, read_config
from .samplers import SOLVERS, check_solver, evaluation_times, integrate, make_times
from .text_decoder import TextDecoder, TextDecoderConfig
from .text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    TextTokenizer,
    Tokenizer,
    load_text_encoder,
)
from .text_projector import TextProjectorConfig

Module = TypeVar("Module", bound=nn.Module)

Precision = Literal["fp32", "bf16"]

# Spaces that decoded BPE tokens have around punctuation and between digits
SUPERFLUOUS_SPACES = re.compile(
    r" (?=[,.;:!?%)\]}]|'\w)|(?<=[(\[{]) |(?<=\d) (?=\d)| (?=-)|(?<=-) "
)


class Sampling:
    """What the settings of any run's sampling can do; the fields are those of a dataclass."""

    sample_text_latent: bool

    def check_images(self, option: str, number: int) -> None:
        """Refuse several images of a caption, all the same; `option` begins the error."""
        if number > 1 and not self.sample_text_latent:
            raise ValueError(
                f"{option} {number}: the run draws nothing (sampling.sample_text_latent=false), a "
                "caption has one image: expected 1"
            )

    def but(self, **changes: Any) -> "Sampling":
        """With those changes that are not None; ValueError for one that this run can't have."""
        given = {name: value for name, value in changes.items() if value is not None}
        known = [field.name for field in fields(self)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{', '.join(unknown)}: this run's sampling has {', '.join(known)}")
        return replace(self, **given)


@dataclass
class SamplingConfig(Sampling):
    """How images and captions are sampled."""

    steps: int = 20
    guidance: float = 2.0
    sampler: str = "euler"  # one of modeling/samplers.py; euler_release for the release's numbers
    # [start, end] of t with guidance
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    sample_text_latent: bool = True  # False: start at z_T's mean (one image per caption)
    # Autocast of velocity network and decoder; the solver's state is float32
    precision: Precision = "fp32"

    def __post_init__(self):
        check_solver(self.sampler, self.steps)
        bounds = [0.0, *self.guidance_interval, 1.0]
        if len(self.guidance_interval) != 2 or bounds != sorted(bounds):
            raise ValueError(
                "guidance_interval must be [start, end] within [0, 1], got "
                f"{self.guidance_interval}"
            )

    def check_flow(self, flow: FlowConfig) -> None:
        """Refuse what a flow was not trained for: guidance, or a solver that needs velocities."""
        check_guidance(self.guidance, flow.null_probability)
        # It would count twice.
        if flow.guidance != 1 and self.guidance != 1:
            raise ValueError(
                f"guidance {self.guidance:g} of a flow that has flow.guidance={flow.guidance:g} "
                "in its network: expected 1"
            )
        if flow.objective == "mean_flow" and self.sampler != "euler":
            raise ValueError(
                f"sampler {self.sampler} with flow.objective=mean_flow: average velocities belong "
                "to whole steps, expected euler"
            )


def unit_noise(shape: tuple[int, int], seed: int, indices: list[int]) -> Tensor:
    """Unit noise, len(indices) x K x C, each row a function of (seed, index). CPU float32.

    NumPy's generator, because torch's CPU generator uses only the low 32 bits of its seed.
    """
    seeds = [np.random.SeedSequence(seed, spawn_key=(index,)) for index in indices]
    rows = [np.random.default_rng(s).standard_normal(shape, dtype=np.float32) for s in seeds]
    return torch.from_numpy(np.stack(rows))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which networks run in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def transport(
    flow: FlowModel,
    start: Tensor,
    context: Tensor | None,
    config: SamplingConfig,
    visited: dict[float, Tensor] | None = None,
) -> Tensor:
    """Follow the guided flow from t = 0 to t = 1: B x K x C -> B x K x C.

    Args:
        context: what the velocity network reads beside the tokens (FlowModel.context).
        visited: gets the points at which the solver asked for the velocity, by their times.
    """
    config.check_flow(flow.config)
    solver = SOLVERS[config.sampler]
    times = make_times(config.steps)
    with autocast(start.device, config.precision):
        # A mean flow is asked for the average over the whole step that follows.
        interval = 1 / config.steps if flow.config.objective == "mean_flow" else None
        branches = flow.flowtok.at_times(evaluation_times(solver, times), context, interval)
        velocity = guided_velocity(branches, config.guidance, tuple(config.guidance_interval))

        def visit(x: Tensor, time: float) -> Tensor:
            if visited is not None:
                visited[time] = x
            return velocity(x, time)

        return integrate(visit, start, solver, times)


@dataclass
class Generator:
    """All parts of a trained run that makes images of captions, in eval mode on one device."""

    text_encoder: TextEncoder
    tokenizer: ImageTokenizer | DualTokenizer

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions -> text states B x L x T."""
        token_ids = self.text_encoder.tokenize(captions)
        return self.text_encoder(token_ids.to(self.device)).float()

    def make_latents(
        self, text_states: Tensor, config: Sampling, seed: int, indices: list[int]
    ) -> Tensor:
        """Text states -> what `decode` takes, B x K x C, each a function of (seed, its index)."""
        raise NotImplementedError

    @torch.no_grad()
    def decode(self, latents: Tensor, text_states: Tensor, precision: Precision = "fp32") -> Tensor:
        """Image latents -> images B x 3 x R x R, clamped to [0, 1], float32."""
        with autocast(self.device, precision):
            return self.tokenizer.decode(latents, text_states).float().clamp(0, 1)

    @torch.no_grad()
    def generate(
        self,
        captions: list[str],
        config: Sampling,
        seed: int = 0,
        indices: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Captions -> (images B x 3 x R x R in [0, 1], latents B x K x C) on the device.

        `indices` number the images for their randomness (default 0..B-1).
        """
        if indices is None:
            indices = list(range(len(captions)))
        text_states = self.encode_text(captions)
        latents = self.make_latents(text_states, config, seed, indices)
        return self.decode(latents, text_states, config.precision), latents


@dataclass
class ImageGenerator(Generator):
    """Of a run that flows from text to image."""

    flow: FlowModel

    @torch.no_grad()
    def start(
        self, text_states: Tensor, config: SamplingConfig, seed: int, indices: list[int]
    ) -> Tensor:
        """Text states -> start of the flow, B x K x C, with noise of (seed, index)."""
        source, noise = self.flow.projector, None
        if config.sample_text_latent:
            noise = unit_noise(source.shape, seed, indices).to(self.device)
        return source.start(text_states, noise)

    @torch.no_grad()
    def transport(self, start: Tensor, text_states: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> image latents in the tokenizer's own scale, B x K x C."""
        # Back to the tokenizer's own scale, in which it decodes.
        context = self.flow.context(text_states)
        return transport(self.flow, start, context, config) / self.flow.latent_scale

    def make_latents(
        self, text_states: Tensor, config: SamplingConfig, seed: int, indices: list[int]
    ) -> Tensor:
        start = self.start(text_states, config, seed, indices)
        return self.transport(start, text_states, config)

    @torch.no_grad()
    def between(
        self, captions: list[str], weights: Tensor, config: SamplingConfig, seed: int = 0
    ) -> Tensor:
        """Images along the line between the starts, and the text states, of two captions.

        Args:
            weights: N in [0, 1]; 0 is the first caption, 1 the second.

        Returns:
            N x 3 x R x R in [0, 1].
        """
        ends = self.encode_text(captions)  # 2 x L x T
        # One noise for both ends: what changes on the way is the text alone.
        starts = self.start(ends, config, seed, indices=[0, 0])
        weight = weights.view(-1, 1, 1).to(self.device)
        states = torch.lerp(ends[:1], ends[1:], weight)  # N x L x T
        latents = self.transport(torch.lerp(starts[:1], starts[1:], weight), states, config)
        return self.decode(latents, states, config.precision)

    @torch.no_grad()
    def trajectory(
        self, caption: str, config: SamplingConfig, seed: int, number: int
    ) -> tuple[list[float], Tensor]:
        """What the flow passes on its way from text to image, decoded.

        Args:
            number: points, both ends included, as evenly spaced as the solver's steps allow; all,
                if there are fewer.

        Returns:
            Their times in [0, 1], and images N x 3 x R x R in [0, 1].
        """
        text_states = self.encode_text([caption])
        start = self.start(text_states, config, seed, indices=[0])
        points: dict[float, Tensor] = {}
        end = transport(self.flow, start, self.flow.context(text_states), config, points)
        points[1.0] = end  # some solvers ask for the velocity at t = 1, too
        times = sorted(points)
        places = np.linspace(0, len(times) - 1, min(number, len(times))).round().astype(int)
        times = [times[place] for place in places]
        latents = torch.cat([points[time] for time in times]) / self.flow.latent_scale
        states = text_states.expand(len(times), -1, -1)
        return times, self.decode(latents, states, config.precision)


def join_punctuation(text: str) -> str:
    """Decoded tokens as they are usually written: "cat , t - rex ( 1 0 )" -> "cat, t-rex (10)"."""
    return SUPERFLUOUS_SPACES.sub("", text)


@dataclass
class Captioner:
    """All parts of a trained run that flows from image to text, in eval mode on one device."""

    tokenize: Tokenizer
    tokenizer: ImageTokenizer
    flow: FlowModel
    decoder: TextDecoder

    @property
    def device(self) -> torch.device:
        return self.flow.latent_scale.device

    @torch.no_grad()
    def start(self, images: Tensor) -> Tensor:
        """Images B x 3 x R x R in [0, 1] -> start of the flow, the mean of z_I: B x K x C."""
        return self.tokenizer.encode(images.to(self.device)).mean * self.flow.latent_scale

    def transport(self, start: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> z_T, B x K x C."""
        return transport(self.flow, start, None, config)

    @torch.no_grad()
    def read(self, latents: Tensor) -> list[str]:
        """z_T B x K x C -> captions; what comes after the first end token is cut off."""
        token_ids = self.decoder(latents).cpu()
        return [join_punctuation(self.tokenize.decode(ids)) for ids in token_ids]

    def captions(self, images: Tensor, config: SamplingConfig) -> list[str]:
        """Images B x 3 x R x R in [0, 1] -> captions, lower case as CLIP's tokenizer has it."""
        return self.read(self.transport(self.start(images), config))


# What scripts/export.py writes


@dataclass
class DirectionConfig:
    """How the flow of one direction is built and sampled."""

    projector: TextProjectorConfig = field(default_factory=TextProjectorConfig)
    flowtok: FlowTokConfig = field(default_factory=FlowTokConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class PipelineConfig:
    """config.json of an exported folder. The tensors of a part are in PART.safetensors.

    The text tower is the one in text_encoder/, if there is that, else the one of a hub.
    """

    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    text_to_image: DirectionConfig | None = None
    image_to_text: DirectionConfig | None = None
    text_decoder: TextDecoderConfig | None = None  # reads where image_to_text ends
    captions: list[str] = field(default_factory=list)  # to try


@dataclass
class FlowTokPipeline:
    """An exported folder. Each network is loaded when it is first used.

    pipeline = FlowTokPipeline.from_pretrained("USER/NAME")
    [image] = pipeline("a red circle", steps=20, guidance=1.5, seed=0)
    """

    folder: Path
    config: PipelineConfig
    device: torch.device

    @classmethod
    def from_pretrained(
        cls, folder_or_id: str | Path, device: str | torch.device | None = None
    ) -> "FlowTokPipeline":
        """Of a folder here or the hub's USER/NAME; ValueError if there is none, or a damaged one.

        device: a GPU, if there is one.
        """
        folder = find_folder(folder_or_id)
        config = read_config(folder, PipelineConfig)
        tower, packed = config.text_encoder, folder / TOWER_FOLDER
        # What lies in the folder has its path only now; all else has a name on a hub.
        if packed.is_dir():
            tower.model = f"local-dir:{packed}" if tower.family == "open_clip" else str(packed)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder, config, torch.device(device or default))

    def __call__(
        self,
        prompts: str | list[str],
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> list[Image.Image]:
        """One image of each prompt, all in one batch; None: as the run samples.

        The i-th image is a function of its prompt and of (seed, i), as in sample.py.
        """
        sampling = self.direction("text_to_image").sampling.but(steps=steps, guidance=guidance)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        images, _ = self.generator.generate(prompts, sampling, seed)
        return [to_pil(image) for image in images]

    def direction(self, name: str) -> DirectionConfig:
        """text_to_image or image_to_text; ValueError if the folder does not have it."""
        if (found := getattr(self.config, name)) is None:
            raise ValueError(f"{self.folder} does not flow from {name.replace('_', ' ')}")
        return found

    @cached_property
    def generator(self) -> ImageGenerator:
        flow = self._load_flow("text_to_image")
        text_encoder = load_text_encoder(self.config.text_encoder).to(self.device)
        return ImageGenerator(text_encoder, self._tokenizer, flow)

    @cached_property
    def captioner(self) -> Captioner:
        flow = self._load_flow("image_to_text")
        decoder = TextDecoder(self.config.text_decoder, *flow.projector.shape)
        return Captioner(
            tokenize=TextTokenizer(self.config.text_encoder),
            tokenizer=self._tokenizer,
            flow=flow,
            decoder=self._load(decoder, "text_decoder"),
        )

    @cached_property
    def _tokenizer(self) -> ImageTokenizer:
        return self._load(ImageTokenizer(self.config.tokenizer), "tokenizer")

    def _load_flow(self, name: str) -> FlowModel:
        parts = self.direction(name)
        return self._load(build_flow(parts.projector, parts.flowtok, parts.flow), name)

    def _load(self, module: Module, part: str) -> Module:
        # Strict: a folder whose config and tensors disagree is refused by the file's name.
        load_weights(module, self.folder / f"{part}.safetensors")
        return module.eval().requires_grad_(False).to(self.device)
