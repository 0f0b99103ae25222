"""Makes `import natten` mean `vicus.natten`, for code that cannot be edited."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from vicus.natten.version import __version__

_NAME = "natten"
_HOME = "vicus.natten"


def _is_natten(name: str) -> bool:
    return name == _NAME or name.startswith(_NAME + ".")


def _home(name: str) -> str:
    return _HOME + name.removeprefix(_NAME)


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` tells about the package: code asks for the version to learn whether NATTEN is there."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n",
            "top_level.txt": f"{_NAME}\n",
        }.get(filename)

    def locate_file(self, path):
        raise FileNotFoundError(f"{path}: natten is vicus.natten here and has no files of its own")


class _Loader(importlib.abc.Loader):
    """Hands out the module of vicus itself, so that both names are one module."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(_home(spec.name))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # the import system has put the other name's there


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_natten(fullname):
            return None
        home = importlib.util.find_spec(_home(fullname))
        if home is None:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, _Loader(), origin=home.origin, is_package=home.submodule_search_locations is not None
        )

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        return [_Distribution()] if name is None or name.lower() == _NAME else []


_finder = _Finder()


def install() -> None:
    """Makes every later `import natten`, `from natten... import ...`, `importlib.util.find_spec("natten")` and
    `importlib.metadata.version("natten")` of this process answer with `vicus.natten`.

    An installed NATTEN is passed over while this holds. Call it before the code that imports natten is imported:
    Hugging Face transformers, for one, looks for the package once, on its own import. A second call does nothing.

    Raises:
        RuntimeError: Another natten is already imported; modules that did so would keep it.

    Source:
        vicus.
    """
    if _finder in sys.meta_path:
        return
    if _NAME in sys.modules:
        raise RuntimeError(
            f"natten is already imported from {getattr(sys.modules[_NAME], '__file__', None)}; "
            "call vicus.natten.install() before anything imports it"
        )
    sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Takes `install` back: later imports of natten find what is installed under that name, or nothing.

    Modules that already hold `vicus.natten` keep it.

    Source:
        vicus.
    """
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name in [name for name in sys.modules if _is_natten(name)]:
        del sys.modules[name]
