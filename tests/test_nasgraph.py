"NASGraph: closed forms and the converter against loops, the NB201 graph against an independent wiring, real models, bad input, the `full` path."
import csv
import math
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, spearmanr
from torch import nn

from researchkit.core.errors import DataError
from researchkit.efficiency import nasgraph as ng

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
archs = st.lists(st.integers(0, 4), min_size=6, max_size=6).map(ng.format_arch)


# ---------------------------------------------------------------- one operation

@given(size=st.integers(1, 12), kernel=st.integers(1, 5), stride=st.integers(1, 4), padding=st.integers(0, 4), dilation=st.integers(1, 3))
@settings(max_examples=80)
def test_border_classes(size, kernel, stride, padding, dilation):
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if count < 1:
        with pytest.raises(ValueError, match="does not fit"):
            ng.border_classes(size, kernel, stride, padding, dilation)
        return
    taps, counts = ng.border_classes(size, kernel, stride, padding, dilation)
    seen = [tuple(float(0 <= r * stride - padding + t * dilation < size) for t in range(kernel)) for r in range(count)]
    assert {tuple(t.tolist()): int(n) for t, n in zip(taps, counts)} == {s: seen.count(s) for s in seen}


def loops(module, channels, shape, relu):
    "The definition: one input channel, one output channel at a time."
    found = []
    for i in range(channels):
        x = torch.zeros(1, channels, *shape, dtype=torch.float64)
        x[0, i] = 1
        with torch.no_grad():
            y = module(x)[0]
        y = y.relu() if relu else y
        found.append([y[j].sum().item() for j in range(len(y))])
    return torch.tensor(found, dtype=torch.float64)


@st.composite
def convolutions(draw):
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    mode = draw(st.sampled_from(["zeros", "replicate", "circular", "reflect"]))
    padding = draw(st.sampled_from(["valid", "same", None]))
    kernel = tuple(k | 1 for k in kernel) if padding == "same" else kernel  # torch warns about even ones
    stride = 1 if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    padding = padding or tuple(draw(st.integers(0, 2)) for _ in range(axes))
    shape = tuple(draw(st.integers(8, 10)) for _ in range(axes))
    if axes == 3:
        mode = "zeros" if mode == "reflect" else mode
        shape = tuple(s - 1 for s in shape)
    torch.manual_seed(draw(st.integers(0, 99)))
    return kind(4, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()), padding_mode=mode).double(), shape


@given(conv=convolutions(), relu=st.sampled_from([None, True, False]))
@settings(max_examples=50)
def test_closed_form_is_the_definition(conv, relu):
    module, shape = conv
    expected = loops(module, 4, shape, relu is not False)
    for method in ("auto", "run"):
        torch.testing.assert_close(ng.edge_scores(module, 4, shape, relu, method), expected / expected.sum() if expected.sum() else expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ng._sums(module, 4, shape, relu, "auto"), expected, rtol=1e-9, atol=1e-9)
    if relu is not False:  # without it sums may cancel, and rounding decides
        assert torch.equal(ng.op_edges(module, 4, shape, relu), expected != 0)


def test_operations_without_weights():
    eye = torch.eye(5, dtype=torch.bool)
    for module in (nn.Identity(), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)):
        assert torch.equal(ng.op_edges(module, 5, 6), eye)
        torch.testing.assert_close(ng.edge_scores(module, 5, 6), torch.eye(5) / 5)
    assert not ng.op_edges(ng.Zero(), 5, 6).any()
    linear = nn.Linear(5, 3).double()
    torch.testing.assert_close(ng._sums(linear, 5, (), None, "auto"), (linear.weight.T + linear.bias).detach())
    block = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 6, 1, bias=False))
    assert torch.equal(ng.op_edges(block, 4, 6), (block[1].weight[:, :, 0, 0] > 0).T)


def test_expected_shares():
    g = torch.Generator().manual_seed(1)
    for kernel, stride, padding, share in ((1, 1, 0, 0.5), (3, 1, 1, 0.843), (3, 2, 1, 0.695)):
        conv = nn.Conv2d(64, 64, kernel, stride, padding, bias=False)
        nn.init.normal_(conv.weight, generator=g)
        low, high = binom.interval(0.9999, 4096, share)
        assert low - 5 < int(ng.op_edges(conv, 64, 32).sum()) < high + 5
    assert ng.op_edges(conv, 64, 32).sum() == ng.op_edges(conv, 64, 224).sum()  # the image has disappeared
    assert len(ng.border_classes(32, 3, 1, 1)[0]) == 3 and len(ng.border_classes(32, 3, 2, 1)[0]) == 2


