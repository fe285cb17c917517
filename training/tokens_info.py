"""What a folder of token shards says about itself: whose latents they are, and their statistics.

scripts/encode_tokens.py writes tokens.json, which marks the folder as complete, and latent_stats.json beside the
shards; stages 2 and 3 check the one against their config and take the latent scale from the other.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data.readers import TokenTextConfig
from data.storage import is_remote
from modeling.fingerprint import fingerprint
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from training.files import write_json

TOKENS_INFO_FILE, LATENT_STATS_FILE = "tokens.json", "latent_stats.json"


@dataclass
class LatentStats:
    """Statistics of the latents of the first `num_samples` samples, in the tokenizer's own scale."""

    num_samples: int
    channel_mean: list[float]  # of the posterior means, over samples and tokens
    channel_std: list[float]
    latent_scale: (
        float  # 1 / deviation of the sampled latents over everything: z_I = latent_scale * latent
    )


@dataclass
class TokensInfo:
    """What the token shards of a folder hold, and what made them."""

    num_samples: int
    num_tokens: int  # K
    token_channels: int  # C
    tokenizer_fingerprint: str
    text_encoder_fingerprint: str
    has_text_states: bool
    flip: bool  # every image is also there mirrored
    num_crops: int  # of each image
    shards: list[str]  # names of the token shards
    skipped: dict[str, int]  # image samples that gave no latents, by reason
    stats: LatentStats

    @property
    def latent_scale(self) -> float:
        """z_I = latent_scale * latent has deviation 1."""
        return self.stats.latent_scale

    def inputs(self) -> dict:
        """What a stage that trains on these tokens depends on."""
        names = ("tokenizer", "text_encoder")
        return {name: getattr(self, f"{name}_fingerprint") for name in names} | {
            "latent_scale": self.latent_scale
        }

    def save(self, folder: Path) -> None:
        """Write both files, the one that marks the folder as complete last."""
        values = asdict(self)
        write_json(values.pop("stats"), folder / LATENT_STATS_FILE)
        write_json(values, folder / TOKENS_INFO_FILE)

    @staticmethod
    def load(folder: Path) -> "TokensInfo":
        """Read the files of a folder of token shards.

        Raises:
            ValueError: one is missing or of another form.
        """
        values = []
        for name in (TOKENS_INFO_FILE, LATENT_STATS_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder / name} does not exist: run scripts/encode_tokens.py (stage tokens)"
                )
            try:
                values.append(json.loads((folder / name).read_text()))
            except ValueError as error:
                raise ValueError(f"{folder / name} is no JSON: {error}") from error
        try:
            return TokensInfo(**values[0], stats=LatentStats(**values[1]))
        except TypeError as error:
            raise ValueError(
                f"{folder}: not what scripts/encode_tokens.py writes: {error}"
            ) from error


def load_tokens_info(
    data: TokenTextConfig, tokenizer: ImageTokenizer, tokenizer_run: str
) -> TokensInfo:
    """What the token shards of a config hold, checked against the tokenizer of a run.

    `data.any_tokenizer` accepts tokens of another tokenizer, and those of unknown origin (without
    tokens.json, such as the release's token.npy), which need `data.latent_scale`. Over several
    folders, the measured scale is that of all samples together, their means taken as equal.

    Raises:
        ValueError: no info, other token counts, another tokenizer; names folder and ways out.
    """
    shape = (tokenizer.config.num_tokens, tokenizer.config.token_channels)
    parents = ("" if is_remote(p) else str(Path(p).expanduser().parent) for p in data.all_shards())
    folders = sorted(set(parents))
    unknown = [f for f in folders if not (f and (Path(f) / TOKENS_INFO_FILE).is_file())]
    if unknown and data.any_tokenizer and data.latent_scale:
        return unknown_tokens(*shape, data.latent_scale)
    if unknown:
        where = f"{TOKENS_INFO_FILE} of remote shards"
        if unknown[0]:
            where = f"{unknown[0]}/{TOKENS_INFO_FILE}"
        raise ValueError(
            f"{where} does not exist: write the token shards with scripts/encode_tokens.py. For "
            "shards from elsewhere, set data.any_tokenizer=true and data.latent_scale (1.0143 for "
            "the release's)"
        )
    infos = {folder: TokensInfo.load(Path(folder)) for folder in folders}
    actual = fingerprint(tokenizer)
    for folder, info in infos.items():
        found = (info.num_tokens, info.token_channels)
        if found != shape:
            raise ValueError(
                f"{folder} holds {found[0]} x {found[1]} tokens, {tokenizer_run} makes "
                f"{shape[0]} x {shape[1]}"
            )
        if not data.any_tokenizer and info.tokenizer_fingerprint != actual:
            raise ValueError(
                f"{folder} was written with another tokenizer ({info.tokenizer_fingerprint}) than "
                f"{tokenizer_run} ({actual}): delete the folder and run scripts/encode_tokens.py "
                "again, or set data.any_tokenizer=true"
            )
    return join_infos(infos, data.latent_scale)


def unknown_tokens(num_tokens: int, token_channels: int, latent_scale: float) -> TokensInfo:
    """What is taken for granted of tokens that nobody described."""
    return TokensInfo(
        num_samples=0,
        num_tokens=num_tokens,
        token_channels=token_channels,
        tokenizer_fingerprint="unknown",
        text_encoder_fingerprint="unknown",
        has_text_states=False,
        flip=False,
        num_crops=1,
        shards=[],
        skipped={},
        stats=LatentStats(0, [], [], latent_scale),
    )


def join_infos(infos: dict[str, TokensInfo], latent_scale: float) -> TokensInfo:
    """One info for the shards of several folders."""
    first_folder, first = next(iter(infos.items()))
    for folder, info in infos.items():
        for name in ("tokenizer_fingerprint", "text_encoder_fingerprint", "has_text_states"):
            if getattr(info, name) != getattr(first, name):
                raise ValueError(
                    f"token shards that do not go together: {name} is {getattr(first, name)} in {first_folder}, "
                    f"{getattr(info, name)} in {folder}"
                )
    total = sum(info.num_samples for info in infos.values())
    variance = sum(info.num_samples / info.latent_scale**2 for info in infos.values()) / max(
        total, 1
    )
    measured = first.latent_scale if len(infos) == 1 else variance**-0.5
    values = asdict(first) | {
        "num_samples": total,
        "stats": LatentStats(total, [], [], latent_scale or measured),
    }
    return TokensInfo(**values)


def projector_sizes(tokenizer: ImageTokenizerConfig) -> dict[str, int]:
    """The derived sizes of a TextProjectorConfig: text flows into image token by token."""
    return {
        "text_tokens": tokenizer.text_tokens,
        "text_width": tokenizer.text_width,
        "token_channels": tokenizer.token_channels,
    }
