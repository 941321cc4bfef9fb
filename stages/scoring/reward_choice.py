"""Which rewards a program beside training uses: names, a recipe, or both, with overrides as the stages take them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from deepgen.cluster.resources import Need, pool_need
from deepgen.config import PoolSettings, Settings, UserError, load_settings
from deepgen.config.recipes import find_recipe
from deepgen.config.stage_rules import require_paths
from deepgen.errors import nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rewards",
        metavar="NAME,...",
        help="pools, as under `rewards` in a recipe, or package.module:Class for one with its usual options "
        "(default: all that the recipe gives a weight)",
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="where the pools' settings come from")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as rewards.clip.path=weights/clip")
    parser.add_argument("--address", help="Ray cluster, as cluster.address (default: one of this program's own)")


def chosen(args: argparse.Namespace) -> tuple[Settings, list[PoolSettings]]:
    """The settings, and those of the chosen pools. Raises UserError for what is unknown, and for missing files."""
    if not args.rewards and not args.recipe:
        raise UserError("--rewards: got none; allowed: names of rewards, or a --recipe that has some")
    names, classes = list[str](), list[str]()
    for given in filter(None, (args.rewards or "").replace(" ", ",").split(",")):
        name = given.rpartition(":")[2].lower() if ":" in given else given
        if name in names:
            raise UserError(f"--rewards: {name!r} is there twice; allowed: once; for a second, rewards.NAME.class=...")
        names.append(name)
        classes += [f"rewards.{name}.class={given}"] if ":" in given else []
    address = [f"cluster.address={args.address}"] if args.address else []
    recipe = find_recipe(args.recipe) if args.recipe else None
    settings = load_settings(recipe, [*classes, *address, *args.overrides])
    pools = settings.rewards.pools
    for name in names:
        if name not in pools:
            raise UserError(
                f"--rewards: got {name!r}{nearest(name, pools)}; allowed: {', '.join(pools)}, a pool whose "
                "rewards.NAME.class is given, or package.module:Class"
            )
    found = [pools[name] for name in names or settings.rewards.used()]
    if not found:
        raise UserError(f"--recipe: {args.recipe} gives no reward a weight; name some with --rewards")
    for pool in found:
        require_paths(pool.input_paths())
    return settings, found


def needs_of(pools: Sequence[PoolSettings]) -> Callable[..., list[Need]]:
    """What their replicas need of a cluster, as `connect` asks."""
    return lambda settings, gpus: [pool_need(settings.cluster, pool, gpus=gpus) for pool in pools]
