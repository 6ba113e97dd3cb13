"""The registry: names to objects by folder, decorator, entry point and path; errors that teach."""

import builtins
import importlib
import importlib.metadata
import re
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mambaverse import registry as registry_module
from mambaverse.engine.task import TASKS
from mambaverse.errors import UserError, suggest
from mambaverse.registry import Registry, RegistryError, check_arguments


class Thing:
    """A thing."""

    def __init__(self, dim: int, size: int = 1) -> None: ...


class OtherThing:
    """Another thing."""


@pytest.fixture
def things() -> Registry[type]:
    return Registry("thing")


def entry_point(name: str, value: str, owner: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name=owner))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Registry[type]:
    points = [
        entry_point("good", f"{Thing.__module__}:Thing", "lab-a"),
        entry_point("broken", "no_such_module_here:Thing", "lab_b"),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    monkeypatch.setitem(sys.modules, Thing.__module__, sys.modules[__name__])
    return Registry("thing", group="mambaverse.things")


def test_the_one_name_that_goes_on_from_what_was_given_is_the_nearest() -> None:
    assert suggest("acc", ["mcc", "accuracy", "loss"]) == ", did you mean 'accuracy'?"
    assert suggest("", ["a"]) == "; known: a"


def test_register_as_decorator_and_directly(things: Registry[type]) -> None:
    things.register("a")(Thing)
    things.register("b", OtherThing)
    assert things.get("a") is Thing
    assert things.get("b") is OtherThing
    assert things.list() == ["a", "b"]


def test_list_matches_wildcards_and_tags(things: Registry[type]) -> None:
    things.register("vim_tiny", Thing, domain="vision")
    things.register("vim_base", OtherThing, domain="vision")
    things.register("dna_tiny", OtherThing, domain="dna")
    assert things.list("vim_*") == ["vim_base", "vim_tiny"]
    assert things.list("*_tiny", domain="dna") == ["dna_tiny"]


def test_unknown_name_says_the_nearest(things: Registry[type]) -> None:
    things.register("selective", Thing)
    with pytest.raises(RegistryError, match="unknown thing 'selectiv', did you mean 'selective'"):
        things.get("selectiv")
    with pytest.raises(RegistryError, match="known: selective"):
        things.get("zzz")


def test_duplicates_raise_unless_overwritten(things: Registry[type]) -> None:
    things.register("a", Thing)
    with pytest.raises(RegistryError, match=r"already registered by .*overwrite=True"):
        things.register("a", OtherThing)
    things.register("a", OtherThing, overwrite=True)
    assert things.get("a") is OtherThing


def test_built_in_names_are_taken() -> None:
    mixers: Registry[type] = Registry("mixer", builtins="mambaverse.mixers")
    with pytest.raises(RegistryError, match="is built in"):
        mixers.register("s6", Thing)


@pytest.mark.parametrize("module_is_name", [True, False])
def test_a_built_in_that_is_imported_later_leaves_what_replaced_it(module_is_name: bool) -> None:
    """An import is stood in for by what it calls: `register`, with an object of the built-in module."""
    mixers: Registry[type] = Registry("mixer", builtins="mambaverse.mixers", module_is_name=module_is_name)
    theirs = type("S6", (), {"__module__": "mambaverse.mixers.s6"})
    mixers.register("s6", Thing, overwrite=True)
    assert mixers.register("s6")(theirs) is theirs
    assert mixers.get("s6") is Thing
    with pytest.raises(RegistryError, match="already registered"):
        mixers.register("s6", OtherThing)


def test_names_of_built_ins_that_only_an_import_tells_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    models: Registry[type] = Registry("model", builtins="mambaverse.mixers", module_is_name=False)
    monkeypatch.setattr(
        registry_module.importlib,
        "import_module",
        lambda module: models.register("of_s6", type("S6", (), {"__module__": "mambaverse.mixers.s6"})),
    )
    with pytest.raises(RegistryError, match=r"'of_s6' is already registered by mambaverse\.mixers\.s6"):
        models.register("of_s6", Thing)
    models.register("s6", Thing)  # a module's name is no entry's


def test_a_domain_may_have_further_tasks_in_a_folder() -> None:
    assert {"dna", "dna_lm", "vision"} <= set(TASKS.list())
    assert TASKS.get("dna_lm").__module__ == "mambaverse.tasks.dna.tasks.dna_lm"


def test_path_needs_no_registration(things: Registry[type]) -> None:
    assert things.get("pathlib:Path") is Path
    with pytest.raises(RegistryError, match="cannot be imported: AttributeError"):
        things.get("pathlib:Pathh")
    with pytest.raises(RegistryError, match=r"expected 'package.module:Attribute'"):
        things.get("pathlib:")


def test_string_target_is_imported_on_first_use(things: Registry[type]) -> None:
    things.register("lazy", "no_such_module_here:X")
    with pytest.raises(RegistryError, match=r"'lazy'.*cannot be imported: ModuleNotFoundError"):
        things.get("lazy")


def test_entry_points_load_on_use_and_broken_ones_stay_apart(plugins: Registry[type]) -> None:
    assert plugins.list() == ["broken", "good"]
    assert plugins.get("good").__name__ == "Thing"
    with pytest.raises(RegistryError, match=r"package lab_b.*ModuleNotFoundError"):
        plugins.get("broken")
    assert plugins.describe("broken")["summary"].startswith("broken: ")
    assert plugins.describe("good") == {
        "name": "good",
        "source": "entry point of package lab-a",
        "summary": "A thing.",
        "signature": "(dim: int, size: int = 1) -> None",
        "arguments": "(dim, size=1)",
    }


@pytest.mark.parametrize(
    ("setting", "names"),
    [("off", []), ("lab-a", ["good"]), ("lab-b", ["broken"]), ("lab_a, lab_b", ["broken", "good"])],
)
def test_plugins_can_be_limited(
    plugins: Registry[type], monkeypatch: pytest.MonkeyPatch, setting: str, names: list[str]
) -> None:
    monkeypatch.setenv("MAMBAVERSE_PLUGINS", setting)
    assert plugins.list() == names


@pytest.mark.parametrize("imported_first", [True, False])
def test_an_entry_point_may_name_what_a_decorator_registers_too(
    plugins: Registry[type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported_first: bool
) -> None:
    (tmp_path / "decorated.py").write_text("class Own:\n    pass\n\n\nregistry.register('own', tag=1)(Own)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "decorated", raising=False)
    monkeypatch.setattr(builtins, "registry", plugins, raising=False)
    points = [entry_point("own", "decorated:Own", "lab")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    if imported_first:
        importlib.import_module("decorated")
    with warnings.catch_warnings(action="error"):
        assert plugins.get("own").__name__ == "Own" and plugins.entry("own").tags == {"tag": 1}
    with pytest.raises(RegistryError, match="already registered by"):
        plugins.register("own", Thing)


def test_entry_point_cannot_take_a_built_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [entry_point("s6", "x:Y", "lab")])
    mixers: Registry[type] = Registry("mixer", builtins="mambaverse.mixers", group="mambaverse.mixers")
    with pytest.warns(UserWarning, match="'s6' of package lab is ignored"):
        assert "s6" in mixers.list()


def test_entry_point_cannot_take_a_name_that_only_an_import_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    models: Registry[type] = Registry("model", builtins="mambaverse.mixers", group="g", module_is_name=False)
    theirs = type("S6", (), {"__module__": "mambaverse.mixers.s6"})
    points = [entry_point("of_s6", "x:Y", "lab"), entry_point("s6", "x:Y", "lab")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    monkeypatch.setattr(registry_module.importlib, "import_module", lambda module: models.register("of_s6", theirs))
    with pytest.warns(UserWarning, match="'of_s6' of package lab is ignored"):
        assert models.list() == ["of_s6", "s6"]
    assert models.get("of_s6") is theirs


def test_arguments_are_checked_against_the_signature() -> None:
    check_arguments(Thing, {"size": 2}, "here")
    with pytest.raises(UserError, match="here: unknown argument 'sise', did you mean 'size'"):
        check_arguments(Thing, {"sise": 2}, "here")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", "2", "size must be int, got '2'"),
        ("size", True, "size must be int, got True"),
        ("sides", 3.5, "sides must be int | tuple[int, int], got 3.5"),
        ("names", ["a", 3], "names must be str | Sequence[str], got ['a', 3]"),
        ("args", [1], "args must be Mapping[str, Mapping[str, Any]], got [1]"),
        ("args", {"a": 1}, "args must be Mapping[str, Mapping[str, Any]], got {'a': 1}"),
    ],
)
def test_arguments_are_checked_against_the_annotations(name: str, value: Any, expected: str) -> None:
    def target(
        size: int = 1,
        sides: int | tuple[int, int] = 1,
        names: str | Sequence[str] = "",
        args: Mapping[str, Mapping[str, Any]] | None = None,
        rate: float = 0.0,
    ) -> None: ...

    fine = {"size": np.int64(2), "sides": [1, 2], "names": ("a", "b"), "args": {"a": {"b": 1}}, "rate": 1}
    check_arguments(target, fine, "here")
    with pytest.raises(UserError, match=re.escape(f"here: {expected}")):
        check_arguments(target, {name: value}, "here")


@pytest.mark.parametrize("name", [None, 3, OtherThing])
def test_a_name_is_a_string(things: Registry[type], name: Any) -> None:
    with pytest.raises(RegistryError, match="thing: expected a name to register under, got "):
        things.register(name)
    with pytest.raises(RegistryError, match="thing: expected a name, got "):
        things.get(name)
    assert things.list() == []


@pytest.mark.parametrize("name", ["", " ", " a", "a ", "a:b"])
def test_a_name_that_nothing_could_be_found_by_is_refused(things: Registry[type], name: str) -> None:
    with pytest.raises(RegistryError, match=r"thing: expected a name to register under, got .* no ':' or spaces"):
        things.register(name)
    with pytest.raises(RegistryError, match="expected 'domain/name' to register under"):
        Registry[type]("thing", qualified=True).register(f"of/{name}")


@pytest.mark.parametrize("given", [3, int, OtherThing()])
def test_what_is_no_class_of_the_kind_is_refused(things: Registry[type], given: Any) -> None:
    with pytest.raises(RegistryError, match=r"thing 'a': expected a subclass of .*\.Thing, got"):
        things.register_class("a", Thing)(given)
    assert things.register_class("a", Thing)(Thing) is Thing


def test_a_thread_that_comes_while_another_reads_entry_points_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, registry = threading.Event(), Registry[type]("thing", group="lab.things")

    def slow(group: str) -> list[SimpleNamespace]:
        reading.set()
        time.sleep(0.2)
        return [entry_point("far", "collections:OrderedDict", "lab")]

    monkeypatch.setattr(registry_module, "entry_points", slow)
    first = threading.Thread(target=registry.list)
    first.start()
    reading.wait()
    assert registry.list() == ["far"]
    first.join()


def test_installed_metadata_is_what_is_read() -> None:
    assert registry_module.entry_points is importlib.metadata.entry_points
