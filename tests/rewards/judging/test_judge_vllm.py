"""The judge on vLLM's offline engine: against transformers, and against the same engine behind HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewards.judging.judge_vllm import reserved_tokens
from tests.helpers.offline_judge import FOLDER, requests
from tests.rewards.test_judge import transformers_probabilities


@pytest.mark.vllm
@pytest.mark.slow
def test_scores_are_those_of_transformers_here_and_through_a_server(root: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.offline_judge"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    here, there = found["here"], found["there"]
    assert here.pop(3) == there.pop(3) == "too_long"  # and disturbs no other
    assert there == pytest.approx(here, abs=1e-6)
    asked = requests()
    del asked[3]
    wanted = transformers_probabilities(root / FOLDER, asked)
    assert here == pytest.approx(wanted, abs=5e-4)
    assert max(wanted) - min(wanted) > 0.5
    two, three, none = found["odd"]
    assert two[1] == none[1] == 20 and three == "refused"  # two images are allowed, words alone, too
    ((text, tokens),) = found["written"]
    assert text and tokens == 0
    assert found["broken"] == "vLLM has failed: RuntimeError: CUDA error: out of memory"
    assert found["wrong"].startswith("rewards.vlm_judge.path: vLLM cannot serve ") and "\n" not in found["wrong"]


def test_reserved_are_special_tokens_and_marks_but_no_ordinary_words() -> None:
    added = {"<|im_end|>": 1, "<think>": 2, "  ": 3, "cat": 4, "[INST]": 5, "\n": 6}
    tokenizer = SimpleNamespace(all_special_tokens=["<|im_end|>", "<s>", " "], get_added_vocab=lambda: added)
    assert reserved_tokens(tokenizer) == ("<|im_end|>", "<s>", "<think>", "[INST]")