def test_tiny_sums_are_edges():
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data = torch.tensor([1e-30, 0.0]).reshape(2, 1, 1, 1)
    assert ng.op_edges(conv, 1, 4).tolist() == [[True, False]]


@pytest.mark.parametrize("call, error, match", [
    (lambda: ng.edge_scores("conv", 3, 8), TypeError, "not str"),
    (lambda: ng.edge_scores(nn.Conv2d(3, 4, 3), 2, 8), ValueError, "in_channels=2 .* takes 3"),
    (lambda: ng.edge_scores(nn.Conv2d(3, 4, 3), 0, 8), ValueError, "in_channels=0"),
    (lambda: ng.edge_scores(nn.Conv2d(3, 4, 3), 3, 0), ValueError, "size=0"),
    (lambda: ng.edge_scores(nn.Conv2d(3, 4, 3), 3, 2), ValueError, "does not fit into 2 pixels"),
    (lambda: ng.edge_scores(nn.Conv2d(3, 4, 3), 3, (8,)), ValueError, "1 axes|has 2"),
    (lambda: ng.op_edges(nn.Identity(), 3, 8, method="fast"), ValueError, "auto, run"),
    (lambda: ng.op_edges(nn.Flatten(0), 3, 8), ValueError, "must map"),
])
def test_bad_operations(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("init", ng.INITS)
def test_weights(init):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a, b = ng.draw_weight((6, 4, 3, 3), init, 3, 7), ng.draw_weight((6, 4, 3, 3), init, 3, 7)
    assert torch.equal(a, b) and a.dtype == torch.float32 and torch.equal(state, torch.random.get_rng_state())
    assert (not torch.equal(a, ng.draw_weight((6, 4, 3, 3), init, 4, 7))) == (init not in ("identity", "custom"))
    assert ng.draw_weight((6, 4), init, preprocess="absolute").min() >= 0
    scaled = ng.draw_weight((6, 4), init, preprocess="minmax")
    assert scaled.min() == 0 and scaled.max() == 1


def test_weights_by_value():
    w = ng.draw_weight((3, 4, 3, 3), "custom")
    torch.testing.assert_close(w, torch.tensor([[o + 0.1 * i for i in range(4)] for o in range(3)])[:, :, None, None].expand_as(w))
    assert torch.equal(ng.draw_weight((3, 4, 3, 3), "identity"), nn.init.dirac_(torch.empty(3, 4, 3, 3)))
    by_function = [ng.draw_weight((8, 8), nn.init.xavier_normal_, seed, 1) for seed in (0, 0, 1)]
    assert torch.equal(by_function[0], by_function[1]) and not torch.equal(by_function[0], by_function[2])
    assert torch.equal(ng.draw_weight((2, 2), lambda w: np.arange(4.0).reshape(2, 2)), torch.arange(4.0).reshape(2, 2))
    big = ng.draw_weight((64, 64, 3, 3), "normal", 1)
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.02
    assert abs(ng.draw_weight((64, 64, 3, 3), "kaiming").std() - math.sqrt(2 / 576)) < 1e-3
    for bad, match in ((dict(init="norml"), "did you mean normal"), (dict(init=lambda w: w[:1]), "shape"), (dict(preprocess="abs"), "absolute")):
        with pytest.raises(ValueError, match=match):
            ng.draw_weight((2, 2), **bad)


# ---------------------------------------------------------------- NAS-Bench-201

def reference(arch, channels, size, cells, init, seed):
    "Nodes and edges by a wiring of its own, written from the description of the released code, and loops over channels."
    ops = [[token.split("~") for token in node.split("|") if token] for node in arch.split("+")]
    modules, parents, entering = [nn.Identity(), nn.Conv2d(3, channels, 3, 1, 1, bias=False)], {0: [], 1: [0]}, {(0, 0, 0): [1]}
    shapes, c, s = [(3, size), (3, size)], channels, size

    def add(module, reads, shape):
        modules.append(module)
        shapes.append(shape)
        parents[len(modules) - 1] = list(reads)
        return len(modules) - 1

    for stage in range(3):
        if stage:
            reads = entering[(stage, 0, 0)]
            a = add(nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), reads, (c, s))
            b = add(nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False), [a], (2 * c, s // 2))
            d = add(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(c, 2 * c, 1, bias=False)), reads, (c, s))
            entering[(stage, 0, 0)], c, s = [d, b], 2 * c, s // 2
        for cell in range(cells):
            for node, tokens in enumerate(ops, 1):
                for name, source in tokens:
                    module = {"none": ng.Zero, "skip_connect": nn.Identity, "avg_pool_3x3": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                              "nor_conv_1x1": lambda: nn.Conv2d(c, c, 1, bias=False), "nor_conv_3x3": lambda: nn.Conv2d(c, c, 3, 1, 1, bias=False)}[name]()
                    at = add(module, entering[(stage, cell, int(source))], (c, s))
                    where = (stage, cell, node) if node < 3 else (stage, cell + 1, 0) if cell + 1 < cells else (stage + 1, 0, 0)
                    entering.setdefault(where, []).append(at)
    add(nn.Identity(), entering[(3, 0, 0)], (c, s))
    edges = set()
    for at, (module, (width, pixels)) in enumerate(zip(modules, shapes)):
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        for m in convs:
            m.weight.data = ng.draw_weight(m.weight.shape, init, seed, at)
        sums = loops(module.double(), width, (pixels, pixels), bool(convs)) if parents[at] else None
        for parent in parents[at]:
            edges |= {((parent, i), (at, j)) for i, j in (sums != 0).nonzero().tolist()}
    return edges


