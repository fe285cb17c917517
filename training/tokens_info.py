"""What a folder of token shards says about itself: whose latents they are, and their statistics.

scripts/encode_tokens.py writes tokens.json, which marks the folder as complete, and latent_stats.json beside the
shards; stages 2 and 3 check the one against their config and take the latent scale from the other.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data.readers import TokenTextConfig
from data.storage import is_remote
from training.loading import fingerprint, load_tokenizer

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
        """Write both files aside and rename them, the mark of completeness last."""
        values = asdict(self)
        for name, content in ((LATENT_STATS_FILE, values.pop("stats")), (TOKENS_INFO_FILE, values)):
            partial = folder / f"{name}.tmp"
            partial.write_text(json.dumps(content, indent=2) + "\n")
            partial.rename(folder / name)

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
    data: TokenTextConfig,
    num_tokens: int,
    token_channels: int,
    tokenizer_run: str,
    latent_scale: float = 0.0,
    any_tokenizer: bool = False,
) -> TokensInfo:
    """What the token shards of a config hold, checked against the model and the tokenizer of `tokenizer_run`.

    Args:
        latent_scale: to take instead of the measured one; 0: measured. Over several folders, the measured one is that
            of all samples together, their means taken as equal.
        any_tokenizer: take tokens of another tokenizer, and such of unknown origin (without tokens.json, for instance
            the release's token.npy); the latter need a latent_scale.

    Raises:
        ValueError: no info, other token counts, another tokenizer or text tower; names the folder and the ways out.
    """
    folders = sorted(
        {"" if is_remote(p) else str(Path(p).expanduser().parent) for p in data.all_shards()}
    )
    unknown = [
        folder for folder in folders if not (folder and (Path(folder) / TOKENS_INFO_FILE).is_file())
    ]
    if unknown and any_tokenizer and latent_scale:
        stats = LatentStats(0, [], [], latent_scale)
        return TokensInfo(
            0, num_tokens, token_channels, "unknown", "unknown", False, False, 1, [], {}, stats
        )
    if unknown:
        where = (
            f"{unknown[0]}/{TOKENS_INFO_FILE}"
            if unknown[0]
            else f"{TOKENS_INFO_FILE} of remote shards"
        )
        raise ValueError(
            f"{where} does not exist: write the token shards with scripts/encode_tokens.py. For shards from elsewhere, "
            "set any_tokenizer=true and their latent_scale (1.0143 for the release's)"
        )
    infos = {folder: TokensInfo.load(Path(folder)) for folder in folders}
    actual = "" if any_tokenizer else fingerprint(load_tokenizer(tokenizer_run)[0])
    for folder, info in infos.items():
        if (info.num_tokens, info.token_channels) != (num_tokens, token_channels):
            raise ValueError(
                f"{folder} holds {info.num_tokens} x {info.token_channels} tokens, the config expects "
                f"{num_tokens} x {token_channels} (projector.text_tokens x token_channels)"
            )
        if not any_tokenizer and info.tokenizer_fingerprint != actual:
            raise ValueError(
                f"{folder} was written with another tokenizer ({info.tokenizer_fingerprint}) than {tokenizer_run} "
                f"({actual}): delete the folder and run scripts/encode_tokens.py again, or set any_tokenizer=true"
            )
    return join_infos(infos, latent_scale)


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
