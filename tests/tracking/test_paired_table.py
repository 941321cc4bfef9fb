"""Before/after table: known distributions, missing values, weights, coverage of the interval."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from deepgen.errors import UserError
from deepgen.tracking.paired_table import bootstrap_interval, load_table, main, paired_table, seeds_table

NAN = math.nan


def test_a_clear_rise_a_fall_and_noise_are_told_apart() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0.5, 0.2, 200)  # prompts differ far more than the change, so only pairing reveals it
    before = {"up": base, "down": base, "same": base}
    noise = rng.normal(0, 0.05, (3, 200))
    after = {"up": base + 0.03 + noise[0], "down": base - 0.03 + noise[1], "same": base + noise[2] - noise[2].mean()}
    table = paired_table(before, after)
    assert [row.verdict for row in table.rows] == ["rose", "fell", "no clear change", "no clear change"]
    up = table.rows[0]
    assert up.low < up.difference < up.high
    # half width of the interval: 1.96 * 0.05 / sqrt(200)
    assert (up.high - up.low) / 2 == pytest.approx(1.96 * 0.05 / math.sqrt(200), rel=0.15)


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    before, after = {"r": rng.random(40)}, {"r": rng.random(40)}
    assert paired_table(before, after, seed=5) == paired_table(before, after, seed=5)
    assert paired_table(before, after, seed=5).rows[0].low != paired_table(before, after, seed=6).rows[0].low


def test_missing_scores_are_counted_and_never_zero() -> None:
    before = {"r": [0.4, NAN, 0.6, 0.8]}
    after = {"r": [0.5, 0.9, NAN, 0.9]}
    row = paired_table(before, after).rows[0]
    assert [row.before, row.after] == pytest.approx([0.6, 0.7])
    assert row.prompts == 2
    assert (row.missing_before, row.missing_after) == (1, 1)


def test_rewards_that_do_not_apply_are_not_missing() -> None:
    weights = [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    before = {"clip": [0.1, 0.2, 0.3], "ocr": [NAN, 0.5, NAN]}
    after = {"clip": [0.1, 0.2, 0.3], "ocr": [NAN, 1.0, 0.5]}
    table = paired_table(before, after, weights)
    ocr = table.rows[1]
    assert (ocr.prompts, ocr.missing_before, ocr.missing_after) == (1, 1, 0)
    assert ocr.verdict == "too few prompts"
    assert table.total.missing_before == 1


def test_total_weighs_per_prompt_and_compares_equal_mixtures() -> None:
    weights = [[0.75, 0.25], [0.2, 0.0], [0.5, 0.5]]
    before = {"a": [0.4, 0.1, 0.2], "b": [0.8, NAN, NAN]}
    after = {"a": [0.8, 0.3, 0.2], "b": [0.4, NAN, 1.0]}  # the last prompt had no b before, so b must not rise
    total = paired_table(before, after, weights).total
    assert total.before == pytest.approx(np.mean([0.75 * 0.4 + 0.25 * 0.8, 0.1, 0.2]))
    assert total.after == pytest.approx(np.mean([0.75 * 0.8 + 0.25 * 0.4, 0.3, 0.2]))


def test_samples_of_one_prompt_are_averaged_before_resampling() -> None:
    rng = np.random.default_rng(1)
    effect = rng.normal(0.1, 0.3, 25)  # per prompt; the eight samples of a prompt repeat it
    ids = np.repeat([f"p{i}" for i in range(25)], 8).tolist()
    before, after = {"r": np.zeros(200)}, {"r": np.repeat(effect, 8)}
    grouped = paired_table(before, after, prompt_ids=ids).rows[0]
    alone = paired_table({"r": np.zeros(25)}, {"r": effect}).rows[0]
    naive = paired_table(before, after).rows[0]
    assert grouped.prompts == 25
    assert [grouped.low, grouped.high] == pytest.approx([alone.low, alone.high])
    assert naive.high - naive.low < 0.5 * (grouped.high - grouped.low)


def test_prompts_with_a_partly_missing_group_still_count() -> None:
    row = paired_table({"r": [0.2, NAN, 0.4, 0.4]}, {"r": [0.4, 0.6, NAN, NAN]}, prompt_ids=[1, 1, 2, 2]).rows[0]
    assert row.prompts == 1
    assert [row.before, row.after] == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize(("n", "kind"), [(12, "normal"), (40, "normal"), (40, "skewed"), (64, "binary")])
def test_the_interval_covers_the_truth_at_the_promised_rate(n: int, kind: str) -> None:
    draws = 600
    covered = 0
    for seed in range(draws):
        rng = np.random.default_rng(10_000 + seed)
        if kind == "normal":
            values, truth = rng.normal(0.3, 1.0, n), 0.3
        elif kind == "skewed":
            values, truth = rng.exponential(1.0, n), 1.0
        else:
            values, truth = (rng.random(n) < 0.3).astype(float), 0.3
        low, high = bootstrap_interval(values, rng, 1000)
        covered += low <= truth <= high
    # two standard errors of the estimate are 0.018; skewed data are known to be covered a little less
    assert 0.92 <= covered / draws <= 0.98


def test_nothing_scored_and_constant_changes() -> None:
    before = {"none": [NAN] * 6, "one": [0.0] * 6}
    table = paired_table(before, {"none": [NAN, 1.0] * 3, "one": [1.0] * 6})
    assert table.rows[0].verdict == "too few prompts"
    assert (table.rows[1].low, table.rows[1].high, table.rows[1].verdict) == (1.0, 1.0, "rose")


def test_a_few_prompts_tell_nothing_however_alike_they_change() -> None:
    for prompts in range(1, 9):
        table = paired_table({"r": [0.0] * prompts}, {"r": [1.0] * prompts})
        assert table.rows[0].verdict == ("too few prompts" if prompts < 6 else "rose")
    few = paired_table({"r": [0.0] * 2}, {"r": [1.0] * 2})
    assert "| few | +1.000 [+1.000, +1.000] (too few prompts) |" in seeds_table({"few": few})
    same = paired_table({"r": [0.0] * 24}, {"r": [1.0] * 24}, prompt_ids=[0, 1] * 12)  # many pictures of two prompts
    assert same.rows[0].verdict == "too few prompts"


def test_text_markdown_and_json_say_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.random(30)
    table = paired_table({"judge": base, "ocr": [NAN] * 30}, {"judge": base + 0.1, "ocr": [NAN] * 30})
    lines = table.to_text().splitlines()
    assert lines[0].split("  ")[0] == "reward"
    assert len(lines) == 6
    assert max(map(len, lines)) <= 100
    assert "| judge |" in table.to_markdown()
    assert "rose" in lines[2]
    table.save_json(tmp_path / "report.json")
    assert "NaN" not in (tmp_path / "report.json").read_text()
    assert load_table(tmp_path / "report.json").to_text() == table.to_text()


def test_seeds_table_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}").mkdir()
        base = np.random.default_rng(seed).random(20)
        paired_table({"judge": base}, {"judge": base + 0.1}).save_json(tmp_path / f"seed-{seed}" / "report.json")
    main([str(tmp_path / f"seed-{seed}" / "report.json") for seed in (0, 1)])
    printed = capsys.readouterr().out
    assert "| seed-1 | **+0.100 [+0.100, +0.100]** |" in printed
    assert "weighted total" in printed
    assert seeds_table({}).startswith("| run |")


def test_a_file_that_is_no_report_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    for path in (tmp_path / "x.json", tmp_path / "absent.json"):
        with pytest.raises(UserError, match=str(path)):
            load_table(path)


@pytest.mark.parametrize(
    ("after", "weights", "ids"),
    [
        ({"other": [1.0, 2.0]}, None, None),
        ({"r": [1.0]}, None, None),
        ({"r": [1.0, 2.0]}, [[1.0]], None),
        ({"r": [1.0, 2.0]}, [[1.0], [-1.0]], None),
        ({"r": [1.0, 2.0]}, None, ["p"]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(after, weights, ids) -> None:
    with pytest.raises(ValueError, match=r".+"):
        paired_table({"r": [0.1, 0.2]}, after, weights, prompt_ids=ids)
