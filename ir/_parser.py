"""Reads the text form of a graph; see `ir.text` for the grammar by example."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NoReturn, cast

import numpy as np

from ir._attributes import MAX_INT, MAX_OPTION_DEPTH, make_op, tensor_type
from ir._lexer import Token, place, tokens
from ir.errors import GraphError, ParseError
from ir.graph import Graph, Node, Value
from ir.op import Array, Op, op_class
from ir.ops.control import Body
from ir.ops.structure import NUMPY_DTYPES, Component, Constant, Input, Parameter
from ir.types import TensorType
from ir.verify import verify

MAX_DEPTH = 32 + MAX_OPTION_DEPTH
MAX_LOOPS = 8


class Parser:
    """A recursive-descent parser with one token of look-ahead; holds nothing but its place in the text."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._tokens = tokens(text, source)
        self._next = 0
        self._nodes: dict[int, Node] = {}
        self._loops = 0

    # -- graph -------------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        """The whole text as a graph."""
        graph = self._graph()
        if self._peek().kind != "end":
            self._fail(self._peek(), "more text after the graph", "the end of the text")
        return graph

    def _graph(self) -> Graph:
        self._word("graph")
        name = self._name()
        self._mark("{")
        while self._peek().kind == "value":
            self._node()
        start = self._word("return")
        outputs = [self._output()]
        while self._accept(","):
            outputs.append(self._output())
        self._mark("}")
        try:
            return verify(Graph(self._nodes.values(), outputs, name=name), allow_components=True)
        except GraphError as error:
            self._fail_from(start, error)

    def _inner_graph(self, token: Token) -> Body:
        """The body of a loop, whose nodes are numbered by themselves."""
        if self._loops >= MAX_LOOPS:
            self._fail(token, "loops are nested too deeply", f"at most {MAX_LOOPS} levels")
        outer, self._nodes = self._nodes, {}
        self._loops += 1
        graph = self._graph()
        self._nodes, self._loops = outer, self._loops - 1
        return Body(graph)

    def _output(self) -> tuple[str, Value]:
        name = self._name()
        self._mark("=")
        return name, self._operand()

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _node(self) -> None:
        results = [self._result()]
        while self._accept(","):
            results.append(self._result())
        self._mark("=")
        op, operands, types = self._body()
        scope = self._name() if self._accept("@") else ""
        number = self._number_of(results, len(types))
        self._nodes[number] = Node(number, op, operands, types, scope)

    def _number_of(self, results: list[Token], count: int) -> int:
        """The node number, checked against the results on the left side."""
        number = self._value(results[0]).node
        expected = [f"%{number}"] if count == 1 else [f"%{number}.{index}" for index in range(count)]
        if [token.text for token in results] != expected:
            self._fail(results[0], "wrong results for the types", ", ".join(expected))
        last = next(reversed(self._nodes), -1)
        if number <= last:
            self._fail(results[0], "node numbers must grow", f"a number above %{last}")
        return number

    def _body(self) -> tuple[Op, tuple[Value, ...], tuple[TensorType, ...]]:
        start = self._word()
        match start.text:
            case "input":
                label = self._string()
                types = self._types()
                return self._typed(start, Input(label, types[0]), (), types)
            case "parameter":
                return self._typed(start, self._parameter(start), (), None)
            case "constant":
                return self._constant(start)
            case "component":
                kind, key = self._string(), self._string()
                operands, options = self._operands(), list(self._attributes().items())
                types = self._types()
                plain = {"kind": kind, "key": key, "options": options, "types": types}
                return self._typed(start, make_op(Component, plain, self._place(start)), operands, types)
            case name:
                operands, attributes = self._operands(), self._attributes()
                types = self._types()
                return self._typed(start, self._op(start, name, attributes), operands, types)

    def _op(self, start: Token, name: str, attributes: dict[str, Any]) -> Op:
        try:
            kind = op_class(name)
        except GraphError as error:
            self._fail_from(start, error)
        return make_op(kind, attributes, self._place(start))

    def _parameter(self, start: Token) -> Op:
        label = self._string()
        axes: list[list[tuple[str, int]]] = []
        while self._accept("("):
            factors: list[tuple[str, int]] = []
            while not self._accept(")"):
                if factors:
                    self._mark(",")
                name = self._name()
                self._mark("=")
                factors.append((name, self._integer()))
            axes.append(factors)
        self._word("init")
        self._mark("=")
        attributes: dict[str, Any] = {"label": label, "axes": axes, "init": self._string()}
        if self._peek().kind == "word" and self._peek().text == "fixed":
            self._word("fixed")
            attributes["trained"] = False
        return make_op(Parameter, attributes, self._place(start))

    def _constant(self, start: Token) -> tuple[Op, tuple[Value, ...], tuple[TensorType, ...]]:
        if self._peek().kind == "base64":
            encoded = self._take()
            types = self._types()
            try:
                data = base64.b64decode(encoded.text[len('base64"') : -1], validate=True)
            except binascii.Error:
                self._fail(encoded, "malformed base64", "multiples of four characters")
            return self._typed(start, Constant(types[0], data), (), types)
        literal = self._literal(0)
        types = self._types()
        numbers = self._flat(start, literal, types[0].shape)
        wrong = [item for item in numbers if type(item) not in _NUMBERS[np.dtype(NUMPY_DTYPES[types[0].dtype]).kind]]
        if wrong or (types[0].dtype == "int32" and any(not -(2**31) <= item < 2**31 for item in numbers)):
            self._fail(start, f"a constant holds something that is no {types[0].dtype}")
        return self._typed(start, Constant(types[0], array_of(numbers, types[0]).tobytes()), (), types)

    def _flat(self, start: Token, literal: Any, shape: tuple[int, ...]) -> list[Any]:
        """Numbers of a nested literal in row-major order."""
        if not shape:
            return [literal]
        if not isinstance(literal, list) or len(cast("list[Any]", literal)) != shape[0]:
            self._fail(start, "a constant does not fill its type", f"lists nested as {list(shape)}")
        return [item for row in cast("list[Any]", literal) for item in self._flat(start, row, shape[1:])]

    def _typed(
        self, start: Token, op: Op, operands: tuple[Value, ...], stated: tuple[TensorType, ...] | None
    ) -> tuple[Op, tuple[Value, ...], tuple[TensorType, ...]]:
        """Infer the types and hold them against those written."""
        try:
            inferred = op.infer_types(tuple(self._nodes[value.node].types[value.index] for value in operands))
        except GraphError as error:
            self._fail_from(start, error)
        if stated is not None and inferred != stated:
            found = ", ".join(map(str, stated))
            self._fail(start, "types are not what the operation gives", ", ".join(map(str, inferred)), found)
        return op, operands, inferred

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _types(self) -> tuple[TensorType, ...]:
        self._mark(":")
        types = [self._type()]
        while self._accept(","):
            types.append(self._type())
        return tuple(types)

    def _type(self) -> TensorType:
        dtype = self._word()
        self._mark("[")
        sizes: list[int] = []
        while not self._accept("]"):
            if sizes:
                self._mark(",")
            sizes.append(self._integer())
        return tensor_type(dtype.text, sizes, self._place(dtype))

    def _operands(self) -> tuple[Value, ...]:
        operands: list[Value] = []
        while self._peek().kind == "value" or (operands and self._accept(",")):
            operands.append(self._operand())
        return tuple(operands)

    def _operand(self) -> Value:
        token = self._result()
        value = self._value(token)
        if value.node not in self._nodes:
            self._fail(token, "no earlier node has this number")
        count = len(self._nodes[value.node].types)
        if value.index >= count or (count > 1) != ("." in token.text):
            expected = f"%{value.node}" if count == 1 else f"%{value.node}.0 to %{value.node}.{count - 1}"
            self._fail(token, "no such result", expected)
        return value

    def _result(self) -> Token:
        token = self._take()
        if token.kind != "value":
            self._fail(token, "a value is missing", "a value such as %3")
        return token

    def _value(self, token: Token) -> Value:
        number, _, index = token.text[1:].partition(".")
        if len(number) > 18 or len(index) > 9:
            self._fail(token, "number out of range")
        return Value(int(number), int(index or "0"))

    def _attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        if not self._accept("{"):
            return attributes
        while not self._accept("}"):
            if attributes:
                self._mark(",")
            token = self._peek()
            name = self._name()
            if name in attributes:
                self._fail(token, "attribute is given twice")
            self._mark("=")
            token = self._peek()
            inner = token.kind == "word" and token.text == "graph"
            attributes[name] = self._inner_graph(token) if inner else self._literal(0)
        return attributes

    def _literal(self, depth: int) -> Any:
        token = self._take()
        if token.kind == "string":
            return self._unquoted(token)
        if token.kind == "number":
            return self._number(token)
        if token.kind == "word" and token.text in _WORDS:
            return _WORDS[token.text]
        if token.text != "[":
            self._fail(token, "a value is missing", "a number, text in quotes, true, false, none or a list")
        if depth >= MAX_DEPTH:
            self._fail(token, "lists are nested too deeply", f"at most {MAX_DEPTH} levels")
        items: list[Any] = []
        while not self._accept("]"):
            if items:
                self._mark(",")
            items.append(self._literal(depth + 1))
        return items

    def _number(self, token: Token) -> int | float:
        if token.text.lstrip("-").isdigit():
            if len(token.text) > 20 or abs(int(token.text)) > MAX_INT:
                self._fail(token, "number out of range", "a 64-bit integer")
            return int(token.text)
        number = float(token.text)
        if abs(number) == float("inf") and token.text != "-inf":
            self._fail(token, "number out of range", "a double-precision number")
        return number

    def _integer(self) -> int:
        token = self._take()
        number = self._number(token) if token.kind == "number" else None
        if not isinstance(number, int):
            self._fail(token, "a whole number is missing", "a whole number")
        return number

    def _string(self) -> str:
        token = self._take()
        if token.kind != "string":
            self._fail(token, "text is missing", "text in double quotes")
        return self._unquoted(token)

    def _unquoted(self, token: Token) -> str:
        try:
            return json.loads(token.text)
        except ValueError:
            self._fail(token, "malformed text in quotes")

    def _name(self) -> str:
        return self._string() if self._peek().kind == "string" else self._word().text

    def _word(self, text: str | None = None) -> Token:
        token = self._take()
        if token.kind != "word" or text not in (None, token.text):
            self._fail(token, "unexpected text", f"'{text}'" if text else "a name")
        return token

    def _mark(self, text: str) -> None:
        token = self._take()
        if token.kind != "mark" or token.text != text:
            self._fail(token, "unexpected text", f"'{text}'")

    def _accept(self, text: str) -> bool:
        found = self._peek().kind == "mark" and self._peek().text == text
        self._next += found
        return found

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _take(self) -> Token:
        token = self._peek()
        self._next += token.kind != "end"
        return token

    def _place(self, token: Token) -> str:
        return place(self._text, token.offset, self._source)

    def _fail(self, token: Token, message: str, expected: str | None = None, found: str | None = None) -> NoReturn:
        raise ParseError(message, where=self._place(token), expected=expected, found=found or str(token))

    def _fail_from(self, token: Token, error: GraphError) -> NoReturn:
        message = f"{error.where}: {error.message}" if error.where else error.message
        raise ParseError(
            message, where=self._place(token), expected=error.expected, found=error.found, hint=error.hint
        ) from error


def array_of(numbers: list[Any], kind: TensorType) -> Array:
    """Numbers as the array that a constant of a type stores."""
    with np.errstate(over="ignore"):
        return np.array(numbers, NUMPY_DTYPES[kind.dtype])


_WORDS = {"true": True, "false": False, "none": None, "inf": float("inf"), "nan": float("nan")}
_NUMBERS = {"f": (int, float), "i": (int,), "b": (bool,)}
