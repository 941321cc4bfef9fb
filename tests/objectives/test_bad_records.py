"""Unusable training records are left out of every mean, listed once and counted; too many end the run."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from actors.learner.protocols import StepContext
from actors.objectives.flow_matching import FlowMatching
from actors.objectives.record_source import MixtureSource
from deepgen.config import UserError, load_settings
from deepgen.data.cache.encoded import EncodingCache, MemoryStore
from deepgen.data.loading.dataset import LATENT, TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ListStore, ParquetStore
from deepgen.data.parquet import write_records
from deepgen.data.quarantine import FILE, BadRow, Quarantine
from deepgen.data.records import Record, RecordError
from tests.data.test_records import EDIT, GOOD, PICTURE
from tests.helpers.factories import make_tiny_model
from tests.helpers.learner_workers import run_workers
from tests.helpers.sft_world import component, make_records, make_sft_world, stage_overrides


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header of this size, followed by only a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def strip(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (replace(GOOD, image=PICTURE[:40]), "image is not a readable image"),
        (replace(GOOD, image=b"<html>"), "image is not a readable image (cannot identify image file"),
        (replace(GOOD, image=None), "no target image"),
        (replace(GOOD, image=strip(90, 10)), "image is 90x10 px; allowed: sides in a ratio of at most 8"),
        (replace(GOOD, image=bomb(60_000, 60_000)), "(Image size (3600000000 pixels) exceeds limit"),
        (replace(GOOD, image=bomb(11_000, 10_000)), "(11000x10000 px; allowed: at most 100,000,000 pixels)"),
        (replace(GOOD, prompt=" "), "prompt is empty"),
        (replace(GOOD, prompt="a <|im_end|> b"), "prompt contains the reserved token <|im_end|>"),
        (replace(GOOD, answer="a <|im_end|> b"), "answer contains the reserved token <|im_end|>"),
        (replace(GOOD, prompt=None), "prompt is null; allowed: text"),  # type: ignore[arg-type]
        (replace(GOOD, references=(PICTURE,)), "task t2i with 1 reference images"),
        (replace(EDIT, references=()), "task edit with 0 reference images"),
        (replace(EDIT, references=(PICTURE, b"x")), "reference 2 is not a readable image"),
        (replace(GOOD, image="gone.png"), "gone.png: No such file or directory"),
    ],
)
def test_each_kind_of_bad_record_has_its_reason(
    tmp_path: Path, bad: Record, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(bad.image, bytes) and bad.image.startswith(b"\x89PNG") and "pixels" in reason:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("a bomb was decoded"))
    write_records(tmp_path / "x.parquet", [bad])
    data = TrainingSet(ParquetStore(tmp_path), 64, ["<|im_end|>"])
    with pytest.raises(RecordError) as caught:
        data.sample(0)
    assert reason in caught.value.reason and caught.value.id == bad.id
    assert str(caught.value) == f"{tmp_path / 'x.parquet'}, row 1: {caught.value.reason}"


def rows(*numbers: int) -> list[BadRow]:
    return [BadRow("a.parquet", number, f"id{number}", "truncated") for number in numbers]


def test_each_row_is_written_once_also_after_a_resume(tmp_path: Path) -> None:
    said: list[str] = []
    first = Quarantine(0.5, tmp_path, say=said.append)
    first.add(10, rows(3, 4, 3))
    first.add(10, rows(4))
    assert len(said) == 1 and "a.parquet, row 3 is left out (truncated)" in said[0] and FILE in said[0]
    with (tmp_path / FILE).open("a") as stream:
        stream.write('{"file": "a.par')  # killed
    resumed = Quarantine(0.5, tmp_path, resume=True, say=said.append)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict() and (resumed.read, resumed.bad) == (20, 4)
    Quarantine(0.5, tmp_path, rank=1).add(10, rows(9))
    resumed.add(10, rows(4, 5))
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["row"] for line in lines] == [3, 4, 5]
    assert lines[0] == {"file": "a.parquet", "row": 3, "id": "id3", "reason": "truncated"}
    Quarantine(0.5, tmp_path)
    assert not (tmp_path / FILE).exists()  # a new run


def test_a_row_is_the_same_on_every_node(tmp_path: Path) -> None:
    """Nodes with a checkout each read the same file under different paths; so may a resume."""
    first = Quarantine(0.01, tmp_path, say=lambda _: None)
    for node in range(20):
        first.add(50, [BadRow(f"/node-{node}/data/a.parquet", 3, "id", "truncated")])
    assert len((tmp_path / FILE).read_text().splitlines()) == 1
    resumed = Quarantine(0.01, tmp_path, resume=True, say=lambda _: pytest.fail("told before"))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed.add(50, [BadRow("/another/data/a.parquet", 3, "id", "truncated")])
    assert len((tmp_path / FILE).read_text().splitlines()) == 1


def test_too_many_bad_records_end_the_run(tmp_path: Path) -> None:
    few = Quarantine(0.01, tmp_path)
    for _ in range(30):
        few.add(50, rows(1, 2, 3, 4, 5))  # a small set, again and again: 10 %, but five rows
    with pytest.raises(UserError) as caught:
        few.add(50, rows(6))
    assert str(caught.value) == (
        "data.train: 9.7% of 1,550 records read cannot be used; allowed: 1.0% (data.max_bad_share); "
        f"{tmp_path / FILE} lists them with reasons"
    )
    early = Quarantine(0.01, tmp_path)
    early.add(199, rows(*range(20)))
    with pytest.raises(UserError, match=r"10\.0% of 200 records"):
        early.add(1, [])
    Quarantine(1.0, tmp_path).add(300, rows(*range(300)))
    with pytest.raises(UserError, match=r"50\.0% of 2 records read cannot be used; allowed: 0\.0%"):
        Quarantine(0.0, tmp_path).add(2, rows(1))


# -- in the loss -----------------------------------------------------------------------------------------------------


def damaged(*numbers: int) -> list[Record]:
    """12 records, with edits 1, 5 and 9. The records `numbers` have truncated images."""
    return [replace(r, image=r.image[:50]) if i in numbers else r for i, r in enumerate(make_records())]  # type: ignore[index]


def make_objective(records: list[Record], folder: Path, micro_batch: int = 3) -> tuple[FlowMatching, MixtureSource]:
    settings = load_settings(None, ["data.micro_batch=3", "data.image_size=64", "data.t2i_per_cycle=3"])
    cache = EncodingCache({LATENT: lambda image: image[:1, ::4, ::4].repeat(8, 1, 1)}, MemoryStore())
    objective = FlowMatching(settings, cache, Quarantine(1.0, folder))
    data = TrainingSet(ListStore(records), 64)
    return objective, MixtureSource(
        data, Mixture.from_settings(settings, data.store, micro_batch), objective.cache, objective.quarantine
    )


def test_a_bad_record_is_in_no_mean(tmp_path: Path) -> None:
    """One step reads all 12 records. Good ones keep their random numbers, and means run over good ones only."""
    context = StepContext(42, 0, 0, 1, torch.device("cpu"))
    model: Any = make_tiny_model()

    def losses(folder: Path, *bad: int) -> tuple[list[Any], list[Tensor], list[Any]]:
        objective, source = make_objective(damaged(*bad), folder)
        micros = objective.prepare(model, source.next(0, 0, 1), context)
        found = [objective.loss(model, micro, context) for micro in micros]
        return micros, [loss.detach() for loss, _ in found], [metrics for _, metrics in found]

    whole, _, _ = losses(tmp_path / "whole")
    micros, values, metrics = losses(tmp_path / "bad", 1, 5, 9, 2)
    assert [micro.task for micro in micros] == ["edit", "t2i", "t2i", "t2i"]
    assert sorted(micro.bad for micro in micros[1:]) == [0, 0, 1] and micros[0].bad == 3
    assert [micro.share for micro in micros] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert values[0] == 0 and "loss/flow_matching" not in metrics[0] and "images_sum" not in metrics[0]
    assert [entry["data/quarantined_sum"] for entry in metrics] == [micro.bad for micro in micros]
    for kept, before in zip(micros[1:], whole[1:], strict=True):
        assert len(kept.prompts) == len(before.prompts) - kept.bad
        noise = [n for n, prompt in zip(before.noise, before.prompts, strict=True) if prompt in kept.prompts]
        assert kept.bad or all(torch.equal(*pair) for pair in zip(kept.noise, noise, strict=True))
    loss, _ = make_objective(damaged(), tmp_path)[0].loss(model, micros[0], context)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    lines = [json.loads(line) for line in (tmp_path / "bad" / FILE).read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [2, 3, 6, 10]


def test_the_mean_is_over_what_remains_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of 3 with bad records have the loss of one rank of 6. One rank's edit batch has no usable record."""
    model: Any = make_tiny_model()

    def total(micro_batch: int, rank: int, world: int, everyone: list[Any] | None = None) -> float:
        objective, source = make_objective(damaged(1, 5, 9, 2, 3), tmp_path, micro_batch)
        batch = source.next(1, rank, world)
        mine = [(len(micro.indices), micro.bad) for micro in batch]
        ranks = [mine] if everyone is None else [*everyone, mine]
        if everyone is not None:
            everyone.append(mine)
        monkeypatch.setattr(
            "actors.objectives.flow_matching.gather", lambda given, _: ranks if isinstance(given, list) else [given]
        )
        context = StepContext(42, 1, rank, world, torch.device("cpu"))
        if everyone is not None and len(ranks) < world:
            return 0.0  # the other rank's counts are not known yet
        return sum(
            float(objective.loss(model, micro, context)[0].detach())
            for micro in objective.prepare(model, batch, context)
        )

    first, second = list[Any](), list[Any]()
    total(3, 0, 2, first), total(3, 1, 2, second)
    both = (total(3, 0, 2, [*second]) + total(3, 1, 2, [*first])) / 2
    assert both == pytest.approx(total(6, 0, 1), rel=1e-4)


