"""Folders of token shards and what they say; tokens and captions as stages use them.

scripts/encode_tokens.py writes latent_stats.json beside the shards, and tokens.json, which marks
the folder as complete. Stages 2 and 3 check the one against their tokenizer's run and take the
latent scale from the other.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from data.config import ReaderConfig
from data.files import load_json, write_json
from data.readers import Reader, TokenTextConfig, caption_reader, token_reader
from data.storage import is_remote
from modeling.dual_tokenizer import DualTokenizer, DualTokens
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from modeling.layers import Posterior, fingerprint
from modeling.text_encoder import TextEncoder, TextEncoderConfig, load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.ridge import fit_linear_skip
from training.run import Run
from training.stage import TrainingConfig, open_stream

TOKENS_INFO_FILE, LATENT_STATS_FILE = "tokens.json", "latent_stats.json"


@dataclass
class LatentStats:
    """Statistics of the first `num_samples` samples' latents, in the tokenizer's own scale."""

    num_samples: int
    channel_mean: list[float]  # of the posterior means, over samples and tokens
    channel_std: list[float]
    # 1 / deviation of the sampled latents over everything: z_I = latent_scale * latent
    latent_scale: float


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
    identity: str = ""  # a digest of the token shards; "" where nobody took it
    # name of each shard -> "num_samples", "skipped", "crc32", "bytes"; {} where nobody counted
    counts: dict[str, dict] = field(default_factory=dict)

    @property
    def latent_scale(self) -> float:
        """z_I = latent_scale * latent has deviation 1."""
        return self.stats.latent_scale

    def damage(self, folder: Path) -> list[str]:
        """What names and sizes show to be wrong with the shards in a folder."""
        found = (shard_damage(folder / name, self.counts.get(name, {})) for name in self.shards)
        return [damage for damage in found if damage]

    def inputs(self) -> dict:
        """What a stage that trains on these tokens depends on."""
        names = ("tokenizer", "text_encoder")
        inputs = {name: getattr(self, f"{name}_fingerprint") for name in names}
        inputs["latent_scale"] = self.latent_scale
        return inputs | ({"tokens": self.identity} if self.identity else {})

    def save(self, folder: Path) -> None:
        """Write both files, the one that marks the folder as complete last."""
        values = asdict(self)
        write_json(values.pop("stats"), folder / LATENT_STATS_FILE)
        write_json(values, folder / TOKENS_INFO_FILE)

    @staticmethod
    def load(folder: Path) -> "TokensInfo":
        """Read the files of a folder of token shards; ValueError: one is missing or damaged."""
        values = []
        for path in (folder / TOKENS_INFO_FILE, folder / LATENT_STATS_FILE):
            if not path.is_file():
                raise ValueError(
                    f"{path} does not exist: run scripts/encode_tokens.py (stage tokens)"
                )
            value = load_json(path.read_bytes())
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path} is not what scripts/encode_tokens.py writes: no JSON object"
                )
            values.append(value)
        try:
            return TokensInfo(**values[0], stats=LatentStats(**values[1]))
        except TypeError as error:
            reason = f"not what scripts/encode_tokens.py writes: {error}"
            raise ValueError(f"{folder}: {reason}") from error


def shard_damage(path: Path, counts: dict) -> str:
    """What is wrong with a token shard by its name and size, "" if nothing; counts: if known."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != counts.get("bytes", size):
        return f"{path.name} has {size} bytes instead of {counts['bytes']}"
    return ""


def refuse_damage(data: ReaderConfig) -> None:
    """Refuse shards that are no longer as scripts/encode_tokens.py wrote them."""
    patterns = [pattern for pattern in data.all_shards() if not is_remote(pattern)]
    for folder in sorted({Path(pattern).expanduser().parent for pattern in patterns}):
        is_known = (folder / TOKENS_INFO_FILE).is_file()
        damage = TokensInfo.load(folder).damage(folder) if is_known else []
        if damage:
            raise ValueError(
                f"{folder}: {damage[0]} ({len(damage)} damaged or lost shards): run "
                "scripts/encode_tokens.py (stage tokens) again, which makes them anew"
            )


