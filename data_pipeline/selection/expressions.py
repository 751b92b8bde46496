"""Conditions as people write them (`aesthetic > 5 and nsfw < 0.1`) as expressions of pyarrow. Nothing is executed.

Python's own parser reads the text; only comparisons, arithmetic and logic over columns become an expression. As in SQL,
a comparison with a null is null, and a row counts only where the condition is true.
"""

import ast
import io
import operator
import tokenize
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from infra.errors import UserError, nearest

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
# SQL's spelling of what Python writes otherwise.
_WORDS = {"AND": "and", "OR": "or", "NOT": "not", "IN": "in", "IS": "is", "NULL": "None", "TRUE": "True",
          "FALSE": "False", "null": "None", "true": "True", "false": "False"}  # fmt: skip
_TAKES = "a condition compares columns with numbers or 'texts': > >= < <= == != in (...) is None and or not + - * /"


class RowCondition:
    """One condition: `text` in one spelling, the columns it reads, and which rows of a table fulfil it."""

    def __init__(self, text: str) -> None:
        self.given, self.names = text, set[str]()
        try:
            self._tree = ast.parse(_respell(text), mode="eval").body
        except (SyntaxError, tokenize.TokenError, RecursionError, ValueError) as error:
            raise UserError(f"--where {text!r} cannot be read ({_TAKES})") from error
        self.text = ast.unparse(self._tree)
        self._expression = self._build(self._tree)
        if not self.names:
            raise UserError(f"--where {text!r} names no column: {_TAKES}")

    def check_columns(self, known: Collection[str], where: str) -> None:
        """UserError for a column that is not there."""
        for name in sorted(self.names - set(known)):
            raise UserError(
                f"--where {self.given!r}: no column {name} in {where}{nearest(name, known)}; it has "
                f"{', '.join(sorted(known))} (--columns adds a table with a column `key`)"
            )

    def mask(self, table: pa.Table) -> np.ndarray:
        """A bool per row: False also where the condition is null."""
        source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
        project = acero.Declaration("project", acero.ProjectNodeOptions([self._expression], ["kept"]))
        try:
            # without threads: see formats/parquet_io.py
            found = acero.Declaration.from_sequence([source, project]).to_table(use_threads=False)["kept"]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            types = ", ".join(f"{name} {table.schema.field(name).type}" for name in sorted(self.names))
            reason = str(error).splitlines()[0]
            raise UserError(f"--where {self.given!r} does not suit its columns ({types}): {reason}") from error
        if not pa.types.is_boolean(found.type):
            raise UserError(f"--where {self.given!r} gives a {found.type}, not true or false: compare it")
        return found.fill_null(False).combine_chunks().to_numpy(zero_copy_only=False)

    def _build(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                self.names.add(name)
                return pc.field(name)
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return pc.scalar(-value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._build(operand)
            case ast.BoolOp(op=op, values=values):
                parts = [self._build(value) for value in values]
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                for part in parts[1:]:
                    parts[0] = join(parts[0], part)
                return parts[0]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self._build(left), self._build(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                parts = [self._compare(a, op, b) for a, op, b in zip(sides, ops, others)]
                for part in parts[1:]:
                    parts[0] = parts[0] & part
                return parts[0]
        raise UserError(f"--where {self.given!r}: {ast.unparse(node)!r} cannot be used; {_TAKES}")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        none = isinstance(right, ast.Constant) and right.value is None
        match op:
            case ast.Is() if none:
                return self._build(left).is_null()
            case ast.IsNot() if none:
                return self._build(left).is_valid()
            case ast.In() | ast.NotIn() if isinstance(right, ast.Tuple | ast.List | ast.Set | ast.Constant):
                listed = right.elts if not isinstance(right, ast.Constant) else [right]  # ('a') is no tuple
                values = [one.value for one in listed if isinstance(one, ast.Constant) and one.value is not None]
                if values and len(values) == len(listed):
                    found = self._build(left).isin(_one_type(values, self.given))
                    # a null is in no list, and not outside of one either; pyarrow calls it outside
                    found = pc.if_else(self._build(left).is_valid(), found, pc.scalar(pa.scalar(None, pa.bool_())))
                    return found if isinstance(op, ast.In) else ~found
            case _ if type(op) in _COMPARE:
                return _COMPARE[type(op)](self._build(left), self._build(right))
        shown = ast.unparse(ast.Compare(left, [op], [right]))
        raise UserError(f"--where {self.given!r}: {shown!r} cannot be used; {_TAKES}")


def _one_type(values: list[Any], given: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"--where {given!r}: a list of several types: {', '.join(map(repr, values))}") from error


def _respell(text: str) -> str:
    """SQL's words and signs as Python's, outside of quoted texts."""
    words: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        word = token.string
        if token.type == tokenize.NAME:
            word = _WORDS.get(word, word)
        elif token.type == tokenize.OP and word == "=":
            word = "=="
        elif token.type == tokenize.OP and word == ">" and words[-1:] == [(tokenize.OP, "<")]:
            words.pop()  # Python reads <> as two signs
            word = "!="
        words.append((token.type, word))
    return tokenize.untokenize(words).strip()
