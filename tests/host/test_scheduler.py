"""The scheduler alone: turns, windows, bounds, and rows of engines that die, against a simulation."""

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_core.errors import HostBusy, HostError, HostUnavailable
from alpaca_core.host.protocol import KINDS, Kind
from alpaca_core.host.scheduler import Scheduler, Ticket

KILLER = "kills"


class Engine:
    """What a scheduler drives: rows come in by `send`, and end, or are gone, as a test says."""

    def __init__(self, slots: int = 4, limit: int = 100_000) -> None:
        self.slots = slots
        self.rows: dict[int, Any] = {}
        self.seen: list[Any] = []  # rows in the order they came
        self.deaths = 0
        self.scheduler = Scheduler(self.send, limit)

    def send(self, message: dict[str, Any]) -> None:
        for key in message.get("drop", ()):
            del self.rows[key]
        for key, _, row in message.get("add", ()):
            assert key not in self.rows
            self.rows[key] = row
            self.seen.append(row)

    def begin(self) -> None:
        assert not self.rows
        self.scheduler.begin(self.slots)

    def end(self, *keys: int) -> None:
        ended = [(key, {"completion": self.rows.pop(key)}) for key in keys or list(self.rows)]
        self.scheduler.heard(ended, len(ended))

    def die(self, weight: float = 1.0) -> None:
        self.rows.clear()
        self.deaths += 1
        self.scheduler.died(weight)
        self.begin()

    def step(self) -> None:
        """End the first row, unless one that kills is there."""
        if any(KILLER in row for row in self.rows.values()):
            self.die()
        elif self.rows:
            self.end(next(iter(self.rows)))


def rows(client: str, count: int, kills: bool = False) -> list[dict[str, Any]]:
    return [{"row": f"{client} {place}"} | ({KILLER: True} if kills else {}) for place in range(count)]


def results(ticket: Ticket) -> list[Any]:
    return [ticket.results.get_nowait() for _ in range(ticket.results.qsize())]


def check(scheduler: Scheduler) -> None:
    """Counters say what there is."""
    lines = scheduler._lines.values()
    waiting = sum(len(line_rows) for line in lines for line_rows in line.clients.values()) + len(scheduler._again)
    assert scheduler.waiting == waiting
    for line in lines:
        assert line.running == sum(row.lanes for row in scheduler._running.values() if row.line is line)


@pytest.mark.parametrize(("quick", "stuck"), [(1, 4), (4, 1)])
def test_rows_with_beams_and_others_do_not_wait_for_each_other(quick: int, stuck: int) -> None:
    engine = Engine(slots=8)
    engine.begin()
    asked = {beams: [row | {"sampling": {"num_beams": beams}} for row in rows("one", 100)] for beams in (1, 4)}
    tickets = {beams: engine.scheduler.submit("one", "generate", each) for beams, each in asked.items()}
    while tickets[quick].left:
        there = Counter(row["sampling"]["num_beams"] for row in engine.rows.values())
        assert min(8, tickets[1].left) <= there[1] <= 10
        assert min(2, tickets[4].left) <= there[4] <= 3
        check(engine.scheduler)
        engine.end(next(key for key, row in engine.rows.items() if row["sampling"]["num_beams"] == quick))
    assert tickets[stuck].left == 100


def test_clients_take_turns_whoever_came_first_and_with_however_much() -> None:
    engine = Engine(slots=4)
    engine.begin()
    many = engine.scheduler.submit("many", "generate", rows("many", 50_000))
    for _ in range(100):
        engine.step()
    one = engine.scheduler.submit("one", "generate", rows("one", 1))
    before = many.left
    while one.left:
        engine.step()
    assert before - many.left <= engine.slots + 2  # those that ran already
    two = engine.scheduler.submit("two", "generate", rows("two", 300))
    three = engine.scheduler.submit("three", "generate", rows("three", 300))
    before = many.left
    while two.left or three.left:
        engine.step()
    assert before - many.left == pytest.approx(300, abs=engine.slots + 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=12), st.integers(1, 5))
def test_turns_go_round_as_a_plain_queue_of_queues_says(arrivals: list[tuple[str, int]], slots: int) -> None:
    engine = Engine(slots)
    expected, lines = [], dict[str, deque[Any]]()
    for client, count in arrivals:
        engine.scheduler.submit(client, "generate", rows(client, count))
        if count:
            lines.setdefault(client, deque()).extend(rows(client, count))
    while lines:
        client = next(iter(lines))
        line = lines.pop(client)
        expected.append(line.popleft())
        if line:
            lines[client] = line
    engine.begin()
    while engine.rows:
        engine.end(next(iter(engine.rows)))
    assert engine.seen == expected


