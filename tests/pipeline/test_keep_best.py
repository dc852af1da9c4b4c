"""One clip of each group stays: the best of those that the other rules keep, whatever they reject."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.keep_best import groups
from pipeline.rules import KEPT, Bounds, CurateRecipe, Interval, Likeness, Rule, first_rejections, rules_of

HIGH = 0.9


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Likeness to a better clip and its rank, by rank: a forest of any shape."""
    count = draw(st.integers(1, 14))
    better = [draw(st.integers(-1, rank - 1)) for rank in range(count)]
    like = [draw(st.sampled_from([0.5, HIGH, 0.95, 1.0])) if link >= 0 else 0.0 for link in better]
    return like, better


def grouped(like: list[float], better: list[int]) -> list[set[int]]:
    """Ranks in groups, by joining sets one link after the other."""
    sets = [{rank} for rank in range(len(like))]
    for rank, (likeness, link) in enumerate(zip(like, better, strict=True)):
        if link >= 0 and np.float32(likeness) > np.float32(HIGH):
            joined = sets[rank] | sets[link]
            for member in joined:
                sets[member] = joined
    return [found for rank, found in enumerate(sets) if rank == min(found)]


def clips_of(
    rules: list[Rule], order: list[int], compared: dict[str, tuple[list[float], list[int]]], **more: object
) -> pa.Table:
    """Clips in some order of their ranks, as `read_scored` gives them."""
    count = len(order)
    columns = {"clip_id": [f"{rank:02d}" for rank in order], "kind": ["video"] * count, **more}
    table = pa.table(columns)
    rank = np.array(order)
    for rule in rules:
        if rule.keeps_one:
            like, better = compared[rule.name]
            values = np.array([like[one] for one in order], np.float32)
            links = np.array([better[one] for one in order])
            group, place = rule.group_columns
            table = table.append_column(rule.column, pa.chunked_array([values]))
            table = table.append_column(group, pa.chunked_array([groups(values, rank, links, HIGH)]))
            table = table.append_column(place, pa.chunked_array([rank]))
    return table


@given(found=comparisons(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_exactly_one_of_each_group_stays_where_other_rules_keep_any(
    found: tuple[list[float], list[int]], data: st.DataObject
) -> None:
    like, better = found
    order = data.draw(st.permutations(range(len(like))))
    passes = data.draw(st.lists(st.booleans(), min_size=len(like), max_size=len(like)))
    rules = rules_of(CurateRecipe(resolution=Bounds(low=512), duplicate=Likeness(high=HIGH)))
    edges = pa.chunked_array([np.array([720 if passes[rank] else 100 for rank in order], np.float32)])
    clips = clips_of(rules, order, {"duplicate": found}, short_edge_px=edges)
    first = first_rejections(rules, clips)
    kept = {rank for rank, by in zip(order, first.tolist(), strict=True) if by == KEPT}
    for group in grouped(like, better):
        able = {rank for rank in group if passes[rank]}
        assert kept & group == ({min(able)} if able else set())
    by_rule = {rank: by for rank, by in zip(order, first.tolist(), strict=True)}
    assert all((by_rule[rank] == 0) is (not passes[rank]) for rank in order)


@given(near=comparisons(), data=st.data())
@settings(deadline=None, max_examples=80)
def test_of_several_such_rules_each_keeps_one_of_what_those_before_it_left(
    near: tuple[list[float], list[int]], data: st.DataObject
) -> None:
    count = len(near[0])
    links = [data.draw(st.integers(-1, rank - 1)) for rank in range(count)]
    meant = [1.0 if link >= 0 else -1.0 for link in links], links
    rules = rules_of(CurateRecipe(duplicate=Likeness(high=HIGH), semantic=Likeness(high=HIGH)))
    clips = clips_of(rules, list(range(count)), {"duplicate": near, "semantic": meant})
    first = first_rejections(rules, clips)
    after_near = set(np.flatnonzero((first == KEPT) | (first == 1)).tolist())
    assert all(len(after_near & group) == 1 for group in grouped(*near))
    kept = set(np.flatnonzero(first == KEPT).tolist())
    for group in grouped(*meant):
        assert kept & group == ({min(after_near & group)} if after_near & group else set())


def test_a_group_goes_to_the_side_of_its_best() -> None:
    """Held out and learnt from: no clip of the one side is a copy of one of the other."""
    ids = ["00" + "0" * 14 + "-x", "ff" + "0" * 14 + "-x"]
    like, better = [0.0, 1.0], [-1, 0]
    for low, high, kept in ((None, 0.5, [True, False]), (0.5, None, [False, False])):
        rules = rules_of(CurateRecipe(split=Bounds(low=low, high=high), duplicate=Likeness(high=HIGH)))
        assert [rule.name for rule in rules] == ["duplicate", "split"]
        split = pa.chunked_array([np.array([0.0, 0.99], np.float32)])
        clips = clips_of(rules, [0, 1], {"duplicate": (like, better)}, split=split).set_column(0, "clip_id", [ids])
        assert (first_rejections(rules, clips) == KEPT).tolist() == kept


def test_likeness_rescues_nothing() -> None:
    with pytest.raises(ValueError, match="keeps one clip of a group"):
        Bounds(low=1, rescue={"duplicate": Interval(high=1)})
