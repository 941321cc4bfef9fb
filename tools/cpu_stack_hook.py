"""Import hook that lets CUDA builds of torchvision, torchaudio and torchcodec work beside a CPU build of torch.

PyPI offers these three packages only as CUDA builds. With `torch+cpu`, torchvision fails with "operator
torchvision::nms does not exist": it cannot load its compiled operators, yet registers fakes for two of them. torchaudio
and torchcodec cannot load at all, and transformers and vLLM treat that as an error, not as an absent package.

`tools/repair_cpu_stack.py` copies this file into site-packages and adds a `.pth` line that imports it. So it runs at
the start of every Python process of the environment, including Ray workers and vLLM engines. It reads version files as
text and imports nothing heavy. If torch is a CUDA build or torchvision a CPU build, it does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

ABSENT_ON_CPU = ("torchaudio", "torchcodec")
OPERATORS = ("nms", "qnms")  # torchvision registers fakes for these even if its operators are not loaded
OPERATOR_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_libraries: list[Any] = []  # keeps them alive: a garbage-collected torch.library.Library unregisters its operators


def build_of(package: str, site: Path) -> str | None:
    """Local part of a package's version, such as "cpu" or "cu130"; "" if it has none, None if not installed."""
    version_file = site / package / "version.py"
    if not version_file.is_file():
        return None
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", version_file.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1).partition("+")[2] if match else ""


def needs_repair(site: Path) -> bool:
    """Whether torch is a CPU build and torchvision a CUDA build."""
    return build_of("torch", site) == "cpu" and (build_of("torchvision", site) or "").startswith("cu")


def declare_operators() -> None:
    """Declare, without kernels, the operators that torchvision's extension would register if it loaded."""
    import torch

    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + OPERATOR_SIGNATURE)
    _libraries.append(library)


class _DeclareFirst(importlib.machinery.SourceFileLoader):
    """Declares torchvision's operators and then loads torchvision."""

    def exec_module(self, module: ModuleType) -> None:
        declare_operators()
        super().exec_module(module)


class TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Finds torchvision where Python would find it, and gives it the loader above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return spec
        return importlib.util.spec_from_file_location(
            fullname,
            spec.origin,
            loader=_DeclareFirst(fullname, spec.origin),
            submodule_search_locations=spec.submodule_search_locations,
        )


def install(site: Path) -> bool:
    """Install the hook in this process if the packages in `site` need it. Returns whether it did."""
    if any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path) or not needs_repair(site):
        return False
    sys.meta_path.insert(0, TorchvisionFinder())
    for name in ABSENT_ON_CPU:
        if (build_of(name, site) or "").startswith("cu"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None means "absent" to Python
    return True


if __name__ == "deepgen_cpu_stack_hook":  # the name in site-packages; other imports (tests) change nothing
    install(Path(__file__).resolve().parent)