@given(arch=archs, channels=st.integers(1, 4), cells=st.integers(1, 2), seed=st.integers(0, 50), init=st.sampled_from(["normal", "custom", "identity", "uniform2"]))
@settings(max_examples=12)
def test_graph_counts_and_wiring(arch, channels, cells, seed, init):
    edges = reference(arch, channels, 8, cells, init, seed)
    nodes = {v for e in edges for v in e}
    options = dict(channels=channels, size=8, cells=cells, init=init, seed=seed)
    for method in ("auto", "run"):
        graph = ng.nb201_graph(arch, **options, method=method)
        assert set(graph.edges) == edges and set(graph) == nodes
    assert ng.nb201_counts(arch, **options) == (2 * len(edges) / len(nodes), len(nodes), len(edges))
    assert ng.nb201_average_degree(arch, **options) == ng.average_degree(graph) == pytest.approx(np.mean([k for _, k in graph.degree()]))
    for parent, at in {(a[0], b[0]) for a, b in edges}:
        assert sum(w for a, b, w in graph.edges(data="weight") if (a[0], b[0]) == (parent, at)) == pytest.approx(1)


@given(arch=archs, seed=st.integers(0, 5), preprocess=st.sampled_from(["none", "absolute", "minmax"]))
@settings(max_examples=8)
def test_fast_path_at_full_width(arch, seed, preprocess):
    graph = ng.nb201_graph(arch, 8, 32, seed=seed, preprocess=preprocess, method="run")
    assert ng.nb201_counts(arch, 8, 32, seed=seed, preprocess=preprocess) == (ng.average_degree(graph), len(graph), graph.number_of_edges())


def test_known_counts():
    "Weights o + 0.1 i: only the pair (0, 0) is no edge. A cell of zeros, by hand."
    degree, nodes, edges = ng.nb201_counts((0,) * 6, channels=2, size=8, init="custom")
    def full(a, b):
        return a * b - 1
    # stem; per reduction three convolutions, the first and the shortcut read three layers each; output reads three layers
    expected = full(3, 2) + 3 * full(2, 4) + full(4, 4) + 3 * full(2, 4) + 3 * full(4, 8) + full(8, 8) + 3 * full(4, 8) + 3 * 8
    # nodes: image 3, stem 2, in each stage the three layers that enter node 3, both ends of the two reductions and their middle, the output
    assert (edges, degree) == (expected, 2 * edges / nodes)
    graph = ng.nb201_graph((0,) * 6, channels=2, size=8, init="custom")
    names = [graph.graph["layers"][layer].op for layer, _ in graph]
    assert {name: names.count(name) for name in set(names)} == {"input": 3, "stem": 2, "none": 3 * (2 + 4 + 8), "reduce_a": 12, "reduce_b": 12, "shortcut": 12, "output": 8}
    assert not any(graph.graph["layers"][at].op == "none" for _, (at, _) in graph.edges)


def test_callable_init_is_not_remembered():
    values = iter([1.0] * 100 + [-1.0] * 100)
    first, second = (ng.nb201_counts((3,) * 6, 2, 8, init=lambda w, v=v: w.fill_(v)).edges for v in (1.0, -1.0))
    assert first > second == 3 * 8 and next(values) == 1.0


