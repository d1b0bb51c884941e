"""The process that holds the weights: rows in as lines of JSON, results out, until the host goes away.

    python -m alpaca_core.host.engine DESCRIPTOR

The descriptor is a socket that was inherited. The first line holds the spec: to load it, or only to check its
adapters. Whatever is raised ends the process: the host starts another.
"""

import faulthandler
import json
import os
import queue
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from threading import Event, Lock, Thread
from typing import Any

from alpaca_core.engines.feeding import BatchFeed
from alpaca_core.engines.opening import open_model, refusals
from alpaca_core.engines.recovering import passes
from alpaca_core.errors import AlpacaError
from alpaca_core.host.protocol import GenerateJson, Result, write_error, write_result
from alpaca_core.model import Completion, Feed, LanguageModel, ScoreRow, Trie
from alpaca_core.spec import ModelSpec

_PULSE = 0.5
"""Seconds between signs of life."""
_PART = 100_000
"""Scores and tokens from which on results go in another line: some 2 MB of scores."""


class Pipe:
    """Lines of JSON, both ways; what comes in is read by a thread, and its end ends the process.

    Args:
        connection: To the host.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = Lock()
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        Thread(target=self._read, daemon=True).start()

    def send(self, **message: object) -> None:
        """Send one line."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._sending:
            self._connection.sendall(line)

    def _read(self) -> None:
        """Read until the host is gone; then end this process, whose main thread may be busy for long."""
        try:
            with suppress(ConnectionError), self._connection.makefile("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else it was killed in mid-line
                        self.inbox.put(json.loads(line))
        except Exception:
            traceback.print_exc()
            os._exit(1)
        finally:
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)  # and what it has begun with it
            os._exit(0)


def main() -> None:
    """Load the model that the first line asks for, and run rows; or say whether its adapters go on its base."""
    faulthandler.enable()
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))
    ((task, told),) = pipe.inbox.get().items()
    spec = ModelSpec.model_validate(told)
    loaded = Event()
    Thread(target=_say_alive, args=(pipe, loaded), daemon=True).start()
    try:
        if task == "check":
            pipe.send(checked={name: write_error(error) for name, error in refusals(spec).items()})
            return
        with open_model(spec) as model:
            loaded.set()
            tokenizer = model.tokenizer
            parts_of = {"definition": tokenizer.definition, "eos_ids": tokenizer.eos_ids, "named": tokenizer.named}
            pipe.send(ready=model.info.model_dump(mode="json"), tokenizer=parts_of)
            try:
                _run(pipe, model, spec.batch_size)
            except Exception:  # after an assertion on a GPU nothing can be closed there any more, and may wait for ever
                traceback.print_exc()
                os._exit(1)
    except AlpacaError as error:
        pipe.send(failed=write_error(error))


def _say_alive(pipe: Pipe, loaded: Event) -> None:
    """Tell the host that the load goes on, and then that passes end: one that only turns round is no sign of life."""
    before = 0
    while True:
        time.sleep(_PULSE)
        if not loaded.is_set():
            pipe.send(loading=True)
        elif (now := passes()) > before:
            before = now
            pipe.send(passes=now)


def _run(pipe: Pipe, model: LanguageModel, batch_size: int) -> None:
    feed: Feed = model.feed() if hasattr(model, "feed") else BatchFeed(model, batch_size)
    info = model.info
    while True:
        while not (len(feed) and pipe.inbox.empty()):
            _take(pipe.inbox.get(), feed)
        for part in parts(feed.step()):
            tokens = sum(each.completion_tokens for _, each in part if isinstance(each, Completion))
            pipe.send(ended=[[key, write_result(result)] for key, result in part], tokens=tokens)
        if model.info is not info:
            info = model.info
            pipe.send(info=info.model_dump(mode="json"))


def parts(ended: Sequence[tuple[int, Result]]) -> Iterator[list[tuple[int, Result]]]:
    """Split the results of a step, so that none of the lines is longer than its host reads.

    Args:
        ended: Any number of results with their keys, each of at most `protocol.MOST_TOKENS` scores or tokens.

    Yields:
        The same in their order: some that have less than `_PART` scores and tokens together, and one more.
    """
    part: list[tuple[int, Result]] = []
    size = 0
    for key, result in ended:
        part.append((key, result))
        size += len(result) if isinstance(result, list) else getattr(result, "completion_tokens", 1)
        if size >= _PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _take(message: dict[str, Any], feed: Feed) -> None:
    for key in message.get("drop", ()):
        feed.drop(key)
    for key, kind, row in message.get("add", ()):
        feed.add(key, GenerateJson.model_validate(row).row() if kind == "generate" else _score_row(row))


def _score_row(row: dict[str, Any]) -> ScoreRow:
    return ScoreRow(tuple(row["prompt_ids"]), _trie(tuple(row["tokens"]), tuple(row["parents"])), row["adapter"])


@lru_cache(maxsize=256)
def _trie(tokens: tuple[int, ...], parents: tuple[int, ...]) -> Trie:
    """One trie for all rows that have the same: engines work out once what they need of it."""
    return Trie(tokens, parents)


if __name__ == "__main__":
    main()
