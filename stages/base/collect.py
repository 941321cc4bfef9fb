"""Put a trained component folder into assets/tiny/model, rounded to bf16 (the VAE stays fp32).

python -m stages.base.collect runs/tiny-sft/model
"""

import argparse
import shutil
from pathlib import Path

import torch

from deepgen.models.unified import UnifiedModel
from stages.base.training import MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="component folder of a finished run")
    args = parser.parse_args()
    model = UnifiedModel.from_folder(args.folder, preset="tiny")
    for name, part in model.named_children():
        if name != "vae":
            part.to(torch.bfloat16)
    model.meta_queries.data = model.meta_queries.data.to(torch.bfloat16)
    beside = MODEL.with_name("model.new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_folder(beside)
    shutil.copy(MODEL / "vlm" / "preprocessor_config.json", beside / "vlm")
    shutil.copytree(MODEL / "vae", beside / "vae", dirs_exist_ok=True)  # a later step has improved its decoder
    shutil.rmtree(MODEL)
    beside.rename(MODEL)
    size = sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file())
    print(f"{MODEL}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