def test_rankings_do_not_depend_on_the_seed():
    rng = np.random.default_rng(0)
    cells = [ng.random_arch(rng) for _ in range(100)]
    degrees = [[ng.nb201_average_degree(a, c, 32, seed=s) for a in cells] for c, s in ((16, 1), (16, 2), (4, 1), (8, 1))]
    assert spearmanr(degrees[0], degrees[1]).statistic > 0.99 and spearmanr(degrees[2], degrees[3]).statistic > 0.97


def test_parse():
    text = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|none~1|avg_pool_3x3~2|"
    assert ng.parse_arch(text) == (3, 0, 1, 2, 0, 4) == ng.parse_arch(np.array([3, 0, 1, 2, 0, 4])) and ng.format_arch((3, 0, 1, 2, 0, 4)) == text


@given(arch=archs)
@settings(max_examples=30)
def test_round_trip(arch):
    assert ng.format_arch(ng.parse_arch(arch)) == arch


@pytest.mark.parametrize("arch, error, match", [
    ("|nor_conv_5x5~0|+|none~0|none~1|+|none~0|none~1|none~2|", ValueError, "nor_conv_5x5"),
    ("|none~0|+|none~0|none~1|", ValueError, "6 edges.* 3 in"),
    ("|none~0|+|none~1|none~0|+|none~0|none~1|none~2|", ValueError, "none~1"),
    ("|none~0|none~0|+|none~1|+|none~0|none~1|none~2|", ValueError, "node 1"),
    ("|none|+|none~0|none~1|+|none~0|none~1|none~2|", ValueError, "'none'"),
    ("", ValueError, "0 in"), ((1, 2, 3), ValueError, "six indices"), ((1, 2, 3, 4, 5, 0), ValueError, "0 to 4"), (7, TypeError, "int"),
])
def test_bad_architectures(arch, error, match):
    with pytest.raises(error, match=match):
        ng.parse_arch(arch)


@pytest.mark.parametrize("options, match", [(dict(channels=0), "channels=0"), (dict(size=10), "multiple of 4"), (dict(cells=1.5), "cells=1.5"), (dict(init="x"), "init"),
                                            (dict(stages=0), "stages=0"), (dict(channels=True), "channels=True"), (dict(preprocess="x"), "preprocess")])
def test_bad_networks(options, match):
    for make in (ng.nb201_graph, ng.nb201_counts):
        with pytest.raises(ValueError, match=match):
            make((3,) * 6, **{"channels": 2, "size": 8, **options})


def test_measures():
    graph = ng.nb201_graph((3, 1, 2, 4, 0, 3), 3, 8)
    graph.add_node("alone")
    m, k = ng.graph_measures(graph), np.array([d for _, d in graph.degree() if d], float)
    graph.remove_node("alone")
    assert (m["nodes"], m["edges"]) == (len(graph), graph.number_of_edges()) and m["density"] == pytest.approx(nx.density(graph))
    assert m["average degree"] == ng.average_degree(graph) and m["resilience"] == pytest.approx((k**2).sum() / k.sum())
    assert m["gini"] == pytest.approx(abs(k[:, None] - k).mean() / 2 / k.mean())
    assert m["wedges"] == sum(math.comb(int(x), 2) for x in k)
    assert m["entropy"] == pytest.approx(-(k / k.sum() * np.log(k / k.sum())).sum() / len(k))
    plain = graph.to_undirected()
    assert ng.graph_measures(plain)["clustering"] == pytest.approx(nx.average_clustering(plain))
    assert ng.graph_measures(plain)["density"] == pytest.approx(nx.density(plain))
    assert ng.average_degree(nx.empty_graph(3)) == 0
    with pytest.raises(ValueError, match="no edges"):
        ng.graph_measures(nx.empty_graph(3))


# ---------------------------------------------------------------- any network

