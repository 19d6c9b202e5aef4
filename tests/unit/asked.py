"""The merged view over lowers that may not answer: each step of a program is a request that begins anew after every question."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from pyoverlay.core.remote import MustAsk, Replies, replies
from pyoverlay.core.view import View
from tests.unit.merged import Merged


class Told:
    """`call` as a request that begins anew after each question; asked: the questions, each once."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def __call__(self, call: Callable[[], Any]) -> Any:
        given = Replies()
        before = replies.set(given)
        try:
            while True:
                try:
                    return call()
                except MustAsk as must:
                    assert must.question is not None
                    self.asked.append(must.question.key)
                    contextvars.Context().run(must.question.run)
        finally:
            replies.reset(before)
            given.close()


class Asked(Merged):
    """Each step of a program is a request of its own, as it is for the kernel."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.told = Told()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in vars(Merged) or name.startswith("_") or name in ("look_up", "parent", "entry", "tree", "forget"):
            return value
        return lambda *arguments, **named: self.told(lambda: value(*arguments, **named))