def test_a_step_without_any_usable_record_ends_the_run(tmp_path: Path) -> None:
    objective, source = make_objective(damaged(*range(12)), tmp_path)
    with pytest.raises(UserError, match=r"no record of step 0 can be used; see .*quarantine\.jsonl"):
        objective.prepare(make_tiny_model(), source.next(0, 0, 1), StepContext(1, 0, 0, 1, torch.device("cpu")))


@pytest.mark.processes
@pytest.mark.slow
def test_ranks_with_nothing_to_do_and_a_resume_change_nothing(tmp_path: Path, empty_database: Path) -> None:
    """Two ranks under ZeRO-3 with one record each, so a bad record leaves a rank with none. Then the run is killed."""
    make_sft_world(tmp_path, empty_database)
    write_records(tmp_path / "train.parquet", damaged(1, 2, 3, 8))

    def run(name: str, ranks: int, micro: int, **more: Any) -> dict[str, Any]:
        overrides = stage_overrides(
            tmp_path, tmp_path / "runs", name, f"train.workers={ranks}", f"data.micro_batch={micro}",
            f"train.zero_stage={3 if ranks == 2 else 2}", "model.lora_dropout=0", "data.max_bad_share=1",
            "tracking.grid_every=0",
        )  # fmt: skip
        return {"stage": "sft", "overrides": overrides} | more

    run_workers(tmp_path, [run("one", 1, 2)])
    run_workers(tmp_path, [run("two", 2, 1, die_after=3)], world=2, exit_code=9)
    run_workers(tmp_path, [run("two", 2, 1)], world=2)  # continues from the checkpoint
    for part in ("bridge", "transformer", "vlm_lora"):
        one, two = (component(tmp_path / "runs", name, part) for name in ("one", "two"))
        assert one and one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5, msg=f"{part} {name}")
    found = [(tmp_path / "runs" / name / FILE).read_text().splitlines() for name in ("one", "two")]
    assert sorted(found[0]) == sorted(found[1])
    assert [json.loads(line)["row"] for line in sorted(found[0])] == [2, 3, 4, 9]
