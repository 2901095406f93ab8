"""Finite semigroups: published sizes, the slow twin, and inputs that are not semigroups of maps."""

import sys

import numpy as np
import pytest

from scalpel.reference import semigroup as twin
from scalpel.semigroup import SemigroupTooLarge, TransformationSemigroup
from semigroup_cases import FLIP_FLOP, PUBLISHED, cyclic, full, random, symmetric

CASES = [pytest.param(PUBLISHED[name][0], id=name) for name in ("T_2", "T_3", "S_4", "Z_12", "Catalan_4", "flip-flop")]
CASES += [pytest.param(random(seed), id=f"random {seed}") for seed in range(25)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    generators, size, idempotents, classes, aperiodic = PUBLISHED[name]
    s = TransformationSemigroup(generators)
    assert s.size == size
    assert len(s.idempotents()) == idempotents
    assert {key: s.greens().counts()[key] for key in classes} == classes
    assert s.is_aperiodic() is aperiodic


@pytest.mark.parametrize("generators", CASES)
def test_elements_and_words_are_the_twins(generators):
    s, expected = TransformationSemigroup(generators), twin.closure(generators)
    assert [tuple(row) for row in s.images.tolist()] == list(expected)
    assert s.words() == list(expected.values())
    for number, (element, word) in enumerate(expected.items()):
        assert s.number(element) == s.number(word) == s.number(number) == number
        assert s.word(number) == word
        assert s.evaluate(word).tolist() == list(element)
        assert element in s
    assert (len(set(s.images[0].tolist())) + 7,) * s.degree not in s


@pytest.mark.parametrize("generators", CASES)
def test_both_cayley_graphs_multiply(generators):
    s = TransformationSemigroup(generators)
    for x, images in enumerate(s.images):
        for g, name in enumerate(s.names):
            generator = np.array(generators[name])
            assert s.images[s.right_cayley_graph[x, g]].tolist() == generator[images].tolist()
            assert s.images[s.left_cayley_graph[x, g]].tolist() == images[generator].tolist()


@pytest.mark.parametrize("generators", CASES)
def test_greens_relations_are_the_twins(generators):
    elements = list(twin.closure(generators))
    if len(elements) > 60:
        elements = []  # the twin takes cubic time, so these rely on published counts
    s = TransformationSemigroup(generators)
    greens = s.greens()
    for relation in "RLHD" if elements else "":
        labels = getattr(greens, relation.lower())
        found = {frozenset(elements[i] for i in np.flatnonzero(labels == c)) for c in np.unique(labels)}
        assert found == twin.greens_classes(elements, relation), relation
    if elements:
        assert {elements[i] for i in s.minimal_ideal()} == twin.minimal_ideal(elements)
        assert {elements[i] for i in s.idempotents()} == twin.idempotents(elements)


@pytest.mark.parametrize("generators", CASES)
def test_egg_boxes_hold_every_element_once(generators):
    s = TransformationSemigroup(generators)
    greens, idempotents = s.greens(), set(s.idempotents().tolist())
    boxes = greens.egg_boxes
    assert sorted(np.concatenate([box.elements.ravel() for box in boxes]).tolist()) == list(range(s.size))
    for box in boxes:
        for row, cell_group in zip(box.elements, box.group, strict=True):
            assert len(set(greens.r[row.ravel()])) == 1
            for cell, group in zip(row, cell_group, strict=True):
                assert len(set(greens.h[cell])) == 1
                assert group == bool(idempotents & set(cell.tolist()))
        for column in box.elements.transpose(1, 0, 2):
            assert len(set(greens.l[column.ravel()])) == 1
        if box.regular:
            assert box.group.any(0).all() and box.group.any(1).all()
    # Exactly one D-class, the minimal ideal, has no class below it.
    assert sum(all(i not in box.above for box in boxes) for i in range(len(boxes))) == 1


@pytest.mark.parametrize("generators", CASES)
def test_index_and_period_and_the_witness(generators):
    s = TransformationSemigroup(generators)
    shapes = [twin.index_and_period(tuple(row)) for row in s.images.tolist()]
    assert [s.index_and_period(i) for i in range(s.size)] == shapes
    first = next((i for i, (_, period) in enumerate(shapes) if period > 1), None)
    assert s.periodic_element() == first
    assert s.is_aperiodic() == (first is None)


def test_the_order_among_d_classes_is_that_of_ranks_in_t_n():
    boxes = TransformationSemigroup(full(4)).greens().egg_boxes
    by_rank = {len(set(box_images)): box for box in boxes for box_images in [_images(full(4), box)]}
    assert sorted(by_rank) == [1, 2, 3, 4]
    for rank in (1, 2, 3):
        assert [boxes[i] for i in by_rank[rank].above] == [by_rank[rank + 1]]
    assert by_rank[4].above == ()


def _images(generators, box):
    return TransformationSemigroup(generators).images[box.elements.ravel()[0]].tolist()


@pytest.mark.parametrize(
    ("generators", "names"),
    [
        (full(4), ["S_4", "S_3", "Z_2", "trivial"]),
        (symmetric(4), ["S_4"]),
        (cyclic(6), ["Z_6"]),
        (FLIP_FLOP, ["trivial", "trivial"]),
        ({"a": [1, 2, 0, 3], "b": [1, 0, 3, 2]}, ["A_4"]),
        ({"a": [1, 0, 2, 3], "b": [0, 1, 3, 2]}, ["commutative of order 4"]),
        ({"r": [1, 2, 3, 0], "s": [0, 3, 2, 1]}, ["non-commutative of order 8"]),
    ],
)
def test_groups_are_named(generators, names):
    s = TransformationSemigroup(generators)
    groups = sorted(s.groups(), key=lambda g: -g.order)
    assert [group.name for group in groups] == names
    for group in groups:
        identity = s.images[group.elements[0]]
        assert (identity[identity] == identity).all()
    assert s.is_group() == (len(groups) == 1 and groups[0].order == s.size)


def test_no_identity_is_adjoined_unless_asked():
    constants = {"set": [1, 1], "reset": [0, 0]}
    assert TransformationSemigroup(constants).size == 2
    with_identity = TransformationSemigroup(constants, identity=True)
    assert with_identity.size == 3
    assert with_identity.word([0, 1]) == ("1",)
    # The identity of a group is already a product of its generators.
    assert TransformationSemigroup(cyclic(5), identity=True).size == 5
    with pytest.raises(ValueError, match="named '1'"):
        TransformationSemigroup({"1": [0]}, identity=True)


def test_the_same_map_under_two_names_is_one_element():
    s = TransformationSemigroup({"a": [1, 0], "again": [1, 0]})
    assert s.size == 2
    assert s.words() == [("a",), ("a", "a")]
    assert s.right_cayley_graph.tolist() == [[1, 1], [0, 0]]


def test_subsemigroups_and_commutativity():
    s = TransformationSemigroup(full(3))
    turns = s.subsemigroup([("turn",)])
    assert turns.size == 3 and turns.names == ("turn",)
    assert s.subsemigroup([s.number(("swap", "turn")), [0, 0, 0]]).names == ("swap turn", s_word(s, [0, 0, 0]))
    assert turns.is_commutative() and not s.is_commutative()


def s_word(s, images):
    return " ".join(s.word(images))


def test_orbits_reachable_and_unreachable_states():
    s = TransformationSemigroup({"up": [1, 2, 2, 3, 3]})
    assert s.orbit(0).tolist() == [0, 1, 2]
    assert s.reachable(0).tolist() == [True, True, True, False, False]
    assert s.unreachable(0).tolist() == [3, 4]
    assert s.unreachable([0, 4]).tolist() == []
    with pytest.raises(ValueError, match="no state 5"):
        s.orbit(5)


@pytest.mark.parametrize(
    ("generators", "error", "words"),
    [
        ({}, ValueError, "at least one"),
        ([[0]], TypeError, "must map names"),
        ({"a": [0, 1], "b": [0, 1, 2]}, ValueError, "'b' has images of 3 states and 'a' of 2"),
        ({"a": [0, 2]}, ValueError, "sends state 1 to 2; the states are 0 to 1"),
        ({"a": [0, -1]}, ValueError, "sends state 1 to -1"),
        ({"a": [0.0, 1.0]}, TypeError, "float64"),
        ({"a": [True, False]}, TypeError, "bool"),
        ({"a": []}, TypeError, "image of every state"),
        ({"a": [[0]]}, TypeError, "shape"),
        ({1: [0]}, TypeError, "type int"),
    ],
)
def test_what_is_no_map_on_the_states_is_refused(generators, error, words):
    with pytest.raises(error, match=words):
        TransformationSemigroup(generators)


def test_unknown_elements_are_refused():
    s = TransformationSemigroup(cyclic(3))
    with pytest.raises(ValueError, match="no generator 'b'"):
        s.evaluate(["b"])
    with pytest.raises(ValueError, match="no element 3"):
        s.number(3)
    with pytest.raises(ValueError, match="not in the semigroup"):
        s.number([0, 0, 0])
    with pytest.raises(ValueError, match="map on the 3 states"):
        s.number([0, 0])
    assert 256 * np.ones(3, dtype=int) not in s


def test_one_that_is_too_large_stops_and_says_what_was_found():
    seen = []
    s = TransformationSemigroup(full(6), limit=20_000, progress=seen.append)
    with pytest.raises(SemigroupTooLarge, match="more than 20000") as stopped:
        _ = s.size
    assert 20_000 < stopped.value.found <= 6**6
    assert stopped.value.longest > 3
    assert seen
    s.limit = 10**6
    assert s.size == 6**6


def test_without_libsemigroups_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libsemigroups_pybind11", None)
    with pytest.raises(ImportError, match=r"semigroup-scalpel\[algebra\]"):
        TransformationSemigroup(cyclic(2))
