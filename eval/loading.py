"""Run folders -> loaded parts, always with EMA weights; and what the stored tokens say about themselves.

A run folder's config.yaml alone says how its network is built; the newest complete checkpoint has the weights.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.pipeline import SamplingConfig, TextToImage
from modeling.text_encoder import TextEncoder, TextEncoderConfig, TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from modeling.text_to_image import TextToImageFlow
from training.checkpoint import EMA_FILE, latest_checkpoint, load_weights, read_state
from training.run import CONFIG_FILE

TOKENS_INFO_FILE = "tokens.json"
T = TypeVar("T")


def read_run_config(run_dir: str | Path) -> DictConfig:
    """The resolved config of a run.

    Raises:
        ValueError: no run there; names what the folder holds.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else path.parent.parent
        found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
        raise ValueError(
            f"{run_dir} is no run folder (no {CONFIG_FILE}); {folder} holds: {', '.join(found) or 'nothing'}"
        )
    return OmegaConf.load(path)


def section(config: DictConfig, key: str, schema: type[T]) -> T:
    """One part of a run's config as its dataclass."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config[key]))


def load_ema(module: nn.Module, run_dir: str | Path) -> nn.Module:
    """Fill a module with the EMA weights of a run's newest checkpoint; frozen, in eval mode.

    Raises:
        ValueError: no checkpoint yet, or one of another network.
    """
    latest = latest_checkpoint(Path(run_dir))
    if latest is None:
        raise ValueError(f"{run_dir} has no checkpoint yet: run its stage first")
    load_weights(module, latest[1] / EMA_FILE)
    return module.eval().requires_grad_(False)


def load_tokenizer(run_dir: str | Path) -> tuple[ImageTokenizer, TextEncoderConfig]:
    """The image tokenizer of a stage-1 run and the text tower that guides its decoder."""
    config = read_run_config(run_dir)
    tokenizer = ImageTokenizer(section(config, "tokenizer", ImageTokenizerConfig))
    return load_ema(tokenizer, run_dir), section(config, "text_encoder", TextEncoderConfig)


def load_projector(run_dir: str | Path) -> TextProjector:
    """The text projector of a stage-2 run."""
    config = read_run_config(run_dir)
    return load_ema(TextProjector(section(config, "projector", TextProjectorConfig)), run_dir)


def load_pipeline(run_dir: str | Path, device: torch.device) -> tuple[TextToImage, SamplingConfig]:
    """All parts of an experiment for generation, and its default sampling.

    Args:
        run_dir: an experiment folder (with flowtok/ in it) or a stage-3 run folder.
    """
    run_dir = Path(run_dir)
    flow_dir = run_dir / "flowtok" if (run_dir / "flowtok").is_dir() else run_dir
    config = read_run_config(flow_dir)
    if "flowtok" not in config:
        raise ValueError(f"{flow_dir} is a run of stage {config.get('stage')!r}; sampling needs a flowtok run")
    flow = TextToImageFlow(section(config, "projector", TextProjectorConfig), section(config, "flowtok", FlowTokConfig))
    load_ema(flow, flow_dir)
    trained_on = read_state(latest_checkpoint(flow_dir)[1])["inputs"]
    text_config = section(config, "text_encoder", TextEncoderConfig)
    text_config.model, text_encoder = find_text_encoder(flow_dir, text_config, trained_on["text_encoder"])
    parts = TextToImage(
        tokenize=TextTokenizer(text_config),
        text_encoder=text_encoder.to(device),
        tokenizer=find_tokenizer(flow_dir, config.tokenizer_run, trained_on["tokenizer"]).to(device),
        flow=flow.to(device),
    )
    return parts, section(config, "sampling", SamplingConfig)


def find_tokenizer(flow_dir: Path, tokenizer_run: str, wanted: str) -> ImageTokenizer:
    """The tokenizer that a flow was trained with: where its config says, or beside the flow if the folder was moved.

    Raises:
        ValueError: neither has the weights with the fingerprint `wanted`.
    """
    runs = [run for run in (Path(tokenizer_run), flow_dir.parent / "tokenizer") if (run / CONFIG_FILE).is_file()]
    for run in runs:
        tokenizer = load_tokenizer(run)[0]
        if fingerprint(tokenizer) == wanted:
            return tokenizer
    tried = ", ".join(map(str, runs)) or f"nothing at {tokenizer_run}"
    raise ValueError(
        f"{flow_dir} was trained with the tokenizer {wanted}, which is not there any more (found: {tried})"
    )


def find_text_encoder(flow_dir: Path, config: TextEncoderConfig, wanted: str) -> tuple[str, TextEncoder]:
    """(model, tower) that a flow was trained with: as its config says, or beside the flow if the folder was moved.

    Raises:
        ValueError: neither has the weights with the fingerprint `wanted`.
    """
    beside = flow_dir.parent / "text_encoder" / "clip"
    models = [config.model] + ([f"local-dir:{beside}"] if beside.is_dir() else [])
    if len(models) == 2 and not Path(config.model.removeprefix("local-dir:")).is_dir():
        models.reverse()
    for model in models:
        tower = load_text_encoder(replace(config, model=model))
        if fingerprint(tower) == wanted:
            return model, tower
    raise ValueError(
        f"{flow_dir} was trained with the text tower {wanted}, which {' and '.join(models)} is not any more"
    )


def fingerprint(module: nn.Module) -> str:
    """16 hex digits over names, shapes and values of a module's state: equal weights, equal fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class TokensInfo:
    """What scripts/encode_tokens.py writes next to its shards."""

    num_samples: int
    num_tokens: int  # K
    token_channels: int  # C
    latent_scale: float  # 1 / deviation of the sampled latents: z_I = latent_scale * latent
    channel_mean: list[float]  # per channel, of the means
    channel_std: list[float]
    tokenizer_fingerprint: str
    text_encoder_fingerprint: str
    has_text_states: bool
    shards: list[str]  # names of the token shards

    def inputs(self) -> dict:
        """What a stage that trains on these tokens depends on."""
        names = ("tokenizer", "text_encoder")
        return {name: getattr(self, f"{name}_fingerprint") for name in names} | {"latent_scale": self.latent_scale}

    def save(self, folder: Path) -> None:
        """Write aside and rename; this file marks the folder as complete."""
        partial = folder / (TOKENS_INFO_FILE + ".tmp")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.rename(folder / TOKENS_INFO_FILE)

    @staticmethod
    def load(folder: Path) -> "TokensInfo":
        """Read the file of a folder of token shards.

        Raises:
            ValueError: missing or of another form.
        """
        path = folder / TOKENS_INFO_FILE
        if not path.is_file():
            raise ValueError(f"{path} does not exist: write the token shards with scripts/encode_tokens.py first")
        try:
            return TokensInfo(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is not what scripts/encode_tokens.py writes: {error}") from error


def load_tokens_info(shards: list[str], num_tokens: int, token_channels: int, tokenizer_run: str) -> TokensInfo:
    """The info of the folder that holds the shards, checked against the model and the tokenizer.

    Raises:
        ValueError: several folders, other token counts, or tokens of another tokenizer than `tokenizer_run`'s.
    """
    folders = {Path(pattern).expanduser().parent for pattern in shards}
    if len(folders) != 1:
        raise ValueError(f"data.shards must lie in one folder (one latent scale), got {sorted(map(str, folders))}")
    folder = folders.pop()
    info = TokensInfo.load(folder)
    if (info.num_tokens, info.token_channels) != (num_tokens, token_channels):
        raise ValueError(
            f"{folder} holds {info.num_tokens} x {info.token_channels} tokens, the config expects "
            f"{num_tokens} x {token_channels} (projector.text_tokens x token_channels)"
        )
    actual = fingerprint(load_tokenizer(tokenizer_run)[0])
    if info.tokenizer_fingerprint != actual:
        raise ValueError(
            f"{folder} was written with another tokenizer ({info.tokenizer_fingerprint}) than {tokenizer_run} "
            f"({actual}): delete the folder and run scripts/encode_tokens.py again"
        )
    return info
