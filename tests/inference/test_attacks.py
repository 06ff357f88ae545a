"""The attacks of tests/stress/attacks.py on a real server; at full size with -m slow."""

import pytest

from tests.stress.attacks import ATTACKS, attacked_server


@pytest.fixture(scope="module", params=["short", pytest.param("full", marks=pytest.mark.slow)])
def target(request):
    with attacked_server(is_short=request.param == "short") as target:
        yield target


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attack(target, attack):
    """It gets the answers that it has to get, and another client's /health is always answered."""
    target.run(attack)
