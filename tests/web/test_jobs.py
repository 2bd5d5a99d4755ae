"""The job queue: who is served, who is sent away, and what happens when a client leaves."""

import asyncio
import itertools
import threading

import pytest

from digit.web.jobs import Cancelled, JobQueue, Refused


def held(until: threading.Event, seen: list, name: str):
    """Work that goes on until ``until`` is set, checking all the time."""

    def work(job):
        seen.append(name)
        try:
            while not until.wait(0.005):
                job.check()
        except (Cancelled, Refused) as error:
            seen.append(f"{name}: {type(error).__name__}")
            raise
        return name

    return work


async def eventually(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def last(job):
    """The last event of a job."""
    return [event async for event in job.events()][-1]


def test_first_come_first_served_and_a_full_queue_says_so():
    async def scene():
        queue, until, seen = JobQueue(2, 60), threading.Event(), []
        jobs = [queue.submit(held(until, seen, name)) for name in "abc"]
        await eventually(lambda: seen == ["a"])
        assert queue.active == 3
        with pytest.raises(Refused, match="2 requests are waiting") as refused:
            queue.submit(held(until, seen, "d"))
        assert refused.value.status == 429
        until.set()
        assert [await last(job) for job in jobs] == [("result", name) for name in "abc"]
        assert seen == ["a", "b", "c"]
        await eventually(lambda: queue.active == 0)
        assert await last(queue.submit(lambda _: "again")) == ("result", "again")

    asyncio.run(scene())


def test_a_client_that_leaves_frees_its_place():
    async def scene():
        queue, until, seen = JobQueue(1, 60), threading.Event(), []
        works = queue.submit(held(until, seen, "a"))
        await eventually(lambda: seen == ["a"])
        waits = queue.submit(held(until, seen, "b"))
        assert queue.active == 2
        waits.cancel()
        await eventually(lambda: queue.active == 1)  # at once, while the other still works
        works.cancel()
        await eventually(lambda: queue.active == 0)
        assert seen == ["a", "a: Cancelled"]  # the work was stopped, and the one that waited never began
        assert [event async for event in waits.events()] == []

    asyncio.run(scene())


def test_work_is_cut_off_after_its_time():
    async def scene():
        queue = JobQueue(0, 0.05)
        kind, error = await last(queue.submit(held(threading.Event(), [], "a")))
        assert (kind, error.status) == ("error", 503)
        assert "more than the 0.05 seconds" in str(error)
        await eventually(lambda: queue.active == 0)
        assert await last(queue.submit(lambda _: 1)) == ("result", 1)

    asyncio.run(scene())


def test_events_that_are_closed_cancel_the_job():
    async def scene():
        queue, seen = JobQueue(0, 60), []

        def work(job):
            try:
                for number in itertools.count():
                    job.report(number)
            except Cancelled:
                seen.append("stopped")
                raise

        events = queue.submit(work).events()
        assert [await anext(events) for _ in range(3)] == [("progress", number) for number in range(3)]
        assert queue.active == 1
        await events.aclose()
        await eventually(lambda: queue.active == 0)
        assert seen == ["stopped"]

    asyncio.run(scene())


def test_progress_arrives_in_order_and_before_the_result():
    async def scene():
        def work(job):
            for number in range(20):
                job.report(number)
            return "done"

        events = [event async for event in JobQueue(0, 60).submit(work).events()]
        assert events == [*(("progress", number) for number in range(20)), ("result", "done")]

    asyncio.run(scene())


def test_an_error_of_the_work_reaches_the_client():
    async def scene():
        queue = JobQueue(0, 60)
        for _ in range(3):
            kind, error = await last(queue.submit(lambda _: 1 / 0))
            assert kind == "error"
            assert isinstance(error, ZeroDivisionError)
            await eventually(lambda: queue.active == 0)

    asyncio.run(scene())
