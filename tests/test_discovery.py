"""Siblings are found by reading a forward: each rule by hand, then whole families of models."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import textwrap
import types
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_models import FAMILIES, class_names, tiny_model, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora import discovery
from fastlora.discovery import sibling_names

QKV = ("q", "k", "v")


class Parent(nn.Module):
    """Three projections and a norm, called in some order by a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in QKV)
        self.norm = nn.LayerNorm(4)


def written(folder: Path, body: str, parameters: str = "self, x, y, c") -> nn.Module:
    """Build a module whose forward has this body, from a file: code without one has no source."""
    path = folder / "written.py"
    source = f"class Written(Parent):\n    def forward({parameters}):\n"
    path.write_text(source + textwrap.indent(body, " " * 8) + "\n")
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    module.Parent = Parent
    spec.loader.exec_module(module)
    return module.Written()


def cases(bodies: dict[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("body", bodies.values(), ids=bodies.keys())


@cases(
    {
        "statements": "q = self.q(x)\nk = self.k(x)\nreturn q, k",
        "one-expression": "return y(y(self.q(x)) * self.k(x))",
        "tuple": "q, k = self.q(x), self.k(x)",
        "method-chain": "return self.q(x).view(1).transpose(0, self.k(x))",
        "arguments": "return y(self.q(x), key=self.k(x))",
        "dict": "return {'q': self.q(x), 'k': self.k(x)}",
        "f-string": "return f'{self.q(x)} {self.k(x)}'",
        "comparison": "return self.q(x) < self.k(x)",
        "augmented-value": "y += self.q(x)\ny -= self.k(x)",
        "annotated-value": "q: object = self.q(x)\nk: object = self.k(x)",
        "subscript-target": "y[0] = self.q(x)\ny[self.k(x)] = 0",
        "expression-statement": "self.q(x)\nself.k(x)",
        "if-test": "q = self.q(x)\nif self.k(x).any():\n    pass",
        "for-iterable": "q = self.q(x)\nfor row in self.k(x):\n    pass",
        "with-item": "q = self.q(x)\nwith y(self.k(x)):\n    pass",
        "match-subject": "q = self.q(x)\nmatch self.k(x):\n    case _:\n        pass",
        "raised": "q = self.q(x)\nraise ValueError(self.k(x))",
        "deleted-item": "q = self.q(x)\ndel y[self.k(x)]",
        "walrus-result": "if (q := self.q(x)) is not None:\n    pass\nk = self.k(x)",
        "last-rebinds-it": "q = self.q(x)\nx = self.k(x)",
    }
)
def test_calls_on_one_variable_are_a_group(tmp_path: Path, body: str) -> None:
    assert sibling_names(written(tmp_path, body), QKV) == (("q", "k"),)


@cases(
    {
        "assignment": "x = y",
        "chained-assignment": "z = x = y",
        "tuple": "z, (x, w) = y",
        "starred": "z, *x = y",
        "augmented": "x += 1",
        "annotated": "x: object = y",
        "walrus": "z = y(x := y)",
        "walrus-that-may-not-run": "z = c and (x := y)",
        "walrus-in-a-comprehension": "z = [(x := row) for row in y]",
        "for-target": "for x in y:\n    pass",
        "for-tuple-target": "for z, x in y:\n    pass",
        "with": "with y as x:\n    pass",
        "with-tuple": "with y as (z, x):\n    pass",
        "except": "try:\n    y()\nexcept ValueError as x:\n    pass",
        "del": "del x",
        "import": "import x",
        "import-as": "import os as x",
        "import-of-a-submodule": "import x.y",
        "from-import": "from os import x",
        "from-import-as": "from os import path as x",
        "def": "def x():\n    pass",
        "class": "class x:\n    pass",
        "match-name": "match y:\n    case x:\n        pass",
        "match-as": "match y:\n    case int() as x:\n        pass",
        "match-star": "match y:\n    case [_, *x]:\n        pass",
        "match-rest": "match y:\n    case {'z': 1, **x}:\n        pass",
        "walrus-in-a-decorator": "@y(x := y)\ndef z():\n    pass",
        "nested-if": "if c:\n    x = y",
        "nested-else": "if c:\n    pass\nelse:\n    x = y",
        "nested-while": "while c:\n    x = y",
        "nested-for": "for z in y:\n    x = z",
        "nested-with": "with y:\n    x = y",
        "nested-try": "try:\n    x = y\nfinally:\n    pass",
        "nested-handler": "try:\n    y()\nexcept ValueError:\n    x = y",
        "nested-finally": "try:\n    y()\nfinally:\n    x = y",
        "nested-match": "match y:\n    case 1:\n        x = y",
        "nested-twice": "if c:\n    for z in y:\n        x = z",
        "nonlocal": "def z():\n    nonlocal x\n    x = y\nz()",
        "return": "return y",
        "raise": "raise ValueError",
    }
)
def test_rebinding_the_variable_or_leaving_separates_calls(tmp_path: Path, body: str) -> None:
    module = written(tmp_path, f"q = self.q(x)\n{body}\nk = self.k(x)")
    assert sibling_names(module, QKV) == ()


@cases(
    {
        "another-variable": "z = y",
        "attribute": "x.z = y",
        "in-place-is-for-the-caller": "x[0] = 1\nx.add_(1)",
        "annotation-without-value": "z: x",
        "local-of-a-function": "def z(w):\n    x = w\n    return x",
        "parameter-of-a-function": "def z(x):\n    return x",
        "local-of-a-class": "class z:\n    x = 1",
        "parameter-of-a-lambda": "z = lambda x: x",
        "target-of-a-comprehension": "z = [x for x in y]",
        "target-of-a-generator": "y = (x + 1 for x in y)",
        "nested-call": "if c:\n    z = self.v(x)",
        "nested-return": "if c:\n    return x",
        "nested-break": "for z in y:\n    break",
    }
)
def test_other_statements_do_not_separate_calls(tmp_path: Path, body: str) -> None:
    module = written(tmp_path, f"q = self.q(x)\n{body}\nk = self.k(x)")
    assert sibling_names(module, QKV) == (("q", "k"),)


@pytest.mark.parametrize("leave", ["break", "continue"])
def test_leaving_a_loop_ends_a_group(tmp_path: Path, leave: str) -> None:
    body = f"for z in y:\n    q = self.q(x)\n    {leave}\n    k = self.k(x)"
    assert sibling_names(written(tmp_path, body), QKV) == ()


@cases(
    {
        "if": "if c:\n    {}",
        "else": "if c:\n    pass\nelse:\n    {}",
        "elif": "if c:\n    pass\nelif y:\n    {}",
        "for": "for z in y:\n    {}",
        "for-else": "for z in y:\n    pass\nelse:\n    {}",
        "while": "while c:\n    {}",
        "with": "with y:\n    {}",
        "try": "try:\n    {}\nfinally:\n    pass",
        "handler": "try:\n    pass\nexcept ValueError:\n    {}",
        "finally": "try:\n    pass\nfinally:\n    {}",
        "case": "match y:\n    case 1:\n        {}",
        "two-deep": "if c:\n    for z in y:\n        {}",
    }
)
def test_a_group_lies_in_one_block(tmp_path: Path, body: str) -> None:
    inside = written(tmp_path, body.format("q = self.q(x); k = self.k(x)"))
    assert sibling_names(inside, QKV) == (("q", "k"),)
    before = written(tmp_path, "q = self.q(x)\n" + body.format("k = self.k(x)"))
    assert sibling_names(before, QKV) == ()
    after = written(tmp_path, body.format("q = self.q(x)") + "\nk = self.k(x)")
    assert sibling_names(after, QKV) == ()


@cases(
    {
        "if-and-else": "if c:\n    q = self.q(x)\nelse:\n    k = self.k(x)",
        "two-ifs": "if c:\n    q = self.q(x)\nif y:\n    k = self.k(x)",
        "try-and-handler": "try:\n    q = self.q(x)\nexcept ValueError:\n    k = self.k(x)",
        "two-cases": "match y:\n    case 1:\n        self.q(x)\n    case _:\n        self.k(x)",
        "a-function": "self.q(y)\nself.k(c)\ndef z():\n    return self.q(x), self.k(x)",
        "a-class": "self.q(y)\nself.k(c)\nclass z:\n    qk = self.q(x), self.k(x)",
        "a-walrus-between": "return y(self.q(x), x := c, self.k(x))",
        "a-walrus-that-may-not-run": "return y(self.q(x), c and (x := c), self.k(x))",
        "a-rebound-self": "q = self.q(x)\nself = y\nk = self.k(x)",
        "a-nonlocal-self": "self.q(x)\ndef z():\n    nonlocal self\n    self = y\nself.k(x)",
    }
)
def test_other_blocks_scopes_and_bindings_are_no_group(tmp_path: Path, body: str) -> None:
    assert sibling_names(written(tmp_path, body), QKV) == ()


@cases(
    {
        "keyword": "self.k(input=x)",
        "extra-keyword": "self.k(x, scale=1)",
        "double-star": "self.k(x, **y)",
        "two-arguments": "self.k(x, y)",
        "star": "self.k(*x)",
        "attribute": "self.k(x.z)",
        "item": "self.k(x[0])",
        "expression": "self.k(x + 0)",
        "walrus": "self.k(x := x)",
        "another-variable": "self.k(y)",
        "if-expression": "self.k(x) if c else None",
        "else-expression": "None if c else self.k(x)",
        "and": "c and self.k(x)",
        "or": "c or self.k(x)",
        "chained-comparison": "0 < c < self.k(x)",
        "lambda": "lambda: self.k(x)",
        "list-comprehension": "[self.k(x) for _ in y]",
        "set-comprehension": "{self.k(x) for _ in y}",
        "dict-comprehension": "{i: self.k(x) for i in y}",
        "generator": "y(self.k(x) for _ in y)",
        "nested-function": "def z():\n    return self.k(x)",
        "nested-class": "class z:\n    k = self.k(x)",
        "while-test": "while self.k(x).any():\n    pass",
        "assert": "assert self.k(x) is not None",
        "another-owner": "y.k(x)",
        "deeper-owner": "self.norm.k(x)",
        "uncalled": "y(self.k, x)",
    }
)
def test_other_calls_are_not_counted(tmp_path: Path, body: str) -> None:
    # k is called once more, so that it is no name that only an inner function knows.
    assert sibling_names(written(tmp_path, f"self.q(x), self.k(c)\n{body}"), QKV) == ()


@pytest.mark.parametrize(
    ("body", "groups"),
    [
        pytest.param("self.v(x), self.q(x), self.k(x)", (("v", "q", "k"),), id="order-of-calls"),
        pytest.param("self.q(x), self.q(x), self.k(x)", (("q", "k"),), id="twice-counts-once"),
        pytest.param("self.q(x), self.q(x)", (), id="one-alone-is-none"),
        pytest.param("self.q(x), self.v(y), self.k(x)", (("q", "k"),), id="interleaved"),
        pytest.param(
            "self.q(x), self.v(y), self.k(x), self.norm(y)",
            (("q", "k"), ("v", "norm")),
            id="two-variables",
        ),
        pytest.param(
            "self.q(x), self.k(x)\nx = y\nself.v(x), self.norm(x)",
            (("q", "k"), ("v", "norm")),
            id="one-variable-bound-twice",
        ),
        pytest.param("self.q(x), self.k(x), self.q(y), self.v(y)", (("q", "k"),), id="first-wins"),
        pytest.param(
            "self.q(x)\nx = y\nself.q(x), self.k(x)", (("q", "k"),), id="one-alone-does-not-win"
        ),
        pytest.param(
            "if c:\n    self.q(x), self.k(x)\nelse:\n    self.q(x), self.k(x), self.v(x)",
            (("q", "k"),),
            id="first-branch-wins",
        ),
        pytest.param("self.q(x), self.same(x), self.k(x)", (("q", "k"),), id="child-of-two-names"),
        pytest.param("self.q(x), self.nothing(x)", (), id="child-that-is-none"),
        pytest.param("self.q(x), self.train(x)", (), id="method"),
    ],
)
def test_each_child_is_in_the_first_group_that_has_it(
    tmp_path: Path, body: str, groups: tuple[tuple[str, ...], ...]
) -> None:
    module = written(tmp_path, body)
    module.same, module.nothing = module.q, None
    assert sibling_names(module, [*QKV, "norm", "same", "nothing", "train"]) == groups


def test_only_candidates_are_counted(tmp_path: Path) -> None:
    module = written(tmp_path, "self.q(x), self.norm(x), self.k(x), self.v(x)")
    assert sibling_names(module, {"v", "q"}) == (("q", "v"),)
    assert sibling_names(module, {"q"}) == ()
    assert sibling_names(module, {"q", "o_proj"}) == ()


@pytest.mark.parametrize(
    ("parameters", "body", "groups"),
    [
        pytest.param("this, x", "this.q(x), this.k(x)", (("q", "k"),), id="another-name"),
        pytest.param("this, /, x", "this.q(x), this.k(x)", (("q", "k"),), id="positional-only"),
        pytest.param("this, self, x", "self.q(x), self.k(x)", (), id="not-the-first"),
        pytest.param("*self, x", "self.q(x), self.k(x)", (), id="starred"),
        pytest.param("self", "global x\nself.q(x), self.k(x)", (), id="global"),
    ],
)
def test_self_is_the_first_parameter_and_variables_are_local(
    tmp_path: Path, parameters: str, body: str, groups: tuple[tuple[str, ...], ...]
) -> None:
    assert sibling_names(written(tmp_path, body, parameters), QKV) == groups


def test_strings_that_begin_left_of_the_code_do_no_harm(tmp_path: Path) -> None:
    module = written(tmp_path, "self.q(x), self.k(x)")
    path = tmp_path / "left.py"
    source = (tmp_path / "written.py").read_text()
    path.write_text(source.replace("self.q", '"""\nleft\n"""\n        self.q'))
    namespace = {"Parent": Parent, "__name__": "left"}
    exec(compile(path.read_text(), path, "exec"), namespace)
    assert sibling_names(namespace["Written"](), QKV) == sibling_names(module, QKV) == (("q", "k"),)


class Attention(Parent):
    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(self.norm(x))


def liger_like(self, x):
    x = self.norm(x)
    return self.k(x) + self.v(x)


def marked(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def hooked(module: nn.Module) -> nn.Module:
    return add_hook_to_module(module, ModelHook())


def rebound(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(liger_like, module)
    return module


def wrapped(module: nn.Module) -> nn.Module:
    module.forward = marked(module.forward)
    return module


def partial_of(module: nn.Module) -> nn.Module:
    module.forward = functools.partial(liger_like, module)
    return module


def partial_of_bound(module: nn.Module) -> nn.Module:
    module.forward = functools.partial(types.MethodType(liger_like, module))
    return module


def hook_over(module: nn.Module) -> nn.Module:
    """Replace what accelerate's hook calls, which leaves its ``__wrapped__`` behind."""
    module._old_forward = types.MethodType(liger_like, module)
    return module


CLASS, LIGER = (("q", "k"),), (("k", "v"),)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        pytest.param([], CLASS, id="class"),
        pytest.param([hooked], CLASS, id="hook"),
        pytest.param([hooked, hooked], CLASS, id="hook-twice"),
        pytest.param([rebound], LIGER, id="liger"),
        pytest.param([rebound, hooked], LIGER, id="liger-then-hook"),
        pytest.param([hooked, rebound], LIGER, id="hook-then-liger"),
        pytest.param([hooked, rebound, hooked], CLASS, id="hook-liger-hook"),
        pytest.param([hooked, hook_over], LIGER, id="liger-under-the-hook"),
        pytest.param([wrapped], CLASS, id="decorator"),
        pytest.param([wrapped, hooked, wrapped], CLASS, id="decorators-and-hook"),
        pytest.param([rebound, wrapped], LIGER, id="decorated-liger"),
        pytest.param([partial_of], LIGER, id="partial"),
        pytest.param([partial_of_bound], LIGER, id="partial-of-a-method"),
    ],
)
def test_the_forward_that_runs_is_the_one_read(changes, groups) -> None:
    module = Attention()
    for change in changes:
        change(module)
    assert sibling_names(module, QKV) == groups
    assert called_on_one_tensor(module) == set(groups[0])
    # A function is copied by reference: what wrapped the forward of the original still calls that.
    assert sibling_names(copy.deepcopy(module), QKV) == (() if wrapped in changes else groups)


def called_on_one_tensor(module: nn.Module) -> set[str]:
    """Run the module, and return the children that got the tensor that ``k`` got."""
    seen = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
        for name in QKV
    ]
    module(torch.ones(1, 4))
    for handle in handles:
        handle.remove()
    return {name for name, x in seen.items() if x is seen["k"]}


class Decorated(Parent):
    @marked
    @marked
    def forward(self, x):
        return self.q(x) + self.k(x)


class Inherited(Attention):
    pass


class Silent(Parent):
    """A decorator without ``functools.wraps`` hides the forward."""

    forward = (lambda forward: lambda self, x: forward(self, x))(Attention.forward)


class Static(Parent):
    @staticmethod
    def forward(self, x):
        return self.q(x) + self.k(x)


def test_decorators_and_base_classes_are_followed() -> None:
    assert sibling_names(Decorated(), QKV) == (("q", "k"),)
    assert sibling_names(Inherited(), QKV) == (("q", "k"),)


def other_forward(module: nn.Module) -> nn.Module:
    module.forward = Attention().forward
    return module


def unbound_function(module: nn.Module) -> nn.Module:
    # Its first parameter is the input, not the module.
    module.forward = liger_like
    return module


def partial_of_another(module: nn.Module) -> nn.Module:
    module.forward = functools.partial(liger_like, Attention())
    return module


def partial_within_a_method(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(functools.partial(liger_like, Attention()), module)
    return module


def exec_without_source(module: nn.Module) -> nn.Module:
    namespace: dict[str, object] = {}
    exec("def forward(self, x):\n    return self.q(x) + self.k(x)", namespace)
    module.forward = types.MethodType(namespace["forward"], module)
    return module


def exec_under_this_file(module: nn.Module) -> nn.Module:
    """Compile a function at the line of another one that has groups."""
    line = liger_like.__code__.co_firstlineno
    source = "\n" * (line - 1) + "def liger_like(self, x):\n    return self.q(x)"
    namespace: dict[str, object] = {}
    exec(compile(source, __file__, "exec"), namespace)
    module.forward = types.MethodType(namespace["liger_like"], module)
    return module


def exec_of_another_name(module: nn.Module) -> nn.Module:
    line = liger_like.__code__.co_firstlineno
    source = "\n" * (line - 1) + "def other(self, x):\n    return self.k(x) + self.v(self.norm(x))"
    namespace: dict[str, object] = {}
    exec(compile(source, __file__, "exec"), namespace)
    module.forward = types.MethodType(namespace["other"], module)
    return module


def exec_of_other_parameters(module: nn.Module) -> nn.Module:
    line = liger_like.__code__.co_firstlineno
    source = "\n" * (line - 1) + "def liger_like(self, y):\n    self.k(y), self.v(self.norm(y))"
    namespace: dict[str, object] = {}
    exec(compile(source, __file__, "exec"), namespace)
    module.forward = types.MethodType(namespace["liger_like"], module)
    return module


def c_function(module: nn.Module) -> nn.Module:
    module.forward = torch.relu
    return module


def c_function_as_method(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(len, module)
    return module


def lambda_forward(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(lambda self, x: self.q(x) + self.k(x), module)
    return module


def endless_wrappers(module: nn.Module) -> nn.Module:
    def forward(self, x):
        return self.q(x) + self.k(x)

    forward.__wrapped__ = forward
    module.forward = types.MethodType(forward, module)
    return module


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, torch.ones(1, 4))


@pytest.mark.parametrize(
    "make",
    [
        other_forward,
        copy.copy,
        unbound_function,
        partial_of_another,
        partial_within_a_method,
        exec_without_source,
        exec_under_this_file,
        exec_of_another_name,
        exec_of_other_parameters,
        c_function,
        c_function_as_method,
        lambda_forward,
        endless_wrappers,
        scripted,
        lambda _: Silent(),
        lambda _: Static(),
        lambda _: Parent(),
    ],
    ids=lambda make: getattr(make, "__name__", str(make)),
)
def test_a_forward_that_cannot_be_read_has_no_groups(make) -> None:
    # copy.copy leaves the forward bound to the module that was copied, whose children it calls.
    assert sibling_names(make(rebound(Attention())), QKV) == ()


@pytest.mark.parametrize("error", [OSError, SyntaxError, RuntimeError])
def test_a_source_that_raises_has_no_groups(error, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_):
        raise error("no source")

    class Fresh(Parent):
        def forward(self, x):
            return self.q(x) + self.k(x)

    monkeypatch.setattr(discovery.inspect, "getsource", broken)
    assert sibling_names(Fresh(), QKV) == ()


def test_a_file_that_was_edited_since_its_import_has_no_groups(tmp_path: Path) -> None:
    module = written(tmp_path, "self.q(x), self.k(x)")
    path = tmp_path / "written.py"
    path.write_text(path.read_text().replace("self.q(x)", "self.v(x)"))
    assert sibling_names(module, QKV) == ()


def test_classes_of_one_name_are_read_each_for_itself(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = written(tmp_path / "a", "self.q(x), self.k(x)")
    second = written(tmp_path, "self.q(x), self.v(x)")
    for _ in range(2):
        assert sibling_names(first, QKV) == (("q", "k"),)
        assert sibling_names(second, QKV) == (("q", "v"),)


def test_a_forward_is_read_once_and_not_kept_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = written(tmp_path, "self.q(x), self.k(x)")
    reads = []
    read = discovery.inspect.getsource
    monkeypatch.setattr(
        discovery.inspect, "getsource", lambda function: reads.append(function) or read(function)
    )
    assert sibling_names(module, QKV) == sibling_names(type(module)(), QKV) == (("q", "k"),)
    assert len(reads) == 1
    reads.clear()
    function = weakref.ref(type(module).forward)
    del module
    gc.collect()
    assert function() is None


ATTENTION = {"self_attn": (("q_proj", "k_proj", "v_proj"),)}
MLP = {"mlp": (("gate_proj", "up_proj"),)}
EXPERT = {"mlp.shared_expert": (("gate_proj", "up_proj"),)}
LINEAR = {"linear_attn": (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),)}
NEXT_LINEAR = {"linear_attn": (("in_proj_qkvz", "in_proj_ba"),)}
HYPER = {
    f"{name}_hyper_connection": (("input_mix_weight_down", "block_inject_weight"),)
    for name in ("attn", "mlp")
}
PER_LAYER_EMBEDDING = {"ple": (("key_proj", "value_proj"),)}

PLAIN = [
    *("qwen2", "qwen2-tied", "qwen3", "qwen2-vl-text", "qwen2-5-vl-text", "qwen3-vl-text"),
    *("llama", "mistral", "gemma", "gemma2", "gemma3"),
]
# Family: what is found in the parents of the first layer and of the second.
FOUND = {
    **dict.fromkeys(PLAIN, (ATTENTION | MLP, ATTENTION | MLP)),
    "qwen2-moe": (ATTENTION | EXPERT, ATTENTION | EXPERT),
    "qwen3-moe": (ATTENTION, ATTENTION),
    "qwen3-vl-moe-text": (ATTENTION, ATTENTION),
    "qwen3-next": (NEXT_LINEAR | EXPERT, ATTENTION | EXPERT),
    "qwen3-5": (LINEAR | MLP, ATTENTION | MLP),
    "qwen3-5-moe": (LINEAR | EXPERT, ATTENTION | EXPERT),
    "qwen4-exp": (
        LINEAR | EXPERT | HYPER | PER_LAYER_EMBEDDING,
        ATTENTION | EXPERT | HYPER,
    ),
    "opt": (ATTENTION, ATTENTION),  # fc1 and fc2 follow one another
    # One projection already makes q, k and v (qkv_proj, query_key_value), and one gate and up
    # (gate_up_proj), or there is no gate.
    "phi3": ({}, {}),
    "gpt-neox": ({}, {}),
    # c_attn makes q, k and v; q_attn, of cross attention, is called in another branch than the
    # c_attn that gets the same variable.
    "gpt2": ({}, {}),
}


def tiny_or_skip(family: str, **overrides: object) -> nn.Module:
    missing = [name for name in class_names(family) if not hasattr(transformers, name)]
    if missing:
        with pytest.raises(NotImplementedError, match=missing[0]):
            tiny_model(family)
        pytest.skip(f"transformers {transformers.__version__} lacks {missing[0]}")
    return tiny_model(family, **overrides)


def groups_of(model: nn.Module) -> dict[str, tuple[tuple[str, ...], ...]]:
    found = {}
    for path, parent in model.named_modules():
        names = [
            n for n, child in parent.named_children() if isinstance(child, (nn.Linear, Conv1D))
        ]
        if groups := sibling_names(parent, names):
            found[path] = groups
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_of_a_family_is_found_and_no_other(family: str) -> None:
    found = groups_of(tiny_or_skip(family))
    # Experts and routers are modules before transformers 5, parameters since then.
    experts = {path for path in found if ".experts." in path}
    assert all(found[path] == MLP["mlp"] for path in experts)
    routers = {
        path for path, groups in found.items() if groups == (("gate", "shared_expert_gate"),)
    }
    assert not (experts | routers) or transformers.__version__.startswith("4.")
    text = {path: groups for path, groups in found.items() if ".layers." in path}
    expected = {
        (layer, name): groups
        for layer, parents in enumerate(FOUND[family])
        for name, groups in parents.items()
    }
    assert {
        (int(layer), name): groups
        for path, groups in text.items()
        if path not in experts | routers
        for layer, _, name in [path.partition(".layers.")[2].partition(".")]
    } == expected
    # The towers for images fuse q, k and v already; one has gate and up.
    vision = found.keys() - text.keys()
    assert vision == ({"model.visual.blocks.0.mlp"} if family == "qwen2-5-vl-text" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_siblings_get_the_same_tensor_when_the_model_runs(family: str) -> None:
    model = tiny_or_skip(family)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0]) if args else None
        )
    with torch.no_grad():
        logits = model(token_ids()).logits
    assert logits.shape == (*token_ids().shape, 64)
    for path, groups in groups_of(model).items():
        for first, *others in groups:
            inputs = seen.get(f"{path}.{first}", [])
            # Images and the experts that no token chose are not reached.
            assert inputs or "visual" in path or ".experts." in path
            for other in others:
                pairs = zip(inputs, seen.get(f"{path}.{other}", []), strict=True)
                assert all(x is y for x, y in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_fp32_and_the_same_every_time(family: str) -> None:
    model = tiny_or_skip(family, experts_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    twin = tiny_model(family, experts_implementation="eager")
    assert torch.equal(model(token_ids()).logits, twin(token_ids()).logits)


def test_gpt2_calls_its_projections_in_exclusive_branches() -> None:
    model = tiny_or_skip("gpt2", add_cross_attention=True)
    attention = model.transformer.h[0].crossattention
    assert {"q_attn", "c_attn"} <= {name for name, _ in attention.named_children()}
    assert groups_of(attention) == {}
