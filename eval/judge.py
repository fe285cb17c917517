"""Reads the facts off images of scenes (data/scenes.py), and says which of a caption's are right.

facts = load_judge()(images)
verdicts = right(facts, wanted_by(statements))  # {"shape": B bool, ..., "all": B bool}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Statement

WEIGHTS = Path(__file__).resolve().parents[1] / "assets" / "scenes" / "judge.safetensors"
IMAGE_SIZE = 64  # pixels; others are resized
GRID = 8  # cells a side; the centres of two objects are never in neighbouring cells
WIDTH = 96  # channels of the features
SPREAD = 0.8  # of an object's mark on the grid, in cells: a Gaussian's deviation
THRESHOLD = 0.4  # an object's mark is at least 0.67 in the cell of its centre
MAX_OBJECTS = 4  # that are read; scenes have at most three
NO_SHAPE = len(SHAPES)  # read of an object with any other outline
RELATIONS = ("left of", "above")
FACTS = ("shape", "colour", "object", "size", "relation", "count", "background", "all")
# Diameter between those of two sizes
SIZE_BOUND = (SIZES["small"][1] + SIZES["large"][0]) / 2


def contents() -> dict[str, str]:
    """The names that the net's outputs stand for, as kept with its weights."""
    names = {"shapes": SHAPES, "colours": COLOURS, "backgrounds": BACKGROUNDS}
    return {name: ", ".join(values) for name, values in names.items()}


# ------------------------------------------------------------------------------------------ reading


class Facts(NamedTuple):
    """What B images show: up to K objects each, the surest first. Numbers index data/scenes.py."""

    present: Tensor  # B x K bool
    shape: Tensor  # B x K; NO_SHAPE: none of them
    colour: Tensor  # B x K
    place: Tensor  # B x K x 2: centre (x, y), shares of the image's side
    diameter: Tensor  # B x K
    background: Tensor  # B
    features: Tensor  # B x WIDTH, to compare sets of images by

    @property
    def size(self) -> Tensor:
        """B x K."""
        return (self.diameter > SIZE_BOUND).long()

    @property
    def count(self) -> Tensor:
        """Number of objects: B."""
        return self.present.sum(dim=1)


def joined(parts: Sequence[Facts]) -> Facts:
    return Facts(*map(torch.cat, zip(*parts)))


