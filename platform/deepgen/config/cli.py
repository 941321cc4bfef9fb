"""The command line of the stage programs: recipe, dotted overrides, --help, --print-config, --resume."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from deepgen.config.recipes import find_recipe, read_recipe
from deepgen.config.schema.paths import CHECKOUT
from deepgen.config.schema.pools import about_pool, own_keys, pool_keys, pool_type
from deepgen.config.settings import (
    ANY_POOL,
    Settings,
    allowed_values,
    is_pool_class,
    leaf_keys,
    load_settings,
    merge_settings,
    sections,
    shown_settings,
)
from deepgen.config.stage_rules import check_inputs, check_stage
from deepgen.errors import SUBMITTED_COPY, UserError, command, nearest
from deepgen.machine import prepare_process
from deepgen.models.stage_parts import Stage
from deepgen.registry import REWARDS

WIDTH = 100
_FLAGS = ("help", "plan", "print-config", "resume")
_INSTEAD = (
    "status",
    "rollout-only",
    "train-only",
    "simulate",
)  # options with a value that run something else than the stage
_WORDS = ("recipe", *_INSTEAD)  # options with a value

_PURPOSE = {
    "pretrain": "Alignment: trains think tokens and bridge by flow matching; VLM and DiT stay as they are.",
    "sft": "Joint fine-tuning: trains think tokens, bridge, DiT and a LoRA on the VLM by flow matching.",
    "rl": "MR-GRPO: rollout actors sample images, reward pools score them, the learner updates the DiT.",
}
_OPTIONS = """\
options:
  --recipe NAME_OR_PATH   differences to the defaults: a name in stages/recipes or a YAML file
                          (without it: {recipe})
  KEY=VALUE               sets one key; --KEY VALUE and --KEY=VALUE do the same. It wins over the
                          recipe; of two for one key the last wins. Values are written as in YAML.
  --resume                continue run.name from its last checkpoint (run.resume=true)
  --print-config          print all settings as YAML, which is itself a recipe, and start nothing;
                          *** stands for a secret
  --plan                  print the memory this run needs on each GPU and the smallest clusters that
                          have it, and start nothing; weights and data need not be there
{more}  --help                  this text
"""
_RL_OPTIONS = """\
  --status RUN            print what the rl run RUN does, a run.name in run.dir or a run folder, and
                          start nothing; exit code 2 if there is no such run
  --rollout-only STEPS    only draw and score so many steps with model.weights, and write them to
                          RUN/replay
  --train-only FOLDER     only train, on the steps in a folder: RUN/replay, or that of a failed step
  --simulate "GPUs=64..4096 [TERM=VALUE]..."
                          predict step time, idle shares, cost and effective training time on so
                          many GPUs, with the best split between the roles, and start nothing;
                          weights and data need not be there. Times in s that were measured replace
                          estimates: from=RUN takes those of a run; sample_s=2 update_s=4
                          score_s=judge:0.3,ocr:1+0.5 (a call + an image) give some. gpu_hour=2.5
                          is the price of a GPU hour. All terms: docs/scale.md
"""


@dataclass
class _Arguments:
    recipe: str
    instead: tuple[str, str] = ("", "")  # one of _INSTEAD, and its value
    overrides: list[str] = field(default_factory=list)
    print_config: bool = False
    plan: bool = False
    help: bool = False


def parse_command_line(
    stage: Stage,
    argv: Sequence[str],
    plan: Callable[[Settings, Stage], str] | None = None,
    instead: Mapping[str, Callable[[Settings, str], None]] | None = None,
) -> Settings:
    """Settings of one stage program, from its arguments without the program's name.

    `plan` makes the text of --plan. `instead`: programs by option, which run in the place of the stage with the
    option's value and check their inputs themselves. Like --help, --plan and --print-config they end with
    SystemExit(0).

    Raises UserError, before anything starts, for an unknown key, a bad value, a missing or broken recipe, two settings
    that do not work together, or a missing input file.
    """
    arguments = _read_arguments(stage, argv)
    if arguments.help:
        print(help_text(stage, arguments.recipe, arguments.overrides))
        sys.exit(0)
    settings = load_settings(find_recipe(arguments.recipe), arguments.overrides)
    check_stage(settings, stage)
    if arguments.print_config:
        print(yaml.safe_dump(shown_settings(settings), sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    if arguments.plan:
        if plan is None:
            raise UserError(f"--plan: {stage} has none; allowed: pretrain.py, sft.py and rl.py in stages/")
        print(plan(settings, stage))
        sys.exit(0)
    prepare_process()
    option, value = arguments.instead
    if option:
        if instead is None:
            raise UserError(f"--{option}: {stage} has none; allowed: rl.py in stages/")
        instead[option](settings, value)
        sys.exit(0)
    check_inputs(settings, stage)
    return settings


def stage_command(stage: Stage, *arguments: str | Path) -> str:
    """A line for a shell that runs a stage: this interpreter and this checkout's program, from any folder."""
    program = f"stages/{stage}.py"
    return command(program if CHECKOUT is None or SUBMITTED_COPY else CHECKOUT / program, *arguments)


