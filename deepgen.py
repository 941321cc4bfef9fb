"""Makes `import deepgen` mean platform/deepgen of this copy of the checkout, whatever copy is installed beside it."""

import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent / "platform" / "deepgen"
_init = _folder / "__init__.py"
_spec = importlib.util.spec_from_file_location("deepgen", _init, submodule_search_locations=[str(_folder)])
assert _spec is not None and _spec.loader is not None
sys.modules["deepgen"] = importlib.util.module_from_spec(_spec)  # the import statement hands out this entry
_spec.loader.exec_module(sys.modules["deepgen"])
