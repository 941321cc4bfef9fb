"""Write a checkpoint in another layout: our component folder, the diffusers folder, or native names.

    python stages/export.py SOURCE OUT [--layout components|diffusers|native]

SOURCE: a run, finished or not, one of its checkpoints, a component folder, a diffusers folder, a DeepSpeed folder (also
one named *.pth), a .pt, .pth or .safetensors file, a folder of .safetensors, or a LoRA as peft writes it. Missing parts
come from --base (a component folder), --vlm (Qwen2.5-VL) and --dit (transformer/ and vae/). The name and shape of every
tensor are checked before anything is written. OUT appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from deepgen.config import UserError, run_program  # noqa: E402
from deepgen.config.schema.paths import argument  # noqa: E402
from stages.exporting.export_run import find_source, is_checkpoint, padding_of, read_checkpoint  # noqa: E402

if TYPE_CHECKING:
    from deepgen.models.weights_io.layout_reader import Weights

TARGETS = ("components", "diffusers", "native")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=argument)
    parser.add_argument("out", type=argument, help="a folder that does not exist yet")
    parser.add_argument("--layout", choices=TARGETS, default="components")
    parser.add_argument("--base", type=argument, help="component folder that supplies what SOURCE lacks")
    parser.add_argument("--vlm", type=argument, help="Qwen2.5-VL as published")
    parser.add_argument("--dit", type=argument, help="folder with transformer/ and vae/, as UniPic2 is published")
    parser.add_argument(
        "--preset", choices=("tiny", "deepgen-5b"), default="deepgen-5b", help="bridge sizes, if no file has them"
    )
    parser.add_argument("--ema", action="store_true", help="of a run, the averages (train.ema_decay)")
    parser.add_argument("--variant", default="", help="fp16 takes x.fp16.safetensors where x.safetensors is there too")
    parser.add_argument("--dtype", choices=("keep", "fp32", "bf16", "fp16"), default="keep")
    parser.add_argument("--without-lora", action="store_true", help="SOURCE is of stage 1 and never had a LoRA")
    return parser.parse_args()


def main() -> int:
    args = parse()
    from deepgen.models.weights_io import layout_writer as export  # late: --help needs no torch
    from deepgen.models.weights_io.layout_reader import read_weights

    source = find_source(args.source, averages=args.ema)
    bases, preset = export.Bases(args.base, args.vlm, args.dit), args.preset
    if is_checkpoint(source):
        for option, given in (("--vlm", args.vlm), ("--dit", args.dit), ("--variant", args.variant)):
            if given:
                raise UserError(
                    f"{option}: got {given} with the checkpoint {source}; allowed: --base, if its base moved"
                )
        found = read_checkpoint(source, args.base, averages=args.ema)
        weights, bases, preset = found.trained, export.Bases(found.base), found.preset
    else:
        weights = read_weights(source, args.variant)
    weights.padding = padding_of(args.source)
    weights = export.complete(weights, bases, without_lora=args.without_lora)
    architecture = export.find_architecture(weights, bases, preset)
    export.check_weights(weights, architecture)
    print(f"{source}: {weights.layout} layout, {architecture.describe()}, {lora_line(weights)}", flush=True)
    export.write(weights, architecture, bases, args.layout, args.out, args.dtype)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {args.layout} layout, {size / 1e6:,.1f} MB")
    return 0


def lora_line(weights: Weights) -> str:
    dit = f", LoRA of rank {weights.dit_rank} on the DiT" if weights.dit_lora else ""
    if weights.lora:
        return f"LoRA of rank {weights.lora_rank} on {len(weights.lora) // 2} modules{dit}"
    return ("LoRA merged" if weights.merged else "no LoRA") + dit


if __name__ == "__main__":
    run_program(main, resumes=False)
