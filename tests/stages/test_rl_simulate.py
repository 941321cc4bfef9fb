"""`stages/rl.py --simulate`: its terms, and its text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deepgen.config import Settings, UserError, load_settings, parse_command_line
from deepgen.planning.scale.phases import CallTime
from stages.rl_simulate import parse_terms, phase_figures, scale_lines, show_scale

ALL = "sample_s=4 load_s=0 score_s=judge:0.1,clip:0.01,aesthetic:0.01,ocr:1+0 update_s=2 step_s=0.5 publish_s=0.1"


@pytest.fixture
def settings(root: Path) -> Settings:
    return load_settings(root / "stages" / "recipes" / "tiny-rl.yaml", ["rollout.prompts_per_step=8"])


def test_terms(settings: Settings) -> None:
    terms = parse_terms(
        "GPUs=48..200 sample_s=2.1 score_s=judge:0.3,ocr:2+0.5 gpu_hour=2.5 tasks=t2i:3 from=a", settings
    )
    assert terms.gpus == (48, 64, 128, 200)
    assert terms.numbers == {"sample_s": 2.1, "gpu_hour": 2.5}
    assert terms.scores == {"judge": CallTime(0.0, 0.3), "ocr": CallTime(2.0, 0.5)}
    assert (terms.tasks, terms.run) == ({"t2i": 3.0}, "a")
    assert parse_terms("GPUs=8", settings).gpus == (8,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample_s=2", "got no GPUs"),
        ("GPUs=0", "GPUs: got '0'; allowed: 1 to 65536"),
        ("GPUs=64..8", "allowed: a range from the smaller to the larger"),
        ("GPUs=8 sampel_s=2", "unknown term 'sampel_s'; did you mean 'sample_s'"),
        ("GPUs=8 sample_s", "sample_s: got no value"),
        ("GPUs=8 sample_s=x", "sample_s: got 'x'; allowed: a number from 0 to 1e+06"),
        ("GPUs=8 sample_s=nan", "sample_s: got 'nan'"),
        ("GPUs=8 utilisation=2", "utilisation: got '2'; allowed: a number from 0.001 to 1"),
        ("GPUs=8 node_gpus=1.5", "node_gpus: got '1.5'; allowed: a whole number"),
        ("GPUs=8 sample_s=1 sample_s=2", "sample_s: given twice"),
        ("GPUs=8 score_s=nobody:1", "score_s: got 'nobody:1'; allowed: NAME:NUMBER, with"),
        ("GPUs=8 score_s=judge:-1", "score_s=judge: got '-1'"),
        ("GPUs=8 tasks=sing:1", "tasks: got 'sing:1'"),
    ],
)
def test_a_bad_term_is_one_line(settings: Settings, text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        parse_terms(text, settings)
    assert str(caught.value).startswith("--simulate: ") and "\n" not in str(caught.value)


def test_too_few_gpus_and_no_such_run(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"GPUs=1 are too few for tiny-rl: .* need \d"):
        list(scale_lines(settings, f"GPUs=1 {ALL}", print))
    with pytest.raises(UserError, match=r"--simulate: from: there is no run 'nowhere'"):
        list(scale_lines(settings, "GPUs=8 from=nowhere", print))


def test_the_text(settings: Settings) -> None:
    said: list[str] = []
    lines = list(scale_lines(settings, f"GPUs=4..8 gpu_hour=2 tasks=t2i:1 {ALL}", said.append))
    text = "\n".join(lines)
    assert "tiny-rl: 26 steps of 8 groups, 8 images each" in lines[0]
    assert re.search(r"sample_s +4 +given ", text) and re.search(r"restart_s +120 +assumed ", text)
    assert re.search(r"score_s=ocr +1 \+ 0 +given", text) and re.search(r"control_s +0.0031 +measured", text)
    rows = [line.split() for line in lines if re.match(r" +[48] +\d+ +[01] ", line)]
    assert [(row[0], row[2]) for row in rows] == [("4", "0"), ("4", "1"), ("8", "0"), ("8", "1")]
    assert all(int(row[1]) <= int(row[0]) for row in rows)
    assert float(rows[2][3]) < float(rows[0][3])  # more GPUs, shorter steps
    assert all(0.9 < float(row[5]) <= 1 for row in rows)
    assert float(rows[0][8].replace(",", "")) == pytest.approx(2 * float(rows[0][7].replace(",", "")), abs=1.5)
    chosen = next(line for line in lines if line.startswith("      8  train.workers="))
    assert "experience.max_staleness=" in chosen and "train.checkpoint_every=" in chosen
    changes = [word for word in chosen.split() if "=" in word]
    load_settings(None, changes)  # each can be set
    assert said and all("GPUs: " in line for line in said)


def test_times_of_a_run_are_used_and_given_ones_win(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    spans = [
        {"actor": actor, "role": role, "what": what, "begin": 10.0, "end": 10.0 + seconds, "step": 1, "version": 1}
        for actor, role, what, seconds in (
            ("rollout-0", "rollout", "sample", 3.0),
            ("learner 0", "learner", "update", 5.0),
            ("learner 0", "learner", "publish", 0.25),
        )
    ]
    (folder / "timeline-a.jsonl").write_text("".join(json.dumps(span) + "\n" for span in spans), encoding="utf-8")
    figures = phase_figures(settings, parse_terms(f"GPUs=8 from={folder} publish_s=7", settings))
    found = {name: (figures.numbers[name].value, figures.numbers[name].source) for name in figures.numbers}
    assert found["sample_s"] == (3.0, "measured") and found["update_s"] == (5.0, "measured")
    assert found["publish_s"] == (7.0, "given") and found["restart_s"] == (120.0, "assumed")


def test_it_runs_instead_of_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--simulate", f"GPUs=4 {ALL}", "rollout.prompts_per_step=4"]
    with pytest.raises(SystemExit) as ended:
        parse_command_line("rl", arguments, instead={"simulate": show_scale})
    assert not ended.value.code
    assert "to set, for the shorter run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_command_line("rl", ["--help"])
    assert '  --simulate "GPUs=64..4096 [TERM=VALUE]..."' in capsys.readouterr().out
