"""Rewards that compare the images of a prompt get all of them in one call."""

from __future__ import annotations

import asyncio

import pytest

from actors.experience.scoring.pool_parts import RewardScores, asked_groups, group_keys
from actors.experience.scoring.reward_pool import RewardPool
from deepgen.config.schema.pools import make_pool
from deepgen.errors import UserError
from rewards import Missing, Score, is_groupwise
from tests.helpers.local_replicas import Death, Script, ask, in_pool, script

__all__ = ["script"]

GROUPS = {"class": "tests.helpers.local_replicas:ScriptedGroups"}


def by_length(names: list[str]) -> list[Score]:
    return [float(len(name.split("+"))) for name in names]


@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_groups_are_never_split_and_share_calls_where_they_fit(script: Script, batch_size: int) -> None:
    script.score = by_length
    wanted = [[f"{group}{image}" for image in range(group + 1)] for group in range(6)]

    async def work(pool: RewardPool) -> list[RewardScores]:
        return await asyncio.gather(*(ask(pool, names) for names in wanted))

    found = in_pool(work, batch_size=batch_size, **GROUPS)
    assert [scores.values for scores in found] == [[float(n)] * n for n in range(1, 7)]
    asked = [name for call in script.calls for name in call]
    assert sorted(asked) == sorted("+".join(names) for names in wanted)
    for call in script.calls:
        assert len(call) == 1 or sum(len(name.split("+")) for name in call) <= batch_size
    assert (len(script.calls) == 1) == (batch_size == 64)


def test_groups_of_one_call_stay_apart_and_members_without_a_picture_are_left_out(script: Script) -> None:
    script.score = by_length
    scores = in_pool(lambda pool: ask(pool, ["a", "b", None, "c", None, None], 2), **GROUPS)
    assert [name for call in script.calls for name in call] == ["a+b", "c"]
    assert scores.values == [2, 2, None, 1, None, None]
    with pytest.raises(ValueError, match="6 requests in groups of 4"):
        in_pool(lambda pool: ask(pool, ["a"] * 6, 4), **GROUPS)


def test_a_score_from_a_comparison_is_kept_for_just_these_images(script: Script) -> None:
    script.score = by_length

    async def work(pool: RewardPool) -> list[float]:
        asked = [["a", "b"], ["a", "b"], ["b", "a"], ["a"], ["a", "b", "c"], ["a", "a"]]
        return [(await ask(pool, names)).counters["cache_hits"] for names in asked]

    assert in_pool(work, **GROUPS) == [0, 2, 0, 0, 0, 0]


def test_a_group_with_a_missing_score_is_asked_for_again_as_a_whole(script: Script) -> None:
    answers: list[list[Score]] = [[Missing("parse")], [1.0]]
    script.score = lambda names: answers.pop(0)

    async def work(pool: RewardPool) -> list[RewardScores]:
        return [await ask(pool, ["a", "b"]) for _ in range(3)]

    found = in_pool(work, **GROUPS)
    assert [scores.values for scores in found] == [[None, None], [1.0, 1.0], [1.0, 1.0]]
    assert script.calls == [["a+b"], ["a+b"]]


def test_only_the_group_that_breaks_a_batch_is_missing(script: Script) -> None:
    def score(names: list[str]) -> list[Score]:
        if any("bad" in name for name in names):
            raise Death
        return by_length(names)

    script.score = score

    async def work(pool: RewardPool) -> list[RewardScores]:
        return await asyncio.gather(*(ask(pool, [f"{n}", "bad" if n == 5 else "x"]) for n in range(8)))

    found = in_pool(work, batch_size=64, retries=0, **GROUPS)
    assert [scores.values for scores in found] == [[2, 2]] * 5 + [[None, None]] + [[2, 2]] * 2
    assert len([call for call in script.calls if any("bad" in name for name in call)]) == 4  # 8, 4, 2, 1 groups


def test_keys_of_members() -> None:
    assert len({*group_keys([b"a", b"b"]), *group_keys([b"b", b"a"]), *group_keys([b"a"]), *group_keys([b"ab"])}) == 6
    assert asked_groups([b"a", None, None, None, b"b", b"c"], 2) == [[0], [4, 5]]
    assert asked_groups([b"a", None, b"b"], None) == [[0], [2]]


def test_a_class_must_be_able_to_score() -> None:
    assert is_groupwise(make_pool("mine", GROUPS))
    assert not is_groupwise(make_pool("mine", {"class": "tests.helpers.local_replicas:Scripted"}))
    with pytest.raises(UserError, match=r"allowed: a class with a method score\(requests\), or score_groups\(groups\)"):
        make_pool("mine", {"class": "tests.helpers.local_replicas:Death"})