class Net(nn.Module):
    "A random network, and its edges by loops: a value is a list of summands, a summand the source of each of its channels."

    def __init__(self, plan, channels, size, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.plan, self.parts, self.start = plan, nn.ModuleList(), (channels, size)
        for step in plan:
            made, out = {"conv": lambda: nn.Conv2d(channels, 4, 3, padding=1), "strided": lambda: nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False),
                         "dilated": lambda: nn.Conv2d(channels, 4, 3, padding=2, dilation=2, bias=False), "same": lambda: nn.Conv2d(channels, 4, 2, padding="same", bias=False),
                         "grouped": lambda: nn.Conv2d(channels, channels, 3, groups=channels, padding=1, bias=False), "transposed": lambda: nn.ConvTranspose2d(channels, 4, 2, bias=False),
                         "max": lambda: nn.MaxPool2d(2), "average": lambda: nn.AvgPool2d(3, 1, 1), "adaptive": lambda: nn.AdaptiveAvgPool2d(2), "identity": nn.Identity,
                         "residual": lambda: nn.Conv2d(channels, channels, 1, bias=False), "cat": lambda: nn.Conv2d(channels, channels, 1, bias=False),
                         "norm": lambda: nn.BatchNorm2d(channels), "relu": lambda: nn.ReLU(inplace=True), "shuffle": nn.Identity, "zero": ng.Zero}[step]().eval(), channels
            out = {"conv": 4, "strided": 4, "dilated": 4, "same": 4, "transposed": 4, "cat": 2 * channels}.get(step, channels)
            self.parts.append(made)
            channels = out
        with torch.no_grad():
            self.head = nn.Linear(self.body(torch.zeros(1, *self.start, size)[:, :, :, :]).flatten(1).shape[1], 3, bias=False)

    def body(self, x):
        for step, part in zip(self.plan, self.parts):
            if step == "residual":
                x = x + part(x)
            elif step == "cat":
                x = torch.cat((x, F.gelu(part(x))), dim=1)
            elif step == "shuffle":
                x = x.view(len(x), 1, *x.shape[1:]).flip(2).squeeze(1) if x.shape[1] % 2 else x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            else:
                x = part(x)
        return x

    def forward(self, x):
        return self.head(torch.flatten(self.body(x), 1))

    def edges(self):
        shape = (self.start[0], self.start[1], self.start[1])
        terms, found, at = [[(0, c) for c in range(shape[0])]], set(), 0

        def layer(module, terms, shape, relu, layer_id):
            for term in terms:
                for source in {s for s in term if s}:
                    x = torch.zeros(1, *shape, dtype=torch.float64)
                    for c, s in enumerate(term):
                        x[0, c] = float(s == source)
                    y = module(x)[0]
                    y = y.relu() if relu else y
                    found.update((source, (layer_id, j)) for j in range(len(y)) if y[j].sum() != 0)
            shape = tuple(module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
            return [[(layer_id, j) for j in range(shape[0])]], shape

        for step, part in zip(self.plan, self.parts):
            part = part.double()
            if step in ("norm", "relu"):
                continue
            if step == "shuffle":
                index = torch.arange(shape[0])
                index = index.flip(0) if shape[0] % 2 else index.unflatten(0, (2, -1)).transpose(0, 1).flatten()
                terms = [[term[i] for i in index.tolist()] for term in terms]
                continue
            at += 1
            new, shape_after = layer(part, [] if step == "zero" else terms, shape, isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)), at)
            if step == "residual":
                terms = terms + new
            elif step == "cat":
                terms = [a + (new[0] if k == 0 else [None] * len(new[0])) for k, a in enumerate(terms)]
                shape = (2 * shape[0], *shape[1:])
            else:
                terms, shape = new, shape_after
        layer(lambda x: self.head.double()(x.flatten(1)), terms, shape, False, at + 1)
        return found


