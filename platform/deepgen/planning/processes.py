"""What `--plan` says of rl's processes beside the learner: rollout actors, reward pools, and all GPUs together.

The GPUs are those that the run will request (`cluster.resources.rl_needs`). Of a reward's memory only the size of its
weights' files is known, and only where they lie here: nothing is loaded, and no size is guessed from a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from deepgen.cluster.resources import pool_placement, rl_needs, role_placement
from deepgen.config import PoolSettings, Settings
from deepgen.config.schema.paths import resolve_path
from deepgen.config.schema.roles import ROLLOUT
from deepgen.planning.memory import GIB

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def other_processes(settings: Settings, model_bytes: int) -> Iterator[str]:
    """Lines about all processes of rl but the learner's. model_bytes: of the model that each rollout actor holds."""
    least, most = settings.rollout.least_actors, settings.rollout.most_actors
    grows = f", up to {most} as nodes come" if most > least else ""
    each = _gpus(role_placement(settings.cluster, ROLLOUT, gpus=True).resources["GPU"])
    yield "beside the learner"
    yield f"  {least} {'rollout actor' if least == 1 else 'rollout actors'}{grows}, {each} each (rollout.actors)"
    yield f"    the model in fp32: {model_bytes / GIB:.1f} GiB"
    yield "    not estimated: forward passes and decoding, which keep nothing"
    for name in settings.rewards.used():
        yield from _pool(settings, settings.rewards.pools[name])
    yield from _sums(settings)


def _pool(settings: Settings, pool: PoolSettings) -> Iterator[str]:
    """Of one reward pool: replicas, where they run, and the memory that is known."""
    name, key = pool.pool_name, pool.dotted("replicas")
    least, most = pool.least_replicas, pool.most_replicas
    grows = f", up to {most} as requests wait" if most > least else ""
    head = f"  {name}: {least} {'replica' if least == 1 else 'replicas'}{grows}"
    if address := getattr(pool, "endpoint", "") or getattr(pool, "url", ""):
        yield f"{head} that only ask {address} ({key}); what that needs is not in this plan"
        return
    if not pool.gpus:
        cpus = pool_placement(settings.cluster, pool, gpus=False).resources["CPU"]
        yield f"{head}, {cpus:g} of a CPU each and no GPU ({key})"
        return
    amount = _gpus(pool.gpus)
    share = getattr(pool, "gpu_memory_share", 0.0)  # of a reward on vLLM
    split = " of one machine, over which the model is split" if share and pool.gpus > 1 else ""
    yield f"{head}, {amount} each{split} ({key})"
    weights = _weights(pool)
    if share:
        yield f"    vLLM takes {share:.0%} of a GPU's memory: for the weights, and what they leave for its cache"
    else:
        yield "    not estimated: what its forward passes need"
    if weights:
        yield f"    weights on each GPU, as large as their files: {weights / max(1, int(pool.gpus)) / GIB:.1f} GiB"
    elif paths := " and ".join(str(path) for path in pool.input_paths().values()):
        yield f"    size of the weights: not known without files in {paths}"


def _gpus(amount: float) -> str:
    return "one GPU" if amount == 1 else f"{amount:g} of a GPU" if amount < 1 else f"{amount:g} GPUs"


def _weights(pool: PoolSettings) -> int:
    """Bytes of the weights' files of a reward that lie here; 0 without any."""
    return sum(sum(map(_size, _files(resolve_path(path)))) for path in pool.input_paths().values())


def _files(path: Path) -> Iterable[Path]:
    """The weights in a folder; of those that are there in several formats, one."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.rglob("*") if file.suffix in WEIGHTS]
    kind = min((WEIGHTS.index(file.suffix) for file in files), default=0)
    return [file for file in files if file.suffix == WEIGHTS[kind]]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _sums(settings: Settings) -> Iterator[str]:
    """All GPUs of the run, and the CPUs that Ray sets aside."""
    needs = rl_needs(settings, gpus=True)
    wanted = [need.per_process.get("GPU", 0.0) for need in needs for _ in range(need.count)]
    parts = [
        f"{need.count * need.per_process['GPU']:g} {need.role.split()[0]}"
        for need in needs
        if "GPU" in need.per_process
    ]
    yield f"GPUs in all: {cards(wanted)} ({', '.join(parts)})"
    largest = max(wanted)
    if any(0 < amount < 1 for amount in wanted):
        yield "  processes with parts of a GPU share one; that is sure on a single machine only"
    if largest > 1:
        yield f"  a process lies on one machine, so one of them needs {largest:g} GPUs"
    cpus = sum(need.count * need.per_process["CPU"] for need in needs)
    yield f"CPUs that Ray sets aside for all, to place them, no limits: {cpus:.1f}"
    yield ""


def cards(wanted: Iterable[float]) -> int:
    """GPUs for processes that want these amounts: whole ones for themselves, parts side by side, largest first."""
    whole, free, place, before = 0, list[float](), 0, 1.0
    for amount in sorted(wanted, reverse=True):
        if amount >= 1:
            whole += int(amount)
            continue
        place = place if amount == before else 0  # where one of this size had no room, the next one has none
        while place < len(free) and free[place] + 1e-6 < amount:
            place += 1
        if place == len(free):
            free.append(1.0)
        free[place] -= amount
        before = amount
    return whole + len([left for left in free if left < 1])
