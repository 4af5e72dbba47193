"""Refuses JSON schemas that are malformed, endless or too costly, before anything compiles them.

The compiler behind it recurses, expands and trusts: it follows a reference loop for ever and ends
the process on a chain of thousands of references. Knows nothing of grammars or vocabularies.
"""

import json
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from localmistral.engine.regex_check import check_regex
from localmistral.engine.schema_formats import write_out_formats
from localmistral.engine.schema_graph import Parts, count_cases, find_loop, weigh_merged
from localmistral.errors import BadRequestError

MAX_BYTES = 256 * 1024
"""Of the schema as JSON; the largest that tools publish are about half of that."""
MAX_DEPTH = 100
"""Of nested arrays and objects in the schema; the compiler's JSON parser stops at 128."""
MAX_NODES = 20_000
"""Values in the schema; compiling takes about 10 microseconds each."""
MAX_PROPERTIES = 1_000
"""Of one object; optional ones cost the square of their number (0.1 s for 1,000)."""
MAX_COUNT = 100_000
"""Of lengths and item counts: more than an answer can hold, and each step is a parser state."""
MAX_ENUM = 10_000
"""Values of one enum; compiling them takes 30 ms."""
MAX_REFERENCES = 500
"""Different schemas referred to; the compiler recurses along them, 5,000 end the process."""
MAX_CASES = 1_000
"""Cases that allOf over anyOf multiplies out to; the compiler builds every one of them."""
MAX_NAME_PATTERNS = 30
"""Of one object; the compiler compares each with every other."""
MAX_MERGED_PATTERNS = 4
"""Patterns that must hold for one string at once; the cost of their product is exponential."""
MAX_MULTIPLE = 3_000
"""Digits of multipleOf; the automaton has a state for each remainder (99,991 took 1.1 GiB)."""
MAX_EXACT = 2**53
"""Larger integers are rounded by the compiler, which computes with doubles."""

TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
_COUNTS = (
    ("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"),
    ("minContains", "maxContains"),
)  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if",
    "then", "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Schema = Mapping[str, Any]


def check_schema(schema: object, param: str) -> str:
    """The schema as JSON text, its dates exact; raises BadRequestError for what can't be served."""
    return _Check(schema, param).run()


