"""One graph each, some of whose nodes have a class to learn from: karate, sbm, Cora."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ...passes.errors import DataError
from .dataset import Dataset

IGNORED = -100
"""The target of a node outside the split: the ``ignore_index`` of torch's cross-entropy."""


def graph_dataset(
    name: str, x: Tensor, edge_index: Tensor, classes: Tensor, train: Tensor, test: Tensor, *, source: str
) -> Dataset:
    """A `Dataset` of one whole graph.

    Args:
        name: Its name in `DATASETS`.
        x: Features, float32 ``(nodes, features)``.
        edge_index: int64 ``(2, edges)``, from and to; an undirected edge twice.
        classes: int64 ``(nodes,)``.
        train: Which nodes' classes are learned from, bool ``(nodes,)``.
        test: Which are tested on.
        source: As `Dataset.source`.

    Raises:
        DataError: a split has no node, or both have one in common.
    """
    if not bool(train.any()) or not bool(test.any()) or bool((train & test).any()):
        raise DataError(
            f"data set {name!r}: the split has {int(train.sum())} nodes to learn from, {int(test.sum())} to test on, "
            f"{int((train & test).sum())} of them in both; it needs some of each and none in both."
        )
    return Dataset(
        name=name,
        train=TensorDataset(x, torch.where(train, classes, IGNORED)),
        test=TensorDataset(x, torch.where(test, classes, IGNORED)),
        input_shape=(x.shape[1],),
        num_classes=int(classes.max()) + 1,
        source=source,
        edge_index=edge_index,
    )


def load_karate(seed: int, root: Path | None) -> Dataset:
    """Zachary's karate club: who of 34 members stays with whom when it splits in two; `root` is not needed.

    Each node's features are the one-hot of its number, as Kipf & Welling have it. Known are the instructor and the
    president (nodes 0 and 33) and one more of each side, drawn by `seed`; the other 30 are the test.
    """
    import networkx

    graph = networkx.karate_club_graph()
    clubs = [graph.nodes[node]["club"] for node in graph]
    classes = torch.tensor([int(club != clubs[0]) for club in clubs])
    train = torch.zeros(len(classes), dtype=torch.bool)
    train[[0, 33]] = True
    train |= _drawn(classes, 1, seed, ~train)
    return graph_dataset(
        "karate",
        torch.eye(len(classes)),
        _edge_index(list(graph.edges)),
        classes,
        train,
        ~train,
        source="networkx's karate_club_graph (Zachary 1977): 34 members, and the club each joined after the split; "
        f"4 are known (both leaders, and one more a club by seed {seed}); features are one-hot.",
    )


SBM_CLASSES, SBM_SIZE, SBM_INSIDE, SBM_BETWEEN = 4, 60, 0.08, 0.015
"""Classes, nodes in each, and the probability of an edge inside a class and between two."""
SBM_FEATURES, SBM_SHIFT, SBM_KNOWN = 16, 0.35, 10
"""Features of a node, the standard deviation of a class's mean beside 1 of its nodes, and known nodes a class."""


def load_sbm(seed: int, root: Path | None) -> Dataset:
    """A stochastic block model (Holland et al. 1983), synthetic; `seed` decides it all, and `root` is not needed.

    Four classes of 60 nodes, joined with probability 0.08 inside and 0.015 between classes; 16 features are the class's
    mean, small beside the normal noise around it. Neither features nor edges tell a class alone: a logistic regression
    of the features reaches 0.48 of the test, a 2-layer GCN by backpropagation over 0.8. 10 nodes a class are known.
    """
    import networkx

    random = np.random.default_rng(seed)
    between = np.full((SBM_CLASSES, SBM_CLASSES), SBM_BETWEEN) + np.eye(SBM_CLASSES) * (SBM_INSIDE - SBM_BETWEEN)
    graph = networkx.stochastic_block_model([SBM_SIZE] * SBM_CLASSES, between.tolist(), seed=seed)
    classes = torch.arange(SBM_CLASSES).repeat_interleave(SBM_SIZE)
    means = random.standard_normal((SBM_CLASSES, SBM_FEATURES)) * SBM_SHIFT
    x = means[classes.numpy()] + random.standard_normal((len(classes), SBM_FEATURES))
    train = _drawn(classes, SBM_KNOWN, seed, torch.ones_like(classes, dtype=torch.bool))
    return graph_dataset(
        "sbm",
        torch.from_numpy(x.astype(np.float32)),
        _edge_index(list(graph.edges)),
        classes,
        train,
        ~train,
        source=f"synthetic: networkx's stochastic_block_model of {SBM_CLASSES} classes of {SBM_SIZE} nodes, normal "
        f"features (seed {seed}); {SBM_KNOWN} nodes a class are known, all others are the test.",
    )


def load_cora(seed: int, root: Path | None) -> Dataset:
    """Cora (Sen et al. 2008) with its public split (Yang et al. 2016), by the library `torch_geometric`.

    2,708 papers, 1,433 words normalised to a sum of 1, seven classes, 20 known papers in each, 1,000 in the test. It is
    downloaded to `root`, by default ``~/.cache/onward``. It has a split of its own, so the seed is not used.
    """
    try:
        from torch_geometric.datasets import Planetoid
    except ImportError as error:
        raise DataError(
            f"data set 'cora' needs the library 'torch_geometric', which cannot be imported ({error}). Install it: "
            "pip install 'onward[graphs]'. The data sets 'karate' and 'sbm' do not need it."
        ) from error
    folder = root or Path.home() / ".cache" / "onward"
    try:
        graph = Planetoid(str(folder), "Cora", split="public")[0]
    except Exception as error:  # the library lets through those of the network, of the file system and of unpickling
        raise DataError(
            f"data set 'cora' could not be loaded: {type(error).__name__}: {error}. Without a network its files "
            f"(ind.cora.* of github.com/kimiyoung/planetoid) must be in {folder / 'Cora' / 'raw'}. The data set "
            "'karate' ships with networkx and needs none."
        ) from error
    words = graph.x / graph.x.sum(1, keepdim=True).clamp(min=1)
    source = "Cora (Sen et al. 2008) with the public split of Planetoid (Yang et al. 2016), by torch_geometric."
    return graph_dataset("cora", words, graph.edge_index, graph.y, graph.train_mask, graph.test_mask, source=source)


def _edge_index(edges: list[tuple[int, int]]) -> Tensor:
    """Both directions of undirected edges, int64 ``(2, 2 * edges)``."""
    one = torch.tensor(edges, dtype=torch.int64).T
    return torch.cat([one, one.flip(0)], 1)


def _drawn(classes: Tensor, count: int, seed: int, among: Tensor) -> Tensor:
    """So many nodes of each class, drawn by `seed` among some, as a mask."""
    random = np.random.default_rng(seed)
    mask = torch.zeros_like(among)
    for number in range(int(classes.max()) + 1):
        nodes = ((classes == number) & among).nonzero().flatten().numpy()
        mask[random.choice(nodes, count, replace=False)] = True
    return mask
