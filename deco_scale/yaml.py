"""YAML 1.2 in and out: ``010`` is ten, ``1:30`` and ``yes`` are text, ``1e-4`` is a number.

Only mappings, lists, text, numbers, true, false and null are read. Keys given twice, other tags and documents
whose aliases expand beyond :data:`MAX_NODES` are errors.
"""

import io
import math
import sys
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from deco_scale.errors import ConfigError
from deco_scale.observability.redact import scrub

MAX_NODES = 100_000
"""Keys and values of a document, those behind each alias counted as often as it is used."""
_TAG = "tag:yaml.org,2002:"


class _Constructor(SafeConstructor):
    """The core types of YAML 1.2; a date stays text."""

    yaml_constructors = {
        **{
            f"{_TAG}{name}": SafeConstructor.yaml_constructors[f"{_TAG}{name}"]
            for name in ("null", "bool", "int", "float", "str", "seq", "map")
        },
        f"{_TAG}timestamp": SafeConstructor.construct_yaml_str,
        f"{_TAG}value": SafeConstructor.construct_yaml_str,
        None: SafeConstructor.construct_undefined,
    }

    def construct_document(self, node: Node) -> Any:
        if _checked_size(node, {}) > MAX_NODES:
            raise ConstructorError(
                None, None, f"more than {MAX_NODES} values, with aliases expanded", node.start_mark
            )
        # _checked_size refuses them without quoting the values, and also beside a merge key.
        self.allow_duplicate_keys = True
        return super().construct_document(node)


def _checked_size(node: Node, sizes: dict[int, float]) -> float:
    """Number of nodes with aliases expanded, inf for one inside of itself; refuses keys given twice."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf
    children: list[Node] = node.value if isinstance(node, SequenceNode) else []
    if isinstance(node, MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        children = [child for pair in node.value for child in pair]
    sizes[id(node)] = 1 + sum(_checked_size(child, sizes) for child in children)
    return sizes[id(node)]


def load_yaml(text: str, source: str) -> Any:
    """The one document of ``text``; raises :class:`ConfigError` with ``source``, line and column.

    ``source`` is quoted as it is. The error does not quote the text, in which half a secret may stand.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = " ".join(scrub(part) for part in (error.context, error.problem) if part) + position
    except RecursionError:
        problem = "it is nested too deep"
    except YAMLError as error:
        problem = scrub(str(error))
    except (ValueError, KeyError):
        problem = "a value does not fit its tag, or an integer has thousands of digits"
    raise ConfigError(f"{source} is not valid YAML: {' '.join(problem.split())}")


def merged(base: Any, top: Any) -> Any:
    """``top`` over ``base``: mappings key by key, anything else of ``top`` replaces that of ``base``."""
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in top.items()}}
    return top


def dump_yaml(value: Any) -> str:
    """Block-style YAML of nested dicts, lists and scalars in their order; :func:`load_yaml` reads it back."""
    yaml = YAML(typ="safe", pure=True)
    # ruamel loses line breaks of Unicode unless they are escaped, and blanks where it folds escaped text.
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = False, sys.maxsize, False
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.representer.ignore_aliases = lambda *_: True
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()
