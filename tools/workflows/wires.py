"""Leads wires round nodes: where a straight one would run behind a node, by points in the gaps between nodes.

The points are the page's own reroutes. All wires of an output share one trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = dict[str, Any]

TITLE, SLOT = 30, 20
RIM = 8  # of a node, where slots lie: a wire may touch it
CURVE = 0.25  # how far the page's curves reach towards their ends, of the distance
GROWTH = 48  # how much taller some pages draw nodes
NEAR, LANE, FIRST_LANE = 7, 9, 30  # between parallel wires; above a node, where its badge is
LANES_ACROSS, LANES_DOWN = 16, 7
ASIDE = 18  # of the first one beside a node, just outside of its group
LETTER, LETTERS = 13, 36  # of a group's title: width, and height with the margin
LONG = 150  # from here on a wire needs a corner between the levels that it joins

Point = tuple[float, float]


class Box(NamedTuple):
    """A node with its title."""

    left: float
    top: float
    right: float
    bottom: float

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies behind it, its rim aside."""
        return self.left + RIM < x < self.right - RIM and self.top + RIM < y < self.bottom - RIM

    def meets(self, a: Point, b: Point) -> bool:
        """Whether a horizontal or vertical wire crosses it."""
        left, right, top, bottom = *sorted((a[0], b[0])), *sorted((a[1], b[1]))
        return left < self.right and right > self.left and top < self.bottom and bottom > self.top


class Wire(NamedTuple):
    link: int
    source: tuple[int, int]
    start: Point
    end: Point


@dataclass
class Router:
    """The reroutes of one graph, for the page's `extra`.

    Attributes:
        nodes: behind which no wire may run.
        titles: of groups, which no wire that is led round crosses.
    """

    nodes: list[Box]
    titles: list[Box]
    reroutes: list[Json] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)  # a link's reroute before its end
    _used: list[tuple[tuple[int, int], Point, Point]] = field(default_factory=list)

    def lead(self, wire: Wire) -> None:
        if not self._runs_behind(wire.start, wire.end):
            return
        a, b = self._shortest(wire)
        points = [a, b]
        if abs(a[1] - wire.start[1]) > LONG:
            points.insert(0, (a[0], wire.start[1]))
        if abs(b[1] - wire.end[1]) > LONG:
            points.append((b[0], wire.end[1]))
        self._used += [(wire.source, *ends) for ends in ((points[0], a), (a, b), (b, points[-1]))]
        parent = None
        for point in points:
            parent = self._reroute(wire, point, parent)
        assert parent is not None
        self.last[wire.link] = parent

    def _runs_behind(self, a: Point, b: Point) -> bool:
        reach = CURVE * math.dist(a, b)
        xs = (a[0], a[0] + reach, b[0] - reach, b[0])
        ys = (a[1], a[1], b[1], b[1])
        curve = [(_bezier(xs, step / 64), _bezier(ys, step / 64)) for step in range(65)]
        return any(box.holds(x, y) for box in self.nodes for x, y in curve)

    def _shortest(self, wire: Wire) -> tuple[Point, Point]:
        """The corners of the shortest way whose three parts are free."""
        for y in sorted(self._levels(), key=lambda y: abs(y - wire.start[1]) + abs(y - wire.end[1])):
            a = self._corner(wire, wire.start[0] + ASIDE, 1, wire.start[1], y)
            b = self._corner(wire, wire.end[0] - ASIDE, -1, wire.end[1], y)
            if a and b and self._is_free(wire, a, b):
                return a, b
        raise AssertionError(f"no way for {wire}")

    def _levels(self) -> Iterator[float]:
        """Lanes above and below each node and group's title, and above them all."""
        for box in (*self.nodes, *self.titles):
            for lane in range(LANES_DOWN):
                yield box.top - FIRST_LANE - LANE * lane
                yield box.bottom + GROWTH + LANE * lane
        highest = min(box.top for box in self.titles)
        yield from (highest - FIRST_LANE - LANE * lane for lane in range(30))

    def _corner(self, wire: Wire, x: float, way: int, start: float, y: float) -> Point | None:
        for step in range(LANES_ACROSS):
            at = x + way * LANE * step
            if self._is_free(wire, (at, start), (at, y)):
                return at, y
        return None

    def _is_free(self, wire: Wire, a: Point, b: Point) -> bool:
        grown = (box._replace(bottom=box.bottom + GROWTH) for box in self.nodes)
        if any(box.meets(a, b) for box in (*grown, *self.titles)):
            return False
        return not any(source != wire.source and _run_together((a, b), (c, d)) for source, c, d in self._used)

    def _reroute(self, wire: Wire, point: Point, parent: int | None) -> int:
        """The reroute at a point: one that the same output's wires have there, or a new one."""
        for reroute in self.reroutes:
            if reroute["source"] == wire.source and reroute["pos"] == list(point) and reroute["parentId"] == parent:
                break
        else:
            reroute = {"id": len(self.reroutes) + 1, "parentId": parent, "pos": list(point), "linkIds": []}
            self.reroutes.append({**reroute, "source": wire.source})
            reroute = self.reroutes[-1]
        reroute["linkIds"].append(wire.link)
        return reroute["id"]

    def extra(self) -> Json:
        kept = [
            {key: value for key, value in reroute.items() if key != "source" and value is not None}
            for reroute in self.reroutes
        ]
        ends = [{"id": link, "parentId": reroute} for link, reroute in sorted(self.last.items())]
        return {"linkExtensions": ends, "reroutes": kept} if kept else {}


def _bezier(at: tuple[float, ...], t: float) -> float:
    a, b, c, d = at
    return (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d


def _run_together(one: tuple[Point, Point], other: tuple[Point, Point]) -> bool:
    """Whether two horizontal or vertical wires lie so near that they would look like one."""
    for along in (0, 1):
        across = 1 - along
        if one[0][across] == one[1][across] and other[0][across] == other[1][across]:
            (a, b), (c, d) = (sorted(end[along] for end in ends) for ends in (one, other))
            if abs(one[0][across] - other[0][across]) < NEAR and a < d + NEAR and c < b + NEAR:
                return True
    return False


def led_round(
    nodes: list[Json], groups: list[Json], links: list[list[Any]], rows: dict[tuple[int, int], float]
) -> Json:
    """What a workflow's `extra` says of its wires.

    Args:
        rows: how far below its node's top each input lies, by node and slot.
    """
    boxes = {}
    for node in nodes:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = Box(x, y - TITLE, x + width, y + height)
    titles = []
    for group in groups:
        x, y, *_ = group["bounding"]
        titles.append(Box(x, y, x + LETTER * len(group["title"]), y + LETTERS))
    router = Router(list(boxes.values()), titles)
    wires = []
    for number, source, out, target, into, _ in links:
        begins, ends = boxes[source], boxes[target]
        start = (begins.right, begins.top + TITLE + SLOT * (out + 0.7))
        wires.append(Wire(number, (source, out), start, (ends.left, ends.top + TITLE + rows[target, into])))
    for wire in sorted(wires, key=lambda wire: math.dist(wire.start, wire.end)):
        router.lead(wire)
    return router.extra()