STEPS = ["conv", "strided", "dilated", "same", "grouped", "transposed", "max", "average", "adaptive", "identity", "residual", "cat", "norm", "relu", "shuffle", "zero"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@given(plan=st.lists(st.sampled_from(STEPS), min_size=1, max_size=5), channels=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=16)
def test_converter_against_loops(plan, channels, seed):
    try:
        net = Net(plan, channels, 9, seed)
    except RuntimeError:  # an image that became too small
        return
    with torch.no_grad():
        expected = net.edges()
    found = ng.module_edges(net, torch.zeros(2, channels, 9, 9))
    graph = ng.module_graph(net, torch.zeros(1, channels, 9, 9))
    assert set(graph.edges) == expected
    nodes = {v for e in expected for v in e}
    assert found.counts() == (pytest.approx(2 * len(expected) / len(nodes)) if nodes else 0.0, len(nodes), len(expected))
    assert ng.module_average_degree(net, torch.zeros(1, channels, 9, 9)) == ng.average_degree(graph) == found.counts().degree


@pytest.mark.parametrize("arch, cells", [((3, 0, 2, 4, 1, 3), 1), ((0,) * 6, 1), ((1, 1, 0, 4, 4, 2), 2)])
def test_three_routes(arch, cells):
    net = nn.Sequential(ng.NB201Net(arch, channels=3, cells=cells).features, nn.Identity())
    general = ng.module_graph(net, torch.zeros(1, 3, 8, 8), init="normal", seed=4, leaves=(nn.Identity, ng.Shortcut))
    plain = ng.nb201_graph(arch, 3, 8, cells, seed=4)
    assert set(general.edges) == set(plain.edges) and set(general) == set(plain)
    for edge in plain.edges:
        assert general.edges[edge]["weight"] == pytest.approx(plain.edges[edge]["weight"], rel=1e-5)
    assert ng.nb201_counts(arch, 3, 8, cells, seed=4)[1:] == (len(general), general.number_of_edges())


def sequential_scores(model, example):
    "Scores of a chain of layers by running each on one-hot images."
    found, x = {}, example
    for at, module in enumerate(model, 1):
        w = ng.edge_scores(module, x.shape[1], tuple(x.shape[2:]), method="run")
        found |= {((at - 1, i), (at, j)): w[i, j].item() for i, j in (w != 0).nonzero().tolist()}
        x = module(x)
    return found


def test_one_and_three_dimensions():
    for conv, pool, shape in ((nn.Conv1d, nn.MaxPool1d, (11,)), (nn.Conv3d, nn.AvgPool3d, (5, 6, 7))):
        model = nn.Sequential(conv(2, 4, 3, stride=2, padding=1), pool(2), conv(4, 4, 2, groups=2, padding="same"))
        example = torch.zeros(1, 2, *shape)
        graph, expected = ng.module_graph(model, example), sequential_scores(model, example)
        assert set(graph.edges) == set(expected)
        np.testing.assert_allclose([graph.edges[e]["weight"] for e in expected], list(expected.values()), rtol=1e-4)


class Mixed(nn.Module):
    "Functional calls, methods, several readers, a gate, padding, upsampling, splits, a mean, tokens."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.head, self.unused = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(8, 1, 1))

    def forward(self, x):
        x = torch.relu_(self.a(x)) * 2.0 + self.shift
        left, right = x.chunk(2, dim=1)
        y = F.interpolate(F.avg_pool2d(left, 2), scale_factor=2.0) - right
        x = x + self.b(F.pad(y, (0, 0, 0, 0)))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return self.head(tokens).mean(1)


def test_functional_network():
    torch.manual_seed(0)
    model = Mixed().train()
    model.norm.eval()
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    graph = ng.module_graph(model, torch.randn(3, 3, 8, 8))
    names = graph.graph["layers"]
    assert len(names) == 8 and [names[k] for k in (0, 1, 3, 5, 6)] == ["input", "a", "b", "gate", "head"]
    assert [m.training for m in model.modules()] == modes and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and not any(m._forward_hooks for m in model.modules())
    reads = {at: sorted({a[0] for a, b in graph.edges if b[0] == at}) for at in range(8)}
    # the pool reads the left half of a; b reads pool and a; the mean reads a and b; the gate the mean; head reads a, b and gate
    assert reads == {0: [], 1: [0], 2: [1], 3: [1, 2], 4: [1, 3], 5: [4], 6: [1, 3, 5], 7: [6]}
    assert {a for a, b in graph.edges if b[0] == 2} == {(1, c) for c in range(4)} and {a for a, b in graph.edges if (a[0], b[0]) == (1, 3)} <= {(1, c) for c in range(4, 8)}
    assert all((b[1] == a[1]) for a, b in graph.edges if b[0] in (4, 7))


def test_labels_that_vary_within_a_channel():
    "A pool over an image whose halves come from two layers; a linear map on rows that start with a constant token."
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)

        def forward(self, x):
            return F.max_pool2d(self.c(torch.cat((self.a(x), self.b(x)), 3)), 2)

    torch.manual_seed(1)
    model = Halves().double()
    graph = ng.module_graph(model, torch.zeros(1, 1, 4, 4))
    for layer, half in ((1, slice(0, 4)), (2, slice(4, 8))):
        for c in range(2):
            x = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
            x[0, c, :, half] = 1
            y = model.c(x).relu()[0].sum((1, 2))
            assert {b[1] for a, b in graph.out_edges((layer, c))} == set((y != 0).nonzero()[:, 0].tolist())

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.map = nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(3, 4)

        def forward(self, x):
            return self.map(torch.cat((self.first.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1))

    graph = ng.module_graph(Tokens(), torch.zeros(1, 3, 2, 2))
    assert graph.number_of_edges() == 12 and len(graph) == 7


@pytest.mark.parametrize("make", [
    lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 2], num_labels=3)),
    lambda: transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(depth_multiplier=0.1, num_labels=3)),
    lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3)),
], ids=["resnet", "mobilenet", "convnext"])
def test_transformers(make):
    torch.manual_seed(0)
    model = make()
    found = ng.module_edges(model, torch.zeros(1, 3, 32, 32))
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    names = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert names <= set(found.layers) and len([n for n in found.layers if n in names]) == convs
    graph = nx.DiGraph(zip(found.source.tolist(), found.target.tolist()))
    assert nx.is_directed_acyclic_graph(graph) and found.counts() == (ng.average_degree(graph), len(graph), graph.number_of_edges())
    out = range(int(found.first[-2]), int(found.first[-1]))
    assert set(out) & nx.descendants(graph, 0) and bool((found.target > found.source).all())


