"""Stored tokens as stages 2 and 3 use them: a loader, text states in the run's precision, the image posterior."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.readers import TokenTextConfig, token_reader
from modeling.posterior import Posterior
from modeling.text_encoder import TextEncoder, TextEncoderConfig, TextTokenizer, load_text_encoder
from modeling.text_projector import TextProjector, TextProjectorConfig
from training.loading import fingerprint
from training.loop import TrainingConfig, batch_per_pass
from training.run import Run
from training.tokens_info import TokensInfo

MEASURED_SAMPLES = 10_000  # on which a projector's whitening and linear start are measured


@dataclass
class StoredTokens:
    """Batches of stored tokens and what they mean. The text tower is only there when its states are not stored."""

    run: Run
    loader: object
    data: TokenTextConfig
    info: TokensInfo
    tokenize: TextTokenizer | None
    text_encoder: TextEncoder | None

    def text_states(self, batch: dict) -> Tensor:
        """Text states of a batch, B x L x T on the device: as stored (then float32), else encoded now."""
        if self.text_encoder is None:
            return batch["text_states"].to(self.run.device, non_blocking=True).float()
        with self.run.accelerator.autocast():
            return self.text_encoder(batch["token_ids"].to(self.run.device, non_blocking=True))

    def image_posterior(self, batch: dict) -> Posterior:
        """Posterior of the image latents in the tokenizer's own scale, B x K x C on the device."""
        mean, logvar = (
            batch[key].to(self.run.device, non_blocking=True)
            for key in ("latent_mean", "latent_logvar")
        )
        return Posterior(mean, logvar)

    def fit(self, projector: TextProjector) -> None:
        """Measure on the first samples what the projector measures: the whitening of text states, the linear start."""
        if projector.config.whiten_text:
            projector.whitening.fit(
                self.text_states(batch).cpu() for batch in self._read(100, MEASURED_SAMPLES)
            )
        if projector.linear_start is not None:
            batches = [
                (
                    self.text_states(batch).cpu().float(),
                    self.image_posterior(batch).mean.cpu() * self.info.latent_scale,
                )
                for batch in self._read(100, MEASURED_SAMPLES)
            ]
            projector.linear_start.fit(*(torch.cat(parts) for parts in zip(*batches)))

    def first(self, number: int) -> dict:
        """The first `number` samples in the order of the shards, as one batch."""
        return next(self._read(number, number))

    def _read(self, batch_size: int, limit: int) -> Iterator[dict]:
        shape = (self.info.num_tokens, self.info.token_channels)
        return token_reader(self.data, *shape, self.tokenize).once(batch_size, limit=limit)


def open_stored_tokens(run: Run, config, info: TokensInfo) -> StoredTokens:
    """Open the shards of a stage-2 or stage-3 config for this process.

    Raises:
        ValueError: the text tower is not the projector's, or not the one of the stored states.
    """
    text_config: TextEncoderConfig = config.text_encoder
    projector: TextProjectorConfig = config.projector
    training: TrainingConfig = config.training
    encoder = load_text_encoder(text_config)
    if (encoder.context_length, encoder.width) != (projector.text_tokens, projector.text_width):
        raise ValueError(
            f"{text_config.model} gives {encoder.context_length} x {encoder.width} text states, the config expects "
            f"projector.text_tokens x text_width = {projector.text_tokens} x {projector.text_width}"
        )
    if info.text_encoder_fingerprint not in ("unknown", fingerprint(encoder)):
        raise ValueError(
            f"the token shards and their tokenizer were made with another text tower than {text_config.model}; "
            "set text_encoder as in the tokenizer's config, or delete the token shards and encode them again"
        )
    tokenize = None if info.has_text_states else TextTokenizer(text_config)
    reader = token_reader(config.data, info.num_tokens, info.token_channels, tokenize)
    loader = reader.stream(
        batch_per_pass(run, training),
        training.seed,
        run.accelerator.process_index,
        run.accelerator.num_processes,
        pin_memory=run.device.type == "cuda",
    )
    encoder = None if info.has_text_states else encoder.to(run.device)
    return StoredTokens(run, loader, config.data, info, tokenize, encoder)