def _read_arguments(stage: Stage, argv: Sequence[str]) -> _Arguments:
    arguments = _Arguments(recipe=f"tiny-{stage}")
    rest = iter(argv)
    for word in rest:
        name, equals, text = word.removeprefix("--").partition("=")
        if word in ("-h", "--help"):
            arguments.help = True
        elif word == "--print-config":
            arguments.print_config = True
        elif word == "--plan":
            arguments.plan = True
        elif word == "--resume":
            arguments.overrides.append("run.resume=true")
        elif word.startswith("--") and name:
            _check_option(name, has_value=bool(equals))
            value = text if equals else next(rest, None)
            if value is None or (not equals and value.startswith("--")):
                raise UserError(f"--{name}: got no value; allowed: --{name} VALUE")
            if name == "recipe":
                arguments.recipe = value
            elif name in _INSTEAD:
                if arguments.instead[0] not in ("", name):
                    raise UserError(f"--{name}: got --{arguments.instead[0]} beside it; allowed: one of the two")
                arguments.instead = (name, value)
            else:
                arguments.overrides.append(f"{name}={value}")
        elif equals and not word.startswith("-"):
            arguments.overrides.append(word)
        else:
            raise UserError(f"cannot read {word!r}; allowed: KEY=VALUE, --KEY VALUE, or an option of --help")
    return arguments


def _check_option(name: str, *, has_value: bool) -> None:
    """Raise UserError for an unknown option or a flag with a value. A name without a dot is an option, not a key.

    This check comes before the next word is read as the value.
    """
    if name in _FLAGS and has_value:
        raise UserError(f"--{name}: got a value; allowed: --{name} alone")
    if "." not in name and name not in _WORDS:
        raise UserError(f"unknown option '--{name}'{nearest(name, [*_WORDS, *_FLAGS, *leaf_keys()])}")


# ---- Help ----


def help_text(stage: Stage, recipe: str, overrides: Sequence[str] = ()) -> str:
    """The text of --help: examples, options, then each key with meaning, allowed values, default and recipe value.

    overrides: only the classes of reward pools matter, because they add keys. Raises UserError for a wrong class.
    """
    program, purpose = f"python stages/{stage}.py", textwrap.fill(_PURPOSE[stage], WIDTH)
    examples = [
        (program, f"the recipe tiny-{stage}"),
        (f"{program} train.steps=10 run.name=short", "the same, with two settings changed"),
        (f"{program} --train.steps 10 --run.name short", "the same again: both spellings work"),
        (f"{program} --recipe my.yaml --resume", "a recipe of your own, continued"),
    ]
    width = max(len(command) for command, _ in examples)
    lines = [
        f"usage: {program} [--recipe NAME_OR_PATH] [KEY=VALUE]... [--resume]",
        f"       {program} [--recipe NAME_OR_PATH] [KEY=VALUE]... --plan | --print-config",
        "",
        purpose,
        "",
    ]
    lines += ["examples:", *(f"  {command:<{width}}  {what}" for command, what in examples), ""]
    lines += [_OPTIONS.format(recipe=f"tiny-{stage}", more=_RL_OPTIONS if stage == "rl" else "")]
    lines += [f"settings (default; in brackets what {recipe} sets):"]
    return "\n".join([*lines, *_help_of_keys(recipe, overrides)])


def _help_of_keys(recipe: str, overrides: Sequence[str]) -> Iterator[str]:
    path, section = find_recipe(recipe), ""
    chosen, groups = read_recipe(path), sections()
    for key, leaf in leaf_keys({}).items():
        owner = key.rpartition(".")[0]
        if section == ANY_POOL != owner:
            yield from _help_of_pools(path, overrides)
        if owner != section:
            section = owner
            yield f"\n{section}: {groups[section].about}"
        yield from _help_of_key(key, leaf, _lookup(chosen, key))


def _help_of_pools(recipe: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Each pool, with the keys that not all pools have and the common keys that the recipe sets."""
    classes = [override for override in overrides if is_pool_class(override.partition("=")[0])]
    rewards = merge_settings(recipe, classes)[0]["rewards"]
    for name in dict.fromkeys([*REWARDS, *rewards]):
        if name == "weights":
            continue
        content = rewards.get(name) or {}
        kind = pool_type(name, content)
        yield "\n" + _wrap(f"rewards.{name}: {about_pool(name, content)}", 0, 2)
        shown = own_keys(kind) | {key: leaf for key, leaf in pool_keys(kind).items() if key in content}
        for key, leaf in shown.items():
            if key != "class":
                yield from _help_of_key(f"rewards.{name}.{key}", leaf, content.get(key))


def _help_of_key(key: str, leaf: FieldInfo, value: Any) -> Iterator[str]:
    unit = leaf.json_schema_extra.get("unit") if isinstance(leaf.json_schema_extra, dict) else ""
    default = "(needed)" if leaf.is_required() else _show(leaf.get_default(call_default_factory=True))
    head = f"{key} = {default}" + (f" {unit}" if unit else "")
    yield _wrap(head + (f"  [{_show(value)}]" if value is not None else ""), 2, 6)
    yield _wrap(f"{leaf.description or ''} Allowed: {allowed_values(leaf)}.".strip(), 6, 6)


def _lookup(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _show(value: Any) -> str:
    if value == "":
        return "(empty)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_show(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrap(text: str, first: int, rest: int) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * first, subsequent_indent=" " * rest, break_on_hyphens=False)
