"""What is wrong with solutions of word problems: no answer, false equations, false reasoning."""

import re
from itertools import pairwise

from inference.solutions import arithmetic, final_answer


def taxonomy(rows: list[dict]) -> tuple[dict[str, list[bool]], dict[str, list[dict]]]:
    """Return a flag per problem for each outcome and error, and three examples of each error."""
    flags, examples = {}, {}
    for row in rows:
        text, correct = row["solutions"][0]["text"], row["solutions"][0]["correct"]
        answer, false = final_answer(row["answer"]), false_equation(text)
        flexible = last_number(text) == answer
        wrong = not (correct or flexible)
        outcome = {
            "exact_match": correct,  # the number after #### is the answer's (strict)
            "flexible_match": flexible,  # the last number is
            "no_answer": final_answer(text) is None,  # nothing after ####
            "stop_rate": row["solutions"][0]["stopped"],  # it ended by itself
        }
        errors = {
            "error_extraction": not correct and flexible,  # a false reject
            "error_arithmetic": wrong and false is not None,  # an equation does not hold
            "error_reasoning": wrong and false is None,  # though every equation holds
            "false_accept": correct and false is not None,  # though an equation does not hold
        }
        for name, flag in {**outcome, **errors}.items():
            flags.setdefault(name, []).append(flag)
        example = {"question": row["question"], "text": text, "answer": answer}
        for name in (name for name, flag in errors.items() if flag):
            examples.setdefault(name, []).append({**example, "false_equation": false})
    return flags, {name: found[:3] for name, found in examples.items()}


def last_number(text: str) -> str | None:
    """Return the last number of all, without commas and dollars (GSM8K's flexible extraction)."""
    found = re.findall(r"-?[0-9][0-9,]*\.?[0-9]*|-?\.[0-9]+", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def false_equation(text: str) -> str | None:
    """Return the first equation between numbers alone that does not hold (3+4=8), or None."""
    outside = re.sub(r"<<[^<>]*>>", "", text)
    for part in re.findall(r"<<([^<>]*)>>", text) + outside.split("\n"):
        for before, after in pairwise(part.split("=")):
            left = re.search(r"[-+*/x().$\d\s,]*$", before)[0].split(", ")[-1].strip()
            right = re.match(r"[-+*/x().,$\d\s]*", after)[0].strip()
            if is_false(left, right):
                return f"{left}={right}"
    return None


def is_false(left: str, right: str) -> bool:
    """Return whether left=right can be read and does not hold."""
    exact, claimed = side_value(left), side_value(right)
    if exact is None or claimed is None or not re.search(r"\d\s*\)*\s*[-+*/x]", left):
        return False
    # 2*3=6+1=7 is bad style and good arithmetic.
    first_number = side_value(re.match(r"[-$(\d.,]*", right)[0])
    return not any(is_close(exact, x) for x in (claimed, first_number) if x is not None)


def side_value(side: str) -> float | None:
    """Return the value of one side of an equation, or None where it cannot be read."""
    side = side.replace("$", "").strip().rstrip(".,")
    side = re.sub(r"(?<=\d)\s*x\s*(?=[\d(])", "*", side)
    # A side that begins with an operator lacks what stood in words before it.
    return arithmetic(side) if re.match(r"[-(\d.]", side) else None


def is_close(exact: float, claimed: float) -> bool:
    """Return whether a claim is right up to rounding to cents or to whole numbers."""
    rounded = claimed == int(claimed) and exact != int(exact)
    return abs(exact - claimed) < max(0.011, 0.01 * abs(exact), float(rounded))