def test_resnet_stage_by_hand():
    "Two convolutions of a transformers ResNet, against their one-hot images."
    torch.manual_seed(0)
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic"))
    graph = ng.module_graph(model, torch.zeros(1, 3, 32, 32))
    at = {name: k for k, name in enumerate(graph.graph["layers"])}
    for name, before, size in (("embedder.embedder.convolution", "input", 32), ("encoder.stages.0.layers.0.layer.0.convolution", "embedder.pooler", 8)):
        conv = model.get_submodule(name)
        edges = ng.op_edges(conv.double(), conv.in_channels, size, method="run")
        assert {(a[1], b[1]) for a, b in graph.edges if (a[0], b[0]) == (at[before], at[name])} == set(map(tuple, edges.nonzero().tolist()))


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced(capfd):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(), Undecided(), nn.Identity())
    with pytest.raises(ValueError, match="Sequential cannot be traced by torch.export.*data-dependent.*leaves="):
        ng.module_graph(model, torch.zeros(1, 3, 4, 4))
    assert model.training and not model[3]._forward_hooks and "forward" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="cannot be traced.*RuntimeError"):
        ng.module_graph(nn.Conv2d(3, 4, 1), torch.zeros(1, 2, 4, 4))
    alone = ng.module_graph(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), torch.zeros(1, 3, 4, 4))
    assert alone.number_of_nodes() > 4


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(1).values


class Second(nn.Module):
    def forward(self, pair):
        return pair[0]


class Slice(nn.Module):
    def forward(self, x):
        y = x * 1.0
        y[:, :1] += x[:, 1:2]
        return y


def test_what_has_no_meaning():
    for module, match in ((Sorted(), "aten.sort .in 1"), (Slice(), "in place"), (nn.MaxPool2d(2, return_indices=True), "aten.max_pool2d_with_indices")):
        model = nn.Sequential(nn.Conv2d(2, 4, 1), module)
        if isinstance(module, nn.MaxPool2d):
            model = nn.Sequential(model, Second())
        with pytest.raises(ValueError, match=match):
            ng.module_graph(model, torch.zeros(1, 2, 4, 4))
    block = nn.Sequential(nn.Conv2d(2, 4, 1), Sorted(), nn.Conv2d(4, 4, 1))
    graph = ng.module_graph(block, torch.zeros(1, 2, 4, 4), leaves=(nn.Identity, Sorted))
    pairs = set(map(tuple, ng.op_edges(Sorted(), 4, 4).nonzero().tolist()))  # as one layer, probed as it is
    assert {(a[1], b[1]) for a, b in graph.edges if b[0] == 2} == pairs and len(pairs) == 4
    for args, error in (((3, torch.zeros(1, 2, 4, 4)), TypeError), ((nn.Identity(), [1]), TypeError), ((nn.Identity(), torch.zeros(1, 2).long()), TypeError),
                        ((nn.Identity(), torch.zeros(3)), ValueError), ((nn.Identity(), torch.zeros(0, 2)), ValueError)):
        with pytest.raises(error):
            ng.module_graph(*args)
    with pytest.raises(ValueError, match="init"):
        ng.module_graph(nn.Identity(), torch.zeros(1, 2), init="nope")


# ---------------------------------------------------------------- ranking, search, tables

def test_rank_and_search():
    table = ng.rank(["a", "bbb", "cc", "dd"], len)
    assert table.arch.tolist() == ["bbb", "cc", "dd", "a"] and table["rank"].tolist() == [1, 2, 2, 4] and table.score.tolist() == [3, 2, 2, 1]
    for bad, match in ((lambda: ng.rank([], len), "no architectures"), (lambda: ng.rank(["x", "y"], lambda a: math.nan), "2 of 2.*'x'"),
                       (lambda: ng.search(ng.random_arch, len, n=0), "n=0")):
        with pytest.raises(ValueError, match=match):
            bad()
    calls = []
    found = ng.search(lambda rng: int(rng.integers(5)), lambda a: calls.append(a) or -a, n=100)
    assert found.arch == 0 and found.score == 0 and sorted(calls) == [0, 1, 2, 3, 4] and len(found.table) == 5
    same = [ng.search(ng.random_arch, lambda a: ng.nb201_average_degree(a, 4, 8), n=20, seed=3) for _ in range(2)]
    assert same[0].arch == same[1].arch and same[0].table.equals(same[1].table)


