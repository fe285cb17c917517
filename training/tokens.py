"""Stored tokens and captions as the stages use them: a loader, text states, image posteriors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from data.config import ReaderConfig
from data.readers import TokenTextConfig, caption_reader, token_reader
from data.storage import is_remote
from modeling.posterior import Posterior
from modeling.text_encoder import TextEncoder, TextEncoderConfig, Tokenizer, load_text_encoder
from modeling.text_projector import TextProjector
from training.loop import TrainingConfig, batch_per_process
from training.ridge import fit_linear_skip
from training.run import Run
from training.tokens_info import TOKENS_INFO_FILE, TokensInfo

FITTED_SAMPLES = 10_000  # on which a projector's whitening and linear skip are measured


@dataclass
class StoredTokens:
    """Batches of stored tokens; the text tower is there only if its states are not stored."""

    run: Run
    loader: StatefulDataLoader
    data: TokenTextConfig
    info: TokensInfo
    tokenize: Tokenizer | None
    text_encoder: TextEncoder | None

    def text_states(self, batch: dict) -> Tensor:
        """Text states of a batch, B x L x T: as stored (then float32), else encoded now."""
        return text_states(self.run, self.text_encoder, batch)

    def image_posterior(self, batch: dict) -> Posterior:
        """Posterior of the image latents in the tokenizer's own scale, B x K x C."""
        mean = batch["latent_mean"].to(self.run.device, non_blocking=True)
        logvar = batch["latent_logvar"].to(self.run.device, non_blocking=True)
        return Posterior(mean, logvar)

    def fit_whitening(self, projector: TextProjector) -> None:
        """Measure the projector's whitening of text states on the first samples, if it has one."""
        if projector.config.whiten_text:
            batches = self._read(100, FITTED_SAMPLES)
            projector.whitening.fit(self.text_states(batch).cpu() for batch in batches)

    def fit_linear_skip(self, projector: TextProjector, strength: float) -> None:
        """Fill the projector's linear skip by ridge regression on the first samples."""
        states, latents = [], []
        for batch in self._read(100, FITTED_SAMPLES):
            states.append(self.text_states(batch).cpu().float())
            latents.append(self.image_posterior(batch).mean.cpu() * self.info.latent_scale)
        fit_linear_skip(projector.linear_skip, torch.cat(states), torch.cat(latents), strength)

    def first(self, number: int) -> dict:
        """The first `number` samples in the order of the shards, as one batch."""
        return next(self._read(number, number))

    def _read(self, batch_size: int, limit: int) -> Iterator[dict]:
        info = self.info
        reader = token_reader(self.data, info.num_tokens, info.token_channels, self.tokenize)
        return reader.once(batch_size, limit=limit)


def open_stored_tokens(
    run: Run,
    data: TokenTextConfig,
    training: TrainingConfig,
    info: TokensInfo,
    text_config: TextEncoderConfig,
) -> StoredTokens:
    """Open token shards for this process.

    Raises:
        ValueError: the text tower is not the one that the tokens were made with.
    """
    encoder = load_text_encoder(text_config)
    if info.text_encoder_fingerprint not in ("unknown", encoder.identity):
        raise ValueError(
            f"the token shards were made with another text tower than {text_config.model} of the "
            "tokenizer's run: delete them and encode them again"
        )
    tokenize = None if info.has_text_states else encoder.tokenize
    reader = token_reader(data, info.num_tokens, info.token_channels, tokenize)
    loader = reader.stream(
        batch_per_process(run, training),
        training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
        pin_memory=run.device.type == "cuda",
    )
    encoder = None if info.has_text_states else encoder.to(run.device)
    return StoredTokens(run, loader, data, info, tokenize, encoder)


@dataclass
class StoredCaptions:
    """Batches of captions. Stored text states are used if they are the tower's own."""

    run: Run
    loader: StatefulDataLoader
    data: ReaderConfig
    tokenize: Tokenizer
    text_encoder: TextEncoder
    has_text_states: bool

    def text_states(self, batch: dict) -> Tensor:
        """Text states of a batch, B x L x T: as stored (then float32), else encoded now."""
        return text_states(self.run, self.text_encoder, batch)

    def read(self, limit: int, shards: list[str] | None = None) -> Iterator[dict]:
        """The first captions in order; of other shards without looking for stored states."""
        has_text_states = self.has_text_states and shards is None
        return caption_reader(self.data, self.tokenize, has_text_states).once(100, shards, limit)

    def fit_whitening(self, projector: TextProjector) -> None:
        """Measure the projector's whitening of text states on the first captions, if it has one."""
        if projector.config.whiten_text:
            batches = self.read(FITTED_SAMPLES)
            projector.whitening.fit(self.text_states(batch).cpu() for batch in batches)


def open_stored_captions(
    run: Run, data: ReaderConfig, training: TrainingConfig, text_config: TextEncoderConfig
) -> StoredCaptions:
    """Open any shards with captions for this process."""
    encoder = load_text_encoder(text_config)
    has_text_states = all(holds_states_of(encoder, pattern) for pattern in data.all_shards())
    loader = caption_reader(data, encoder.tokenize, has_text_states).stream(
        batch_per_process(run, training),
        training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )
    return StoredCaptions(
        run, loader, data, encoder.tokenize, encoder.to(run.device), has_text_states
    )


def text_states(run: Run, encoder: TextEncoder | None, batch: dict) -> Tensor:
    """Text states of a batch, B x L x T on the device: as stored, else of the tower."""
    if "text_states" in batch:
        return batch["text_states"].to(run.device, non_blocking=True).float()
    with run.accelerator.autocast():
        return encoder(batch["token_ids"].to(run.device, non_blocking=True))


def holds_states_of(encoder: TextEncoder, pattern: str) -> bool:
    """Whether shards lie in a folder of token shards that has this tower's text states."""
    folder = Path(pattern).expanduser().parent
    if is_remote(pattern) or not (folder / TOKENS_INFO_FILE).is_file():
        return False
    info = TokensInfo.load(folder)
    return info.has_text_states and info.text_encoder_fingerprint == encoder.identity