def test_what_a_client_drops_costs_it_no_turn() -> None:
    engine = Engine(slots=1)
    kept = engine.scheduler.submit("a", "generate", rows("a", 1))
    gone = engine.scheduler.submit("a", "generate", rows("gone", 3))
    for client in "bcd":
        engine.scheduler.submit(client, "generate", rows(client, 3))
    engine.scheduler.drop(gone)
    engine.begin()
    assert engine.seen[0] == {"row": "a 0"}
    engine.end()
    assert len(results(kept)) == 1
    assert results(gone) == []


def test_the_engine_has_no_more_than_keeps_it_busy() -> None:
    engine = Engine(slots=8)
    engine.begin()
    engine.scheduler.submit("a", "generate", rows("a", 1000))
    engine.scheduler.submit("a", "loglikelihood", rows("a", 1000))
    kinds = [row.kind for row in engine.scheduler._running.values()]
    assert (kinds.count("generate"), kinds.count("loglikelihood")) == (10, 16)
    assert engine.scheduler.running == 26
    assert engine.scheduler.waiting == 2000 - 26


def test_too_many_rows_are_refused_and_may_come_again() -> None:
    engine = Engine(slots=1, limit=10)
    first = engine.scheduler.submit("a", "generate", rows("a", 10))
    with pytest.raises(HostBusy, match="at most 10 rows") as refusal:
        engine.scheduler.submit("b", "generate", rows("b", 1))
    assert isinstance(refusal.value, HostError)
    engine.begin()
    while first.left:
        engine.step()
    second = engine.scheduler.submit("b", "generate", rows("b", 1))
    engine.step()
    assert len(results(second)) == 1


def test_a_request_of_more_rows_than_may_wait_is_taken_when_nothing_waits() -> None:
    engine = Engine(slots=1, limit=10)
    engine.begin()
    ticket = engine.scheduler.submit("a", "generate", rows("a", 256))
    with pytest.raises(HostBusy):
        engine.scheduler.submit("b", "generate", rows("b", 1))
    while ticket.left:
        engine.step()
    assert len(results(ticket)) == 256


def test_a_row_that_kills_is_found_and_its_neighbours_run() -> None:
    engine = Engine(slots=6)
    engine.begin()
    good = engine.scheduler.submit("good", "generate", rows("good", 20))
    bad = engine.scheduler.submit("bad", "generate", rows("bad", 1, kills=True))
    while good.left or bad.left:
        engine.step()
    assert engine.deaths == 3
    assert sorted(index for index, _ in results(good)) == list(range(20))
    ((_, result),) = results(bad)
    assert result["error"]["code"] == "engine_failed"
    check(engine.scheduler)


def test_a_row_that_kills_alone_is_found_at_the_second_death() -> None:
    engine = Engine()
    engine.begin()
    bad = engine.scheduler.submit("bad", "loglikelihood", rows("bad", 1, kills=True))
    while bad.left:
        engine.step()
    assert engine.deaths == 2


def test_kills_from_outside_convict_no_row_that_is_alone() -> None:
    engine = Engine()
    engine.begin()
    killers = [engine.scheduler.submit("bad", "generate", rows("bad", 1, kills=True)) for _ in range(2)]
    good = engine.scheduler.submit("good", "generate", rows("good", 1))
    engine.step()
    engine.step()  # all three are suspects now, and run alone
    engine.step()
    engine.step()
    assert [ticket.left for ticket in killers] == [0, 0]
    assert list(engine.rows.values()) == rows("good", 1)
    engine.die(0.25)
    engine.step()
    assert results(good) == [(0, {"completion": {"row": "good 0"}})]


def test_a_row_is_convicted_only_while_it_is_alone() -> None:
    engine = Engine()
    engine.begin()
    good = engine.scheduler.submit("good", "generate", rows("good", 1))
    engine.die()  # alone, by chance
    bad = engine.scheduler.submit("bad", "generate", rows("bad", 1, kills=True))
    while good.left or bad.left:
        engine.step()
    assert "completion" in results(good)[0][1]
    assert "error" in results(bad)[0][1]