def load_tokens_info(
    data: TokenTextConfig, tokenizer: ImageTokenizer, tokenizer_run: str
) -> TokensInfo:
    """What the token shards of a config hold, checked against the tokenizer of a run.

    `data.any_tokenizer` accepts tokens of another tokenizer, and those of unknown origin (without
    tokens.json, such as the release's token.npy), which need `data.latent_scale`.

    Raises:
        ValueError: no info, other token counts, another tokenizer; names folder and ways out.
    """
    # Where the shards lie, and whether somebody described them there.
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

    # A decoder makes noise of latents that another tokenizer's encoder gave.
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
    # The release's folders hold token.npy files only: nothing says who made them, and from what.
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
    # Weights that are trained on two text towers or tokenizers at once belong to neither.
    first_folder, first = next(iter(infos.items()))
    for folder, info in infos.items():
        for name in ("tokenizer_fingerprint", "text_encoder_fingerprint", "has_text_states"):
            if getattr(info, name) != getattr(first, name):
                raise ValueError(
                    f"token shards that do not go together: {name} is {getattr(first, name)} in "
                    f"{first_folder}, {getattr(info, name)} in {folder}"
                )

    # The measured scale is that of all samples together, their means taken as equal.
    total = sum(info.num_samples for info in infos.values())
    squares = sum(info.num_samples / info.latent_scale**2 for info in infos.values())
    measured = first.latent_scale if len(infos) == 1 else (squares / max(total, 1)) ** -0.5
    return replace(
        first,
        num_samples=total,
        stats=LatentStats(total, [], [], latent_scale or measured),
        identity="+".join(filter(None, (info.identity for info in infos.values()))),
        counts={},
    )


def projector_sizes(tokenizer: ImageTokenizerConfig) -> dict[str, int]:
    """The derived sizes of a TextProjectorConfig."""
    # Text flows into image token by token, if it has as many and none of them is padding.
    is_paired = tokenizer.num_tokens == tokenizer.text_tokens and not tokenizer.text_is_masked
    return {
        "text_tokens": tokenizer.text_tokens,
        "text_width": tokenizer.text_width,
        "token_channels": tokenizer.token_channels,
        "num_queries": 0 if is_paired else tokenizer.num_tokens,
    }


def complete_projector(
    typed: TextProjectorConfig | None,
    source: TextProjector | None,
    source_run: str,
    tokenizer_run: str,
    sizes: dict[str, int],
) -> TextProjectorConfig:
    """The projector's config: that of the weights it starts from, or as typed; with its sizes."""
    # Sizes follow from the tokenizer, so weights for another one do not fit.
    if source is None:
        return replace(typed or TextProjectorConfig(), **sizes)
    found = {name: getattr(source.config, name) for name in sizes}
    if found != sizes:
        raise ValueError(f"the projector of {source_run} has {found}, {tokenizer_run} {sizes}")
    return source.config


# Batches

FITTED_SAMPLES = 10_000  # on which a projector's whitening and linear skip are measured


@dataclass
class StoredText:
    """Batches with text; the tower is there unless its states are stored with all of it."""

    run: Run
    loader: StatefulDataLoader
    reader: Reader  # of the same samples in order
    text_encoder: TextEncoder | None

    def text_states(self, batch: dict) -> Tensor:
        """Text states of a batch, B x L x T: as stored (then float32), else encoded now."""
        return text_states(self.run, self.text_encoder, batch)

    def fit_whitening(self, projector: TextProjector) -> None:
        """Measure the projector's whitening of text states on the first samples, if it has one."""
        if projector.config.whiten_text:
            batches = self.reader.once(100, limit=FITTED_SAMPLES)
            projector.whitening.fit(self.text_states(batch).cpu() for batch in batches)


