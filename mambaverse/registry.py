"""One small registry for mixers, models, data sets and tasks: names to objects, imported when they are first used.

A name comes from one of four doors:

1. a file in a folder of ours (`builtins`): the file's name is the entry's name, so a new entry is one new file;
2. the decorator `register`;
3. an entry point of an installed package (`group`), kept as a string until somebody asks for it;
4. a path "package.module:Attribute", which needs no registration at all.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from numbers import Integral, Real
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from mambaverse.errors import UserError, of_import, suggest

T = TypeVar("T")
PLUGINS_VARIABLE = "MAMBAVERSE_PLUGINS"  # "off", or the distributions (comma-separated) whose entry points are used


class RegistryError(UserError):
    """A name that is unknown, taken, or whose object cannot be imported."""


@dataclass
class Entry(Generic[T]):
    """One name of a registry."""

    name: str
    target: T | str  # the object, or where to import it from: "package.module:Attribute"
    source: str  # who registered it, for messages: "built-in", "entry point of package x", a module
    tags: dict[str, Any] = field(default_factory=dict)
    replaces: bool = False  # registered with overwrite=True: what a built-in registers later gives way


class Registry(Generic[T]):
    """Names to objects of one kind.

    Args:
        kind: What is registered, for messages: "mixer".
        builtins: Packages whose modules are built-ins, one pattern or several; "*" stands for one folder:
            "mambaverse.tasks.*.models". Where no package but a module stands, the folder's name is the entry's.
        group: Entry-point group of third parties.
        module_is_name: A module of `builtins` holds one object, registered under the module's name, so that the names
            are known without importing anything. Otherwise modules are imported to learn what they register.
        qualified: The name is "folder/module", with the folder that "*" stood for.
        meant: What errors suggest for a name that others use, in lower case without "-" and "_": {"mamba2": "ssd"}.
    """

    def __init__(
        self,
        kind: str,
        *,
        builtins: str | Sequence[str] = (),
        group: str = "",
        module_is_name: bool = True,
        qualified: bool = False,
        meant: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._builtins, self._group = [builtins] if isinstance(builtins, str) else list(builtins), group
        self._module_is_name, self._qualified = module_is_name, qualified
        self._meant = dict(meant or {})
        self._entries: dict[str, Entry[T]] = {}
        self._modules: dict[str, str] | None = None  # built-in modules: name -> module path
        self._refused: dict[str, str] = {}  # names of entry points that are not allowed -> their package
        self._discovered = False
        self._lock = threading.RLock()

    def register(
        self, name: str, target: T | str | None = None, *, overwrite: bool = False, **tags: Any
    ) -> Callable[[T], T]:
        """Register `target` (an object, or "package.module:Attribute" to import on first use), or decorate one.

        A built-in that is imported after its name was registered with `overwrite` leaves that entry as it is. A name
        of which only importing the built-ins can tell whether it is theirs imports them.

        Raises:
            RegistryError: if the name is taken and `overwrite` is False, or is none to register under.
        """
        self._check_name(name)

        def add(obj: T) -> T:
            source = str(obj if isinstance(obj, str) else getattr(obj, "__module__", "?"))
            is_builtin = source in self._builtin_modules().values()
            if not (overwrite or is_builtin or self._module_is_name):
                try:
                    self._load_builtins(None)
                except ImportError as error:
                    what = f"{self.kind} {name!r}: cannot tell whether it is built in"
                    raise RegistryError(f"{what}: {error}; overwrite=True does not ask") from error
            taken = self._entries.get(name)
            builtin = self._builtin_modules().get(name) if self._module_is_name else None
            if not overwrite and taken is not None and taken.target is not obj and not _same(taken.target, obj):
                if is_builtin and taken.replaces:
                    return obj
                raise RegistryError(
                    f"{self.kind} {name!r} is already registered by {taken.source}; overwrite=True replaces it"
                )
            if not overwrite and builtin is not None and source != builtin:
                raise RegistryError(f"{self.kind} {name!r} is built in ({builtin}); overwrite=True replaces it")
            if taken is not None and isinstance(taken.target, str) and not overwrite:
                source = taken.source  # the entry point, whose import has come to the decorator
            self._entries[name] = Entry(name, obj, source, tags, overwrite)
            return obj

        return add if target is None else add(target)  # type: ignore[arg-type, return-value]

    def register_class(self, name: str, base: type, *, overwrite: bool = False) -> Callable[[Any], Any]:
        """Return a class decorator that registers subclasses of `base`, and raises RegistryError for all else."""
        register = self.register(name, overwrite=overwrite)

        def add(cls: Any) -> Any:
            if not (isinstance(cls, type) and issubclass(cls, base)):
                expected = f"{base.__module__}.{base.__qualname__}"
                raise RegistryError(f"{self.kind} {name!r}: expected a subclass of {expected}, got {cls!r}")
            return register(cls)  # type: ignore[arg-type]

        return add

    def get(self, name: str) -> T:
        """Return the object called `name`, importing it if need be; "package.module:Attribute" needs no registration.

        Raises:
            RegistryError: unknown name (with the nearest known one), or the import failed (with its reason).
        """
        if isinstance(name, str) and ":" in name and name not in self._entries:
            return self._import(name, f"{self.kind} {name!r}")
        entry = self.entry(name)
        if isinstance(entry.target, str):
            entry.target = self._import(entry.target, f"{self.kind} {name!r} ({entry.source})")
        return entry.target

    def entry(self, name: str) -> Entry[T]:
        """Return the entry called `name`, without importing what it points to."""
        if not isinstance(name, str):
            raise RegistryError(f"{self.kind}: expected a name, got {name!r}")
        self._discover()
        if name not in self._entries:
            self._load_builtins(name)
        if name not in self._entries:
            if name in self._refused:
                told = f"{PLUGINS_VARIABLE}={os.environ.get(PLUGINS_VARIABLE)} leaves out package {self._refused[name]}"
                raise RegistryError(f"unknown {self.kind} {name!r}: {told}, which has it")
            raise RegistryError(f"unknown {self.kind} {name!r}{self.suggest(name)}")
        return self._entries[name]

    def suggest(self, name: str) -> str:
        """Return what `errors.suggest` says of an unknown `name`; what others call so comes before what looks alike."""
        plain = name.lower().replace("-", "").replace("_", "")
        return suggest(self._meant.get(plain, name), self.list())

    def list(self, pattern: str = "*", **tags: Any) -> list[str]:
        """Return the sorted names that match `pattern` (`*`, `?`, `[...]`) and carry all `tags`.

        Raises:
            RegistryError: the pattern is no text.
        """
        if not isinstance(pattern, str):
            raise RegistryError(f"{self.kind}: expected a pattern such as 'v*', got {pattern!r}")
        self._discover()
        names = set(self._entries)
        if self._module_is_name and not tags:
            names |= set(self._builtin_modules())
        else:
            self._load_builtins(None)
            names = {n for n, e in self._entries.items() if all(e.tags.get(k) == v for k, v in tags.items())}
        return sorted(n for n in names if fnmatch.fnmatchcase(n, pattern))

    def tag_values(self, tag: str) -> set[Any]:
        """Return what the entries that carry `tag` have there."""
        self._discover()
        self._load_builtins(None)
        return {entry.tags[tag] for entry in self._entries.values() if tag in entry.tags}

    def describe(self, name: str) -> dict[str, str]:
        """Return what is known of `name`: name, source, summary (first line of its docstring), signature and arguments.

        The arguments are the signature without its types.
        """
        try:
            obj = self.get(name)
        except RegistryError as error:
            return {"name": name, "source": "", "summary": f"broken: {error}", "signature": "", "arguments": ""}
        source = self._entries[name].source if name in self._entries else name
        summary = (inspect.getdoc(obj) or "").partition("\n")[0]
        return {"name": name, "source": source, "summary": summary, **signatures(obj)}  # type: ignore[arg-type]

    def __contains__(self, name: object) -> bool:
        return name in self.list()

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    def _check_name(self, name: Any) -> None:
        """Raise RegistryError unless something can be registered, and then found, under `name`."""
        what = "'domain/name'" if self._qualified else "a name"
        parts = name.split("/") if isinstance(name, str) and self._qualified else [name]
        sound = all(isinstance(part, str) and part and part == part.strip() and ":" not in part for part in parts)
        if not sound or len(parts) != 1 + self._qualified:
            raise RegistryError(
                f"{self.kind}: expected {what} to register under, got {name!r}; names have no ':' or spaces around them"
            )

    def _builtin_modules(self) -> dict[str, str]:
        if self._modules is None:
            self._modules = {}
            for pattern in self._builtins:
                self._modules |= dict(_modules(pattern, self._qualified))
        return self._modules

    def _load_builtins(self, name: str | None) -> None:
        """Import the module of `name`; where a module's name does not say what it holds, all of them."""
        modules = self._builtin_modules()
        if self._module_is_name and name is not None:
            modules = {n: m for n, m in modules.items() if n == name}
        for expected, module in modules.items():
            importlib.import_module(module)
            if self._module_is_name and expected not in self._entries:
                raise RegistryError(f"{module} does not register a {self.kind} called {expected!r}, as its name says")

    def _discover(self) -> None:
        """Read the entry points of the group, once; importing none of them."""
        with self._lock:  # who comes while a thread reads them waits for the names
            if not self._discovered and self._group:
                self._discovered = True
                self._read_entry_points()

    def _read_entry_points(self) -> None:
        allowed = os.environ.get(PLUGINS_VARIABLE)
        names = None if allowed is None else {_normal(n) for n in allowed.split(",")}
        for point in entry_points(group=self._group):
            owner = point.dist.name if point.dist else "?"
            if names is not None and (allowed == "off" or _normal(owner) not in names):
                self._refused.setdefault(point.name, owner)
                continue
            if not self._module_is_name:
                self._load_builtins(None)  # for their names
            target = point.value.partition("[")[0].strip()  # "a.b:C [extra]" is a.b:C
            taken = self._entries.get(point.name)
            if taken is not None and _same(target, taken.target):  # a decorator registered it before
                continue
            if taken is not None or (self._module_is_name and point.name in self._builtin_modules()):
                by = taken.source if taken else f"built-in {self._builtin_modules()[point.name]}"
                warnings.warn(
                    f"{self.kind} {point.name!r} of package {owner} is ignored: the name is taken by {by}", stacklevel=3
                )
                continue
            self._entries[point.name] = Entry(point.name, target, f"entry point of package {owner}")

    def _import(self, path: str, what: str) -> T:
        module, _, attribute = path.partition(":")
        if not module or not attribute:
            raise RegistryError(f"{what}: expected 'package.module:Attribute', got {path!r}")
        try:
            obj: Any = importlib.import_module(module)
            for part in attribute.split("."):
                obj = getattr(obj, part)
        except (Exception, SystemExit) as error:  # whatever a plug-in's import raises is reported as its failure
            raise RegistryError(f"{what} cannot be imported: {of_import(error, module)}") from error
        return obj


