"""YAML as recipes want it: a key given twice is an error, and 1e-4 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tagi_ds.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping; a key given twice is an error.

    Raises:
        UserError: the file is missing, not YAML, or no mapping; the text names the line.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"the recipe {path} is missing", "check the path after --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "name a readable UTF-8 YAML file after --config") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not a valid recipe: {error}", "mend the YAML at that place") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no table of sections", "write `section:` and its fields below, as YAML")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key.value}` twice", key.start_mark)
            # A merge key may occur with keys that it also brings: those are overridden, not doubled.
            if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
