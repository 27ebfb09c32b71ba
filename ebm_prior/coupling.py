r"""Symbol-vector coupling: labels in the energies of chosen layers (paper, Section 3.3, App. A.2).

A coupled layer's network gives one value per class. With S the layers of an attribute and y its
class,

.. math::
    F[y] = \sum_{i \in S} f_i[y] + \sum_{i \notin S} f_i, \qquad
    \hat F = \log\sum_y e^{F[y]}, \qquad p(y | u_0) = \text{softmax}_y \sum_{i \in S} f_i[y]

Large F[y] = y plausible. Several attributes on disjoint sets of layers add up, each with its own
log-sum-exp where it is not specified (contract, conditional.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attribute:
    """What is labelled, how many classes it has, and the layers (0 = top) that know it."""

    name: str
    classes: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def check_class(self, value: int) -> None:
        """Refuse the number of a class that there is not."""
        if not 0 <= value < self.classes:
            raise ValueError(
                f"class {value} of attribute {self.name!r}: expected 0 to {self.classes - 1}"
            )


def checked(attributes: Iterable[Attribute], num_layers: int) -> tuple[Attribute, ...]:
    """The attributes, if a hierarchy of `num_layers` layers can hold them.

    Raises:
        ValueError: unknown or shared layers, no classes, a name twice.
    """
    found = tuple(attributes)
    taken: dict[int, str] = {}
    for attribute in found:
        name = attribute.name
        if type(attribute.classes) is not int or not 1 <= attribute.classes <= 10**5:
            raise ValueError(
                f"attribute {name!r:.40} has {attribute.classes!r:.40} classes, expected a whole"
                " number from 1 to 100000"
            )
        if not attribute.layers:
            raise ValueError(f"attribute {name!r:.40} has no layers; couple at least one")
        for layer in attribute.layers:
            if type(layer) is not int or not 0 <= layer < num_layers:
                raise ValueError(
                    f"attribute {name!r:.40} is at layer {layer!r:.40}; this hierarchy has layers"
                    f" 0 (top) to {num_layers - 1}"
                )
            if layer in taken:
                raise ValueError(
                    f"layer {layer} is coupled to {taken[layer]!r:.40} and {name!r:.40}; different"
                    " attributes need different layers"
                )
            taken[layer] = name
    if len({attribute.name for attribute in found}) < len(found):
        raise ValueError(f"attributes {[a.name for a in found]!r:.200}: a name occurs twice")
    return found


class Coupling:
    """How the columns that the networks give make the layers' f and the classes' logits.

    Args:
        attributes: in the order of the labels' columns.
        per_layer: every coupled layer is a classifier of its own, with its own log-sum-exp, in
            place of one classifier per attribute.
    """

    def __init__(
        self, num_layers: int, attributes: Sequence[Attribute] = (), per_layer: bool = False
    ) -> None:
        self.attributes = checked(attributes, num_layers)
        classes = {layer: a.classes for a in self.attributes for layer in a.layers}
        self.widths = tuple(classes.get(i, 1) for i in range(num_layers))
        # (column of the labels, layers that vote together)
        self.voters: list[tuple[int, tuple[int, ...]]] = [
            (number, layers)
            for number, a in enumerate(self.attributes)
            for layers in ([(i,) for i in a.layers] if per_layer else [a.layers])
        ]

    def total(
        self, columns: Tensor, labels: Tensor | None = None, guidance: float = 1.0
    ) -> Tensor:
        r"""(B, columns) -> (B, L) whose sum over layers is F[y], or F^ where y is not given.

        Voters' joint term stands in the column of their first layer, zeros in the others':
        F^ + g log softmax_y, which for g = 1 is F[y].

        Args:
            labels: (B, attributes) class numbers, -1 = not specified; None: none is.
            guidance: g.
        """
        if not self.attributes:
            return columns
        parts = list(columns.split(self.widths, dim=1))
        for number, layers in self.voters:
            votes = sum_of([parts[i] for i in layers])
            value = votes.logsumexp(1, keepdim=True)
            if labels is not None:
                value = value + guidance * _log_probability(votes, labels[:, number])
            for layer in layers:
                parts[layer] = torch.zeros_like(value)
            parts[layers[0]] = value
        return torch.cat(parts, dim=1)

    def own(self, columns: Tensor) -> Tensor:
        """(B, L): each layer alone, a coupled one as the log-sum-exp over its classes."""
        if not self.attributes:
            return columns
        parts = columns.split(self.widths, dim=1)
        return torch.cat([part.logsumexp(1, keepdim=True) for part in parts], dim=1)

    def logits(self, columns: Tensor) -> list[Tensor]:
        """Per attribute (B, classes): logits of p(y | u_0), normalised if voters are several."""
        parts = columns.split(self.widths, dim=1)
        found: list[list[Tensor]] = [[] for _ in self.attributes]
        for number, layers in self.voters:
            found[number].append(sum_of([parts[i] for i in layers]))
        return [
            votes[0] if len(votes) == 1 else sum_of([v.log_softmax(1) for v in votes])
            for votes in found
        ]

    def cross_entropy(self, columns: Tensor, labels: Tensor) -> Tensor:
        """(B, L): -log p(y | u_0) in the column of the voters' first layer; 0 where unlabelled."""
        parts = columns.split(self.widths, dim=1)
        result = [torch.zeros_like(columns[:, :1]) for _ in parts]
        for number, layers in self.voters:
            votes = sum_of([parts[i] for i in layers])
            result[layers[0]] = -_log_probability(votes, labels[:, number])
        return torch.cat(result, dim=1)

    def check_labels(self, labels: Tensor, count: int) -> None:
        """Refuse labels of another shape or type; values are not looked at (the device waits)."""
        expected = (count, len(self.attributes))
        if not self.attributes:
            raise ValueError(
                "got labels for a prior without attributes; train one with --attribute"
            )
        if tuple(labels.shape) != expected or labels.is_floating_point():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}, expected"
                f" {expected} whole numbers: one column per attribute, -1 = not specified"
            )

    def check_classes(self, labels: Tensor) -> None:
        """Refuse labels beyond -1 and the classes; looks at values, so once before a chain."""
        for column, attribute in zip(labels.T, self.attributes, strict=True):
            for value in column[column != -1].unique().tolist():
                attribute.check_class(value)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum from the first on, without a leading zero: one part stays what it is."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _log_probability(votes: Tensor, y: Tensor) -> Tensor:
    """(B, 1): log softmax at y, 0 where y is -1."""
    picked = votes.log_softmax(1).gather(1, y.clamp_min(0).unsqueeze(1))
    return torch.where(y.unsqueeze(1) >= 0, picked, torch.zeros_like(picked))