class Judge(nn.Module):
    """Images -> facts.

    A convolutional net that research/train_judge.py trains on scenes of any objects in any number,
    so that it knows no rule of what goes together, on what has another outline, and on images laid
    over each other, whose objects do not count. For each cell of an 8 x 8 grid it says how near
    the centre of an object is, and of which shape, colour, place and size that object is (Zhou et
    al. 2019, "Objects as Points").
    """

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(3, 24, stride=2),  # 32 x 32
            *_convolution(24, 48, stride=2),  # 16 x 16
            *_convolution(48, 48),
            *_convolution(48, WIDTH, stride=2),  # 8 x 8
            *_convolution(WIDTH, WIDTH),
            *_convolution(WIDTH, WIDTH),
        )
        # In each cell: mark, shapes and none, colours, centre from the cell's (in cells), diameter
        self.parts = (1, len(SHAPES) + 1, len(COLOURS), 2, 1)
        self.cells = nn.Conv2d(WIDTH, sum(self.parts), kernel_size=1)
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))

    def forward(self, images: Tensor) -> Facts:
        """B x 3 x R x R in [0, 1] -> what they show."""
        if images.shape[-1] != IMAGE_SIZE:
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return read_facts(*self.outputs(images))

    def outputs(self, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """B x 3 x 64 x 64 in [0, 1] -> what is trained and read.

        Returns (the parts of the cells, B x C x 8 x 8 each; B x backgrounds; features B x WIDTH).
        """
        trunk = self.trunk(images - 0.5)  # B x WIDTH x 8 x 8
        features = trunk.mean(dim=(2, 3))
        return self.cells(trunk).split(self.parts, dim=1), self.background(features), features


def _convolution(channels: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def read_facts(parts: Sequence[Tensor], background: Tensor, features: Tensor) -> Facts:
    """The net's outputs -> facts: an object in each cell whose mark is highest around it."""
    mark, shape, colour, offset, diameter = parts
    # A cell beside one with a higher mark sees the same object
    is_peak = mark == F.max_pool2d(mark, kernel_size=3, stride=1, padding=1)
    marks = mark.masked_fill(~is_peak, -torch.inf).flatten(1)
    marks, cells = marks.topk(MAX_OBJECTS, dim=1)  # B x K
    place = (cell_centres(mark.device) + rearrange(offset, "b c h w -> b (h w) c")) / GRID

    def at_peaks(values: Tensor) -> Tensor:
        return values.gather(1, cells)

    return Facts(
        present=marks.sigmoid() > THRESHOLD,
        shape=at_peaks(shape.argmax(dim=1).flatten(1)),
        colour=at_peaks(colour.argmax(dim=1).flatten(1)),
        place=torch.stack([at_peaks(axis) for axis in place.unbind(dim=2)], dim=2),
        diameter=at_peaks(diameter.flatten(1)),
        background=background.argmax(dim=1),
        features=features,
    )


def cell_centres(device: torch.device) -> Tensor:
    """64 x 2: (x, y) of each cell's centre, in cells; row by row."""
    middles = torch.arange(GRID, device=device) + 0.5
    return torch.cartesian_prod(middles, middles).flip(1)


def load_judge(device: torch.device | str = "cpu") -> Judge:
    """The trained judge.

    ValueError: data/scenes.py has other shapes, colours or backgrounds now.
    """
    with safe_open(WEIGHTS, framework="pt") as file:
        known = file.metadata()
    if known != contents():
        raise ValueError(
            f"{WEIGHTS} knows {known}, data/scenes.py has {contents()}: train it anew "
            "(research/train_judge.py)"
        )
    # Statistics of its batch norms are those of training: eval mode
    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.to(device).eval().requires_grad_(False)


# ----------------------------------------------------------------------------- against the captions


class Wanted(NamedTuple):
    """What B captions say. Of equal objects the second kind is the first again, in number 0."""

    shape: Tensor  # B x 2
    colour: Tensor  # B x 2
    size: Tensor  # B x 2; -1: not said
    number: Tensor  # B x 2: how many of each kind
    relation: Tensor  # B, from first to second kind; -1: not said
    background: Tensor  # B; -1: not said


def wanted_by(statements: Sequence[Statement]) -> Wanted:
    """What statements say, as tensors."""

    def index(names: Sequence[str], name: str | None) -> int:
        return -1 if name is None else tuple(names).index(name)

    # Objects in a relation are one of each kind; others are several of one kind
    kinds = [(said.objects[0], said.objects[-1]) for said in statements]
    numbers = [(1, 1) if said.relation else (len(said.objects), 0) for said in statements]
    return Wanted(
        shape=torch.tensor([[index(SHAPES, kind.shape) for kind in pair] for pair in kinds]),
        colour=torch.tensor([[index(COLOURS, kind.colour) for kind in pair] for pair in kinds]),
        size=torch.tensor([[index(SIZES, kind.size) for kind in pair] for pair in kinds]),
        number=torch.tensor(numbers),
        relation=torch.tensor([index(RELATIONS, said.relation) for said in statements]),
        background=torch.tensor([index(BACKGROUNDS, said.background) for said in statements]),
    )


def is_said(wanted: Wanted) -> dict[str, Tensor]:
    """FACTS -> B bool: whether a caption says anything of it."""
    always = torch.ones_like(wanted.relation, dtype=torch.bool)
    sometimes = {
        "size": (wanted.size >= 0).any(dim=1),
        "relation": wanted.relation >= 0,
        "background": wanted.background >= 0,
    }
    return {name: sometimes.get(name, always) for name in FACTS}


def right(facts: Facts, wanted: Wanted) -> dict[str, Tensor]:
    """FACTS -> B bool: whether it is as the caption says; True of what it does not say.

    As GenEval (Ghosh et al. 2023) has it, objects are looked for, wherever they are.
    """
    said = is_said(wanted)
    # Image's objects x caption's kinds (B x K x 2), caption's kinds x each other (B x 2 x 2)
    is_open = wanted.size < 0
    found = facts.present[:, :, None]
    shape, same_shape = _equal(facts.shape, wanted.shape)
    colour, same_colour = _equal(facts.colour, wanted.colour)
    size, same_size = _equal(facts.size, wanted.size)
    size = size | is_open[:, None]

    def enough(match: Tensor, same: Tensor) -> Tensor:
        have = (match & found).sum(dim=1)
        return have >= (same * wanted.number[:, None]).sum(dim=2)

    verdicts = {
        # As many objects of each as the caption names, whatever else they are
        "shape": enough(shape, same_shape).all(dim=1),
        "colour": enough(colour, same_colour).all(dim=1),
        "size": (enough(size, same_size) | is_open).all(dim=1),
        # As many of each shape and colour together
        "object": enough(shape & colour, same_shape & same_colour).all(dim=1),
        "relation": _holds(facts, wanted, shape.int() + colour.int() + size.int()),
        # As many objects as the caption names, no more
        "count": facts.count == wanted.number.sum(dim=1),
        "background": facts.background == wanted.background,
    }
    verdicts = {name: verdict | ~said[name] for name, verdict in verdicts.items()}
    # Kinds of one shape and colour are equal objects, so of one size
    whole = enough(shape & colour & size, same_shape & same_colour).all(dim=1)
    others = [verdicts[name] for name in ("relation", "count", "background")]
    return verdicts | {"all": torch.stack([whole, *others]).all(dim=0)}


def _equal(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """B x K and B x 2 numbers -> which of both are equal, which of the second to each other."""
    return found[:, :, None] == wanted[:, None], wanted[:, :, None] == wanted[:, None]


def _holds(facts: Facts, wanted: Wanted, agreement: Tensor) -> Tensor:
    """Whether the pair of objects that agrees best with the caption is in its relation: B bool.

    agreement: B x K x 2, of each object with each kind.
    """
    # Of each ordered pair of objects: agreement and distance
    score = agreement[:, :, None, 0] + agreement[:, None, :, 1]  # B x K x K
    distance = facts.place[:, None, :] - facts.place[:, :, None]  # B x K x K x 2
    axis = wanted.relation.clamp(min=0)[:, None, None, None].expand_as(distance[..., :1])
    along = distance.gather(3, axis).squeeze(3)
    across = distance.gather(3, 1 - axis).squeeze(3)
    # An object in no relation to itself
    is_pair = facts.present[:, :, None] & facts.present[:, None]
    is_pair = is_pair & ~torch.eye(MAX_OBJECTS, dtype=torch.bool, device=is_pair.device)
    is_right = along > across.abs()
    # Where a pair in the relation agrees as well as one that is not, the caption may mean the other
    best, other = (
        score.masked_fill(~(is_pair & chosen), -1).flatten(1).amax(dim=1)
        for chosen in (is_right, ~is_right)
    )
    return best > other


def spread(facts: Facts, wanted: Wanted) -> float | None:
    """How far the images of one caption differ in places and sizes; None if it cannot be said.

    facts: of N x M images, those of a caption one after the other; wanted: of the N captions.
    """
    # The mean distance of two images of a caption that have as many objects as it names: from each
    # object to the nearest of the other image, by centre and diameter (shares of the image's side)
    # Captions x images x objects
    present = facts.present.unflatten(0, (len(wanted.relation), -1))
    points = torch.cat([facts.place, facts.diameter[:, :, None]], dim=2)
    points = points.view(*present.shape, 3)
    # From each object of an image to each of another; to none that is not there
    distance = (points[:, :, None, :, None] - points[:, None, :, None]).norm(dim=-1)
    distance = distance.masked_fill(~present[:, None, :, None], torch.inf)
    nearest = distance.amin(dim=-1).masked_fill(~present[:, :, None], 0)
    one_way = nearest.sum(dim=-1) / present.sum(dim=-1)[:, :, None]  # N x M x M
    # Two images, both with the right number
    is_right = present.sum(dim=-1) == wanted.number.sum(dim=1)[:, None]
    is_pair = is_right[:, :, None] & is_right[:, None]
    is_pair &= ~torch.eye(is_pair.shape[1], dtype=torch.bool, device=is_pair.device)
    return one_way[is_pair].mean().item() if is_pair.any() else None
