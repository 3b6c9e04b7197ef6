"""Which projections of a module share their input, read from the source of its ``forward``.

    q = self.q_proj(x)
    k = self.k_proj(x)      ->  ("q_proj", "k_proj")
    x = self.norm(x)
    o = self.o_proj(x)      another tensor

Nothing is executed or rewritten. Why the source: a group must be known before the first call, or
the first pass under gradient checkpointing would save other tensors than its recomputation does.
What is read are names, not tensors: whether the variable still holds the same, unchanged tensor
(``x.add_(1)`` between two calls is not seen here) is for the caller to check at run time.
"""

from __future__ import annotations

import ast
import functools
import inspect
import weakref
from collections.abc import Collection, Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_MAX_WRAPPERS = 32  # around a forward; more is a cycle of ``__wrapped__``

_NEW_SCOPE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Evaluated later, not at all, or more than once.
_CONDITIONAL = (ast.Lambda, ast.BoolOp, ast.IfExp, *_COMPREHENSIONS)
_LEAVES_BLOCK = (ast.Return, ast.Raise, ast.Break, ast.Continue)

# By function object: thousands of layers share one forward, and a class that was made anew under an
# old name has its own.
_runs_of: weakref.WeakKeyDictionary[FunctionType, tuple[tuple[str, ...], ...]]
_runs_of = weakref.WeakKeyDictionary()


