"""Where the boxes of a picture stand: in layers from top to bottom, with few crossings and straight edges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import networkx as nx

from .picture import Box, Picture

CHARACTER = 6.4
"""Width of a character."""

LINE = 15.0
"""Height of a line of text."""

GAP_X = 22.0
"""Between two boxes of a layer."""

_GAP_Y = 34.0
_LANE = 8.0


@dataclass(eq=False)
class Place:
    """A box, or (without one) a point where an edge passes a layer, with its position."""

    box: Box | None
    layer: int
    width: float
    height: float
    bottom: float = 0.0
    """Of its layer."""
    x: float = 0.0
    """Centre."""
    y: float = 0.0
    """Top."""
    above: list[Place] = field(default_factory=list)
    below: list[Place] = field(default_factory=list)


def layout(picture: Picture) -> list[list[Place]]:
    """The boxes in layers, each placed, with the points at which long edges pass the layers between."""
    layers = _order(_layers(picture))
    _set_x(layers)
    y = 0.0
    for layer in layers:
        tallest = max(place.height for place in layer)
        for place in layer:
            place.y, place.bottom = y, y + tallest
            if place.box is None:
                place.height = tallest
        y += tallest + _GAP_Y
    return layers


def _size(box: Box) -> tuple[float, float]:
    rows = [f"{box.title}    {box.shape}", box.module, *box.details]
    width = max(len(row) for row in rows) * CHARACTER + 22
    height = 12 + LINE * (1 + bool(box.module) + len(box.details)) + (16 if box.captured else 0)
    return max(width, 84.0), height


def _layers(picture: Picture) -> list[list[Place]]:
    """Longest-path layers; what no input feeds stands right above its reader; long edges pass through points."""
    graph = nx.DiGraph()
    graph.add_nodes_from(picture.boxes)
    graph.add_edges_from(picture.edges)
    layer_of: dict[Box, int] = {}
    for number, generation in enumerate(nx.topological_generations(graph)):
        layer_of.update(dict.fromkeys(generation, number))
    inputs = {box for box in picture.boxes if box.role == "input" and box.title.startswith("input ")}
    fed = inputs.union(*(nx.descendants(graph, box) for box in inputs))
    for box in reversed(list(nx.topological_sort(graph))):
        if box not in fed and graph.out_degree(box):
            layer_of[box] = min(layer_of[reader] for reader in graph.successors(box)) - 1
    first = min(layer_of.values(), default=0)
    layers: list[list[Place]] = [[] for _ in range(max(layer_of.values(), default=-1) - first + 1)]
    place_of: dict[Box, Place] = {}
    for box in picture.boxes:
        width, height = _size(box)
        place_of[box] = Place(box, layer_of[box] - first, width, height)
        layers[layer_of[box] - first].append(place_of[box])
    for source, reader in picture.edges:
        upper = place_of[source]
        for layer in range(upper.layer + 1, place_of[reader].layer):
            point = _shared_point(upper, layer)
            if point is None:
                point = Place(None, layer, _LANE, 0.0)
                layers[layer].append(point)
                _link(upper, point)
            upper = point
        _link(upper, place_of[reader])
    return layers


def _shared_point(upper: Place, layer: int) -> Place | None:
    """The point that an earlier long edge of the same source already has in `layer`: edges share their way."""
    return next((place for place in upper.below if place.box is None and place.layer == layer), None)


def _link(upper: Place, lower: Place) -> None:
    upper.below.append(lower)
    lower.above.append(upper)


def _order(layers: list[list[Place]]) -> list[list[Place]]:
    """Fewest crossings found by barycentre sweeps."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(12):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            index = {place: number for one in layers for number, place in enumerate(one)}
            weight = {
                place: fmean([index[n] for n in near])
                if (near := place.above if down else place.below)
                else index[place]
                for place in layer
            }
            layer.sort(key=weight.__getitem__)
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
        if not fewest:
            break
    return best


def _crossings(layers: list[list[Place]]) -> int:
    count = 0
    for upper, lower in itertools.pairwise(layers):
        index = {place: number for number, place in enumerate(lower)}
        ends = [sorted(index[reader] for reader in place.below) for place in upper]
        flat = [end for group in ends for end in group]
        count += sum(a > b for a, b in itertools.combinations(flat, 2))
    return count


def _set_x(layers: list[list[Place]]) -> None:
    """Centres near those of the neighbours, in the given order and without overlap."""
    for layer in layers:
        x = 0.0
        for place in layer:
            place.x = x + place.width / 2
            x += place.width + GAP_X
    for sweep in range(24):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            wanted = []
            weights = []
            for place in layer:
                near = (place.above if down else place.below) or (place.below if down else place.above)
                wanted.append(fmean([other.x for other in near]) if near else place.x)
                straight = place.box is None and all(other.box is None for other in near)
                weights.append(8.0 if straight else 2.0 if place.box is None else 1.0)
            _spread(layer, wanted, weights)


def _spread(layer: Sequence[Place], wanted: Sequence[float], weights: Sequence[float]) -> None:
    """The positions nearest to `wanted` (least squares) that keep the order and the gaps: pooled adjacent violators."""
    offset = 0.0
    offsets = []
    for number, place in enumerate(layer):
        if number:
            offset += layer[number - 1].width / 2 + GAP_X + place.width / 2
        offsets.append(offset)
    blocks: list[list[float]] = []  # weight, mean of wanted - offset, members
    for want, weight, shift in zip(wanted, weights, offsets, strict=True):
        blocks.append([weight, want - shift, 1])
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            weight_b, mean_b, count_b = blocks.pop()
            weight_a, mean_a, count_a = blocks.pop()
            both = weight_a + weight_b
            blocks.append([both, (weight_a * mean_a + weight_b * mean_b) / both, count_a + count_b])
    means = [mean for _, mean, count in blocks for _ in range(int(count))]
    for place, mean, shift in zip(layer, means, offsets, strict=True):
        place.x = mean + shift
