import logging

from edgefl.logs import event


def test_an_event_is_one_line_of_fields(caplog):
    with caplog.at_level(logging.INFO):
        event(logging.getLogger("t"), logging.INFO, "round.done", job="j", round=2, seconds=0.123456789, reason='a "b"')
    assert caplog.messages == ['round.done job=j round=2 seconds=0.123457 reason="a \\"b\\""']


def test_a_line_break_in_a_field_does_not_make_a_second_line(caplog):
    event(logging.getLogger("t"), logging.WARNING, "update.refused", reason="one\ntwo", empty="")
    assert caplog.messages == ['update.refused reason="one\\ntwo" empty=""']
