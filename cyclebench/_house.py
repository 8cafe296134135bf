"""Makes sure that ``import bench`` means the folder beside this package, whatever lies in the working folder."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def settle() -> None:
    """Import the engine from beside this package, if it is not imported yet."""
    if "bench" in sys.modules:
        return  # itself sees to it that it is ours
    place = Path(__file__).parent.parent / "bench"
    spec = spec_from_file_location("bench", place / "__init__.py", submodule_search_locations=[str(place)])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["bench"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["bench"]
        raise
