"""Loaded parts -> captions: the one captioning path, for sample.py, evaluation, stage 3's pictures (paper, Sec. 4.1).

In: images B x 3 x R x R in [0, 1]. The image tokenizer's mean z_I flows to z_T, which the text decoder reads. Nothing
is drawn: an image has one caption.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.flow import check_guidance, guided_velocity
from modeling.flow_model import FlowModel
from modeling.flowtok import TimeTable
from modeling.image_tokenizer import ImageTokenizer
from modeling.pipeline import SamplingConfig
from modeling.samplers import SOLVERS, evaluation_times, integrate, make_times
from modeling.text_decoder import TextDecoder
from modeling.text_encoder import TextTokenizer

# Spaces that decoded BPE tokens have around punctuation and between digits
SPLIT = re.compile(r" (?=[,.;:!?%)\]}]|'\w)|(?<=[(\[{]) |(?<=\d) (?=\d)| (?=-)|(?<=-) ")


def join_punctuation(text: str) -> str:
    """Decoded tokens as they are usually written: "cat , t - rex ( 1 0 )" -> "cat, t-rex (10)"."""
    return SPLIT.sub("", text)


@dataclass
class Captioner:
    """All parts of a trained run that flows from image to text, in eval mode on one device."""

    tokenize: TextTokenizer
    tokenizer: ImageTokenizer
    flow: FlowModel
    decoder: TextDecoder

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.flow.latent_scale.device

    @torch.no_grad()
    def source(self, images: Tensor) -> Tensor:
        """Images B x 3 x R x R in [0, 1] -> start of the flow, the mean of z_I: B x K x C."""
        return self.tokenizer.encode(images.to(self.device)).mean * self.flow.latent_scale

    @torch.no_grad()
    def transport(self, source: Tensor, config: SamplingConfig) -> Tensor:
        """Start of the flow -> z_T, B x K x C."""
        check_guidance(config.guidance, self.flow.null_probability)
        solver, times = SOLVERS[config.sampler], make_times(config.steps, config.time_shift)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            network = self.flow.flowtok
            table = TimeTable(
                network, evaluation_times(solver, times), to_text=network.config.two_way
            )
            velocity = guided_velocity(table, config.guidance, tuple(config.guidance_interval))
            return integrate(velocity, source, solver, times)

    @torch.no_grad()
    def read(self, latents: Tensor) -> list[str]:
        """z_T B x K x C -> captions; what comes after the first end token is cut off."""
        return [join_punctuation(self.tokenize.decode(ids)) for ids in self.decoder(latents).cpu()]

    def captions(self, images: Tensor, config: SamplingConfig) -> list[str]:
        """Images B x 3 x R x R in [0, 1] -> a caption of each, lower case as CLIP's tokenizer has it."""
        return self.read(self.transport(self.source(images), config))