def write_table(path, rows, header=("file id", "arch str", "cfg name", "validation accuracy", "test accuracy")):
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(header)
        out.writerows(rows)
    return path


def table_rows(count, seed=0):
    rng, cells = np.random.default_rng(seed), {}
    while len(cells) < count:
        cells[ng.random_arch(rng)] = None
    return [[k, a, "infer.tiny", 50.0, round(50 + 5 * sum(o in (2, 3) for o in ng.parse_arch(a)) + rng.normal(), 3)] for k, a in enumerate(cells)]


def test_table(tmp_path):
    rows = table_rows(5)
    table = ng.load_nasbench201_csv(write_table(tmp_path / "t.csv", rows))
    assert table.columns.tolist() == ["arch", "accuracy"] and table.arch.tolist() == [r[1] for r in rows] and table.accuracy.tolist() == [r[4] for r in rows]


@pytest.mark.parametrize("change, match", [
    (lambda r: r[1].__setitem__(1, "|nor_conv_9x9~0|"), "line 3: "), (lambda r: r[1].__setitem__(4, "high"), "line 3: test accuracy 'high'"),
    (lambda r: r[2].__setitem__(4, 101), "line 4"), (lambda r: r[2].__setitem__(4, ""), "line 4"), (lambda r: r[4].__setitem__(1, r[0][1]), "line 6: .* line 2 already"),
    (lambda r: r[3].__setitem__(1, ""), "line 5"), (lambda r: r.clear(), "no rows")])
def test_bad_tables(tmp_path, change, match):
    rows = table_rows(5)
    change(rows)
    with pytest.raises(DataError, match=match):
        ng.load_nasbench201_csv(write_table(tmp_path / "t.csv", rows))


def test_missing_tables(tmp_path):
    with pytest.raises(DataError, match="no file .*nasbench201_cifar10.csv"):
        ng.load_nasbench201_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="no column 'test accuracy'; it has: arch str, accuracy"):
        ng.load_nasbench201_csv(write_table(tmp_path / "t.csv", [], ("arch str", "accuracy")))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    for name in ("empty.csv", "binary.csv"):
        with pytest.raises(DataError, match=name):
            ng.load_nasbench201_csv(tmp_path / name)


def test_trainable_network():
    torch.manual_seed(0)
    net = ng.NB201Net((3, 1, 2, 4, 0, 3), channels=4, num_classes=7, cells=2, stages=2, in_channels=1)
    x = torch.randn(5, 1, 8, 8)
    assert net(x).shape == (5, 7)
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    dead = ng.NB201Net((0,) * 6, channels=4).eval()
    out = dead(torch.randn(3, 3, 16, 16))
    torch.testing.assert_close(out, out[:1].expand(3, -1))
    for bad in (dict(arch="x"), dict(arch=(3,) * 6, channels=0), dict(arch=(3,) * 6, stages=0)):
        with pytest.raises(ValueError):
            ng.NB201Net(**bad)


def test_full_profile(tmp_path, monkeypatch, capsys):
    "The notebook's cells at `full`, with a tiny table of accuracies, in this process."
    import matplotlib
    import nbformat

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    path = write_table(tmp_path / "cells.csv", table_rows(30))
    names = {"__name__": "nasgraph_full"}
    for cell in nbformat.read(ROOT / "nbs/efficiency/nasgraph.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "nasgraph.ipynb", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(profile="full", seeds=[0, 1, 2], pool=20, dataset=str(path))
    record = names["study"].record
    verdicts = {c["id"]: c["verdict"] for c in record["claims"]}
    assert record["profile"] == "full" and list(verdicts) == [f"C{i}" for i in range(1, 8)]
    assert verdicts["C1"] == "reproduced" and verdicts["C5"] == "not tested"
    rho = spearmanr([ng.nb201_average_degree(r[1], seed=0) for r in table_rows(30)], [r[4] for r in table_rows(30)]).statistic
    assert [r["spearman"] for r in record["rows"] if r.get("cells") == "all cells" and r["proxy"] == "average degree"] == [pytest.approx(rho)]