def test_rows_live_through_kills_from_outside() -> None:
    engine = Engine()
    engine.begin()
    good = [engine.scheduler.submit(name, "generate", rows(name, 1)) for name in ("a", "b")]
    for _ in range(11):  # suspects after eight, and then alone at three
        engine.die(0.25)
    while any(ticket.left for ticket in good):
        engine.step()
    assert all("completion" in results(ticket)[0][1] for ticket in good)


def test_failing_ends_every_ticket_and_leaves_room_for_the_next() -> None:
    engine = Engine(slots=2)
    engine.begin()
    tickets = [engine.scheduler.submit(client, "generate", rows(client, 5)) for client in "abc"]
    engine.scheduler.fail(HostUnavailable("gone"))
    assert [isinstance(results(ticket)[-1], HostUnavailable) for ticket in tickets] == [True] * 3
    check(engine.scheduler)
    engine.rows.clear()
    engine.begin()
    after = engine.scheduler.submit("d", "generate", rows("d", 5))
    while after.left:
        engine.step()
    assert len(results(after)) == 5


def test_results_of_an_engine_that_is_gone_are_nobodys() -> None:
    engine = Engine(slots=2)
    engine.begin()
    ticket = engine.scheduler.submit("a", "generate", rows("a", 2))
    old = list(engine.rows)
    engine.die()
    engine.scheduler.heard([(key, {"completion": "old"}) for key in old], 0)
    assert ticket.left == 2
    assert ticket.results.empty()


EVENTS = st.one_of(
    st.tuples(
        st.just("submit"),
        st.sampled_from("abcd"),
        st.sampled_from(KINDS),
        st.lists(st.sampled_from([False] * 9 + [True]), max_size=6),
    ),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("drop"), st.integers(0, 20)),
    st.tuples(st.just("kill")),
    st.tuples(st.just("replace")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.integers(1, 6), st.integers(0, 8))
def test_whatever_comes_every_row_comes_out_once(events: list[Any], slots: int, begins: int) -> None:
    engine = Engine(slots, limit=30)
    tickets: list[tuple[Ticket, list[bool]]] = []
    dropped: set[int] = set()
    kills = 0
    for place, (name, *told) in enumerate(events):
        if place == begins:
            engine.begin()
        if name == "submit":
            client, kind, killing = told
            wanted: list[Any] = [{"row": each} | ({KILLER: True} if kill else {}) for each, kill in enumerate(killing)]
            waiting = engine.scheduler.waiting
            try:
                tickets.append((engine.scheduler.submit(client, kind, wanted), killing))
            except HostBusy:
                assert waiting + len(wanted) > 30
                assert engine.scheduler.waiting == waiting
        elif name == "drop" and told[0] < len(tickets):
            engine.scheduler.drop(tickets[told[0]][0])
            dropped.add(told[0])
        elif place < begins:
            continue
        elif name == "step":
            for _ in range(told[0]):
                engine.step()
        elif name == "kill" and kills < 3:  # four, while a row is alone, would count as its own
            kills += 1
            engine.die(0.25)
        elif name == "replace":
            engine.scheduler.pause()
            engine.die(0.0)
        check(engine.scheduler)
    if len(events) <= begins:
        engine.begin()
    for _ in range(10_000):
        if not engine.rows:
            break
        engine.step()
        check(engine.scheduler)
    assert engine.scheduler.waiting == engine.scheduler.running == engine.scheduler.clients == 0
    for place, (ticket, killing) in enumerate(tickets):
        found = results(ticket)
        assert len({index for index, _ in found}) == len(found)
        if place not in dropped:
            assert sorted(index for index, _ in found) == list(range(len(killing)))
        for index, result in found:
            assert ("error" in result) == killing[index]
            if not killing[index]:
                assert result == {"completion": {"row": index}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_clients_of_which_half_leave(kind: Kind) -> None:
    engine = Engine(slots=16)
    engine.begin()
    tickets = [engine.scheduler.submit(f"client {place}", kind, rows("x", 7)) for place in range(100)]
    for place, ticket in enumerate(tickets):
        engine.step()
        if place % 2:
            engine.scheduler.drop(ticket)
    while engine.rows:
        engine.step()
    assert all(ticket.left == 0 for ticket in tickets[::2])
    assert engine.scheduler.waiting == engine.scheduler.clients == 0