def sibling_names(parent: nn.Module, candidates: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Find the children that the parent's forward calls with the very same variable.

    A group is made of calls ``self.<child>(<variable>)``, with this one argument, that stand in the
    same block of statements and are reached on every way through it, except for a ``return`` (or
    the like) in a statement nested between them. Nothing between the calls rebinds the variable.

    Args:
        parent: its ``forward`` as it is bound now is read, also below decorators, accelerate's hook
            and what other libraries put on the instance.
        candidates: names of children to look for.

    Returns:
        Groups of two or more names, in the order of the calls; a child is in one group at most, the
        first. Empty where the source cannot be read.
    """
    function = _forward_function(parent)
    if function is None:
        return ()
    groups: list[tuple[str, ...]] = []
    grouped: set[int] = set()
    for run in _runs(function):
        children: dict[int, str] = {}
        for name in run:
            # One child may have two names.
            child = parent._modules.get(name) if name in candidates else None
            if child is not None and id(child) not in grouped:
                children.setdefault(id(child), name)
        if len(children) > 1:
            groups.append(tuple(children.values()))
            grouped.update(children)
    return tuple(groups)


def _forward_function(parent: nn.Module) -> FunctionType | None:
    """Return the function that runs as ``parent.forward``, or ``None`` if it is not bound to it."""
    forward: Any = parent.forward
    bound = False
    for _ in range(_MAX_WRAPPERS):
        if isinstance(forward, MethodType):
            # A shallow copy of a module has the forward of the original, which calls its children.
            if forward.__self__ is not parent:
                return None
            bound, forward = True, forward.__func__
        elif _is_accelerate_hook(forward) and "_old_forward" in vars(parent):
            forward = vars(parent)["_old_forward"]
        elif hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        elif isinstance(forward, functools.partial):
            if forward.args:
                if forward.args[0] is not parent:
                    return None
                bound = True
            forward = forward.func
        else:
            break
    return forward if bound and isinstance(forward, FunctionType) else None


def _is_accelerate_hook(forward: object) -> bool:
    # Its ``__wrapped__`` is what it wrapped first; what it calls is the module's ``_old_forward``.
    # That attribute alone says nothing: it stays behind when a forward is bound over the hook.
    if not isinstance(forward, functools.partial):
        return False
    return getattr(forward.func, "__module__", None) == "accelerate.hooks"


def _runs(function: FunctionType) -> tuple[tuple[str, ...], ...]:
    """Return, for each variable, the names that are called with it between two rebindings."""
    runs = _runs_of.get(function)
    if runs is None:
        node = _parse(function)
        runs = () if node is None else _runs_in(node)
        # A file that was edited since its import, or code that was compiled under another file's
        # name, gives the source of something else.
        if not {name for run in runs for name in run} <= set(function.__code__.co_names):
            runs = ()
        _runs_of[function] = runs
    return runs


def _parse(function: FunctionType) -> ast.FunctionDef | None:
    """Return the syntax tree of a function, or ``None`` if it has no source or that of another."""
    try:
        source = inspect.getsource(function)
        # Under an ``if`` a method may keep its indentation; removing it fails where a string has
        # lines that begin further left.
        tree = ast.parse("if True:\n" + source if source[:1].isspace() else source)
    except Exception:  # a module's loader, which is asked for the source, may raise anything
        return None
    node = tree.body[0]
    if isinstance(node, ast.If):
        node = node.body[0]
    code = function.__code__
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        return None
    names = tuple(argument.arg for argument in (*node.args.posonlyargs, *node.args.args))
    return node if names == code.co_varnames[: code.co_argcount] else None


def _runs_in(function: ast.FunctionDef) -> tuple[tuple[str, ...], ...]:
    """Return the attributes of ``self`` that are called with the same variable, run by run.

    Args:
        function: a method; ``self`` is whatever its first parameter is called.

    Returns:
        Runs in the order of their first calls; a name may be in several, and a run may have one.
    """
    # A nested function that declares a variable nonlocal may rebind it whenever it is called.
    shared = {
        name
        for node in ast.walk(function)
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
    parameters = [*function.args.posonlyargs, *function.args.args]
    if not parameters or parameters[0].arg in shared | _bound_names(function.body):
        return ()
    runs: list[list[str]] = []
    _read_block(function.body, parameters[0].arg, shared, runs)
    return tuple(tuple(dict.fromkeys(run)) for run in runs)


def _read_block(
    statements: list[ast.stmt], this: str, shared: set[str], runs: list[list[str]]
) -> None:
    """Add the runs of a block, then of the blocks nested in it, to ``runs``."""
    open_runs: dict[str, list[str]] = {}
    for statement in statements:
        rebound = _bound_names([statement])
        # Inside one expression a walrus may stand on either side of a call.
        unsure = shared | _bound_names(_heads(statement), walrus_only=True)
        for head in _heads(statement):
            for name, variable in _calls(head, this):
                if variable in unsure:
                    continue
                if variable not in open_runs:
                    open_runs[variable] = []
                    runs.append(open_runs[variable])
                open_runs[variable].append(name)
        for variable in rebound:
            open_runs.pop(variable, None)
        if isinstance(statement, _LEAVES_BLOCK):
            open_runs.clear()
        if not isinstance(statement, _NEW_SCOPE):
            for block in _nested_blocks(statement):
                _read_block(block, this, shared, runs)


def _heads(statement: ast.stmt) -> list[ast.expr]:
    """Return the expressions that a statement always evaluates once, in order, before any block."""
    heads: list[ast.expr | None]
    match statement:
        case ast.Assign():
            heads = [statement.value, *statement.targets]
        case ast.AugAssign() | ast.AnnAssign():
            heads = [statement.value, statement.target]
        case ast.Expr() | ast.Return():
            heads = [statement.value]
        case ast.Raise():
            heads = [statement.exc, statement.cause]
        case ast.Delete():
            heads = [*statement.targets]
        case ast.If():
            heads = [statement.test]
        case ast.For():
            heads = [statement.iter]
        case ast.With():
            heads = [item.context_expr for item in statement.items]
        case ast.Match():
            heads = [statement.subject]
        case _:
            # The test of a ``while`` runs again after its body, ``assert`` not under -O.
            heads = []
    return [head for head in heads if head is not None]


def _nested_blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the blocks of a compound statement, in order."""
    for _, value in ast.iter_fields(node):
        if not isinstance(value, list) or not value:
            continue
        if isinstance(value[0], ast.stmt):
            yield value
        elif isinstance(value[0], (ast.ExceptHandler, ast.match_case)):
            for part in value:
                yield from _nested_blocks(part)


def _calls(head: ast.expr, this: str) -> list[tuple[str, str]]:
    """Return ``(name, variable)`` of each call ``self.<name>(<variable>)`` that is always made."""
    found: list[tuple[int, int, str, str]] = []
    pending: list[ast.AST] = [head]
    while pending:
        node = pending.pop()
        chained = isinstance(node, ast.Compare) and len(node.ops) > 1
        if chained or isinstance(node, _CONDITIONAL):
            continue
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr=name),
                args=[ast.Name(id=variable)],
                keywords=[],
            ) if owner == this:
                found.append((node.lineno, node.col_offset, name, variable))
            case _:
                pending.extend(ast.iter_child_nodes(node))
    # Calls on plain names cannot hold one another, so they run in the order of the text.
    return [(name, variable) for _, _, name, variable in sorted(found)]


def _bound_names(nodes: Iterable[ast.AST], *, walrus_only: bool = False) -> set[str]:
    """Return the local variables of a function that executing these nodes may bind or delete."""
    names: set[str | None] = set()
    for node in _same_scope(nodes):
        if walrus_only and not isinstance(node, ast.NamedExpr):
            continue
        match node:
            case ast.NamedExpr():
                names.add(node.target.id)
            case ast.Name(ctx=ast.Store() | ast.Del()):
                names.add(node.id)
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                names.add(node.name)
            case ast.MatchMapping():
                names.add(node.rest)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.alias():
                names.add(node.asname or node.name.partition(".")[0])
    return {name for name in names if name is not None}


def _same_scope(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Walk over nodes without what binds in a scope of its own."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, _NEW_SCOPE):
            # Decorators, defaults and base classes belong to the function around.
            pending += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)]
        elif isinstance(node, ast.comprehension):
            pending += [node.iter, *node.ifs]
        else:
            pending += ast.iter_child_nodes(node)
