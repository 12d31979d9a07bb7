"""Numbers of devices and seconds, by hand."""

import pytest

from edgefl.config import RoundsConfig
from edgefl.exchange import Terms, cohort_size, gathering


def test_a_rounds_terms_are_its_settings() -> None:
    rounds = RoundsConfig(quorum=3, offline_grace_s=7.0)
    terms = Terms.of_round(rounds, 50.0)
    assert (terms.deadline_s, terms.quorum, terms.offline_grace_s, terms.return_s) == (50.0, 3, 7.0, 20.0)


@pytest.mark.parametrize(
    ("rounds", "is_first", "wanted", "quorum"),
    [
        ({"clients": 5, "quorum": 2, "wait_s": 60.0, "offline_grace_s": 5.0}, True, (5, 60.0), (2, 0.0)),
        ({"clients": 5, "quorum": 2, "wait_s": 60.0, "offline_grace_s": 5.0}, False, (5, 5.0), (2, 55.0)),
        ({"quorum": 2, "wait_s": 3.0, "offline_grace_s": 5.0}, False, (2, 3.0), (2, 0.0)),
    ],
)
def test_a_later_round_waits_for_the_quorum_alone(rounds, is_first, wanted, quorum) -> None:
    assert gathering(RoundsConfig(**rounds), is_first=is_first) == (wanted, quorum)


@pytest.mark.parametrize(("clients", "over", "size"), [(0, 0.5, 0), (100, 0.1, 110), (3, 0.5, 5), (10, 0.0, 10)])
def test_a_cohort_has_the_over_selected(clients, over, size) -> None:
    assert cohort_size(RoundsConfig(clients=clients, over_selection=over)) == size
