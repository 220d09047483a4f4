"""Any combination of models, files, folders and options is taken or refused in a sentence, never a traceback."""

import random

import pytest
from combinations import Things, make_things, tried

EXAMPLES = 60


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    return make_things(tmp_path_factory.mktemp("things"))


@pytest.mark.slow
def test_any_combination_is_taken_or_refused(things: Things, tmp_path_factory: pytest.TempPathFactory) -> None:
    for number in range(EXAMPLES):
        tried(things, random.Random(f"0/{number}"), tmp_path_factory.mktemp("out"))
