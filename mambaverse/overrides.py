"""Between what a person wrote in a config and OmegaConf: its values as text, and its complaints in our words.

YAML reads an unquoted 007, 1.10, 12:30 or `on` as a number or as true. Where a text is expected, what was written is
meant: run 007 is not run 7.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, FloatNode, IntegerNode, OmegaConf, StringNode
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mambaverse.errors import suggest

NOTHING = ("", "~", "null", "Null", "NULL")  # YAML's words for None
NOT_DECIMAL = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-9.]+)+)")  # YAML 1.1's octal and sexagesimal numbers


def take_as_written(layer: DictConfig, item: str, schema: Any) -> None:
    """Put what was written in place of what YAML read, in the layer of one argument, where that is meant.

    That is where `schema` expects a text, but for quoted ones, null, lists and interpolations, or a number, and YAML
    would take one like 010 for 8.

    Args:
        layer: What YAML made of `item`.
        item: key=value.
        schema: The config that `layer` will be merged into.
    """
    key, _, value = item.partition("=")
    text, node = value.strip(), _node(schema, key)
    if "${" in text:
        return
    if isinstance(node, StringNode):
        plain = not OmegaConf.is_config(OmegaConf.select(layer, key)) and not text.startswith(("'", '"', "!!"))
        as_is = plain and text not in NOTHING
    else:
        as_is = isinstance(node, IntegerNode | FloatNode) and NOT_DECIMAL.fullmatch(text) is not None
    if as_is:
        OmegaConf.update(layer, key, text)


def _node(schema: Any, key: str) -> Any:
    """Return the node of `schema` at the dotted `key`, None if it has none."""
    node = schema
    for part in key.split("."):
        node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) else None
    return node


def explain(error: OmegaConfBaseException) -> str:
    """Say what OmegaConf found wrong; for an unknown key, also what would have been right."""
    if isinstance(error, ConfigKeyError) and error.parent_node is not None:
        return f"unknown key {error.full_key!r}{_nearest_key(str(error.key), error.parent_node)}"
    text = str(error).splitlines()[0].partition(". Did you mean")[0]
    text = re.sub(r"Invalid value assigned: \w+ is not a ListConfig.*", "expected a list, such as [1, 2]", text)
    text = re.sub(r"Merge error: .*\. value: ", "expected keys and values where there is a section, got ", text)
    keyed = r"expected a mixer's name and its arguments, such as model.mixer_args.ssd.d_state=64, got \1"
    text = re.sub(r"Value (.*) \(\w+\) is incompatible with type hint 'typing\.Dict\[str, typing\.Any\]'", keyed, text)
    return f"{error.full_key}: {text}" if error.full_key else text


def _nearest_key(key: str, parent: Any) -> str:
    """Say which key of `parent` was meant; of the whole config also one of a section: lr is optim.lr."""
    inside: dict[str, list[str]] = {}
    if parent._get_parent() is None:
        for section in (name for name in parent if OmegaConf.is_dict(parent[name])):
            for name in parent[section]:
                inside.setdefault(str(name), []).append(f"{section}.{name}")
    if close := get_close_matches(key, inside, n=1, cutoff=0.8):
        return f", did you mean {' or '.join(map(repr, inside[close[0]]))}?"
    return suggest(key, map(str, parent))
