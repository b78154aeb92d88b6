"""Tuning: the cheapest search parameters whose recall@10 is proven against exact truth, for several targets.

Queries are real ones where enough were kept. Else they are made of stored rows that the index has not seen: each gets
noise of the data's own covariance, as strong as the data spread. On WordNet that is about as hard as real sentences
are, for graphs and for lists; rows as they are, jittered or not, are easier, and midpoints of rows harder for graphs
(docs/decisions/0004-adaptive-index.md). A graph is tuned with both: rows as they are say what queries among the rows
need, rows with noise what those far from all rows do (`tune_near_and_far`, docs/decisions/0006-speed.md). An index that
was built on a GPU has seen all rows: it is tuned with real queries or rows with noise, which are none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.config import Metric
from cluster.index_spec import FAR_EF_SEARCH, FAR_SCORE, search_grid
from cluster.segment import OperatingPoint
from cluster.topk import recall_at_k, smaller_is_better

TUNING_K = 10
HELD_OUT_MAX = 1_000
NEAR_SHARES = (0.5, 0.95)  # of the rows, by how far they are from the others: the first are too easy to prove anything,
NEAR_QUERIES_MIN = 20  # those beyond the second count as far
TUNED_SHARE = 0.7  # of the queries; the others validate
STANDARD_TARGETS = (0.90, 0.95, 0.99)
ONE_SIDED_95 = 1.645  # standard normal quantile
LATENCY_SAMPLES = 32
THROUGHPUT_BATCH, THROUGHPUT_REPEATS = 256, 3
ASKED_FIRST = 32  # queries, then as many again as were asked: FAISS's threads share so many evenly
NESTED_KNOBS = {"nprobe", "rerank"}  # with more of one a search compares the same rows, and others
SECOND_KNOB_SLACK = 2  # how much more of the first knob less of the second may cost

Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]
Shares = NDArray[np.float64]
Params = dict[str, float]


class Searcher(Protocol):
    """What is tuned (`SegmentSearcher`)."""

    def search(self, queries: Vectors, width: int, params: Params) -> tuple[Labels, Vectors]: ...


@dataclass(frozen=True)
class TuningSet:
    """Queries (n, d), their exact rows and the scores of these (n, 10); none, (0, 10), of an exact index."""

    queries: Vectors
    truth: Labels
    scores: Vectors

    def of(self, which: NDArray[np.bool_]) -> TuningSet:
        return TuningSet(self.queries[which], self.truth[which], self.scores[which])


@dataclass(frozen=True)
class Knobs:
    """The parameters to walk, and the bounds of their grids."""

    names: tuple[str, ...]
    count: int
    lists: int

    def grid(self, name: str) -> Sequence[int]:
        return search_grid(name, self.count, self.lists)


def held_out_count(count: int) -> int:
    """How many rows to keep out of the index while it is tuned."""
    return min(HELD_OUT_MAX, count // 10)


def tuning_queries(held_out: Vectors, sample: Vectors, metric: Metric, seed: int) -> Vectors:
    """`held_out` (n, d) plus noise that has the covariance of `sample` (m, d); unit length under cosine.

    Noise is a random combination of the centred sample, so no d x d matrix is formed.
    """
    random = np.random.default_rng(seed)
    weights = random.standard_normal((len(held_out), len(sample))).astype(np.float32) / np.float32(np.sqrt(len(sample)))
    queries = held_out + weights @ (sample - sample.mean(axis=0))
    if metric == "cosine":
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        queries = np.where(norms > 1e-6, queries / np.maximum(norms, 1e-6), held_out)
    return np.asarray(queries, dtype=np.float32)


def recall_interval(recalls: NDArray[np.float64]) -> tuple[float, float]:
    """One-sided 95% bounds, lower and upper, of the mean of per-query recalls (normal approximation)."""
    mean = float(recalls.mean())
    if len(recalls) < 2:
        return mean, mean
    half = float(ONE_SIDED_95 * recalls.std(ddof=1) / np.sqrt(len(recalls)))
    return mean - half, mean + half


def tune(
    searcher: Searcher,
    knobs: Knobs,
    asked: TuningSet,
    target_recall: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[OperatingPoint, ...]:
    """Operating points for the collection's own target (first) and the standard ones.

    A target that no parameters reach gets the best ones, `met=False`.
    """
    tuning = _Tuning(searcher, knobs, asked, clock)
    return tuple(tuning.point(target) for target in _targets(target_recall))


def tune_near_and_far(
    searcher: Searcher,
    knobs: Knobs,
    near: TuningSet,
    far: TuningSet,
    metric: Metric,
    target_recall: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[OperatingPoint, ...]:
    """As `tune`, of a graph: `ef_search` is proven with queries like the rows, `near`.

    Queries whose tenth hit then scores worse than `FAR_SCORE` are searched again with `FAR_EF_SEARCH`, whose mean
    recall reaches the target for `far`, which are to be farther than most. How much a query needs depends on how far
    it is from the rows more than on what it is. What is told of a point was measured with all of `near`.
    """
    nearby, far_score = _near_queries(near, metric)
    proving = _Tuning(searcher, knobs, nearby, clock)
    harder = _Tuning(searcher, knobs, far, clock, proven=False)
    told = _Tuning(searcher, knobs, near, clock)
    return tuple(_joined(proving, harder, told, target, far_score) for target in _targets(target_recall))


def tune_with_twin(
    gpu: Searcher,
    cpu: Searcher,
    knobs: Knobs,
    asked: TuningSet,
    target_recall: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[tuple[OperatingPoint, ...], tuple[OperatingPoint, ...]]:
    """As `tune`, of an index on a GPU: (its operating points, what was measured for each of them on its twin).

    The twin of a graph takes `ef_search`, which is tuned on it and becomes a parameter of the operating points. Others
    are measured with the very parameters, if any: float16 codes round more on a CPU, where points lie far from the
    origin. Of an exact index nothing is told.
    """
    points = tune(gpu, knobs, asked, target_recall, clock)
    if "itopk_size" in knobs.names:
        twins = tune(cpu, replace(knobs, names=("ef_search",)), asked, target_recall, clock)
        pairs = zip(points, twins, strict=True)
        return tuple(replace(point, params={**point.params, **twin.params}) for point, twin in pairs), twins
    measuring = _Tuning(cpu, knobs, asked, clock)
    return points, tuple(measuring.told(point) for point in points) if len(asked.truth) else ()


def _joined(nearby: _Tuning, far: _Tuning, told: _Tuning, target: float, far_score: float) -> OperatingPoint:
    params, met = nearby.least(target)
    far_params, far_met = far.least(target)
    if far_params["ef_search"] > params["ef_search"] and isfinite(far_score):
        params = {**params, FAR_EF_SEARCH: far_params["ef_search"], FAR_SCORE: far_score}
    return replace(told.measured(params), target_recall=target, met=met and far_met)


def _near_queries(asked: TuningSet, metric: Metric) -> tuple[TuningSet, float]:
    """(the farther ones of those that are near, the score of the tenth hit beyond which a query is far).

    A target that holds for these holds as well where more queries than rows are at such a distance.
    """
    cost = asked.scores[:, -1] if smaller_is_better(metric) else -asked.scores[:, -1]
    easy, far = np.quantile(cost, NEAR_SHARES, method="lower")
    harder = (cost > easy) & (cost <= far)
    chosen = asked.of(harder) if harder.sum() >= NEAR_QUERIES_MIN else asked
    return chosen, float(far if smaller_is_better(metric) else -far)


def _targets(target_recall: float) -> tuple[float, ...]:
    return (target_recall, *(t for t in STANDARD_TARGETS if t != target_recall))


def _nested(params: Params) -> tuple[float, float]:
    """(lists that are visited, candidates per hit); 0 of what is no knob."""
    return params.get("nprobe", 0.0), params.get("rerank", 0.0)


def _same_but_nested(params: Params, others: Params) -> bool:
    return all(name in NESTED_KNOBS or params[name] == value for name, value in others.items())


class _Recalls:
    """Recall of the queries that were `asked` with some parameters: from `least` to `most`, (n,); 0 to 1 of others."""

    def __init__(self, count: int) -> None:
        self.least, self.most = np.zeros(count), np.ones(count)
        self.asked = np.zeros(count, dtype=bool)

    def learn(self, which: NDArray[np.int64], recalls: Shares) -> None:
        self.least[which] = self.most[which] = recalls
        self.asked[which] = True


class _Tuning:
    """Measurements of one index, each made once."""

    def __init__(
        self, searcher: Searcher, knobs: Knobs, asked: TuningSet, clock: Callable[[], float], *, proven: bool = True
    ) -> None:
        self._searcher = searcher
        self._knobs = knobs
        self._queries = asked.queries
        self._truth = asked.truth
        self._clock = clock
        self._proven = proven  # by the lower end of the interval; else the mean is enough
        self._tuned = max(1, round(len(self._queries) * TUNED_SHARE))
        # cuVS searches a graph by another kernel where many are asked at once, which costs a GPU little: all then
        self._first = len(self._queries) if "itopk_size" in knobs.names else ASKED_FIRST
        self._known: dict[tuple[tuple[str, float], ...], _Recalls] = {}
        self._lacked = np.zeros(len(self._queries))  # of its truth, by each query, over all that was asked
        self._speeds: dict[tuple[tuple[str, float], ...], float] = {}
        self._measured: dict[tuple[tuple[str, float], ...], OperatingPoint] = {}

    def point(self, target: float) -> OperatingPoint:
        """The fastest parameters that are proven to reach the target, else the ones with the best recall."""
        params, met = self.least(target)
        return replace(self.measured(params), target_recall=target, met=met)

    def told(self, point: OperatingPoint) -> OperatingPoint:
        """What is measured here for the parameters of a point that was tuned elsewhere."""
        measured = self.measured(point.params)
        met = self._reaches(point.params, point.target_recall)
        return replace(measured, target_recall=point.target_recall, met=met)

    def least(self, target: float) -> tuple[Params, bool]:
        """(parameters, whether they reach the target) of `point`; timed only where there is a choice.

        All queries were asked with them: what seemed to reach the target and does not then, does not count again.
        """
        while True:
            params, met = self._found(target)
            asked = self._known_of(params).asked.all()
            self._recall(params)
            if asked or (met and self._reaches(params, target)):
                return params, met

    def _found(self, target: float) -> tuple[Params, bool]:
        """As `least`, by what is known so far of the queries that were not asked."""
        if not self._knobs.names:
            return {}, self._reaches({}, target)
        reaching = [params for params in self._cheapest(target) if self._reaches(params, target)]
        if len(reaching) > 1:
            return max(reaching, key=self._queries_per_s), True
        if reaching:
            return reaching[0], True
        best, _ = max(self._known.items(), key=lambda item: float(item[1].most.mean()))
        return dict(best), False

    def _cheapest(self, target: float) -> list[Params]:
        """The least value of the first knob that reaches the target, for each value of the second worth trying."""
        first = self._knobs.names[0]
        grid = self._knobs.grid(first)
        if len(self._knobs.names) == 1:
            return [{first: self._least(first, grid, target, {})}]
        second = self._knobs.names[1]
        *values, enough, most = self._knobs.grid(second)
        fewest = self._least(first, grid, target, {second: enough})  # no less of the second needs fewer of the first
        found: list[Params] = [{first: fewest, second: enough}]
        if not self._reaches(found[0], target):
            return [{first: self._least(first, grid, target, {second: most}), second: most}]
        near = [value for value in grid if fewest <= value <= SECOND_KNOB_SLACK * fewest]
        for value in values:
            others: Params = {second: value}
            least = self._least(first, near, target, others)
            found.append({first: least, **others})
            if least == fewest:
                break  # more of the second knob saves nothing of the first
        return found

    def _least(self, name: str, grid: Sequence[int], target: float, others: Params) -> float:
        """Gallops up the grid from its cheap end, then bisects; the last value where none reaches the target."""
        low, high, step = -1, 0, 1
        while not self._reaches({name: grid[high], **others}, target):
            if high == len(grid) - 1:
                return grid[high]
            low, high, step = high, min(len(grid) - 1, high + step), step * 2
        while high - low > 1:
            middle = (low + high) // 2
            if self._reaches({name: grid[middle], **others}, target):
                high = middle
            else:
                low = middle
        return grid[high]

    def _reaches(self, params: Params, target: float) -> bool:
        """By all queries together, and not refuted by those that validate alone.

        Asks no more queries than it takes to know, those first that lack most elsewhere. Most of what is tried misses
        the target, and searches longest: a tenth of the queries shows that, where the others cannot make up for it.
        """
        if not len(self._truth):
            return True
        known = self._known_of(params)
        while True:
            least, most = self._bounds(params)
            if float(most.mean()) < target:
                return False
            if self._proves(least, target):
                return True
            left = np.flatnonzero(least < most)
            if not len(left):
                return False
            hardest = left[np.argsort(-self._lacked[left], kind="stable")]
            self._ask(params, np.sort(hardest[: max(self._first, int(known.asked.sum()))]))

    def _proves(self, recalls: Shares, target: float) -> bool:
        validating = recalls[self._tuned :]
        refuted = len(validating) > 0 and recall_interval(validating)[1] < target
        reached = recall_interval(recalls)[0] if self._proven else float(recalls.mean())
        return reached >= target and not refuted

    def _recall(self, params: Params) -> Shares:
        """Of each query; those that were not asked yet are."""
        if not len(self._truth):
            return np.ones(len(self._queries))
        known = self._known_of(params)
        self._ask(params, np.flatnonzero(~known.asked))
        return known.least

    def _ask(self, params: Params, which: NDArray[np.int64]) -> None:
        if len(which):
            found, _ = self._searcher.search(self._queries[which], TUNING_K, params)
            recalls = recall_at_k(found, self._truth[which])
            self._known_of(params).learn(which, recalls)
            self._lacked[which] += 1.0 - recalls

    def _known_of(self, params: Params) -> _Recalls:
        return self._known.setdefault(tuple(params.items()), _Recalls(len(self._queries)))

    def _bounds(self, params: Params) -> tuple[Shares, Shares]:
        """The least and the most that each query finds, (n,), by all that was asked so far.

        Of the same lists more candidates for the exact scores include the fewer. More lists include the fewer as well,
        but by their codes some rows may come before true ones. Not so of a query that finds all ten in fewer lists,
        and in more lists with no more candidates. Of a query that was asked only that counts: where rows have the same
        codes, more candidates may be others.
        """
        known = self._known_of(params)
        least, most = known.least.copy(), known.most.copy()
        in_fewer, in_more = np.zeros((2, len(least)), dtype=bool)
        lists, candidates = _nested(params)
        for key, other in self._known.items():
            if not _same_but_nested(dict(key), params):
                continue
            its_lists, its_candidates = _nested(dict(key))
            if its_lists == lists and its_candidates <= candidates:
                np.maximum(least, other.least, out=least)
            if its_lists == lists and its_candidates >= candidates:
                np.minimum(most, other.most, out=most)
            if its_lists <= lists:
                in_fewer |= other.least == 1.0
            if its_lists >= lists and its_candidates <= candidates:
                in_more |= other.least == 1.0
        least[in_fewer & in_more] = 1.0
        return np.where(known.asked, known.least, least), np.where(known.asked, known.most, most)

    def measured(self, params: Params) -> OperatingPoint:
        """Recall and speed of parameters, as an operating point of no target."""
        key = tuple(params.items())
        if key not in self._measured:
            recalls = self._recall(params)
            latency_ms, queries_per_s = self._latency_ms(params), self._queries_per_s(params)
            low, _ = recall_interval(recalls)
            mean = float(recalls.mean())
            self._measured[key] = OperatingPoint(0.0, params, mean, low, latency_ms, False, queries_per_s)
        return self._measured[key]

    def _latency_ms(self, params: Params) -> float:
        """Median time of one single-query search, in milliseconds."""
        return 1e3 * self._median_s([query[None, :] for query in self._queries[:LATENCY_SAMPLES]], params)

    def _queries_per_s(self, params: Params) -> float:
        key = tuple(params.items())
        if key not in self._speeds:
            batch = self._queries[:THROUGHPUT_BATCH]
            self._speeds[key] = len(batch) / max(1e-9, self._median_s([batch] * THROUGHPUT_REPEATS, params))
        return self._speeds[key]

    def _median_s(self, batches: list[Vectors], params: Params) -> float:
        times = []
        for batch in batches:
            start = self._clock()
            self._searcher.search(batch, TUNING_K, params)
            times.append(self._clock() - start)
        return float(np.median(times)) if times else 0.0
