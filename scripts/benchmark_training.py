"""scripts/benchmark.py train: the real training step of a stage on made-up data in memory.

Trainer, losses, optimizer, EMA and autocast are those of the stage's program; weights are random (also where training
starts at zero, so that nothing is degenerate), text states and latents are drawn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from configs.schema import FlowTokStage, StageConfig, TextProjectorStage, TokenizerStage
from torch import nn
from training.stored_tokens import StoredTokens

import train_flowtok
import train_text_projector
import train_tokenizer
from modeling.losses import freeze_unused_alignment
from modeling.text_projector import TextProjector
from scripts.benchmark_flops import training_gflop
from scripts.benchmark_plain import PlainTrainer, plain_copy
from scripts.benchmark_timing import Memory, Parts, Timing, alternate
from scripts.plan_stages import EmptyPerceptualLoss, Sizes, build_tower, find_sizes, tower_config
from training.loop import Trainer
from training.run import Run, start_run

MAX_TOKEN_ID = 49_000  # below CLIP's vocabulary
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Step:
    """A stage's training step, ready to run again and again."""

    run: Run
    trainer: Trainer
    loss_fn: Callable[[nn.Module, dict], dict]
    batch: dict
    gflop_per_sample: float
    methods: list[tuple[str, object, str]]  # its parts, as Parts.measure takes them
    losses_of: Callable[[nn.Module], dict] | None = (
        None  # terms of another network of the same maths
    )

    def __call__(self, batches: Iterator[dict] | None = None) -> None:
        self.trainer.optimizer_step(batches or repeat(self.batch), self.loss_fn)
        self.trainer.window.reset()

    def parts(self) -> dict[str, float]:
        """Seconds a step by part."""
        parts, trainer = Parts(self.run.device), self.trainer
        batches = parts.iterate("data", repeat(self.batch))
        last = [
            ("backward", self.run.accelerator, "backward"),
            ("optimizer", trainer.player, "update"),
            ("ema", trainer.ema, "update"),
        ]
        return parts.measure(partial(self, batches), [*self.methods, *last])


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """Random values for each weight that starts at zero, as gates and last layers do."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def build_step(config: StageConfig, path: Path, run: Run, with_tower: bool) -> Step:
    """The step of a stage that trains.

    Raises:
        ValueError: another stage, or a text tower of unknown size.
    """
    build = {
        TokenizerStage: tokenizer_step,
        FlowTokStage: token_step,
        TextProjectorStage: token_step,
    }.get(type(config))
    if build is None:
        valid = "flowtok, text_projector, tokenizer"
        raise ValueError(
            f"{path}: a config of stage {config.stage!r} has no step to measure here; valid: {valid}"
        )
    step = build(config, find_sizes(config, path), run, with_tower)
    step.trainer.player.wrapped.train()
    return step


def make_tower(sizes: Sizes, device: torch.device) -> nn.Module:
    """The frozen text tower with random weights.

    Raises:
        ValueError: its size is not known here.
    """
    if tower_config(sizes.text_encoder) is None:
        raise ValueError(
            f"text_encoder.model {sizes.text_encoder.model}: its size is not known here; name another"
        )
    return build_tower(sizes).to(device)


def token_step(
    config: FlowTokStage | TextProjectorStage, sizes: Sizes, run: Run, with_tower: bool
) -> Step:
    """Stages 2 and 3, on stored text states unless the tower is to run."""
    info = SimpleNamespace(latent_scale=1.0)
    tower = make_tower(sizes, run.device) if with_tower else None
    tokens = StoredTokens(run, None, config.data, info, None, tower)
    is_flow = isinstance(config, FlowTokStage)
    if is_flow:
        model, losses = train_flowtok.build_model(config, info, None), train_flowtok.compute_losses
    else:
        model, losses = TextProjector(config.projector), train_text_projector.compute_losses
        freeze_unused_alignment(model, config.losses)
    fill_zeros(model)
    trainer = Trainer(run, config.training, config.optimizer, model, None)
    net, count = config.projector, config.training.batch_size
    batch = {
        "key": [str(number) for number in range(count)],
        "token_ids": torch.randint(MAX_TOKEN_ID, (count, net.text_tokens)),
        "latent_mean": torch.randn(count, net.text_tokens, net.token_channels),
        "latent_logvar": torch.randn(count, net.text_tokens, net.token_channels) - 4,
    }
    if tower is None:
        batch["text_states"] = torch.randn(count, net.text_tokens, net.text_width).half()
    methods = [("data", tokens, "image_posterior"), ("text", tokens, "text_states")]
    projector = model.projector if is_flow else model
    methods.append(("projector_forward", projector, "forward"))
    methods += [("flow_forward", model.flowtok, "forward")] if is_flow else []
    useful = training_gflop(config, sizes, with_tower)

    def losses_of(other: nn.Module) -> dict:
        with run.accelerator.autocast():
            return losses(config, info, tokens, other, batch)

    return Step(
        run, trainer, partial(losses, config, info, tokens), batch, useful, methods, losses_of
    )


def tokenizer_step(config: TokenizerStage, sizes: Sizes, run: Run, with_tower: bool) -> Step:
    """Stage 1 with the losses of its first step; its decoder reads text states, so that the tower always runs."""
    tower = make_tower(sizes, run.device) if config.tokenizer.text_guidance else None
    perceptual = None
    if config.losses.perceptual_weight:
        perceptual = EmptyPerceptualLoss(config.perceptual)
        for head in (p for name, p in perceptual.named_parameters() if "heads" in name):
            nn.init.uniform_(head)  # left unset there
        perceptual = perceptual.to(run.device)
    model = train_tokenizer.build_model(config, run, started=True)
    fill_zeros(model)
    losses = train_tokenizer.TokenizerLosses(config, run, tower, perceptual)
    trainer = Trainer(run, config.training, config.optimizer, model, None, {}, losses.opponent)
    net, count = config.tokenizer, config.training.batch_size
    batch = {
        "key": [str(number) for number in range(count)],
        "image": torch.randint(256, (count, 3, net.image_size, net.image_size), dtype=torch.uint8),
        "token_ids": torch.randint(MAX_TOKEN_ID, (count, net.text_tokens)),
    }
    methods = [
        ("encoder_forward", model.encoder, "forward"),
        ("decoder_forward", model.decoder, "forward"),
    ]
    methods += [("text", tower, "forward")] if tower is not None else []
    methods += [("perceptual_forward", perceptual, "forward")] if perceptual is not None else []
    if losses.opponent:
        methods += [("discriminator_optimizer", losses.opponent.player, "update")]
    loss_fn = lambda model, batch: losses(model, batch, trainer.step)  # noqa: E731
    return Step(run, trainer, loss_fn, batch, training_gflop(config, sizes, True), methods)


def plain_step(step: Step, config: FlowTokStage) -> Callable[[], None]:
    """The plain way of the same step (scripts/benchmark_plain.py), from the same weights."""
    plain = plain_copy(step.trainer.player.model, config.projector, config.flowtok)
    trainer = PlainTrainer(plain, config.optimizer, config.training)
    return lambda: trainer.update(lambda other: step.losses_of(other)["loss"])


def measure_training(config: StageConfig, path: Path, args) -> dict:
    """The part `train`; `args` has seconds, repeats, baseline and text_tower.

    Raises:
        ValueError: --baseline for another stage than 3.
    """
    if args.baseline and not isinstance(config, FlowTokStage):
        raise ValueError(
            f"--baseline: there is a plain way of stage flowtok only, {path} is of stage {config.stage}"
        )
    training = config.training
    with TemporaryDirectory() as folder:
        run = start_run(Path(folder) / "run", training.precision, training.seed)
        memory = Memory(run.device)
        step = build_step(config, path, run, args.text_tower)
        step()  # makes the optimizer's moments, and faults memory in
        parts, peak = step.parts(), memory.peak_gib()
        ways = {"train": step} | (
            {"plain_train": plain_step(step, config)} if args.baseline else {}
        )
        timing = alternate(
            ways,
            run.device,
            DTYPES[training.precision],
            args.seconds,
            args.repeats,
            is_warm={"train"},
        )
    return {
        "batch_size": training.batch_size,
        "precision": training.precision,
        "measures": measures(
            timing, {name: (training.batch_size, step.gflop_per_sample) for name in ways}
        ),
        "peak_memory_gib": peak,
        "seconds_by_part": {"train": parts},
    }


def measures(timing: Timing, work: dict[str, tuple[int, float]]) -> dict[str, dict]:
    """Figures of each way, from its (samples a call, GFLOP a sample); of plain_X also its time by that of X."""
    figures = {name: timing.figures(name, *sizes) for name, sizes in work.items()}
    for name in figures:
        if name.startswith("plain_"):
            figures[name]["times_as_long"] = timing.ratio(name, name.removeprefix("plain_"))
    return figures
