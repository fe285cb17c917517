"""Scenes of coloured shapes: what is in them, what a caption says of them, how they are drawn.

A scene has one object, two of different shapes in a relation, or two or three equal ones, on a
plain background, each in a cell of its own of a 3 x 3 grid. A Statement is what a caption says:
size and background may be left open, and are then drawn anew for each image, as cells are. A
statement belongs to one split (split_of): what is never shown in training is stated here. Numbers
come in as a numpy Generator.
Lengths and positions are shares of the image's side; x goes right, y down.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# -------------------------------------------------------------------------- what scenes are made of

COLOURS = {
    "red": (215, 35, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 40),
    "green": (40, 160, 60),
    "cyan": (40, 205, 220),
    "blue": (40, 70, 215),
    "purple": (130, 45, 165),
    "pink": (255, 145, 200),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (64, 64, 64), "black": (20, 20, 20)}
SIZES = {"small": (0.20, 0.22), "large": (0.29, 0.31)}  # side of the box around an object
CELLS = 3  # a side, in each of which an object may lie
JITTER = 0.01  # by which an object lies beside the middle of its cell, at most, in x and in y
MAX_SLANT = 0.6  # across / along a stated relation, so that nobody would name the other one
CANDIDATES = 64  # arrangements drawn at a time, of which the first that fits is taken
SUPERSAMPLING = 4


def _arc(radius: float, start: float, end: float, x: float = 0.0) -> list[tuple[float, float]]:
    """Points of a circle around (x, 0) between two angles in degrees."""
    angles = np.radians(np.linspace(start, end, 33))
    return [(x + radius * np.cos(a), radius * np.sin(a)) for a in angles]


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star that points up, in the middle of its box; inner: radius between points."""
    radii, angles = [1, inner] * points, np.radians(np.arange(2 * points) * 180 / points - 90)
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    return list(zip(x, y - (y.min() + y.max()) / 2))


_THIRD = 0.36
OUTLINES = {  # corners in the box [-1, 1] x [-1, 1]
    "circle": _arc(1, 0, 360),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "star": _star(5, inner=0.42),
    "cross": [
        *((-_THIRD, -1), (_THIRD, -1), (_THIRD, -_THIRD), (1, -_THIRD), (1, _THIRD)),
        *((_THIRD, _THIRD), (_THIRD, 1), (-_THIRD, 1), (-_THIRD, _THIRD), (-1, _THIRD)),
        *((-1, -_THIRD), (-_THIRD, -_THIRD)),
    ],
    "ring": _arc(1, 0, 360),
    # both circles meet at its tips
    "crescent": [*_arc(1, 72.5, 287.5, x=0.35), *reversed(_arc(0.986, 104.7, 255.3, x=0.9))],
    "bar": [(-1, -0.38), (1, -0.38), (1, 0.38), (-1, 0.38)],
}
SHAPES = tuple(OUTLINES)
RING_HOLE = 0.55  # radius

# ------------------------------------------------------------------------------ what is never shown

SPLITS = ("train", "seen", "new", "pairs", "relations", "counts")
# 14 of the 64 pairs; each shape and each colour is shown in six or seven others
UNSEEN_PAIRS = {
    (SHAPES[i], tuple(COLOURS)[(i + shift) % 8])
    for shift, number in ((0, 8), (3, 6))
    for i in range(number)
}
# 16 of the 112 ways in which two shapes lie; each shape is shown in every place
UNSEEN_RELATIONS = {
    (SHAPES[i], relation, SHAPES[(i + step) % 8])
    for relation, step in (("left of", 3), ("above", 1))
    for i in range(8)
}
UNSEEN_COUNTS = {(2, "cross"), (2, "triangle"), (3, "ring"), (3, "star")}
NEW_SHARE = 5  # one in so many statements of what is shown is kept for the split "new"


@dataclass(frozen=True)
class Kind:
    """What a caption says of an object."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Statement:
    """What a caption says; None: nothing is said.

    With a relation ("left of", "above") it holds from the first object to the second, of another
    shape; without one all objects are equal.
    """

    objects: tuple[Kind, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Object:
    """An object of a scene: centre and side of its box."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True)
class Scene:
    """All that an image shows."""

    background: str
    objects: tuple[Object, ...]


def split_of(statement: Statement) -> str | None:
    """The split that a statement is for, "seen" if it may be trained on; None: for none.

    new: objects and relations that are shown, never together. pairs: each object is of a
    colour-shape pair never shown. relations, counts: shown objects, as these shapes never lie, or
    in a number in which this shape is never shown. For none: what is held out twice, or in part.
    """
    first, last = statement.objects[0], statement.objects[-1]
    pairs = [(kind.shape, kind.colour) for kind in statement.objects]
    unseen = [pair in UNSEEN_PAIRS for pair in pairs]
    is_relation = (first.shape, statement.relation, last.shape) in UNSEEN_RELATIONS
    is_count = statement.relation is None and (len(pairs), first.shape) in UNSEEN_COUNTS
    if any(unseen):
        is_pure = all(unseen) and not is_relation and not is_count
        return "pairs" if is_pure and len(pairs) <= 2 else None
    if is_relation or is_count:
        return "relations" if is_relation else "counts"
    # by what is said, whatever size and background: no list of statements has to be kept
    said = repr((pairs, statement.relation))
    return "new" if zlib.crc32(said.encode()) % NEW_SHARE == 0 else "seen"


