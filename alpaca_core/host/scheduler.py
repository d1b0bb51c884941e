"""Whose row is next: clients in turn, as many rows at the engine as it can use, and rows run again when it dies.

The engine gets no more rows than keep it busy, so that a row of a client that has just come waits for the rows
that run, and not for the million of another client.

A row may be what the engine dies of. Rows that were there when it died are run again together; those that were there
at two such deaths are then run one at a time, nothing beside them, and one of which it has died twice, once of it
alone, gets an error. A kill from outside counts as a quarter of a death, since rows are seldom its reason.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from alpaca_core.errors import AlpacaError, HostBusy
from alpaca_core.host.protocol import KINDS, Kind

Json = dict[str, Any]

_AHEAD = 1.0
"""Seconds of judging that the engine has before it: passes take rows of many clients together."""
_MOST_AHEAD = 512
_DEATHS = 2.0
"""Deaths of the engine after which a row is run alone."""
_ALONE = 1.0
"""Deaths, of those, with no other row there, after which it was the row."""


class Ticket:
    """The rows of one request: what has come back waits in `results`, an error there ends them all.

    Args:
        client: Whose turn they take.
        count: Rows that are still out.
    """

    def __init__(self, client: str, count: int) -> None:
        self.client, self.left = client, count
        self.results: asyncio.Queue[tuple[int, Json] | AlpacaError] = asyncio.Queue()


@dataclass(eq=False, slots=True)
class _Row:
    ticket: Ticket
    index: int
    kind: Kind
    line: "_Line"
    row: Json
    lanes: int = 1
    deaths: float = 0.0
    alone: float = 0.0  # those of its deaths at which no other row was there


@dataclass(eq=False, slots=True)
class _Line:
    """Rows that wait for the same slots: clients in turn, and each client's rows in the order they came."""

    clients: dict[str, deque[_Row]] = field(default_factory=dict)  # the next one's turn first
    running: int = 0  # lanes that the engine has; a row has one, or one for each beam
    window: int = 0

    def add(self, row: _Row) -> None:
        self.clients.setdefault(row.ticket.client, deque()).append(row)

    def take(self) -> _Row | None:
        if not self.clients:
            return None
        client = next(iter(self.clients))
        rows = self.clients.pop(client)
        row = rows.popleft()
        if rows:
            self.clients[client] = rows  # behind all others
        return row

    def drop(self, ticket: Ticket) -> int:
        """Take out what waits of a ticket; return how many rows it was."""
        rows = self.clients.get(ticket.client, deque())
        kept = deque(row for row in rows if row.ticket is not ticket)
        if kept:
            self.clients[ticket.client] = kept  # its turn stays what it was
        else:
            self.clients.pop(ticket.client, None)
        return len(rows) - len(kept)


