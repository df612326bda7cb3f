"""What the parts of a Python source are, from Python's own tokenizer and parser."""

import ast
import builtins
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import Final

from mxd.probing.examples import Span, Unlabelled

DEEP: Final = 3
"""Levels of indentation from which on code counts as deeply nested."""

BUILTIN_EXCEPTIONS = frozenset(
    name
    for name in dir(builtins)
    if isinstance(getattr(builtins, name), type) and issubclass(getattr(builtins, name), BaseException)
)
BUILTINS = frozenset(dir(builtins)) - BUILTIN_EXCEPTIONS - frozenset(keyword.kwlist)
COMPARISONS = frozenset({"==", "!=", "<", ">", "<=", ">="})
ARITHMETIC = frozenset({"+", "-", "*", "/", "//", "%", "**", "|", "&", "^", "~", "<<", ">>"})
BRACKETS = frozenset("()[]{}")
_BLANKS = re.compile(r"[ \t]*")


def python_spans(text: str) -> list[Span]:
    """Return the labelled parts of a Python source.

    Raises:
        Unlabelled: If it is no source of this version of Python.
    """
    try:
        with warnings.catch_warnings():
            # A source's own sloppy escapes are not ours to report.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        lines = _Lines(text)
        return [*_token_spans(text, lines), *_node_spans(tree, lines)]
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise Unlabelled(f"a text must be Python source; this one is not ({error}).") from error


class _Lines:
    """Where the lines of a source are, as Python counts them."""

    def __init__(self, text: str) -> None:
        # Python ends a line at \n, \r\n and \r alone, str.splitlines at several more.
        self.lines = [*io.StringIO(text, newline="")]
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, row: int, column: int) -> int:
        """Return the place of a column in characters; rows count from 1."""
        return self.starts[row - 1] + column

    def at_byte(self, row: int, column: int) -> int:
        """Return the place of a column in bytes of UTF-8, as the parser counts."""
        line = self.lines[row - 1] if row <= len(self.lines) else ""
        return self.at(row, column if line.isascii() else len(line.encode()[:column].decode(errors="ignore")))

    def node(self, node: ast.expr | ast.stmt | ast.arg | ast.keyword | ast.excepthandler, label: str) -> Span:
        """Return the span of a node."""
        last, column = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        return Span(self.at_byte(node.lineno, node.col_offset), self.at_byte(last, column), label)


def _token_spans(text: str, lines: _Lines) -> Iterator[Span]:
    depth, in_string, depths = 0, 0, dict[int, int]()
    tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="").readline))
    for place, token in enumerate(tokens):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        # Since 3.12 what stands in an f-string is tokens of its own; before, it was one string.
        name = tokenize.tok_name[token.type]
        in_string += name.endswith("STRING_START")
        start, end = lines.at(*token.start), lines.at(*token.end)
        if token.type in (tokenize.NEWLINE, tokenize.NL):
            if end > start:
                # Most tokenizers join the indentation behind a line's end to it.
                behind = _BLANKS.match(text, end)
                yield Span(start, end if behind is None else behind.end(), "line break")
        elif end > start and not in_string:
            depths.setdefault(token.start[0], depth)
            labels = _labels_of(token, tokens[place - 1].string if place else "")
            yield from (Span(start, end, label) for label in labels)
        in_string -= name.endswith("STRING_END")
    for row, level in depths.items():
        line = lines.lines[row - 1]
        indent = len(line) - len(line.lstrip(" \t\f"))
        if indent and line.strip():
            yield Span(lines.at(row, 0), lines.at(row, indent), "indentation")
        if level >= DEEP or level == 0:
            label = "deeply nested" if level else "module level"
            yield Span(lines.at(row, indent), lines.at(row, len(line.rstrip())), label)


def _labels_of(token: tokenize.TokenInfo, before: str) -> Sequence[str]:
    kind, string = token.type, token.string
    if kind == tokenize.COMMENT:
        return ("comment",)
    if kind == tokenize.NUMBER:
        return ("number",)
    if kind == tokenize.NAME:
        return _labels_of_name(string, before)
    if kind == tokenize.OP:
        groups = {"comparison": COMPARISONS, "arithmetic operator": ARITHMETIC, "bracket": BRACKETS}
        group = next((name for name, members in groups.items() if string in members), None)
        return ("operator",) if group is None else ("operator", group)
    return ("string",) if kind == tokenize.STRING else ()


def _labels_of_name(name: str, before: str) -> Sequence[str]:
    if keyword.iskeyword(name):
        return ("constant",) if name in ("None", "True", "False") else ("keyword", *_statement_keyword(name))
    if before in ("def", "class"):
        return (f"{'function' if before == 'def' else 'class'} name",)
    if before == ".":
        return ("attribute",)
    if name in ("self", "cls"):
        return ("self",)
    if name in BUILTIN_EXCEPTIONS:
        return ("exception class",)
    return ("builtin",) if name in BUILTINS else ()


def _statement_keyword(name: str) -> Sequence[str]:
    return (name,) if name in ("def", "return", "if", "in") else ()


def _node_spans(tree: ast.Module, lines: _Lines) -> Iterator[Span]:
    for node in _walk(tree):
        match node:
            case ast.JoinedStr():
                yield lines.node(node, "string")
            case ast.Import() | ast.ImportFrom():
                yield lines.node(node, "import")
            case ast.Raise():
                yield lines.node(node, "raise")
            case ast.Return():
                yield lines.node(node, "return statement")
            case ast.Call():
                yield lines.node(node.func, "called function")
                yield from (lines.node(each, "keyword argument") for each in node.keywords if each.arg)
            case ast.arg():
                start = lines.at_byte(node.lineno, node.col_offset)
                yield Span(start, start + len(node.arg), "parameter")
                if node.annotation is not None:
                    yield lines.node(node.annotation, "type annotation")
            case ast.AnnAssign():
                yield lines.node(node.annotation, "type annotation")
                yield lines.node(node.target, "assigned to")
            case ast.Assign():
                yield from (lines.node(target, "assigned to") for target in node.targets)
            case ast.If() | ast.While():
                yield lines.node(node.test, "condition")
            case ast.ExceptHandler(type=ast.expr() as caught):
                yield lines.node(caught, "caught exception")
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                yield lines.node(node, "comprehension")
            case ast.Subscript():
                yield lines.node(node.slice, "index")
            case _:
                pass
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _definition_spans(node, lines)


def _walk(tree: ast.Module) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        # Before 3.12 the parser misplaces what stands in an f-string.
        if not isinstance(node, ast.JoinedStr):
            waiting.extend(ast.iter_child_nodes(node))


def _definition_spans(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, lines: _Lines
) -> Iterator[Span]:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield lines.node(first, "docstring")
    if isinstance(node, ast.Module):
        return
    yield from (lines.node(decorator, "decorator") for decorator in node.decorator_list)
    if not isinstance(node, ast.ClassDef) and node.returns is not None:
        yield lines.node(node.returns, "type annotation")
