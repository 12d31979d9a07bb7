"""Nothing is done: the round that every hostile test ends with, by itself."""


def test_a_round_of_three(fleet, three, round_is_right):
    three(fleet)
    round_is_right(fleet)
