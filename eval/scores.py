"""The numbers of an evaluation, from the features that an image store keeps and those of its reference.

A metric that can't be computed is null, with the reason; the others are there all the same.
"""

import torch
from accelerate import PartialState
from torch import Tensor

from eval.clip_score import clip_score
from eval.features import Extractor
from eval.frechet import FeatureStatistics, frechet_distance
from eval.image_store import ImageStore
from eval.making import measure_name
from eval.metrics import inception_score, kernel_distance, precision_recall, retrieval
from eval.networks import Networks
from eval.protocol import Protocol
from eval.reference import Reference


def measure(
    store: ImageStore,
    networks: Networks,
    image_size: int,
    reference: Reference | None,
    state: PartialState,
) -> tuple[dict[str, float | None], dict[str, str]]:
    """(metrics, why one is null) of the features of all processes, {} on all but the main one. All must call it."""
    extractor, wanted, statistics, features = networks.extractor, store.protocol.metrics, None, None
    if extractor:
        name = measure_name(extractor, image_size)
        statistics = FeatureStatistics(extractor.width, state.device)
        for group in range(state.process_index, store.num_groups, state.num_processes):
            statistics.add(store.read_features(name, group).to(state.device))
        statistics = statistics.over_processes()
    if not state.is_main_process:
        return {}, {}
    if extractor and {*store.protocol.feature_metrics} - {"frechet"}:
        features = store.all_features(name).to(state.device)
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for metric in wanted:
        try:
            if metric == "clip_score":
                values |= measure_clip(store, networks)
            elif extractor is None:
                raise ValueError(networks.absent["features"])
            else:
                values |= compute(metric, store, extractor, reference, statistics, features)
        except ValueError as error:
            nulls = dict.fromkeys(result_names(metric, store.protocol), str(error))
            values, reasons = values | dict.fromkeys(nulls), reasons | nulls
    return values, reasons


def frechet_name(protocol: Protocol) -> str:
    """FID is the Frechet distance of Inception's features alone; clean-fid's resize gives another number."""
    if protocol.features != "inception":
        return "frechet_distance"
    return "clean_fid" if protocol.resize == "clean" else "fid"


def result_names(metric: str, protocol: Protocol) -> tuple[str, ...]:
    """What a metric's results are called; frechet_by_category has one a category as soon as there is any."""
    return {
        "frechet": (frechet_name(protocol),),
        "frechet_by_category": (f"{frechet_name(protocol)}_by_category",),
        "kid": ("kid", "kid_std"),
        "inception_score": ("inception_score", "inception_score_std"),
        "precision_recall": ("precision", "recall"),
        "retrieval": ("retrieval_top1", "retrieval_top5"),
        "clip_score": ("clip_score",),
    }[metric]


def measure_clip(store: ImageStore, networks: Networks) -> dict[str, float]:
    """The CLIP score by its name.

    Raises:
        ValueError: why there is none.
    """
    if networks.clip is None:
        raise ValueError(networks.absent["clip"])
    return {"clip_score": clip_score(store.all_features(networks.clip.name))}


def compute(
    name: str,
    store: ImageStore,
    extractor: Extractor,
    reference: Reference | None,
    statistics: FeatureStatistics,
    features: Tensor | None,
) -> dict[str, float]:
    """One metric's results by their names.

    Raises:
        ValueError: why it can't be computed.
    """
    protocol = store.protocol
    names = result_names(name, protocol)
    if name == "inception_score":
        logits = torch.cat([extractor.logits(rows) for rows in features.split(1024)])
        return dict(zip(names, inception_score(logits.cpu(), protocol.inception_splits)))
    if reference is None:
        raise ValueError(
            "the protocol names no reference: add reference=[FILE.npz] (scripts/reference_stats.py)"
        )
    if name == "frechet":
        return {names[0]: frechet_distance(statistics.gaussian(), reference.gaussian)}
    if reference.features is None:
        raise ValueError(
            f"{reference.description['file']} keeps no features of single images: scripts/reference_stats.py "
            "--keep-features makes one that does"
        )
    real = reference.features.to(features.device)
    if name == "kid":
        return dict(
            zip(
                names,
                kernel_distance(features, real, protocol.kid_subsets, protocol.kid_subset_size),
            )
        )
    if name == "precision_recall":
        return dict(zip(names, precision_recall(features, real, protocol.neighbours)))
    if name == "frechet_by_category":
        return distances_by_category(store, reference, features, real)
    own = [reference.rows[store.caption(number).source] for number in range(store.num_images)]
    rows = torch.tensor(own, device=real.device)
    return dict(zip(names, retrieval(features, real, reference.groups.to(real.device), rows)))


def distances_by_category(
    store: ImageStore, reference: Reference, features: Tensor, real: Tensor
) -> dict[str, float]:
    """Frechet distance of each category of the captions to the reference images in the folder of that name.

    Raises:
        ValueError: the reference does not say its images' folders, or a category has fewer than 2 images.
    """
    if not reference.categories:
        raise ValueError(
            "the reference does not say which folders its images lie in: it must be of folders of images"
        )
    made, found = [store.caption(number).category for number in range(store.num_images)], {}
    for category in sorted({*made}):
        pair = []
        for rows, names in ((features, made), (real, reference.categories)):
            statistics = FeatureStatistics(rows.shape[1], rows.device)
            statistics.add(rows[[name == category for name in names]])
            pair.append(statistics.gaussian())
        found[f"{frechet_name(store.protocol)}/{category}"] = frechet_distance(*pair)
    return found
