"""Whose turn is it: which rollout actor gets the next call.

An idle actor gets it. While more calls wait than there are actors, an actor that still works gets its next call, too:
it then goes on at once when it has finished, without a way to the stream and back. At the end of a step, when few calls
are left, each waits for whoever is free first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Turn:
    """A call's turn on an actor. It begins when the turn `before` it, if there is one, has ended."""

    name: str
    before: Turn | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    well: bool = True  # False once the call has ended with the actor's death

    async def begin(self) -> bool:
        """Wait until the turn begins. Returns False if the actor has died before."""
        if self.before is None:
            return True
        await self.before.ended.wait()
        well, self.before = self.before.well, None  # let go of it, and of all before it
        return well


class Turns:
    """Hands out the actors that have been admitted, inside one asyncio loop. `actors`: how many there are at most."""

    def __init__(self, actors: int) -> None:
        self._actors = actors
        self._waiting: deque[asyncio.Future[Turn]] = deque()
        self._idle: deque[str] = deque()
        self._busy: dict[str, Turn] = {}  # actors with one turn, the one that began first in front
        self._open: dict[str, list[Turn]] = {}  # actors that work -> their turns
        self._leaving: dict[str, asyncio.Future[bool]] = {}
        self._gone: Exception | None = None

    @property
    def working(self) -> int:
        """Actors that get calls."""
        return len(self._open.keys() - self._leaving.keys())

    def admit(self, name: str) -> None:
        """An actor can work, for the first time or again."""
        self._open[name] = []
        self._idle.append(name)
        self._deal()

    async def take(self) -> Turn:
        """The next turn on any actor; `end` it. Raises what `close` was given."""
        if self._gone:
            raise self._gone
        place: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._deal()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.end(place.result())
            raise

    def end(self, turn: Turn, *, well: bool = True) -> None:
        """The call has ended. Not `well`: the actor has died, and gets no turn until it is admitted again."""
        of_this_life = turn in (turns := self._open.get(turn.name, []))
        left = self._leaving.pop(turn.name, None) if of_this_life else None
        if left and not left.done():
            left.set_result(well)
        turn.well = well and left is None  # whoever follows on one that leaves goes to another actor
        turn.ended.set()
        if not of_this_life:
            return
        self._busy.pop(turn.name, None)
        turns.remove(turn)
        if not turn.well:
            del self._open[turn.name]
        elif turns:
            self._busy[turn.name] = turns[0]
        else:
            self._idle.append(turn.name)
        self._deal()

    def leave(self, name: str) -> asyncio.Future[bool]:
        """The actor begins nothing more until it is admitted again. Resolves when its turn has ended: True if well."""
        left: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._open[name]:
            self._busy.pop(name, None)
            self._leaving[name] = left
        else:
            self._idle.remove(name)
            del self._open[name]
            left.set_result(True)
        return left

    def close(self, error: Exception) -> None:
        """No actor is left: whoever waits, or comes later, gets the error."""
        self._gone = error
        while self._waiting:
            if not (place := self._waiting.popleft()).done():
                place.set_exception(error)

    def _deal(self) -> None:
        while self._waiting and (self._idle or (self._busy and len(self._waiting) > self._actors)):
            if (place := self._waiting.popleft()).done():  # cancelled
                continue
            if self._idle:
                name, before = self._idle.popleft(), None
            else:
                name, before = next(iter(self._busy.items()))
                del self._busy[name]
            turn = Turn(name, before)
            self._open[name].append(turn)
            if before is None:
                self._busy[name] = turn
            place.set_result(turn)
