"""Settings, recipes and the command line. Imports neither torch nor ray."""

from deepgen.config.cli import parse_command_line
from deepgen.config.paths import resolve_path
from deepgen.config.settings import Settings, load_settings, settings_from_dict, settings_hash
from deepgen.errors import UserError, run_program

__all__ = [
    "Settings",
    "UserError",
    "load_settings",
    "parse_command_line",
    "resolve_path",
    "run_program",
    "settings_from_dict",
    "settings_hash",
]
