"""Strangers at the HTTPS plane: no body is read for them, wrong tokens are slowed down, operators have places."""

import asyncio

import pytest

from cloud.http import strangers as http_strangers
from cloud.http.strangers import (
    FOR_OPERATORS,
    MAX_ACTIVE,
    REFUSALS_BURST,
    EnrolmentLimit,
    OperatorFirst,
    is_operator,
)

TOKEN = "secret"  # noqa: S105 - of a test
RIGHT = (b"authorization", b"Bearer secret")


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def scope(path="/v1/jobs", *headers, client="192.0.2.1"):
    return {"type": "http", "method": "POST", "path": path, "headers": list(headers), "client": (client, 5)}


async def ask(app, one):
    """Return (status, whether the body was asked for, headers)."""
    sent, received = [], []

    async def receive():
        received.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await app(one, receive, send)
    return sent[0]["status"], bool(received), dict(sent[0]["headers"])


def answering(status):
    async def app(_scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


def test_a_strangers_body_is_not_read_except_for_enrolment():
    app, body = OperatorFirst(answering(200), token=TOKEN), (b"content-length", b"5")

    async def main():
        return [
            await ask(app, scope("/v1/jobs", body)),
            await ask(app, scope("/v1/jobs", (b"transfer-encoding", b"chunked"))),
            await ask(app, scope("/v1/enroll", body)),
            await ask(app, scope("/v1/jobs", body, RIGHT)),
            await ask(app, scope("/v1/health")),
        ]

    answers = asyncio.run(main())
    assert [answer[:2] for answer in answers] == [(401, False), (401, False), (200, True), (200, True), (200, True)]
    assert answers[0][2][b"www-authenticate"] == b"Bearer"


def test_operators_have_places_that_strangers_do_not_take():
    async def main():
        go, begun = asyncio.Event(), asyncio.Semaphore(0)

        async def slow(_scope, _receive, send):
            begun.release()
            await go.wait()
            await answering(200)(_scope, _receive, send)

        app = OperatorFirst(slow, token=TOKEN)
        strangers = [asyncio.create_task(ask(app, scope("/v1/health"))) for _ in range(MAX_ACTIVE)]
        operators = [asyncio.create_task(ask(app, scope("/v1/devices", RIGHT))) for _ in range(FOR_OPERATORS)]
        for _ in range(MAX_ACTIVE):
            await begun.acquire()
        go.set()
        answers = [await asyncio.gather(*group) for group in (strangers, operators)]
        return [[status for status, *_ in group] for group in answers]

    strangers, operators = asyncio.run(main())
    assert strangers.count(200) == MAX_ACTIVE - FOR_OPERATORS
    assert strangers.count(503) == FOR_OPERATORS
    assert operators == [200] * FOR_OPERATORS


def test_an_address_whose_enrolments_are_refused_is_slowed_down_and_no_other():
    clock = Clock()
    app = EnrolmentLimit(answering(403), clock=clock)

    async def statuses(count, client="192.0.2.1"):
        return [(await ask(app, scope("/v1/enroll", client=client)))[0] for _ in range(count)]

    async def main():
        assert await statuses(REFUSALS_BURST + 3) == [403] * (REFUSALS_BURST + 1) + [429] * 2
        status, _, headers = await ask(app, scope("/v1/enroll"))
        assert (status, headers[b"retry-after"]) == (429, b"2")
        assert await statuses(1, "192.0.2.2") == [403]
        clock.now_s += 2.0
        assert await statuses(2) == [403, 429]
        assert (await ask(app, scope("/v1/health")))[0] == 403

    asyncio.run(main())


def test_refusals_that_come_all_at_once_do_not_shut_an_address_out_for_long():
    async def main():
        go = asyncio.Event()

        async def slow(*call):
            await go.wait()
            await answering(403)(*call)

        app = EnrolmentLimit(slow, clock=Clock())
        many = [asyncio.create_task(ask(app, scope("/v1/enroll"))) for _ in range(1000)]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*many)
        return (await ask(app, scope("/v1/enroll")))[2][b"retry-after"]

    assert int(asyncio.run(main())) <= 6


@pytest.mark.parametrize("status", [200, 400, 503])
def test_enrolments_that_are_not_refused_are_not_counted(status):
    app = EnrolmentLimit(answering(status), clock=Clock())

    async def main():
        return {(await ask(app, scope("/v1/enroll")))[0] for _ in range(10 * REFUSALS_BURST)}

    assert asyncio.run(main()) == {status}


def test_an_address_that_asks_too_often_waits_and_is_told_and_operators_do_not_wait(monkeypatch):
    monkeypatch.setattr(http_strangers, "REQUESTS_PER_S", 50)
    monkeypatch.setattr(http_strangers, "REQUESTS_BURST", 5)
    app = OperatorFirst(answering(200), token=TOKEN, clock=Clock())  # it stands still: the debt only rises

    async def main():
        asked = [ask(app, scope("/v1/health")) for _ in range(5 + 4 * 50 + 20)]
        statuses = [status for status, *_ in await asyncio.gather(*asked)]
        operators = {(await ask(app, scope("/v1/devices", RIGHT)))[0] for _ in range(100)}
        return statuses, operators, (await ask(app, scope("/v1/health", client="192.0.2.2")))[0]

    statuses, operators, other = asyncio.run(main())
    assert 190 < statuses.count(200) <= 205  # the rest of these got no place in time
    assert statuses.count(429) >= 20
    assert (operators, other) == ({200}, 200)


@pytest.mark.parametrize(
    ("header", "right"),
    [("Bearer secret", True), ("bearer  secret ", True), ("Basic secret", False), ("Bearer", False), ("", False)],
)
def test_who_is_an_operator(header, right):
    assert is_operator(header, "secret") is right
