import numpy as np
import pytest

from afdslib.base.errors import AFDSError
from afdslib.data.trees import TEST, TRAIN, UNSPLIT, VALIDATION, Listing, alternate_test, fixed_test, partition


def _listing(counts, parts):
    """counts: images per class and part, in the order of `parts`."""
    targets, where = [], []
    for label, numbers in enumerate(counts):
        for part, number in zip(parts, numbers, strict=True):
            targets += [label] * number
            where += [part] * number
    names = tuple(f"class{i}" for i in range(len(counts)))
    return Listing([], np.array(targets), np.array(where, dtype=np.int8), names)


def _draw(listing, *, per_class=None, seed=0, validation=5, **options):
    return partition(listing, listing.parts, per_class=per_class, seed=seed, validation_per_class=validation, **options)


def _counts(listing, rows):
    return np.bincount(listing.targets[rows], minlength=len(listing.classes)).tolist()


def test_validation_is_a_tenth_of_each_class_or_with_per_class_drawn_from_what_is_not_fitted():
    listing = _listing([(20, 5), (31, 6), (3, 1)], (TRAIN, TEST))
    drawn = _draw(listing)
    counts = [_counts(listing, rows) for rows in (drawn.train, drawn.validation, drawn.test)]
    assert counts == [[18, 28, 2], [2, 3, 1], [5, 6, 1]] and not set(drawn.train) & set(drawn.validation)
    listing = _listing([(20, 5), (12, 5)], (TRAIN, TEST))
    drawn = _draw(listing, per_class=10)
    assert _counts(listing, drawn.train) == [10, 10] and _counts(listing, drawn.validation) == [5, 2]
    assert not set(drawn.train) & set(drawn.validation)
    assert (listing.parts[drawn.train] == TRAIN).all() and (listing.parts[drawn.validation] == TRAIN).all()
    assert not len(_draw(listing.take(drawn.train), per_class=10).validation)  # nothing is left


def test_the_seed_draws_the_fitted_images_and_not_the_test_and_fewer_are_among_more():
    listing = _listing([(90, 5), (90, 5)], (TRAIN, TEST))
    one, same, other, more = (_draw(listing, per_class=n, seed=s) for n, s in ((30, 1), (30, 1), (30, 2), (60, 1)))
    assert np.array_equal(one.train, same.train) and np.array_equal(one.validation, same.validation)
    assert not np.array_equal(one.train, other.train) and np.array_equal(one.test, other.test)
    assert set(one.train) < set(more.train)


def test_a_class_with_too_few_images_is_named():
    words = "class 'class1' has 9 training images, fewer than per_class=10"
    for counts, match in (([(20, 5), (9, 5)], words), ([(15, 2), (0, 2)], "class1")):
        with pytest.raises(AFDSError, match=match):
            _draw(_listing(counts, (TRAIN, TEST)), per_class=10)


def test_without_a_holdout_nothing_is_kept_back_and_an_official_validation_part_is_used_as_it_is():
    listing = _listing([(20, 5), (31, 6)], (TRAIN, TEST))
    for per_class, fitted in ((None, [20, 31]), (10, [10, 10])):
        drawn = _draw(listing, per_class=per_class, holdout=False)
        assert _counts(listing, drawn.train) == fitted and not len(drawn.validation)
        assert np.array_equal(drawn.test, _draw(listing).test)
    listing = _listing([(20, 3, 5), (20, 4, 5)], (TRAIN, VALIDATION, TEST))
    drawn = _draw(listing, per_class=4)
    assert np.array_equal(drawn.validation, np.flatnonzero(listing.parts == VALIDATION))
    assert _counts(listing, _draw(listing).train) == [20, 20]


def test_a_flat_tree_is_split_70_15_15_by_the_seed():
    listing = _listing([(100,), (40,), (4,)], (UNSPLIT,))
    drawn, other = _draw(listing, seed=1), _draw(listing, seed=2)
    parts = (drawn.train, drawn.validation, drawn.test)
    assert [_counts(listing, rows) for rows in parts] == [[70, 28, 2], [15, 6, 1], [15, 6, 1]]
    assert sorted(np.concatenate(parts).tolist()) == list(range(144)) and not np.array_equal(drawn.test, other.test)


def test_a_fixed_test_part_is_the_same_whatever_the_seed_and_an_alternate_one_halves_each_class():
    listing = _listing([(80,), (95,)], (UNSPLIT,))
    parts = fixed_test(listing, 20)
    assert _counts(listing, np.flatnonzero(parts == TEST)) == [20, 20]
    drawn = [partition(listing, parts, per_class=60, seed=s, validation_per_class=100) for s in (0, 1)]
    assert np.array_equal(drawn[0].test, drawn[1].test) and not set(drawn[0].train) & set(drawn[0].test)
    assert _counts(listing, drawn[0].validation) == [0, 15]
    with pytest.raises(AFDSError, match="class0"):
        fixed_test(listing, 80)
    listing = Listing([], np.array([0, 1, 0, 1, 0, 1, 1]), np.full(7, UNSPLIT, np.int8), ("a", "b"))
    assert np.flatnonzero(alternate_test(listing) == TEST).tolist() == [2, 3, 6]


def test_the_draw_is_pinned():
    """A change of the rule or of a library would change every result: these numbers must not move."""
    drawn = _draw(_listing([(8, 2), (8, 2)], (TRAIN, TEST)), per_class=3, seed=7, validation=2)
    assert (drawn.train.tolist(), drawn.validation.tolist()) == ([2, 3, 6, 12, 13, 17], [0, 1, 10, 14])
