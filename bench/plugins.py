"""What a user has registered outside of any installed package, and how it reaches the processes that work for him.

Such things are in a file given with ``--import`` (or ``imports:`` in a study), in a notebook, or in a script. Another
process, perhaps on another machine, cannot import them: it is sent their definitions (by cloudpickle).
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from bench.errors import UserError, first_line, typed_line
from bench.registry import Registry
from bench.tables import counted

PREFIX = "cyclebench_import_"  # of the names of modules made from files
DIGEST, DIGITS = "__cyclebench_digest__", 16  # what such a module keeps its digest under, and the digest's digits

_sent: dict[str, str] = {}  # ``digests`` of the process that has sent its definitions here


def import_files(paths: Iterable[str | Path], where: str) -> None:
    """Run Python files that register something. A file that was imported already is not run again before it changes.

    Args:
        paths: of the files.
        where: what messages call the place that names them, ``--import``.

    Raises:
        UserError: one line with the file and why it cannot be imported.
    """
    if isinstance(paths, str | Path):
        raise UserError(f"{where}: {str(paths)!r} is one path (allowed: a list of paths)")
    for path in paths:
        resolved = Path(path).resolve()
        if not resolved.is_file():
            raise UserError(f"{where}: {str(path)!r} is not a file (allowed: a Python file that registers something)")
        try:
            _imported(resolved, _digest(resolved.read_bytes()))
        except ImportError as error:
            raise UserError(f"{where}: {str(resolved)!r} {error}") from None


@cache
def _imported(path: Path, digest: str) -> ModuleType:
    """The module of a file as it is now. Raises ImportError with what is the matter with it, UserError where the file
    does.
    """
    name = f"{PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("is not a Python file")
    module = module_from_spec(spec)
    vars(module)[DIGEST] = digest
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file raises
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise ImportError(f"cannot be imported: {typed_line(error)}") from None
    return module


def pack() -> bytes:
    """What is registered here and cannot be imported elsewhere, as bytes for ``unpack``.

    Raises UserError if a definition cannot be sent, since it holds something that is not to be copied.
    """
    names = {thing.__module__ for _, _, thing in _by_hand()} - {"__main__"}
    modules = [module for name, module in sys.modules.items() if name.startswith(PREFIX) or name in names]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        found = [(registry.builtin, registry.group, name, thing) for registry, name, thing in _by_hand()]
        return cloudpickle.dumps((found, digests())) if found else b""
    except Exception as error:  # whatever pickle says of what it cannot take
        raise UserError(f"what was registered by hand cannot be sent to workers: {first_line(error)}") from None
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def unpack(packed: bytes) -> None:
    """Register what ``pack`` has found in another process."""
    if not packed:
        return
    found: list[tuple[str, str, str, Any]]
    found, told = cloudpickle.loads(packed)
    _sent.update(told)
    for builtin, group, name, thing in found:
        if not any(registry.group == group for registry in Registry.all):
            import_module(builtin)  # the registry's own: a definition need not have imported it
        (mine,) = (registry for registry in Registry.all if registry.group == group)
        mine.register(name)(thing)


def digests() -> dict[str, str]:
    """Digests of the code of what is registered by hand, by its kind and name (``gate half``): of the whole file, or of
    the definition alone where that is in a notebook.
    """
    found = dict(_sent)
    for registry, name, thing in _by_hand():
        if (what := f"{registry.kind} {name}") in _sent:
            continue
        module = sys.modules.get(thing.__module__)
        digest, file = getattr(module, DIGEST, None), getattr(module, "__file__", None)
        if digest is None and file is not None and Path(file).is_file():
            digest = _digest(Path(file).read_bytes())
        found[what] = digest or _digest(_source(thing).encode())
    return found


def changed_since(codes: Iterable[Mapping[str, str]], now: Mapping[str, str]) -> list[str]:
    """What is registered by hand with other code than finished cells were run with, in words.

    codes: of each cell, ``Record.code``; now: ``digests``.
    """
    cells = Counter(what for code in codes for what, digest in code.items() if now.get(what, digest) != digest)
    return [
        f"the code of {what}, after {counted(n, 'cell')} that used it, whose results stay (another name runs it anew)"
        for what, n in cells.items()
    ]


def _by_hand() -> Iterator[tuple[Registry[Any], str, Any]]:
    """What is registered here and cannot be imported elsewhere."""
    for registry in Registry.all:
        yield from ((registry, name, thing) for name, thing in registry.by_hand().items())


def _source(thing: Any) -> str:
    """The text of what a notebook defines: of a class that of its methods, since that of classes is not kept there."""
    texts = []
    for part in [thing] if inspect.isfunction(thing) else vars(thing).values():
        with suppress(OSError, TypeError):  # typed at a prompt, or no code
            texts.append(inspect.getsource(part))
    return "".join(texts)


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:DIGITS]