@dataclass
class StoredTokens(StoredText):
    """Batches of stored tokens."""

    info: TokensInfo

    def image_posterior(self, batch: dict) -> Posterior:
        """Posterior of the image latents in the tokenizer's own scale, B x K x C."""
        mean = batch["latent_mean"].to(self.run.device, non_blocking=True)
        logvar = batch["latent_logvar"].to(self.run.device, non_blocking=True)
        return Posterior(mean, logvar)

    def fit_linear_skip(self, projector: TextProjector, strength: float) -> None:
        """Fill the projector's linear skip by ridge regression on the first samples."""
        # Means, not samples: the noise of the posterior is nothing that text could predict.
        states, latents = [], []
        for batch in self.reader.once(100, limit=FITTED_SAMPLES):
            states.append(self.text_states(batch).cpu().float())
            latents.append(self.image_posterior(batch).mean.cpu() * self.info.latent_scale)
        fit_linear_skip(projector.linear_skip, torch.cat(states), torch.cat(latents), strength)


def open_stored_tokens(
    run: Run,
    data: TokenTextConfig,
    training: TrainingConfig,
    info: TokensInfo,
    text_config: TextEncoderConfig,
) -> StoredTokens:
    """Open token shards for this process.

    Raises:
        ValueError: the text tower is not the one that the tokens were made with, their text states
            are of one caption where it is to be drawn, or a shard is lost or damaged.
    """
    # States are stored of one caption, and would be read with whichever is drawn.
    if info.has_text_states and data.has_several_captions():
        raise ValueError(
            "data.captions draws captions (json:captions, recaption_keys, window=sentences), but "
            "the token shards hold the text states of one: encode them again with "
            "store_text_states=false, or name one caption, as keys=[txt]"
        )
    refuse_damage(data)
    encoder = load_text_encoder(text_config)
    if info.text_encoder_fingerprint not in ("unknown", encoder.identity):
        raise ValueError(
            f"the token shards were made with another text tower than {text_config.model} of the "
            "tokenizer's run: delete them and encode them again"
        )

    # Where all samples have states, the tower leaves the device's memory to the training.
    tokenize = None if info.has_text_states else encoder.tokenize
    # Shards of unknown origin may hold the states of another tower, or of another caption
    if info.text_encoder_fingerprint == "unknown":
        run.say("token shards of unknown origin: text states in them are not read, but made anew")
    reader = token_reader(
        data, info.num_tokens, info.token_channels, tokenize, with_states=info.has_text_states
    )
    encoder = None if info.has_text_states else encoder.to(run.device)
    return StoredTokens(run, open_stream(run, training, reader), reader, encoder, info)


def open_stored_captions(
    run: Run, data: ReaderConfig, training: TrainingConfig, text_config: TextEncoderConfig
) -> StoredText:
    """Open any shards with captions for this process; ValueError if one of tokens is damaged.

    Stored text states are used if they are the tower's own.
    """
    refuse_damage(data)
    encoder = load_text_encoder(text_config)
    # states are of one whole caption: of drawn ones they are encoded
    has_text_states = not data.has_several_captions() and all(
        holds_states_of(encoder, pattern) for pattern in data.all_shards()
    )
    reader = caption_reader(data, encoder.tokenize, has_text_states)
    return StoredText(run, open_stream(run, training, reader), reader, encoder.to(run.device))


def text_states(run: Run, encoder: TextEncoder | None, batch: dict) -> Tensor:
    """Text states of a batch, B x L x T on the device: as stored, else of the tower."""
    if "text_states" in batch:
        return batch["text_states"].to(run.device, non_blocking=True).float()
    with run.accelerator.autocast():
        return encoder(batch["token_ids"].to(run.device, non_blocking=True))


def unit_images(run: Run, batch: dict) -> Tensor:
    """A batch's uint8 images -> float32 in [0, 1] on the device."""
    return batch["image"].to(run.device, non_blocking=True).float().div_(255)


@torch.no_grad()
def encode_images(
    run: Run, tokenizer: ImageTokenizer | DualTokenizer, batch: dict
) -> Posterior | DualTokens:
    """What a frozen tokenizer makes of a batch's images, in the run's precision."""
    with run.accelerator.autocast():
        return tokenizer.encode(unit_images(run, batch))


def holds_states_of(encoder: TextEncoder, pattern: str) -> bool:
    """Whether shards lie in a folder of token shards that has this tower's text states."""
    folder = Path(pattern).expanduser().parent
    if is_remote(pattern) or not (folder / TOKENS_INFO_FILE).is_file():
        return False
    info = TokensInfo.load(folder)
    return info.has_text_states and info.text_encoder_fingerprint == encoder.identity