# --------------------------------------------------------------------------------------- statements


def _picker(rng: np.random.Generator, count: int) -> Callable[[Sequence], Any]:
    """Draws one of its options evenly, up to `count` times; always takes `count` numbers."""
    numbers = iter(rng.random(count).tolist())
    return lambda options: options[int(next(numbers) * len(options))]


def draw_statement(rng: np.random.Generator) -> Statement:
    """One object, equal ones, or two in a relation (half of the time), of any split."""
    pick = _picker(rng, 10)
    arrangement = pick(("one", "equal", "relation", "relation"))
    background = pick((None,) * len(BACKGROUNDS) + tuple(BACKGROUNDS))
    sizes = (None,) * len(SIZES) + tuple(SIZES)
    first = Kind(pick(SHAPES), pick(tuple(COLOURS)), pick(sizes))
    if arrangement == "one":
        return Statement((first,), background=background)
    if arrangement == "equal":
        return Statement((first,) * pick((2, 3)), background=background)
    others = [shape for shape in SHAPES if shape != first.shape]
    second = Kind(pick(others), pick(tuple(COLOURS)), pick(sizes))
    return Statement((first, second), pick(("left of", "above")), background)


def draw_statement_of(split: str, rng: np.random.Generator) -> Statement:
    """A statement that split_of puts into a split."""
    while split_of(statement := draw_statement(rng)) != split:
        pass
    return statement


RELATION_WORDS = {  # (from first to second, from second to first)
    "left of": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over"), ("below", "under")),
}
NUMBERS = {2: "two", 3: "three"}
OPENINGS = ("{}", "{}", "a picture of {}", "an image with {}")
GROUNDS = ("{} on {}", "{} on a {} background", "{} against {}")


def draw_caption(statement: Statement, rng: np.random.Generator) -> str:
    """A plain English phrasing of a statement."""
    pick = _picker(rng, 4)
    first, last = statement.objects[0], statement.objects[-1]
    if statement.relation:
        turned = pick((0, 1))
        words = pick(RELATION_WORDS[statement.relation][turned])
        ends = (last, first) if turned else (first, last)
        text = f"{name_kind(ends[0])} {words} {name_kind(ends[1])}"
    else:
        text = name_kind(first, len(statement.objects))
    text = pick(OPENINGS).format(text)
    return pick(GROUNDS).format(text, statement.background) if statement.background else text


def name_kind(kind: Kind, count: int = 1) -> str:
    """'a small red circle', 'an orange star', 'two crosses'."""
    words = " ".join(filter(None, (kind.size, kind.colour, kind.shape)))
    if count > 1:
        return f"{NUMBERS[count]} {words}{'es' if kind.shape == 'cross' else 's'}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ------------------------------------------------------------------------------------------- scenes


def draw_scene(statement: Statement, rng: np.random.Generator) -> Scene:
    """A scene of which a statement is true; what it leaves open is drawn. Equal ones: one size."""
    names = tuple(SIZES)
    if statement.relation:
        sizes = [kind.size or names[rng.integers(2)] for kind in statement.objects]
    else:
        sizes = [statement.objects[0].size or names[rng.integers(2)]] * len(statement.objects)
    background = statement.background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    bounds = np.array([SIZES[size] for size in sizes])
    diameters = rng.uniform(bounds[:, 0], bounds[:, 1])
    centres = _arrange(len(sizes), statement.relation, rng)
    return Scene(
        background,
        tuple(
            Object(kind.shape, kind.colour, size, round(x, 4), round(y, 4), round(diameter, 4))
            for kind, size, (x, y), diameter in zip(
                statement.objects, sizes, centres.tolist(), diameters.tolist()
            )
        ),
    )


def _arrange(number: int, relation: str | None, rng: np.random.Generator) -> np.ndarray:
    """Centres N x 2 of objects in cells of their own, and in the relation."""
    # many at a time, so that nearly always one draw is enough
    while True:
        cells = rng.integers(CELLS, size=(CANDIDATES, number, 2))
        fits = np.ones(CANDIDATES, dtype=bool)
        for i, j in combinations(range(number), 2):
            distance = cells[:, j] - cells[:, i]
            fits &= distance.any(axis=1)
            if relation:
                axis = ("left of", "above").index(relation)
                along, across = distance[:, axis], abs(distance[:, 1 - axis])
                fits &= across <= MAX_SLANT * along
        if fits.any():
            middles = (cells[fits.argmax()] + 0.5) / CELLS
            return middles + rng.uniform(-JITTER, JITTER, size=middles.shape)


def draw_image(
    scene: Scene, image_size: int, outlines: dict[str, list[tuple[float, float]]] = OUTLINES
) -> Image.Image:
    """Antialiased RGB image of a scene; outlines: of its objects' shapes."""
    # Pillow draws without antialiasing: larger, then reduced
    side = image_size * SUPERSAMPLING
    ground = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        centre, radius = np.array([item.x, item.y]) * side - 0.5, item.diameter * side / 2
        outline = centre + radius * np.array(outlines[item.shape])
        draw.polygon(outline.ravel().tolist(), fill=COLOURS[item.colour])
        if item.shape == "ring":
            hole = centre + RING_HOLE * radius * np.array(OUTLINES["circle"])
            draw.polygon(hole.ravel().tolist(), fill=ground)
    return image.reduce(SUPERSAMPLING)
