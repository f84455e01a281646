"""The desk: jobs go out once, and again to a worker that died; results come in the order of their handing in."""

from __future__ import annotations

import asyncio
from typing import Any

from autocompress.desk import Desk, Job


def test_a_desk_gives_a_job_again_to_a_worker_that_did_not_finish_it() -> None:
    async def day() -> tuple[list[Any], list[Any]]:
        desk = Desk()
        for number in (7, 8, 9):
            await desk.put(Job(number, "{}", []))
        await desk.close()
        taken = [await desk.exchange("a", None), await desk.exchange("b", None)]
        taken.append(await desk.exchange("a", None))  # a new process of the same worker
        taken.append(await desk.exchange("b", (8, {"failure": "it broke"})))
        taken.append(await desk.exchange("a", (7, {"failure": "it broke, too"})))
        taken.append(await desk.exchange("b", (9, {"failure": "and this"})))
        await desk.end()
        return taken, [await desk.result() for _ in range(4)]

    taken, results = asyncio.run(day())
    assert [job and (job.number, job.attempt) for job in taken] == [(7, 1), (8, 1), (7, 2), (9, 1), None, None]
    assert [found and found[0] for found in results] == [8, 7, 9, None]


def test_a_desk_loses_nothing_to_a_worker_that_died_while_it_waited() -> None:
    async def day() -> list[Any]:
        desk = Desk()
        dead = asyncio.create_task(desk.exchange("a", None))
        await asyncio.sleep(0)
        again = asyncio.create_task(desk.exchange("a", None))
        await asyncio.sleep(0)
        await desk.put(Job(7, "{}", []))
        await asyncio.wait([dead, again])
        await desk.close()
        found = again.result()
        return [found and found.number, await desk.exchange("a", (7, {})), await desk.exchange("b", None)]

    assert asyncio.run(asyncio.wait_for(day(), 10)) == [7, None, None]


def test_what_a_lost_worker_had_is_given_to_whoever_comes() -> None:
    """Also where it died while it waited: nothing is given to a process that is not there any more."""

    async def day() -> list[Any]:
        desk = Desk()
        await desk.put(Job(7, "{}", []))
        first = await desk.exchange("a", None)
        waiting = asyncio.create_task(desk.exchange("b", None))
        dead = asyncio.create_task(desk.exchange("c", None))
        await asyncio.sleep(0)
        await desk.lost("c")
        await desk.lost("a")
        await asyncio.wait([waiting, dead])
        again, nothing = waiting.result(), dead.result()
        await desk.put(Job(8, "{}", []))
        begun = await desk.exchange("a", None)  # a new process of it, in the end
        return [job and (job.number, job.attempt) for job in (first, again, nothing, begun)]

    assert asyncio.run(asyncio.wait_for(day(), 10)) == [(7, 1), (7, 2), None, (8, 1)]


def test_a_result_that_comes_late_from_a_worker_that_was_lost_is_not_told_twice() -> None:
    async def day() -> list[Any]:
        desk = Desk()
        await desk.put(Job(7, "{}", []))
        await desk.close()
        await desk.exchange("a", None)
        await desk.lost("a")
        again = await desk.exchange("b", None)
        late = await desk.exchange("a", (7, {"failure": "late"}))
        await desk.exchange("b", (7, {"failure": "in time"}))
        await desk.end()
        return [again and again.number, late, await desk.result(), await desk.result()]

    assert asyncio.run(asyncio.wait_for(day(), 10)) == [7, None, (7, {"failure": "in time"}), None]


def test_what_is_withdrawn_is_given_to_nobody() -> None:
    async def day() -> list[Any]:
        desk = Desk()
        for number in (7, 8):
            await desk.put(Job(number, "{}", []))
        first = await desk.exchange("a", None)
        await desk.withdraw()
        return [first and first.number, await desk.exchange("b", None), await desk.exchange("a", (7, {}))]

    assert asyncio.run(asyncio.wait_for(day(), 10)) == [7, None, None]
