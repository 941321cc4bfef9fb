"""Stage 1, alignment: the think tokens and the bridge learn to steer the frozen DiT (method 2).

python stages/pretrain.py [--recipe NAME_OR_PATH] [KEY=VALUE ...] [--resume] [--plan]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from deepgen.config import run_program  # noqa: E402
from stages.supervised import main  # noqa: E402

if __name__ == "__main__":
    run_program(lambda: main("pretrain"))
