"""What is done with a search around Serve: which requests are searches, which are let in, and what follows when their
client leaves.

Serve watches every request for its client's leaving, with two tasks more: a fourth of what a request costs the
endpoint process (docs/decisions/0003-ingress.md). Searches are marked so that Serve does not, and a search that is not
answered soon watches for itself. What is refused because there is too much of it is refused before Serve sees it, too:
under overload refusals are most of the work. Imported by every proxy of the cluster: nothing large is imported here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.middleware import Middleware

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH_START, PATH_END = "/v1/collections/", "/points:search"
SEARCH_PATH = f"{PATH_START}{{collection}}{PATH_END}"
UNWATCHED = (b"x-request-disconnect-disabled", b"?1")  # Serve's header for clients that do without
ADMISSION = "eagleray.admission"  # the key of a search's scope under which its admission is, if it was let in here
WATCH_AFTER_S = 0.02  # nearly all searches are answered by then, and a search in a batch ends no sooner for one less


def searched_collection(scope: Scope) -> str | None:
    """The collection of a search, as the path has it; None where the request is no search."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    if not (path.startswith(PATH_START) and path.endswith(PATH_END)):
        return None
    name = path[len(PATH_START) : -len(PATH_END)]
    return name if name and "/" not in name else None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The whole answer to a search that is not let in."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Admitted(Protocol):
    """A search that is worked on until it is released; to release it again does nothing."""

    def release(self) -> None: ...


LetIn = Callable[[str], Admitted | Refusal | None]


class Entrance:
    """Who lets searches of this process in: the endpoint, while it runs here; nobody in a proxy, nor for requests of
    another event loop than the endpoint's. What nobody lets in or refuses here the endpoint itself does."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._let_in: LetIn | None = None

    def keep(self, let_in: LetIn) -> None:
        """From now on `let_in`, called in the event loop that runs now, says who comes in."""
        self._loop, self._let_in = asyncio.get_running_loop(), let_in

    def leave(self, let_in: LetIn) -> None:
        """That one does so no more."""
        if self._let_in == let_in:
            self._loop = self._let_in = None

    def ask(self, collection: str) -> Admitted | Refusal | None:
        if self._let_in is None or self._loop is not asyncio.get_running_loop():
            return None
        return self._let_in(collection)


ENTRANCE = Entrance()  # of this process: Serve makes the middleware, and the endpoint can't hand it anything


def middlewares() -> list[Middleware]:
    """For Serve: `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.ingress.middlewares` on every node."""
    return [Middleware(UnwatchedSearches)]


class UnwatchedSearches:
    """Lets searches in or refuses them, and marks them so that Serve leaves watching for their client to them."""

    def __init__(self, app: App, entrance: Entrance = ENTRANCE) -> None:
        self._app = app
        self._entrance = entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        collection = searched_collection(scope)
        if collection is None:
            await self._app(scope, receive, send)
            return
        answer = self._entrance.ask(collection)
        if isinstance(answer, Refusal):
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await send({"type": "http.response.body", "body": answer.body})
            return
        scope["headers"] = [*scope["headers"], UNWATCHED]
        if answer is None:
            await self._app(scope, receive, send)
            return
        scope[ADMISSION] = answer
        try:
            await self._app(scope, receive, send)
        finally:
            answer.release()


class CancelledWhenClientLeaves:
    """Cancels the task that runs the `with` block, should that take longer than `WATCH_AFTER_S` and the client leave
    meanwhile. The request's body must have been received."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._watching: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._waiting = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._watching is not None:
            self._watching.cancel()

    def _begin(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        if self._waiting is not None:
            self._waiting.cancel()
