"""Spellings of earlier versions: each is refused in one line that names the new one, and is used nowhere else."""

from __future__ import annotations

import re

import pytest

from balcony_edge.budget import Budget
from balcony_edge.errors import BudgetError
from balcony_edge.renamed import RENAMED
from tests.command import invoke_here


@pytest.mark.parametrize("former", RENAMED)
def test_former_spellings_name_the_new_one(former: str) -> None:
    verb, _, option = former.partition(" ")
    if not option:
        with pytest.raises(BudgetError) as caught:
            Budget(**{former: True})
        assert str(caught.value) == f"{former} = True: this key is now {RENAMED[former]}; write that instead"
        Budget.model_validate_json("{" + re.sub(r"(\w+) = ", r'"\1": ', RENAMED[former]) + "}")  # it says something
        return
    for given in ((verb, option), (verb, "demo", f"{option}=sorted")):
        done = invoke_here(*given)
        line = f"balcony-edge: {former}: this option is now {RENAMED[former]}: write that instead\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_an_option_of_another_verb_stays_a_usage_error() -> None:
    done = invoke_here("run", "bundle", "hi", "--unfreeze")
    assert done.returncode == 2 and "No such option" in done.stderr
