"""data/draws.py: the random numbers of a sample."""

import zlib

import numpy as np

from data.draws import SampleDraws

NAMES = ("crop_x", "crop_y", "flip", "recaption", "caption")


def numbers(*arguments):
    return [getattr(SampleDraws(*arguments), name) for name in NAMES]


def test_each_use_has_its_own_number_whatever_else_is_drawn_and_in_which_order():
    draws = SampleDraws(3, 1, "key")
    backwards = [getattr(draws, name) for name in reversed(NAMES)]
    assert backwards[::-1] == numbers(3, 1, "key") and len(set(backwards)) == 5
    assert all(0 <= number < 1 for number in backwards)


def test_seed_epoch_and_key_each_change_all_numbers():
    base = numbers(3, 1, "key")
    for other in ((4, 1, "key"), (3, 2, "key"), (3, 1, "kez")):
        assert not set(numbers(*other)) & set(base)


def test_the_numbers_are_those_of_philox_keyed_by_seed_epoch_and_key():
    generator = np.random.Generator(np.random.Philox(key=(3, (1 << 32) + zlib.crc32(b"key"))))
    assert numbers(3, 1, "key") == generator.random(5).tolist()


def test_a_key_that_is_no_unicode_has_numbers_too():
    assert 0 <= SampleDraws(0, 0, "\udcff").flip < 1
