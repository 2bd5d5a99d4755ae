"""The waiting room: who gets a chair, who is sent away, and what happens when somebody leaves."""

import asyncio
import itertools
import threading

import pytest

from digit.web.limits import MIB, Budget, Busy, Desk, Gone, Limits, TookTooLong
from digit.web.page import stream


def held(until: threading.Event, seen: list, name: str):
    """Work that goes on until ``until`` is set, checking all the time."""

    def work(visit):
        seen.append(name)
        try:
            while not until.wait(0.005):
                visit.check()
        except (Gone, TookTooLong) as error:
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


def test_first_come_first_served_and_a_full_room_says_so():
    async def scene():
        desk, until, seen = Desk(Limits(waiting=2)), threading.Event(), []
        tasks = [asyncio.ensure_future(desk.run(held(until, seen, name))) for name in "abc"]
        await eventually(lambda: seen == ["a"])
        assert desk.inside == 3
        with pytest.raises(Busy, match="2 requests are waiting"):
            await desk.run(held(until, seen, "d"))
        until.set()
        assert await asyncio.gather(*tasks) == ["a", "b", "c"]
        assert seen == ["a", "b", "c"]
        await eventually(lambda: desk.inside == 0)
        assert await desk.run(lambda _: "again") == "again"

    asyncio.run(scene())


def test_who_leaves_frees_the_slot():
    async def scene():
        desk, until, seen = Desk(Limits(waiting=1)), threading.Event(), []
        working = asyncio.ensure_future(desk.run(held(until, seen, "a")))
        await eventually(lambda: seen == ["a"])
        waits = asyncio.ensure_future(desk.run(held(until, seen, "b")))
        await eventually(lambda: desk.inside == 2)
        waits.cancel()
        await eventually(lambda: desk.inside == 1)  # at once, while the other still works
        working.cancel()
        await eventually(lambda: desk.inside == 0)
        assert seen == ["a", "a: Gone"]  # the work was stopped, and the one who waited never began

    asyncio.run(scene())


def test_work_is_cut_off_after_its_time():
    async def scene():
        desk, seen = Desk(Limits(seconds=0.05)), []
        with pytest.raises(TookTooLong, match=r"more than the 0\.05 seconds"):
            await desk.run(held(threading.Event(), seen, "a"))
        assert await desk.run(lambda _: 1) == 1

    asyncio.run(scene())


def test_a_page_that_is_closed_frees_the_slot():
    async def scene():
        desk, seen = Desk(Limits()), []

        def work(visit):
            try:
                for number in itertools.count():
                    visit.news(number)
            except Gone:
                seen.append("stopped")
                raise

        frames = stream(desk, work)
        assert [await anext(frames) for _ in range(3)] == [0, 1, 2]
        assert desk.inside == 1
        await frames.aclose()  # what Gradio does with the iterator of a visitor who left
        await eventually(lambda: desk.inside == 0)
        assert seen == ["stopped"]

    asyncio.run(scene())


def test_news_arrive_in_order_and_before_the_result():
    async def scene():
        told = []

        def work(visit):
            for number in range(20):
                visit.news(number)
            return "done"

        told.append(await Desk(Limits()).run(work, told.append))
        assert told == [*range(20), "done"]

    asyncio.run(scene())


def test_an_error_of_the_work_reaches_the_one_who_asked():
    async def scene():
        desk = Desk(Limits(waiting=0))
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await desk.run(lambda _: 1 / 0)
        await eventually(lambda: desk.inside == 0)

    asyncio.run(scene())


def test_a_budget_is_given_back():
    budget = Budget(10)
    with budget.hold() as take:
        take(4)
        with budget.hold() as also, pytest.raises(Busy):
            also(7)
        take(6)
        assert budget.held == 10
    assert budget.held == 0


def test_a_body_may_hold_a_whole_file_as_base64():
    limits = Limits(upload_mb=3)
    assert limits.upload_bytes == 3 * MIB
    assert limits.body_bytes > 4 * MIB
