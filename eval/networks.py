"""The frozen networks that a protocol measures images with; what is absent is said, with the file to fetch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from eval.clip_score import ClipScorer, own_clip
from eval.dinov2 import ABSENT
from eval.features import (
    Extractor,
    dinov2_extractor,
    inception_extractor,
    inception_reason,
    tokenizer_extractor,
)
from eval.inception import INCEPTION
from eval.json_report import describe_file
from eval.protocol import Protocol
from modeling.clip_weights import AbsentWeights
from modeling.image_tokenizer import ImageTokenizer
from modeling.text_encoder import TextEncoderConfig


@dataclass
class MeasuringConfig:
    """How features are computed, whatever the protocol."""

    batch_size: int = 64  # images that a feature network sees at once
    num_workers: int = 2  # processes of each process that read reference images
    inception_weights: str = ""  # path; empty: torch's cache
    dinov2_weights: str = ""  # path of DINOv2 ViT-L/14, for features=dinov2

    def __post_init__(self):
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"evaluation: batch_size must be at least 1 and num_workers at least 0, got {self.batch_size} and "
                f"{self.num_workers}"
            )


@dataclass(frozen=True)
class Networks:
    """The feature network and the CLIP; None where the protocol needs none, or where its weights are absent."""

    extractor: Extractor | None
    clip: ClipScorer | None
    absent: dict[str, str]  # why one is missing, by "features" and "clip"
    weights: dict[str, Any]  # plain values


def load_networks(
    protocol: Protocol,
    tokenizer: ImageTokenizer,
    text_encoder: TextEncoderConfig,
    config: MeasuringConfig,
    download: bool,
    state: PartialState,
) -> Networks:
    """What the protocol's metrics need. tokenizer, text_encoder: the run's own, for features=tokenizer, clip.model=own.

    Raises:
        ValueError: weights of another net, damaged ones, or no file at a given path.
    """
    absent, weights, extractor, clip, file = {}, {}, None, None, None
    with state.local_main_process_first():  # one process a machine downloads
        if protocol.feature_metrics:
            file = find_weights(protocol, config, download)
        if "clip_score" in protocol.metrics:
            try:
                clip = ClipScorer(own_clip(protocol.clip, text_encoder), state.device, download)
                weights["clip"] = clip.description
            except AbsentWeights as error:
                absent["clip"] = str(error)
    if protocol.feature_metrics and (file or protocol.features == "tokenizer"):
        extractor = build_extractor(protocol, tokenizer, file, state.device)
    elif protocol.feature_metrics:
        absent["features"] = inception_reason() if protocol.features == "inception" else ABSENT
    if file:
        weights[protocol.features] = describe_file(file)
    return Networks(extractor, clip, absent, weights)


def find_weights(protocol: Protocol, config: MeasuringConfig, download: bool) -> Path | None:
    """The feature network's file; None if it is not there, or if the features are the tokenizer's.

    Raises:
        ValueError: no file at a given path.
    """
    if protocol.features == "tokenizer":
        return None
    if protocol.features == "inception":
        return INCEPTION.find(config.inception_weights, download)
    if not config.dinov2_weights:
        return None
    if not Path(config.dinov2_weights).is_file():
        raise ValueError(f"--dinov2-weights: no file {config.dinov2_weights}")
    return Path(config.dinov2_weights)


def build_extractor(
    protocol: Protocol, tokenizer: ImageTokenizer, weights: Path | None, device: torch.device
) -> Extractor:
    """The protocol's features."""
    if protocol.features == "tokenizer":
        return tokenizer_extractor(tokenizer)
    if protocol.features == "dinov2":
        return dinov2_extractor(weights, device)
    return inception_extractor(weights, protocol.precision, device, protocol.resize)
