"""The PBQP solver against brute force, an exact MILP, and on instances the size of real networks."""

from __future__ import annotations

import numpy as np
import pytest
from clock import Clock
from exact import Edges, Nodes, brute_force, check, exact_milp
from hypothesis import given, settings
from hypothesis import strategies as st

from convselect.selection import Solution, solve

pytestmark = pytest.mark.usefixtures("solver_clock")


def random_instance(
    rng: np.random.Generator, n: int, density: float, *, options: int = 4, forbidden: float = 0.0, integer: bool = False
) -> tuple[Nodes, Edges]:
    """Edges in either direction, sometimes both; costs of both signs."""

    def costs(*shape: int) -> np.ndarray:
        values = rng.integers(-3, 4, shape).astype(float) if integer else rng.normal(size=shape)
        values[rng.random(shape) < forbidden] = np.inf
        return values

    sizes = rng.integers(1, options + 1, n)
    edges = {
        (i, j): costs(sizes[i], sizes[j]) for i in range(n) for j in range(n) if i != j and rng.random() < density / 2
    }
    return [costs(k) for k in sizes], edges


def layout_change(scale: float, k: int = 2) -> np.ndarray:
    return scale * (1.0 - np.eye(k))


def densenet(
    rng: np.random.Generator, *, options: int, blocks: tuple[int, ...] = (6, 12, 24, 16)
) -> tuple[Nodes, Edges]:
    """DenseNet-121 with concatenations, convolutions and batch norms as nodes.

    A convolution has `options` primitives, each in one of two layouts; the others have the two layouts. A change of
    layout on the way to a concatenation costs something like the differences between the primitives.
    """
    nodes: Nodes = []
    edges: Edges = {}
    layouts = np.arange(options) % 2

    def conv() -> int:
        nodes.append(rng.uniform(0.3, 1.5, options))
        return len(nodes) - 1

    def operator() -> int:
        nodes.append(rng.uniform(0.0, 0.4, 2))
        return len(nodes) - 1

    def connect(i: int, j: int, ms: float) -> None:
        change = layout_change(ms)
        left = layouts if len(nodes[i]) == options else np.arange(2)
        right = layouts if len(nodes[j]) == options else np.arange(2)
        edges[i, j] = change[np.ix_(left, right)]

    tensor = conv()
    for layers in blocks:
        features = [tensor]
        for _ in range(layers):
            cat, norm, bottleneck, growth = operator(), operator(), conv(), conv()
            for number, feature in enumerate(features):
                connect(feature, cat, rng.uniform(0.01, 0.06) * (4 if number == 0 else 1))
            for a, b in ((cat, norm), (norm, bottleneck), (bottleneck, growth)):
                connect(a, b, rng.uniform(0.05, 0.3))
            features.append(growth)
        cat, tensor = operator(), conv()
        for feature in features:
            connect(feature, cat, rng.uniform(0.01, 0.06))
        connect(cat, tensor, 0.2)
    return nodes, edges


@pytest.mark.parametrize("forbidden", [0.0, 0.15])
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("density", [0.15, 0.5, 1.0])
def test_equals_brute_force(density: float, integer: bool, forbidden: float) -> None:
    rng = np.random.default_rng([int(density * 100), integer, int(forbidden * 100)])
    solved = 0
    for _ in range(60):
        nodes, edges = random_instance(rng, int(rng.integers(1, 8)), density, forbidden=forbidden, integer=integer)
        optimum = brute_force(nodes, edges)
        if np.isinf(optimum):
            with pytest.raises(ValueError, match="infeasible"):
                solve(nodes, edges, budget_s=10)
            continue
        solved += 1
        check(nodes, edges, solve(nodes, edges, budget_s=10), optimum)
    assert solved >= 20