class _Check:
    """One pass over one schema; nothing here recurses."""

    def __init__(self, schema: object, param: str) -> None:
        self._root = schema
        self._param = param
        self._nodes: dict[int, tuple[str, Schema]] = {}

    def run(self) -> str:
        if not isinstance(self._root, dict):
            raise self._error(
                f"A JSON schema must be an object, this one is {_name_kind(self._root)}."
            )
        self._check_values()
        self._check_size()
        self._collect()
        for path, schema in self._nodes.values():
            self._check_keywords(path, schema)
        self._check_loops()
        self._check_products()
        exact = write_out_formats(self._root, lambda value: id(value) in self._nodes)
        return json.dumps(exact, ensure_ascii=False, allow_nan=False)

    def _error(self, message: str, hint: str = "") -> BadRequestError:
        return BadRequestError(message, hint, param=self._param)

    # Plain JSON: how much of it there is.

    def _check_values(self) -> None:
        todo: list[tuple[Any, int]] = [(self._root, 1)]
        count = 0
        while todo:
            value, depth = todo.pop()
            count += 1
            if count > MAX_NODES:
                raise self._error(
                    f"The schema has more than {MAX_NODES} values, that is the most taken."
                )
            if depth > MAX_DEPTH:
                raise self._error(
                    f"The schema is nested more than {MAX_DEPTH} deep.",
                    "Describe recursive data with $defs and $ref.",
                )
            todo += [(child, depth + 1) for child in self._children(value)]

    def _children(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise self._error("The schema has a key that is not a string.")
            return list(value.values())
        if isinstance(value, list | tuple):
            return list(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"The schema contains {value}, which is not a JSON number.")
        if value is not None and not isinstance(value, str | int | float):
            raise self._error(f"The schema contains a {type(value).__name__}, which is not JSON.")
        return []

    def _check_size(self) -> None:
        try:
            text = json.dumps(self._root, ensure_ascii=False, allow_nan=False)
            size = len(text.encode("utf-8"))
        except ValueError as error:  # half of a surrogate pair, an integer of 5,000 digits
            raise self._error(f"The schema can't be written as JSON: {error}.") from error
        if size > MAX_BYTES:
            raise self._error(f"The schema has {size} bytes, at most {MAX_BYTES} are taken.")

    # Schemas inside the schema.

    def _collect(self) -> None:
        """Find every schema: by keyword from the root, and wherever a reference points."""
        references: set[int] = set()
        todo: list[tuple[str, Any]] = [("#", self._root)]
        while todo:
            path, schema = todo.pop()
            if not isinstance(schema, dict | bool):
                raise self._error(f"{_show(path)} must be a schema, it is {_name_kind(schema)}.")
            if isinstance(schema, bool) or id(schema) in self._nodes:
                continue
            self._nodes[id(schema)] = (path, schema)
            todo += self._subschemas(path, schema)
            if "$ref" in schema:
                target = self._resolve(path, schema["$ref"])
                references.add(id(target))
                todo.append((schema["$ref"], target))
        if len(references) > MAX_REFERENCES:
            raise self._error(
                f"The schema refers to {len(references)} different places, at most "
                f"{MAX_REFERENCES} are taken."
            )

    def _subschemas(self, path: str, schema: Schema) -> Iterator[tuple[str, Any]]:
        for key, value in schema.items():
            if key in _MAPS:
                if not isinstance(value, dict):
                    raise self._error(f"{_show(path)} has {key} that is {_name_kind(value)}.")
                for name, child in value.items():
                    yield f"{path}/{key}/{_escape(name)}", child
            elif key in _LISTS and isinstance(value, list | tuple):
                for number, child in enumerate(value):
                    yield f"{path}/{key}/{number}", child
            elif key in _SINGLE:
                yield f"{path}/{key}", value

    def _resolve(self, path: str, reference: object) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self._error(
                f"{_show(path)} refers to {_quote(reference)}, but only references inside the "
                "schema are followed, such as #/$defs/Name.",
                "Copy the schema it means into $defs.",
            )
        node: Any = self._root
        for part in urllib.parse.unquote(reference).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list | tuple) else node[key]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise self._error(
                    f"{_show(path)} refers to {_quote(reference)}, which is not in the schema."
                ) from error
        return node

    # What the keywords say.

    def _check_keywords(self, path: str, schema: Schema) -> None:
        where = _show(path)
        self._check_types(where, schema)
        self._check_properties(where, schema)
        self._check_counts(where, schema)
        for key in _BOUNDS:
            self._check_exact(where, key, schema.get(key))
        if "const" in schema:
            self._check_exact(where, "const", schema["const"])
        if "enum" in schema:
            self._check_enum(where, schema["enum"])
        if isinstance(schema.get("pattern"), str):
            check_regex(
                schema["pattern"], f"The pattern of {where[0].lower()}{where[1:]}", self._param
            )
        for pattern in schema.get("patternProperties", ()):
            check_regex(pattern, f"The name pattern {_quote(pattern)}", self._param)
        if path != "#" and "$id" in schema:
            raise self._error(f"{where} has an $id, which only the whole schema may have.")
        self._check_multiple(where, schema.get("multipleOf", 1))
        for key in _IN_PLACE:
            if key in schema and not (isinstance(schema[key], list | tuple) and schema[key]):
                raise self._error(f"{where} has {key} that is no list with a schema in it.")

    def _check_properties(self, where: str, schema: Schema) -> None:
        for key, limit in (
            ("properties", MAX_PROPERTIES),
            ("patternProperties", MAX_NAME_PATTERNS),
        ):
            count = len(schema.get(key, ()))
            if count > limit:
                raise self._error(f"{where} has {count} {key}, at most {limit} are taken.")
        required = schema.get("required", ())
        if not isinstance(required, list | tuple) or not all(isinstance(n, str) for n in required):
            raise self._error(f"{where} has required that is not a list of names.")

    def _check_types(self, where: str, schema: Schema) -> None:
        if "type" not in schema:
            return
        kinds = schema["type"] if isinstance(schema["type"], list | tuple) else [schema["type"]]
        if not kinds:
            raise self._error(f"{where} allows no type, so no value can satisfy it.")
        for kind in kinds:
            if kind not in TYPES:
                raise self._error(
                    f"{where} has the type {_quote(kind)}; known are {', '.join(TYPES)}."
                )

    def _check_counts(self, where: str, schema: Schema) -> None:
        for pair in _COUNTS:
            for key in pair:
                value = schema.get(key, 0)
                if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
                    raise self._error(f"{where} has {key} {_quote(value)}, it must be an integer.")
                if not 0 <= value <= MAX_COUNT:
                    raise self._error(
                        f"{where} has {key} {_shorten(value)}, it must be 0 to {MAX_COUNT}.",
                        f"Leave {key} out where it only means that there is no limit.",
                    )
            low, high = pair
            if high in schema and schema.get(low, 0) > schema[high]:
                raise self._error(
                    f"{where} has {low} {schema[low]} over {high} {schema[high]}, so no value can "
                    "satisfy it."
                )
        least = schema.get("minProperties", 0)
        if least > max(1, len(schema.get("required", ()))):
            raise self._error(
                f"{where} has minProperties {least}, more than 1 can't be enforced.",
                "Name the properties in required.",
            )

    def _check_exact(self, where: str, key: str, value: object) -> None:
        if isinstance(value, int) and abs(value) > MAX_EXACT:
            raise self._error(
                f"{where} has {key} {_shorten(value)}, integers beyond 2^53 can't be enforced."
            )

    def _check_multiple(self, where: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._error(f"{where} has multipleOf {_quote(value)}, it must be above 0.")
        digits = int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
        if digits > MAX_MULTIPLE:
            raise self._error(
                f"{where} has multipleOf {value}, its digits must not be over {MAX_MULTIPLE}."
            )

    def _check_enum(self, where: str, values: object) -> None:
        if not isinstance(values, list | tuple):
            raise self._error(f"{where} has an enum that is {_name_kind(values)}, not an array.")
        if not values:
            raise self._error(f"{where} has an empty enum, so no value can satisfy it.")
        if len(values) > MAX_ENUM:
            raise self._error(
                f"{where} has {len(values)} enum values, at most {MAX_ENUM} are taken."
            )
        for value in values:
            self._check_exact(where, "the enum value", value)

    # How schemas lead to one another.

    def _check_loops(self) -> None:
        loop = find_loop(self._nodes, lambda node: self._in_place(node))
        if loop is not None:
            raise self._error(
                f"{_show(self._nodes[loop][0])} refers back to itself without taking anything in, "
                "so it never ends.",
                "A recursive schema has to lead through properties or items.",
            )
        loop = find_loop(self._nodes, lambda node: self._required(node))
        if loop is not None:
            raise self._error(
                f"{_show(self._nodes[loop][0])} requires itself inside itself, so no finite value "
                "can satisfy it.",
                "Make the inner property optional, or allow null.",
            )

    def _in_place(self, node: int) -> list[int]:
        """Schemas that must hold, or may, for the very same value."""
        path, schema = self._nodes[node]
        children = [child for key in _IN_PLACE for child in schema.get(key, ())]
        children += [schema[key] for key in ("not", "if", "then", "else") if key in schema]
        if "$ref" in schema:
            children.append(self._resolve(path, schema["$ref"]))
        return _identify(children)

    def _required(self, node: int) -> list[int]:
        """Schemas that any value of this one has a value of inside it, or is one of."""
        path, schema = self._nodes[node]
        children: list[Any] = list(schema.get("allOf", ()))
        for key in ("anyOf", "oneOf"):
            children += schema.get(key, ()) if len(schema.get(key, ())) == 1 else ()
        if "$ref" in schema:
            children.append(self._resolve(path, schema["$ref"]))
        if schema.get("type") == "object":
            properties = schema.get("properties", {})
            names = [name for name in schema.get("required", ()) if isinstance(name, str)]
            children += [properties[name] for name in names if name in properties]
        if (
            schema.get("type") == "array"
            and schema.get("minItems", 0)
            and "prefixItems" not in schema
        ):
            children.append(schema.get("items"))
        return _identify(children)

    def _check_products(self) -> None:
        parts = {node: self._take_apart(node) for node in self._nodes}
        cases = count_cases(parts, MAX_CASES + 1)
        for node, count in cases.items():
            if count > MAX_CASES:
                raise self._error(
                    f"{_show(self._nodes[node][0])} combines alternatives into more than "
                    f"{MAX_CASES} cases, that is the most taken.",
                    "Write fewer alternatives side by side in allOf.",
                )
        weights = weigh_merged(parts, MAX_MERGED_PATTERNS + 1)
        for node, weight in weights.items():
            if weight > MAX_MERGED_PATTERNS:
                raise self._error(
                    f"{_show(self._nodes[node][0])} asks for more than {MAX_MERGED_PATTERNS} "
                    "patterns or formats at once, that is the most taken."
                )

    def _take_apart(self, node: int) -> Parts:
        path, schema = self._nodes[node]
        joined = list(schema.get("allOf", ()))
        if "$ref" in schema:
            joined.append(self._resolve(path, schema["$ref"]))
        groups = [_identify(schema.get(key, ())) for key in ("anyOf", "oneOf")]
        same = set(self._in_place(node))
        inner = _identify(child for _, child in self._subschemas(path, schema))
        return Parts(
            own=("pattern" in schema) + ("format" in schema),
            all_of=tuple(_identify(joined)),
            any_of=tuple(tuple(group) for group in groups if group),
            inner=tuple(child for child in inner if child not in same),
        )


def _identify(schemas: Iterable[Any]) -> list[int]:
    """The nodes of `schemas`; true and false are none."""
    return [id(schema) for schema in schemas if isinstance(schema, dict)]


def _name_kind(value: object) -> str:
    kinds = {"dict": "an object", "list": "an array", "tuple": "an array", "str": "a string"}
    kinds |= {"bool": "a boolean", "int": "a number", "float": "a number", "NoneType": "null"}
    return kinds.get(type(value).__name__, f"a {type(value).__name__}")


def _show(path: str) -> str:
    return "The schema" if path == "#" else f"The schema at {path[:200]}"


def _quote(value: object) -> str:
    return repr(value)[:80]


def _shorten(value: int | float) -> str:
    return str(value) if abs(value) < 10**18 else "beyond 10^18"


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
