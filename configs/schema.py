"""One dataclass a stage, composed of the parts' own dataclasses, and the checks across parts.

The parts' fields, with units and meaning, stand beside the code that reads them: modeling/, data/, training/, eval/.
"""

from dataclasses import dataclass, field
from typing import Literal

from data.config import ReaderConfig
from data.readers import ImageTextConfig, TokenTextConfig
from eval.during_training import EvaluationConfig, ReconstructionEvaluationConfig
from eval.protocol import protocol_file
from modeling.activation_checkpointing import Recompute
from modeling.adversarial import AdversarialConfig
from modeling.discriminator import DiscriminatorConfig
from modeling.flow import FlowConfig, check_guidance
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizerConfig
from modeling.losses import ReconstructionLossConfig, SourceLossConfig
from modeling.perceptual import PerceptualConfig
from modeling.pipeline import SamplingConfig
from modeling.text_decoder import TextDecoderConfig, TextDecoderLossConfig
from modeling.text_encoder import TextEncoderConfig
from modeling.text_projector import TextProjectorConfig
from training.loop import TrainingConfig
from training.metrics import LoggingConfig
from training.optim import OptimizerConfig


@dataclass
class PictureConfig:
    """The picture that stages 1 and 2 write: the first samples, true left, reconstructed right."""

    num_samples: int = 16

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"pictures.num_samples must be at least 1, got {self.num_samples}")


@dataclass
class ReconstructionPictureConfig(PictureConfig):
    """The picture of stage 1."""

    shards: list[str] = field(default_factory=list)  # whose images; empty: the training shards


@dataclass
class CaptionPictureConfig:
    """The pictures of stage 3, which sample.py also draws when neither prompt nor image is given."""

    captions: list[str] = field(default_factory=list)  # to make images of
    images: list[str] = field(default_factory=list)  # folders or image shards to make captions of
    num_images: int = 24  # so many of them, evenly spaced

    def __post_init__(self):
        if self.num_images < 1:
            raise ValueError(f"pictures.num_images must be at least 1, got {self.num_images}")
        if not all(caption.strip() for caption in self.captions):
            raise ValueError("pictures.captions has an empty caption")


@dataclass
class ClipSizeConfig:
    """Sizes of a small CLIP trained from scratch."""

    image_size: int = 64  # pixels
    patch_size: int = 16  # pixels
    context_length: int = 77  # L
    embed_dim: int = 256
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 6
    vision_width: int = 192
    vision_layers: int = 4


@dataclass
class StageConfig:
    """What every stage has."""

    stage: str = ""  # which stage this file configures: one of STAGES
    experiment_dir: str = "runs/experiment"  # what the experiment makes
    run_dir: str = "${experiment_dir}/${stage}"  # folder of this stage's run; a second round of a stage has its own
    data_dir: str = "datasets"  # where the full-size experiments look for image shards; their data.shards start with it