@pytest.mark.parametrize("seed", range(6))
def test_equals_milp(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes, edges = random_instance(rng, 18, 0.3, options=3)
    check(nodes, edges, solve(nodes, edges, budget_s=30), exact_milp(nodes, edges))


def test_small_densenet_equals_milp() -> None:
    nodes, edges = densenet(np.random.default_rng(1), options=4, blocks=(6, 8))
    check(nodes, edges, solve(nodes, edges, budget_s=10), exact_milp(nodes, edges))


@pytest.mark.parametrize("seed", range(3))
def test_densenet121_takes_little_search(seed: int, solver_clock: Clock) -> None:
    """In looks at the clock, one for each sweep over all nodes and each step of the search."""
    nodes, edges = densenet(np.random.default_rng(seed), options=20)
    start = solver_clock.now_s
    solution = solve(nodes, edges, budget_s=10)
    assert solution.lower_bound == solution.cost
    assert solver_clock.now_s - start < 60 * solver_clock.look_s


@pytest.mark.parametrize("options", [2, 20])
def test_long_chain(options: int) -> None:
    rng = np.random.default_rng(0)
    n = 1000
    nodes = [rng.random(options) for _ in range(n)]
    edges = {(i, i + 1): rng.random((options, options)) for i in range(n - 1)}
    best = nodes[0]
    for i in range(n - 1):
        best = (best[:, None] + edges[i, i + 1]).min(axis=0) + nodes[i + 1]
    solution = solve(nodes, edges, budget_s=0.0)
    check(nodes, edges, solution, float(best.min()))


def test_trees_and_series_parallel_graphs_need_no_search() -> None:
    rng = np.random.default_rng(3)
    n = 60
    edges: Edges = {}
    for node in range(1, n):  # each node joins an edge of the graph so far, or a node of it: treewidth 2
        parent = int(rng.integers(node))
        edges[parent, node] = rng.normal(size=(3, 3))
        others = [pair for pair in edges if parent in pair and node not in pair]
        if others and rng.random() < 0.7:
            a, b = others[int(rng.integers(len(others)))]
            edges[node, a if b == parent else b] = rng.normal(size=(3, 3))
    nodes = [rng.normal(size=3) for _ in range(n)]
    check(nodes, edges, solve(nodes, edges, budget_s=0.0), exact_milp(nodes, edges))


def test_disconnected_parts_and_multi_edges() -> None:
    nodes = [np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([5.0, 2.0]), np.array([0.0, 0.0])]
    edges = {
        (0, 1): np.array([[3.0, 0.0], [0.0, 3.0]]),
        (1, 0): np.array([[0.0, 5.0], [0.0, 0.0]]),
        (3, 3): np.array([[7.0, 0.0], [0.0, 4.0]]),
    }
    solution = solve(nodes, edges)
    assert solution.choices == [0, 1, 1, 1]
    assert solution.cost == solution.lower_bound == 7.0


def test_out_of_time_gives_a_solution_and_a_valid_bound(solver_clock: Clock) -> None:
    rng = np.random.default_rng(5)
    nodes, edges = random_instance(rng, 14, 1.0, options=3)
    optimum = exact_milp(nodes, edges)
    check(nodes, edges, solve(nodes, edges, budget_s=0.0), optimum, exact=False)
    nodes, edges = random_instance(rng, 60, 0.6)
    solver_clock.look_s, start = 1e-3, solver_clock.now_s
    solution = solve(nodes, edges, budget_s=0.02)
    assert solver_clock.now_s - start < 0.03
    assert solution.lower_bound < solution.cost


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 14),
    density=st.sampled_from([0.2, 0.5, 1.0]),
    forbidden=st.sampled_from([0.0, 0.1]),
    integer=st.booleans(),
    budget_s=st.sampled_from([0.0, 10.0]),
)
def test_the_optimum_lies_between_bound_and_cost(
    seed: int, n: int, density: float, forbidden: float, integer: bool, budget_s: float
) -> None:
    """Also where the search stops at once; the cost is what the choices sum to."""
    rng = np.random.default_rng(seed)
    nodes, edges = random_instance(rng, n, density, options=3, forbidden=forbidden, integer=integer)
    optimum = exact_milp(nodes, edges)
    if np.isinf(optimum):
        with pytest.raises(ValueError, match="infeasible"):
            solve(nodes, edges, budget_s=budget_s)
    else:
        check(nodes, edges, solve(nodes, edges, budget_s=budget_s), optimum, exact=budget_s > 0)


def test_forbidden_everywhere_is_infeasible() -> None:
    with pytest.raises(ValueError, match="infeasible"):
        solve([[np.inf, np.inf]], {})
    unequal = np.where(np.eye(2), np.inf, 0.0)
    with pytest.raises(ValueError, match="infeasible"):  # an odd cycle has no two-colouring
        solve([[0.0, 0.0]] * 3, {(0, 1): unequal, (1, 2): unequal, (0, 2): unequal})
    five = {(i, j): unequal for i in range(5) for j in range(i)}
    with pytest.raises(ValueError, match="infeasible"):
        solve([[0.0, 0.0]] * 5, five, budget_s=0.0)
    three = {(i, j): np.where(np.eye(3), np.inf, 0.0) for i in range(6) for j in range(i)}
    with pytest.raises(ValueError, match="infeasible"):
        solve([[0.0, 0.0, 0.0]] * 6, three)


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        ([[]], {}, "node 0"),
        ([[[1.0]]], {}, "node 0"),
        ([[np.nan]], {}, "nan"),
        ([[-np.inf]], {}, "-inf"),
        ([[1.0]], {(0, 1): [[1.0]]}, "not there"),
        ([[1.0], [1.0]], {(0, 1): [[1.0, 2.0]]}, "shape"),
    ],
)
def test_malformed_input(nodes: list[object], edges: dict[tuple[int, int], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(nodes, edges)  # type: ignore[arg-type]


def test_empty_instance() -> None:
    assert solve([], {}) == Solution([], 0.0, 0.0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_never_beaten_by_any_choice(data: st.DataObject) -> None:
    value = st.one_of(st.integers(-4, 4).map(float), st.floats(-10, 10, width=32), st.just(float("inf")))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    nodes = [np.array(data.draw(st.lists(value, min_size=k, max_size=k))) for k in sizes]
    pairs = data.draw(st.sets(st.tuples(*[st.integers(0, len(sizes) - 1)] * 2)))
    edges = {}
    for i, j in sorted(pairs):
        size = sizes[i] * sizes[j]
        edges[i, j] = np.array(data.draw(st.lists(value, min_size=size, max_size=size))).reshape(sizes[i], sizes[j])
    optimum = brute_force(nodes, edges)
    if np.isinf(optimum):
        with pytest.raises(ValueError, match="infeasible"):
            solve(nodes, edges)
    else:
        check(nodes, edges, solve(nodes, edges, budget_s=5), optimum)
