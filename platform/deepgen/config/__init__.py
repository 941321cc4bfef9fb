"""Settings, recipes and the command line. Imports neither torch nor ray."""

from deepgen.config.cli import parse_command_line, stage_command
from deepgen.config.schema.choices import Share
from deepgen.config.schema.paths import InputPath, resolve_path
from deepgen.config.schema.pools import PoolSettings
from deepgen.config.schema.section import setting
from deepgen.config.settings import Settings, load_settings, settings_from_dict, settings_hash, shown_settings
from deepgen.errors import UserError, run_program

__all__ = [
    "InputPath",
    "PoolSettings",
    "Settings",
    "Share",
    "UserError",
    "load_settings",
    "parse_command_line",
    "resolve_path",
    "run_program",
    "setting",
    "settings_from_dict",
    "settings_hash",
    "shown_settings",
    "stage_command",
]
