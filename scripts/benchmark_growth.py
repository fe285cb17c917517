"""scripts/benchmark.py growth: the DiT's time a sample against batch, tokens and depth, beside what its FLOPs predict.

Forward and backward at the config's width, in float32 or under the run's autocast, without optimizer. The prediction
is the reference's time (largest batch, 77 tokens, the middle depth), scaled by the FLOPs. All points are timed in turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from configs.schema import FlowTokStage, StageConfig
from torch.nn import functional as F

from modeling.flowtok import FlowTok, FlowTokConfig
from scripts.benchmark_flops import velocity_gflop
from scripts.benchmark_timing import Timing, alternate, spread
from scripts.benchmark_training import DTYPES, fill_zeros
from training.run import start_accelerator


@dataclass(frozen=True)
class Point:
    """What one row of the table is measured at."""

    batch_size: int = 16
    num_tokens: int = 77
    depth: int = 4


REFERENCE = Point()
ROWS = {
    "batch_size": [Point(batch_size=n) for n in (1, 2, 4, 8, 16)],
    "num_tokens": [Point(num_tokens=n) for n in (77, 154, 308)],
    "depth": [Point(depth=n) for n in (2, 4, 8)],
}


def all_points() -> Iterable[Point]:
    """Each once, the reference first."""
    return dict.fromkeys([REFERENCE, *(point for row in ROWS.values() for point in row)])


def config_at(net: FlowTokConfig, point: Point) -> FlowTokConfig:
    """The config's DiT with the point's tokens and depth."""
    return replace(net, num_tokens=point.num_tokens, depth=point.depth)


class Pass:
    """Forward and backward of one point."""

    def __init__(self, net: FlowTokConfig, point: Point, device: torch.device, precision: str):
        self.network = FlowTok(config_at(net, point)).to(device)
        fill_zeros(self.network)
        self.tokens = torch.randn(
            point.batch_size, point.num_tokens, net.token_channels, device=device
        )
        self.t = torch.rand(point.batch_size, device=device)
        self.precision = precision

    def __call__(self) -> None:
        with torch.autocast(self.t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            velocity = self.network(self.tokens, self.t, self.t > 0.9)
        F.mse_loss(velocity.float(), self.tokens).backward()
        self.network.zero_grad(set_to_none=True)


def measure_growth(config: StageConfig, path: Path, args) -> dict:
    """The part `growth`; `args` has seconds (each point) and repeats.

    Raises:
        ValueError: a config of another stage than 3.
    """
    if not isinstance(config, FlowTokStage):
        raise ValueError(f"{path}: growth is that of a DiT, stage flowtok, got {config.stage!r}")
    net, precision = config.flowtok, config.training.precision
    device = start_accelerator(precision).device
    points = {str(point): point for point in all_points()}
    passes = {name: Pass(net, point, device, precision) for name, point in points.items()}
    timing = alternate(passes, device, DTYPES[precision], args.seconds, args.repeats)
    gflop = {name: 3 * velocity_gflop(config_at(net, point)) for name, point in points.items()}
    rows = {name: [row_of(timing, point, gflop) for point in row] for name, row in ROWS.items()}
    return {"precision": precision, "width": net.width, "growth": rows}


def row_of(timing: Timing, point: Point, gflop: dict[str, float]) -> dict:
    """Figures of a point, its predicted time, and by how much it takes longer than that (0.1: a tenth)."""
    name, reference = str(point), str(REFERENCE)
    scale = gflop[name] / gflop[reference] * point.batch_size / REFERENCE.batch_size  # of a call
    pairs = list(zip(timing.seconds[name], timing.seconds[reference], strict=True))
    figures = timing.figures(name, point.batch_size, gflop[name])
    return {
        **vars(point),
        "seconds_per_sample": figures["seconds_per_sample"],
        "predicted_seconds_per_sample": spread(
            base * scale / point.batch_size for _, base in pairs
        )["median"],
        "deviation": spread(own / (base * scale) - 1 for own, base in pairs),
        "share": figures["share"],
        "gflop_per_sample": gflop[name],
    }
