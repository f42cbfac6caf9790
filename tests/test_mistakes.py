"""What went wrong in a solution: false equations, and errors sorted by their kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import mistakes
from inference.solutions import final_answer


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 3", "3"),
        ("so 1,234.50 dollars.", "1234.50"),
        ("5 then -7", "-7"),
        ("it is 12.", "12"),
        ("$5,000", "5000"),
        ("none", None),
    ],
)
def test_last_number_is_what_flexible_extraction_reads(text, number):
    assert mistakes.last_number(text) == number


@pytest.mark.parametrize(
    "text, false",
    [
        ("3+4=<<3+4=8>>8", "3+4=8"),
        ("3+4=<<3+4=7>>7", None),
        ("He has 3 + 4 = 8 pens", "3 + 4=8"),
        ("2*3=6+1=7", None),
        ("2*3=6+1=8", "6+1=8"),
        ("10/3=3.33", None),
        ("10/3=3", None),
        ("10/3=4", None),
        ("10/3=5", "10/3=5"),
        ("$5 x 3 = $15", None),
        ("$5 x 3 = $16", "$5 x 3=$16"),
        ("5 miles * 2 = 7", None),
        ("x = 5", None),
        ("3x - 5 = 16", None),
        ("2+2=2 1/2", None),
        ("no sum", None),
    ],
)
def test_a_false_equation_is_one_that_both_sides_spell_out(text, false):
    """What cannot be read is not called wrong.

    Thirds may be rounded to cents or to whole numbers.
    """
    assert mistakes.false_equation(text) == false


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/x=().,$<>% \n#a", max_size=60))
def test_no_text_of_a_model_stops_the_sorting_of_errors(text):
    """Models write anything; and an equation called false is one that stands in the text."""
    found = mistakes.false_equation(text)
    assert found is None or found.split("=")[0] in text
    mistakes.last_number(text), final_answer(text)


def test_errors_are_sorted_by_what_went_wrong():
    """One solution of each kind; the classes of error are disjoint and cover all that is wrong."""
    texts = [
        "2+2=4\n#### 4",
        "2+2=4, so 4",
        "2+2=5\n#### 5",
        "2+3=5\n#### 5",
        "2+2=5\n#### 4",
        "hm",
    ]
    flags, examples = mistakes.taxonomy(
        [
            {
                "question": "2 + 2?",
                "answer": "#### 4",
                "solutions": [
                    {"text": text, "correct": final_answer(text) == "4", "stopped": True}
                ],
            }
            for text in texts
        ]
    )
    found = {
        name: [text for text, flag in zip(texts, values, strict=True) if flag]
        for name, values in flags.items()
    }
    assert (
        found["exact_match"] == [texts[0], texts[4]]
        and found["flexible_match"] == [texts[0], texts[1], texts[4]]
        and found["no_answer"] == [texts[1], texts[5]]
    )
    assert (
        found["error_extraction"] == [texts[1]]
        and found["error_arithmetic"] == [texts[2]]
        and found["error_reasoning"] == [texts[3], texts[5]]
    )
    assert found["false_accept"] == [texts[4]] and [
        e["false_equation"] for e in examples["false_accept"]
    ] == ["2+2=5"]
