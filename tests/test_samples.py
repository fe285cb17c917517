"""data/samples.py: how many bad samples stop a reader, and what it says of them."""

import pytest

from data.samples import SampleCounter


def count(bad, max_bad_share, reason="text: missing", total=150):
    """A counter that has seen `total` samples; those in `bad` were skipped for a reason."""
    counter = SampleCounter(max_bad_share, "reader 0 of 1")
    for i in range(total):
        counter.skip(f"{i:05d}", reason, "members cls") if i in bad else counter.usable()
    return counter


def test_more_bad_samples_than_allowed_stop_the_run_with_counts_and_the_first_case():
    message = (
        r"^reader 0 of 1: 6 of the last 100 samples are bad, more than max_bad_share = 0.05 allows "
        r"\(text: missing: 6, first 00003 \(members cls\)\); the first: 00003, 00005, 00020, 00030"
    )
    with pytest.raises(ValueError, match=message):
        count({3, 5, 20, 30, 50, 70}, 0.05)


def test_as_many_as_allowed_and_filtered_ones_do_not_stop_it_and_a_share_of_one_never_stops():
    most = set(range(200)) - {7}
    for counter, number in (
        (count({3, 5, 20, 30, 50}, 0.05), 5),
        (count(most, 1.0), 149),
        (count(most, 0.05, "filter: min_longer_side"), 149),
    ):
        told = counter.tell()
        (reason,) = counter.first
        assert told["skipped"] == {reason: number} and told["first_skipped"] == counter.first
        assert counter.first[reason] in ("00003 (members cls)", "00000 (members cls)")
        counter.skip("later", reason)
        assert counter.tell() == {"skipped": {reason: 1}} and counter.tell() == {"skipped": {}}


def test_only_the_recent_samples_count():
    counter = count(range(5), 0.05, total=5)
    for _ in range(3):
        for _ in range(980):
            counter.usable()
        for _ in range(40):
            counter.skip("x", "x")
    with pytest.raises(ValueError, match="51 of the last 1000"):
        for _ in range(12):
            counter.skip("x", "x")
