"""The numbers of an evaluation, from the features that an image store keeps and those of its reference.

A metric that can't be computed is null, with the reason; the others are there all the same.
"""

import torch
from accelerate import PartialState
from torch import Tensor

from eval.dinov2 import ABSENT
from eval.features import Extractor, inception_reason
from eval.frechet import FeatureStatistics, frechet_distance
from eval.image_store import ImageStore
from eval.metrics import inception_score, kernel_distance, precision_recall, retrieval
from eval.protocol import Protocol
from eval.reference import Reference


def measure(
    store: ImageStore, extractor: Extractor | None, reference: Reference | None, state: PartialState
) -> tuple[dict[str, float | None], dict[str, str]]:
    """(metrics, why one is null) of the features of all processes, {} on all but the main one. Every one must call it.

    extractor: None if its weights are absent.
    """
    wanted = store.protocol.metrics
    if extractor is None:
        reason = inception_reason() if store.protocol.features == "inception" else ABSENT
        return explain(wanted, reason, store.protocol)
    statistics = FeatureStatistics(extractor.width, state.device)
    for group in range(state.process_index, store.num_groups, state.num_processes):
        statistics.add(store.read_features(group).to(state.device))
    statistics = statistics.over_processes()
    if not state.is_main_process:
        return {}, {}
    features = store.all_features().to(state.device) if {*wanted} - {"frechet"} else None
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in wanted:
        try:
            found = compute(name, store, extractor, reference, statistics, features)
            values |= dict(zip(result_names(name, store.protocol), found))
        except ValueError as error:
            nulls, why = explain([name], str(error), store.protocol)
            values, reasons = values | nulls, reasons | why
    return values, reasons


def result_names(metric: str, protocol: Protocol) -> tuple[str, ...]:
    """What a metric's results are called; FID is the Frechet distance of Inception's features alone."""
    return {
        "frechet": ("fid",) if protocol.features == "inception" else ("frechet_distance",),
        "kid": ("kid", "kid_std"),
        "inception_score": ("inception_score", "inception_score_std"),
        "precision_recall": ("precision", "recall"),
        "retrieval": ("retrieval_top1", "retrieval_top5"),
    }[metric]


def explain(metrics: list[str], reason: str, protocol: Protocol) -> tuple[dict[str, None], dict[str, str]]:
    """Null results of metrics, and the reason beside each."""
    named = {result: reason for metric in metrics for result in result_names(metric, protocol)}
    return dict.fromkeys(named), named


def compute(
    name: str,
    store: ImageStore,
    extractor: Extractor,
    reference: Reference | None,
    statistics: FeatureStatistics,
    features: Tensor | None,
) -> tuple[float, ...]:
    """One metric's results, in the order of `result_names`.

    Raises:
        ValueError: why it can't be computed.
    """
    protocol = store.protocol
    if name == "inception_score":
        logits = torch.cat([extractor.logits(rows) for rows in features.split(1024)])
        return inception_score(logits.cpu(), protocol.inception_splits)
    if reference is None:
        raise ValueError("the protocol names no reference: add reference=[FILE.npz] (scripts/reference_stats.py)")
    if name == "frechet":
        return (frechet_distance(statistics.gaussian(), reference.gaussian),)
    if reference.features is None:
        raise ValueError(
            f"{reference.description['file']} keeps no features of single images: scripts/reference_stats.py "
            "--keep-features makes one that does"
        )
    real = reference.features.to(features.device)
    if name == "kid":
        return kernel_distance(features, real, protocol.kid_subsets, protocol.kid_subset_size)
    if name == "precision_recall":
        return precision_recall(features, real, protocol.neighbours)
    own = [reference.rows[store.caption(number).source] for number in range(store.num_images)]
    return retrieval(features, real, reference.groups.to(real.device), torch.tensor(own, device=real.device))