class Scheduler:
    """Rows of all clients, and which of them the engine has. Used by one thread.

    Args:
        send: Sends a message to the engine.
        limit: Rows that may wait.

    Attributes:
        waiting: Rows that the engine has not.
        rows: Rows that have come out, of all clients since the start.
        tokens: Tokens that have been generated since.
        in_vain: Deaths of engines since a row came out.
        used: When there was something to do last, by `time.monotonic`.
    """

    def __init__(self, send: Callable[[Json], None], limit: int) -> None:
        self._send, self.limit = send, limit
        # rows with beams have slots of their own: in one line with others each would wait for the other
        self._lines: dict[str, _Line] = {name: _Line() for name in (*KINDS, "beams")}
        self._again: deque[_Row] = deque()  # were there when the engine died
        self._running: dict[int, _Row] = {}
        self._next_key = 0
        self._open = False
        self._slots = 1
        self.waiting = self.rows = self.tokens = self.in_vain = 0
        self.used = time.monotonic()
        self._recent: deque[tuple[float, Kind, int, int]] = deque()  # when, and how many rows and tokens

    @property
    def running(self) -> int:
        """Rows that the engine has."""
        return len(self._running)

    @property
    def clients(self) -> int:
        """Clients whose rows wait or run."""
        tickets = [row.ticket.client for row in (*self._running.values(), *self._again)]
        return len({*tickets, *(client for line in self._lines.values() for client in line.clients)})

    @property
    def adapters(self) -> set[str | None]:
        """What rows name that wait or run."""
        waiting = (row for line in self._lines.values() for rows in line.clients.values() for row in rows)
        return {row.row["adapter"] for row in (*self._running.values(), *self._again, *waiting)}

    def speed(self) -> tuple[float, float]:
        """Rows and tokens a second, of the last ten seconds."""
        self._forget()
        return sum(each[2] for each in self._recent) / 10, sum(each[3] for each in self._recent) / 10

    def submit(self, client: str, kind: Kind, rows: list[Json]) -> Ticket:
        """Line up rows of a client. Where none wait they may be more than the limit, or they could never come.

        Raises:
            HostBusy: If too many rows wait.
        """
        if self.waiting and self.waiting + len(rows) > self.limit:
            raise HostBusy(
                f"at most {self.limit:,} rows wait at a host, but {self.waiting:,} do, and {len(rows):,} more came. "
                "Try again later."
            )
        ticket = Ticket(client, len(rows))
        for index, row in enumerate(rows):
            beams = row.get("sampling", {}).get("num_beams", 1)
            line = self._lines["beams" if beams > 1 else kind]
            line.add(_Row(ticket, index, kind, line, row, beams))
        self.waiting += len(rows)
        self._fill()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Take out what is left of a ticket, from the engine, too."""
        if not ticket.left:
            return
        for line in self._lines.values():
            self.waiting -= line.drop(ticket)
        again = deque(row for row in self._again if row.ticket is not ticket)
        self.waiting -= len(self._again) - len(again)
        self._again = again
        keys = [key for key, row in self._running.items() if row.ticket is ticket]
        for key in keys:
            row = self._running.pop(key)
            row.line.running -= row.lanes
        if keys:
            self._send({"drop": keys})
        self.used = time.monotonic()
        self._fill()

    def heard(self, ended: list[tuple[int, Json]], tokens: int) -> None:
        """Hand results of the engine to their tickets."""
        self.used = now = time.monotonic()
        self.tokens += tokens
        counts = dict.fromkeys(KINDS, 0)
        for key, result in ended:
            row = self._running.pop(key, None)
            if row is None:  # dropped meanwhile
                continue
            row.line.running -= row.lanes
            counts[row.kind] += 1
            self.in_vain = 0
            self._hand_out(row, result)
        for kind, count in counts.items():
            if count:
                self._recent.append((now, kind, count, tokens if kind == "generate" else 0))
        self._forget()
        judged = sum(count for when, kind, count, _ in self._recent if kind == "loglikelihood" and now - when < 2)
        ahead = min(_MOST_AHEAD, int(judged / 2 * _AHEAD))
        self._lines["loglikelihood"].window = max(2 * self._slots, ahead)
        self._fill()

    def begin(self, slots: int) -> None:
        """Give rows to an engine that is ready, and computes so many together."""
        self._open, self._slots, self.used = True, slots, time.monotonic()
        self._lines["generate"].window = self._lines["beams"].window = slots + max(1, slots // 4)
        self._lines["loglikelihood"].window = 2 * slots
        self._fill()

    def pause(self) -> None:
        """Give no more rows to the engine."""
        self._open = False

    def died(self, weight: float) -> None:
        """Put the rows that the engine had back in line.

        Args:
            weight: How far one of them may be the reason: 0 is not at all, 1 a death of its own.
        """
        self._open = False
        self.in_vain += weight >= 1.0
        alone = len(self._running) == 1
        for row in self._running.values():
            row.deaths += weight
            row.alone += weight if alone else 0.0
            if alone and weight and row.deaths >= _DEATHS and row.alone >= _ALONE:
                self._hand_out(row, _killer())
            else:
                self._again.append(row)
                self.waiting += 1
        self._forget_running()

    def fail(self, error: AlpacaError) -> None:
        """End all tickets."""
        rows = [*self._running.values(), *self._again]
        while (row := next((row for line in self._lines.values() if (row := line.take())), None)) is not None:
            rows.append(row)
        for ticket in {row.ticket for row in rows}:
            ticket.left = 0
            ticket.results.put_nowait(error)
        self._forget_running()
        self._again.clear()
        self.waiting = 0

    def _forget_running(self) -> None:
        self._running.clear()
        for line in self._lines.values():
            line.running = 0

    def _hand_out(self, row: _Row, result: Json) -> None:
        row.ticket.left -= 1
        self.rows += 1
        row.ticket.results.put_nowait((row.index, result))

    def _fill(self) -> None:
        """Send rows to the engine, up to what it can use."""
        if not self._open:
            return
        added = [(self._start(row), row.kind, row.row) for row in self._next_rows()]
        if added:
            self._send({"add": added})

    def _start(self, row: _Row) -> int:
        self._next_key += 1
        self._running[self._next_key] = row
        row.line.running += row.lanes
        self.waiting -= 1
        self.used = time.monotonic()
        return self._next_key

    def _next_rows(self) -> Iterator[_Row]:
        suspects = [row for row in self._again if row.deaths >= _DEATHS]
        if suspects:
            if not self._running:
                self._again.remove(suspects[0])
                yield suspects[0]
            return
        if any(row.deaths >= _DEATHS for row in self._running.values()):
            return  # it runs alone
        while self._again:
            yield self._again.popleft()
        for line in self._lines.values():
            while line.running < line.window and (row := line.take()) is not None:
                yield row

    def _forget(self) -> None:
        while self._recent and time.monotonic() - self._recent[0][0] > 10:
            self._recent.popleft()


def _killer() -> Json:
    return {
        "error": {
            "code": "engine_failed",
            "message": "the engine died of this row more than once, the last time with no other row beside it. "
            "Shorten the row, or read the host's log and report it.",
        }
    }
