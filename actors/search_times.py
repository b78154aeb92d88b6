"""How long searches of a form take, by the last of each: what is short is done where it was asked for."""

from __future__ import annotations

from math import inf

from cluster.query import SearchGroup, ShardSearch

FORMS_MAX = 64
Form = tuple[object, ...]


class SearchTimes:
    """Vectors and seconds of the last search, by what decides the time besides the vectors: k, parameters and columns.

    More vectors take longer in proportion, fewer take as long at most: where all rows are read, one costs nearly what
    a hundred do.
    """

    def __init__(self) -> None:
        self._last: dict[Form, tuple[int, float]] = {}

    def predicted_s(self, request: ShardSearch) -> float:
        """What the request will take at most; infinite where none of its form was measured yet."""
        return sum(map(self._group_s, request.groups))

    def _group_s(self, group: SearchGroup) -> float:
        vectors, seconds = self._last.get(_form(group), (1, inf))
        return seconds * max(1.0, (group.stop - group.start) / vectors)

    def took(self, request: ShardSearch, seconds: float) -> None:
        """Remember a measured one. Of several groups in one nobody knows which took how long: if they took longer than
        was predicted, each of them is expected to do so again."""
        if len(request.groups) == 1 and len(request.vectors):
            if len(self._last) >= FORMS_MAX:
                self._last.clear()
            self._last[_form(request.groups[0])] = len(request.vectors), seconds
        elif 0.0 < (predicted_s := self.predicted_s(request)) < seconds:
            for form in set(map(_form, request.groups)):
                vectors, last_s = self._last.get(form, (1, inf))
                self._last[form] = vectors, last_s * seconds / predicted_s


def _form(group: SearchGroup) -> Form:
    return (group.k, group.params, group.columns)
