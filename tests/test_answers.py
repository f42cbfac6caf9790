"""Answers are described in numbers, and what went wrong with them in words."""

import pytest

from inference.answers import changes, curve_notes, repetition


@pytest.mark.parametrize(
    "ids, share",
    [([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 13, 0.9), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition_is_the_share_of_4_grams_seen_before(ids, share):
    assert repetition(ids) == pytest.approx(share)


def test_notes_say_in_words_what_the_curves_show():
    """Users take a falling chosen log-prob for a bug, and overlook a saturated accuracy."""
    notes = curve_notes(
        {"val_logps/chosen": -20.0, "val_rewards/accuracies": 1.0}, {"val_logps/chosen": -10.0}
    )
    assert len(notes) == 2 and "less likely" in notes[0] and "saturated" in notes[1]
    good = {"val_logps/chosen": -5.0, "val_rewards/accuracies": 0.7}
    assert curve_notes(good, {"val_logps/chosen": -10.0}) == []


def test_habits_that_go_wrong_are_said_in_words():
    """What users notice weeks later in samples: no stop, repetition, longer and longer answers."""
    good = {"stop_rate": 0.9, "length": 20.0, "repetition": 0.02}
    assert changes(good, good)[1] == []
    _, notes = changes(good, {"stop_rate": 0.1, "length": 48.0, "repetition": 0.8})
    assert len(notes) == 3
    assert "stop by themselves" in notes[0]
    assert "repetition: 2% -> 80%" in notes[1]
    assert "length" in notes[2]