def signatures(target: Callable[..., Any]) -> dict[str, str]:
    """Return what `target` takes: "signature" with types, "arguments" such as "(dim, d_state=16)" without."""
    signature = inspect.signature(target)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    arguments = signature.replace(parameters=bare, return_annotation=signature.empty)
    return {"signature": str(signature), "arguments": str(arguments)}


def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, also: Iterable[str] = ()
) -> None:
    """Raise UserError unless every name in `arguments` is a parameter of `target`, its value of the annotated type.

    Args:
        target: A class or function; one that takes `**kwargs` accepts any name.
        arguments: What it is about to be called with.
        where: Where the arguments came from, for the message: "model.mixer_args.ssd".
        also: Further names that are known.
    """
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in parameters and name not in also:
                public = [*(p for p in parameters if p not in ("self", "dim", "device", "dtype")), *also]
                raise UserError(f"{where}: unknown argument {name!r}{suggest(name, public)}")
    try:
        made: Any = target  # of a class its `__init__` says what it takes
        hints = get_type_hints(made.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a plug-in's annotations that mean nothing at run time
        return
    for name, value in arguments.items():
        if name in hints and not is_a(value, hints[name]):
            hint = hints[name]
            expected = hint.__name__ if hint in (bool, int, float, str) else str(hint).replace(" | None", "")
            expected = expected.replace("collections.abc.", "").replace("typing.", "")
            raise UserError(f"{where}: {name} must be {expected}, got {value!r}")


def check_complete(target: Callable[..., Any], where: str, *given: Any, **arguments: Any) -> None:
    """Raise UserError unless `target` can be called with what is `given`; `where` is as in `check_arguments`."""
    try:
        inspect.signature(target).bind(*given, **arguments)
    except TypeError as error:
        called = f"{target.__module__}.{target.__qualname__}" if hasattr(target, "__qualname__") else repr(target)
        raise UserError(f"{where}: {called}: {error}") from None


def is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type that `hint` annotates; of types that are not plain ones every value is."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(is_a(value, option) for option in get_args(hint))
    if hint in (int, float):  # numpy's numbers are numbers too
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin in (tuple, list, Sequence):  # YAML knows lists alone; what lists in lists mean, who takes them says
        part = get_args(hint)[0]
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and (part not in (int, float, bool, str) or all(is_a(v, part) for v in value))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(is_a(v, get_args(hint)[1]) for v in value.values())
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def _normal(distribution: str) -> str:
    """Return the one spelling of a distribution's name (PEP 503): "My_lab.mixers" is "my-lab-mixers"."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _same(old: Any, new: Any) -> bool:
    """Whether `new` is `old` again (a module that was reloaded), or what an entry point `old` names."""
    if isinstance(old, str):  # which may be another module of that package, from which the one named imports it
        module, _, name = old.partition(":")
        root = str(getattr(new, "__module__", "")).partition(".")[0]
        return name == getattr(new, "__qualname__", None) and module.partition(".")[0] == root
    both = [(getattr(o, "__module__", None), getattr(o, "__qualname__", None)) for o in (old, new)]
    return both[0] == both[1] != (None, None)


def _modules(pattern: str, qualified: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, module path) for the public modules of the package, or packages, that `pattern` names."""
    head, star, tail = pattern.partition(".*.")
    if not star:
        for info in pkgutil.iter_modules(_folders(pattern)):
            if not info.name.startswith("_") and info.name != "base":
                yield info.name, f"{pattern}.{info.name}"
        return
    for folder in pkgutil.iter_modules(_folders(head)):
        if not folder.ispkg:
            continue
        package = f"{head}.{folder.name}.{tail}"
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        if spec.submodule_search_locations is None:  # one module a folder: the folder's name is the entry's
            yield folder.name, package
            continue
        for name, path in _modules(package, qualified):
            yield (f"{folder.name}/{name}" if qualified else name), path


def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or []) if spec else []