@dataclass
class TextEncoderStage(StageConfig):
    """scripts/train_text_encoder.py: a small CLIP from scratch, where no pretrained one can be had."""

    clip: ClipSizeConfig = field(default_factory=ClipSizeConfig)
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class TokenizerStage(StageConfig):
    """train_tokenizer.py."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    activation_checkpointing: Recompute = "none"  # see modeling/activation_checkpointing.py
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    # Weights to start from, a stage-1 run's EMA, of any size: what does not fit starts afresh and is listed.
    init_from: str = ""
    freeze_encoder: bool = False  # train the decoder alone: the latents stay what they are
    losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    pictures: ReconstructionPictureConfig = field(default_factory=ReconstructionPictureConfig)
    evaluation: ReconstructionEvaluationConfig = field(
        default_factory=ReconstructionEvaluationConfig
    )


@dataclass
class TokensStage(StageConfig):
    """scripts/encode_tokens.py: image shards -> token shards with a trained tokenizer."""

    tokenizer_run: str = "${experiment_dir}/tokenizer"
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    batch_size: int = 64  # images per pass and process
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # autocast of the encoder; latents are stored as float16 either way
    )
    flip: bool = False  # also store every image mirrored, as a sample KEY-flip
    num_crops: int = 1  # 1: the centre; more: so many along the longer side, as samples KEY-crop0, KEY-crop1, ...
    # Also store the text states (L x T float16 a sample): later stages then never run the text tower. Worth it for
    # small sets seen many times; at ViT-L/14 it costs 118 kB a sample.
    store_text_states: bool = False


@dataclass
class TextProjectorStage(StageConfig):
    """train_text_projector.py."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    # whose token shards are expected; decodes the pictures when image_regression_weight > 0
    tokenizer_run: str = "${experiment_dir}/tokenizer"
    any_tokenizer: bool = (
        False  # accept token shards that another tokenizer made, or nobody knows which
    )
    latent_scale: float = (
        0.0  # z_I = latent_scale * latent; 0: as measured when the tokens were written
    )
    projector: TextProjectorConfig = field(default_factory=TextProjectorConfig)
    data: TokenTextConfig = field(default_factory=TokenTextConfig)
    losses: SourceLossConfig = field(default_factory=SourceLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    pictures: PictureConfig = field(default_factory=PictureConfig)


@dataclass
class TextDecoderStage(StageConfig):
    """train_text_decoder.py: projector and text decoder as an autoencoder of captions, for image to text."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    projector_run: str = ""  # a run with a trained projector to start from; empty: random weights
    freeze_projector: bool = False  # train the decoder alone, on the z_T that projector_run gives
    projector: TextProjectorConfig = field(default_factory=TextProjectorConfig)
    text_decoder: TextDecoderConfig = field(default_factory=TextDecoderConfig)
    data: ReaderConfig = field(default_factory=ReaderConfig)
    heldout_shards: list[str] = field(
        default_factory=list
    )  # captions to measure on, never trained on; empty: none
    losses: TextDecoderLossConfig = field(default_factory=TextDecoderLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class FlowTokStage(StageConfig):
    """train_flowtok.py."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    tokenizer_run: str = "${experiment_dir}/tokenizer"
    any_tokenizer: bool = (
        False  # accept token shards that another tokenizer made, or nobody knows which
    )
    latent_scale: float = (
        0.0  # z_I = latent_scale * latent; 0: as measured when the tokens were written
    )
    # Where the weights come from: none of the two (random), a stage-2 run for the projector, or a stage-3 run for
    # everything (fine-tuning: its EMA weights, with a fresh optimiser and step 0; to continue a run is no option).
    projector_run: str = "${experiment_dir}/text_projector"
    init_from: str = ""
    text_decoder_run: str = ""  # of a flow to text: what reads its z_T; its projector is the flow's
    projector: TextProjectorConfig = field(default_factory=TextProjectorConfig)
    flowtok: FlowTokConfig = field(default_factory=FlowTokConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    activation_checkpointing: Recompute = (
        "none"  # of the DiT, see modeling/activation_checkpointing.py
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: TokenTextConfig = field(default_factory=TokenTextConfig)
    losses: SourceLossConfig = field(default_factory=SourceLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    pictures: CaptionPictureConfig = field(default_factory=CaptionPictureConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class ReportStage(StageConfig):
    """eval/report.py: reconstruction and retrieval figures of an experiment, without downloads."""

    train_shards: list[str] = field(default_factory=list)  # images whose captions were trained on
    heldout_shards: list[str] = field(default_factory=list)  # images never trained on
    distractor_shards: list[str] = field(
        default_factory=list
    )  # further images in the retrieval pool
    caption_keys: list[str] = field(
        default_factory=lambda: ["txt", "json:caption"]
    )  # as in the other stages
    background: list[int] = field(
        default_factory=lambda: [255, 255, 255]
    )  # RGB behind transparent pixels
    caption_variant: str = (
        ""  # regular expression of what may differ in captions of the same subject; empty: nothing
    )
    num_train_captions: int = (
        256  # how many of them are drawn as images, evenly spaced over the shards
    )
    batch_size: int = 64
    seed: int = 0


STAGES: dict[str, type[StageConfig]] = {
    "text_encoder": TextEncoderStage,
    "tokenizer": TokenizerStage,
    "tokens": TokensStage,
    "text_projector": TextProjectorStage,
    "text_decoder": TextDecoderStage,
    "flowtok": FlowTokStage,
    "report": ReportStage,
}


def teaches_source(losses: SourceLossConfig) -> bool:
    """Whether any loss on the flow's source is on."""
    weights = (
        losses.alignment_weight,
        losses.kl_weight,
        losses.image_regression_weight,
        losses.image_alignment_weight,
    )
    return any(weights)


def check_direction(config: FlowTokStage) -> None:
    """Refuse a flow to text that could not be trained or read, and a network that can't tell the directions apart.

    Raises:
        ValueError: naming the keys, what was given and what is expected.
    """
    direction, two_way = config.flow.direction, config.flowtok.two_way
    if two_way != (direction == "joint"):
        raise ValueError(
            f"flow.direction={direction} needs flowtok.two_way={str(direction == 'joint').lower()}: the embedding of "
            "the direction is there for joint training alone"
        )
    if direction == "text_to_image":
        return
    if config.flow.projector != "frozen":
        raise ValueError(
            f"flow.direction={direction} needs flow.projector=frozen (it is {config.flow.projector}): z_T is what the "
            "text decoder has learned to read"
        )
    if teaches_source(config.losses):
        raise ValueError(
            f"flow.direction={direction}: no loss but the flow's, set losses.alignment_weight, kl_weight, "
            "image_regression_weight and image_alignment_weight to 0"
        )
    if not config.text_decoder_run:
        raise ValueError(f"flow.direction={direction} needs a text decoder: set text_decoder_run")
    if not config.pictures.images:
        raise ValueError(
            "pictures.images is empty: name folders or image shards to make captions of"
        )


def check(config: StageConfig) -> None:
    """Checks that concern more than one part.

    Raises:
        ValueError: naming the keys, what was given and what is expected.
    """
    if isinstance(config, FlowTokStage):
        tokens = (config.projector.text_tokens, config.projector.token_channels)
        if tokens != (config.flowtok.num_tokens, config.flowtok.token_channels):
            raise ValueError(
                f"projector.text_tokens x token_channels = {tokens} must equal flowtok.num_tokens x token_channels = "
                f"{(config.flowtok.num_tokens, config.flowtok.token_channels)}: text flows into image token by token"
            )
        if config.flow.direction != "image_to_text" and not config.pictures.captions:
            raise ValueError("pictures.captions is empty: name the captions of the sample pictures")
        if config.init_from and config.projector_run:
            raise ValueError(
                f"init_from={config.init_from} already has a projector, and projector_run={config.projector_run} names "
                'another: leave one of them empty (projector_run: "")'
            )
        if config.flow.projector == "frozen" and not (config.projector_run or config.init_from):
            raise ValueError(
                "flow.projector=frozen needs a trained projector: set projector_run or init_from"
            )
        if config.flow.projector == "detached" and not teaches_source(config.losses):
            raise ValueError(
                "flow.projector=detached leaves the projector without any loss: set losses, or take frozen"
            )
        check_guidance(config.sampling.guidance, config.flow.null_probability)
        check_direction(config)
        if config.evaluation.every_steps:
            protocol_file(config.evaluation.protocol)
            if config.flow.direction == "image_to_text":
                raise ValueError(
                    "evaluation.every_steps: a flow to text alone makes no images to measure, set it to 0"
                )
    if (
        isinstance(config, TextDecoderStage)
        and config.projector.linear_start
        and not config.projector_run
    ):
        raise ValueError(
            f"projector.linear_start={config.projector.linear_start} is a regression onto image latents, and this "
            "stage has captions alone: set it to 0, or projector_run to a run that has it"
        )
    if isinstance(config, TextDecoderStage) and config.freeze_projector:
        if not config.projector_run:
            raise ValueError("freeze_projector=true needs a trained projector: set projector_run")
        if config.losses.kl_weight:
            raise ValueError(
                f"freeze_projector=true: the KL of a frozen projector teaches nothing, set losses.kl_weight=0 (it is "
                f"{config.losses.kl_weight})"
            )
    if isinstance(config, TokenizerStage):
        start, end = config.adversarial.start_step, config.training.max_steps
        if config.adversarial.weight and start >= end:
            raise ValueError(
                f"adversarial.start_step={start} is not before the end, training.max_steps={end}: lower it, or turn "
                "the adversarial loss off by adversarial.weight=0"
            )
        if config.evaluation.every_steps and not (
            config.evaluation.shards or config.pictures.shards
        ):
            raise ValueError(
                "evaluation.every_steps needs images: set evaluation.shards (or pictures.shards)"
            )
        if config.freeze_encoder and not config.init_from:
            raise ValueError("freeze_encoder=true needs a trained encoder: set init_from")
        if config.freeze_encoder and config.losses.kl_weight:
            raise ValueError(
                f"freeze_encoder=true: the KL of a frozen encoder teaches nothing, set losses.kl_weight=0 (it is "
                f"{config.losses.kl_weight})"
            )
    if isinstance(config, TokensStage):
        several = [
            key
            for source in config.data.full_sources().values()
            for key in source.captions.keys
            if ":" in key
        ]
        recaptioned = config.data.captions.recaption_keys
        if config.store_text_states and (recaptioned or "json:captions" in several):
            raise ValueError(
                "store_text_states=true stores the states of one caption; with several (json:captions, recaption_keys) "
                "set it to false"
            )
        if config.num_crops < 1 or config.batch_size < 1:
            raise ValueError(
                f"num_crops {config.num_crops} and batch_size {config.batch_size} must be at least 1"
            )
    if getattr(config, "latent_scale", 0.0) < 0:
        raise ValueError(f"latent_scale must not be negative, got {config.latent_scale}")
    if isinstance(config, TextProjectorStage) and not teaches_source(config.losses):
        raise ValueError(
            "losses: alignment_weight, kl_weight and image_regression_weight are all 0"
        )
    if isinstance(config, ReportStage) and not (config.train_shards and config.heldout_shards):
        raise ValueError("the report needs train_shards and heldout_shards")
    training = getattr(config, "training", None)
    if (
        training is not None
        and training.compile
        and getattr(config, "activation_checkpointing", "") == "selective"
    ):
        raise ValueError(
            "training.compile=true chooses itself what is kept for the backward pass: set activation_checkpointing to "
            "none or full"
        )
    data = getattr(config, "data", None)
    if data is not None:
        try:
            data.check()
        except ValueError as error:
            raise ValueError(f"data.{error}") from error
