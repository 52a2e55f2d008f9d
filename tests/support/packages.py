"""Both packages that PyTorch Lightning comes in, and the models of the tests for each.

``support.models`` is written for ``lightning``. For ``pytorch_lightning``, its source runs once more with the other
import.
"""

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from support import models as models_for_lightning

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


@dataclass(frozen=True)
class Package:
    """One of the packages.

    Attributes:
        pl: The package.
        models: The module ``support.models`` on top of it.
    """

    pl: Any
    models: Any


@cache
def package(name: str) -> Package:
    """Import one of :data:`PACKAGES`."""
    pl = importlib.import_module(name)
    return Package(pl, models_for_lightning if name == PACKAGES[0] else _models_for(name))


def _models_for(name: str) -> ModuleType:
    source = Path(models_for_lightning.__file__).read_text()
    ours = "import lightning.pytorch as pl\n"
    assert ours in source
    module = ModuleType(f"models_for_{name}")
    sys.modules[module.__name__] = module  # so that what it defines can be pickled
    exec(compile(source.replace(ours, f"import {name} as pl\n"), models_for_lightning.__file__, "exec"), vars(module))
    return module
