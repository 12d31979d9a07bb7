"""Work that waits: lazily taken, put back in front."""

from edgefl.process.workers.work_queue import WorkQueue


def test_the_source_is_read_no_further_than_needed():
    read = []
    queue = WorkQueue(read.append(one) or one for one in range(10))
    assert queue.more()
    assert read == [0]
    assert queue.more(2)
    assert read == [0, 1, 2]
    assert not WorkQueue(range(3)).more(3)


def test_what_is_put_back_comes_first_and_what_is_retried_in_parts():
    queue = WorkQueue(["ab", "c", "d"], split=list)
    assert queue.more()
    both, _ = queue.take(), queue.more()
    both.losses = 1
    queue.put_back([both])
    assert queue.first() == "ab"
    queue.retry(queue.take())
    parts = [queue.take() for _ in range(2) if queue.more()]
    assert [(part.message, part.losses) for part in parts] == [("a", 1), ("b", 1)]
    assert list(queue.rest()) == ["c", "d"]


def test_once_stopped_there_is_nothing_more():
    stopped = []
    queue = WorkQueue("abc", stopped=lambda: bool(stopped))
    assert queue.more(1)
    stopped.append(True)
    assert not queue.more()
    stopped.clear()
    assert list(queue.rest()) == ["c"]  # what had been taken from the source is gone
