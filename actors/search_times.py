"""How long searches of a form take, by the last of each: what is short is done where it was asked for."""

from __future__ import annotations

from math import inf

from cluster.query import SearchGroup, ShardSearch

FORMS_MAX = 64
Form = tuple[object, ...]


class SearchTimes:
    """Seconds per vector, by what decides them besides the vectors: k, parameters and columns."""

    def __init__(self) -> None:
        self._seconds: dict[Form, float] = {}

    def predicted_s(self, request: ShardSearch) -> float:
        """What the request will take; infinite where none of its form was measured yet."""
        return sum((g.stop - g.start) * self._seconds.get(_form(g), inf) for g in request.groups)

    def took(self, request: ShardSearch, seconds: float) -> None:
        """Remember a measured one. Of several groups in one nobody knows which took how long: it is left out."""
        if len(request.groups) == 1 and len(request.vectors):
            if len(self._seconds) >= FORMS_MAX:
                self._seconds.clear()
            self._seconds[_form(request.groups[0])] = seconds / len(request.vectors)


def _form(group: SearchGroup) -> Form:
    return (group.k, group.params, group.columns)
