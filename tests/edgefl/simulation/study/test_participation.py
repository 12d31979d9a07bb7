"""How often each client took part."""

from edgefl.simulation.study.participation import clients_by_rounds, count, no_counts


def test_by_hand():
    counts = no_counts(5)
    count(counts, iter([0, 3]))
    count(counts, [3])
    count(counts, [])
    assert counts.tolist() == [1, 0, 0, 2, 0]
    assert clients_by_rounds(counts) == {"0": 3, "1": 1, "2": 1}


def test_a_million_clients_are_four_megabytes_and_few_lines():
    counts = no_counts(10**6)
    count(counts, range(100))
    assert counts.nbytes == 4_000_000
    assert clients_by_rounds(counts) == {"0": 999_900, "1": 100}
