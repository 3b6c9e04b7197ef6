"""Groups of projections that share their input: when they are computed together, and when not.

Everything that can happen between the calls of two siblings is a test here; whole models of every
family are in test_families.
"""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_accurate
from conftest import Spy
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import tiny_model, tiny_peft, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from whole_models import (
    assert_same,
    loss_and_gradients,
    patched_twin,
    through_pickle,
    through_torch_save,
)

import fastlora
from fastlora import dropout, siblings
from fastlora import plain as plain_operators
from fastlora.layers import LoRALinear

WIDTH = 24
Between = Callable[[nn.Module, Tensor], None]


class Attention(nn.Module):
    """Three projections of one input, with room for an accident before each of the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, 8)
        self.v_proj = nn.Linear(WIDTH, 8, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.between: Between = lambda module, x: None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        self.between(self, x)
        k = self.k_proj(x)
        self.between(self, x)
        v = self.v_proj(x)
        return self.o_proj(q) * (k * v).sum(-1, keepdim=True)


def attention(targets: str = ".*_proj", p: float = 0.0, rank: int = 4, **lora: object) -> nn.Module:
    """Build the module with adapters, unpatched."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_dropout=p, target_modules=targets, init_lora_weights=False, **lora
    )
    return inject_adapter_in_model(config, Attention()).train()


def inputs() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()


def run(module: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    x = inputs() if x is None else x
    module.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    y = module(x)
    y.square().sum().backward()
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **named}


def assert_right(patched: nn.Module, plain: nn.Module) -> None:
    """Assert that the patched module is as close to fp64 as its twin, gradients included."""
    exact_module = copy.deepcopy(plain).double()
    ours, peft = run(patched), run(plain)
    exact = run(exact_module, inputs().detach().double().requires_grad_())
    assert ours.keys() == peft.keys() == exact.keys()
    for part in ("y", "dx"):
        assert_as_accurate(ours[part], peft[part], exact[part], name=part)
    # One vector: a ratio of two errors in a tensor of 32 elements is mostly chance.
    names = [name for name in exact if name not in ("y", "dx")]
    vectors = (torch.cat([r[name].flatten() for name in names]) for r in (ours, peft, exact))
    assert_as_accurate(*vectors, name="gradients")


def groups(module: nn.Module) -> list[siblings.SiblingGroup]:
    return [group for _, _, group in siblings.groups_of(module)]


def held(module: nn.Module) -> list[object]:
    """Return what the groups keep alive."""
    return [kept for group in groups(module) for kept in (group._pending, group._parent) if kept]


# What is gained


def test_the_first_sibling_computes_all_of_them(spy: Spy) -> None:
    plain = attention()
    patched = patched_twin(plain)
    assert [group.names for group in groups(patched)] == [("q_proj", "k_proj", "v_proj")]
    assert_right(patched, plain)
    assert (spy.fused, spy.together, spy.peft) == (4, 3, 0)


def test_x_is_read_once_for_all_and_once_for_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []
    lengths = {
        "shrink": lambda x, lora_as, *rest: len(lora_as),
        "fill_low_rank_gemm": lambda ys, *rest: len(ys),
        "adapter_grads": lambda dys, *rest: len(dys),
        "fill_input_grad": lambda dx, dys, *rest: len(dys),
    }
    for name, length in lengths.items():
        operator = getattr(plain_operators, name)

        def counted(*args, _name=name, _length=length, _operator=operator, **kwargs):
            calls.append((_name, _length(*args)))
            return _operator(*args, **kwargs)

        monkeypatch.setattr(plain_operators, name, counted)
    run(patched_twin(attention(p=0.1)))
    forward, backward = list(lengths)[:2], list(lengths)[2:]
    assert calls == [
        *[(name, number) for number in (3, 1) for name in forward],
        *[(name, number) for number in (1, 3) for name in backward],
    ]


def test_every_sibling_has_a_mask_of_its_own() -> None:
    patched = patched_twin(attention(p=0.5))
    x = inputs()
    torch.manual_seed(9)
    seed = dropout.draw_seed(x.device)
    outputs: dict[str, Tensor] = {}
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        layer = patched.get_submodule(name)
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
        keep = dropout.keep_mask(seed, 5, WIDTH, 0.5, stream=number)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.base_layer(x) + (x * keep * 2) @ a.t() @ b.t() * layer.scaling["default"]
        torch.manual_seed(9)
        patched(x)
        assert torch.allclose(outputs[name], expected, rtol=1e-5, atol=1e-5), name


def test_one_seed_is_drawn_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = dropout.draw_seed
    monkeypatch.setattr(dropout, "draw_seed", lambda device: drawn.append(1) or draw(device))
    patched_twin(attention(p=0.5))(inputs())
    assert len(drawn) == 2  # q, k, v and o


def test_outputs_may_be_changed_in_place() -> None:
    patched = patched_twin(attention())
    patched.q_proj.register_forward_hook(lambda module, args, y: y.mul_(2))
    expected = patched_twin(attention())
    expected.q_proj.register_forward_hook(lambda module, args, y: y * 2)
    assert_same(run(patched), run(expected))


def test_five_projections_are_a_group_of_four_and_a_single_one(spy: Spy) -> None:
    class Five(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "abcde":
                setattr(self, name, nn.Linear(WIDTH, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.c(x) + self.d(x) + self.e(x)

    plain = inject_adapter_in_model(
        LoraConfig(r=4, target_modules=list("abcde"), init_lora_weights=False), Five()
    )
    patched = patched_twin(plain)
    assert [group.names for group in groups(patched)] == [("a", "b", "c", "d")]
    assert_right(patched, plain)
    assert (spy.fused, spy.together) == (5, 4)


# What may happen between the calls of two siblings


def no_grad_once(module: nn.Module, x: Tensor) -> None:
    torch.set_grad_enabled(not torch.is_grad_enabled())


def change_x(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(2)


def step(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module.k_proj.lora_A["default"].weight.add_(0.1)


def disable(module: nn.Module, x: Tensor) -> None:
    module.v_proj.enable_adapters(False)


def merge(module: nn.Module, x: Tensor) -> None:
    if not module.v_proj.merged:
        module.v_proj.merge()


def rescale(module: nn.Module, x: Tensor) -> None:
    module.v_proj.scaling["default"] = 0.25


def other_weight(module: nn.Module, x: Tensor) -> None:
    torch.manual_seed(11)
    for layer in (module.k_proj, module.v_proj):
        layer.lora_A["default"].weight = nn.Parameter(torch.randn(4, WIDTH))


def hook_b(module: nn.Module, x: Tensor) -> None:
    module.v_proj.lora_B["default"].register_forward_hook(lambda module, args, y: y * 2)


@pytest.mark.parametrize(
    ("accident", "recomputed"),
    [
        pytest.param(no_grad_once, True, id="grad-mode"),
        pytest.param(change_x, True, id="x-changed-in-place"),
        pytest.param(step, True, id="weights-changed-in-place"),
        pytest.param(disable, False, id="adapters-disabled"),
        pytest.param(merge, False, id="merged"),
        pytest.param(rescale, True, id="scaling"),
        pytest.param(other_weight, True, id="weight-replaced"),
        pytest.param(hook_b, False, id="hook-on-lora-b"),
    ],
)
def test_an_accident_between_siblings_is_noticed(
    accident: Between, recomputed: bool, spy: Spy
) -> None:
    plain = attention()
    patched = patched_twin(plain)
    for module in (plain, patched):
        module.between = accident
    x, y = inputs().detach(), inputs().detach()
    spy.reset()
    assert torch.allclose(patched(x), plain(y), rtol=1e-5, atol=1e-5)
    # Whoever finds the mode, the tensor or a weight changed computes anew, for those that follow.
    assert spy.together > 3 if recomputed else spy.together == 3
    assert torch.is_grad_enabled()
    assert not held(patched)


def test_autocast_between_siblings_is_noticed() -> None:
    dtypes = []

    def record(module: nn.Module, args: object, y: Tensor) -> None:
        dtypes.append(y.dtype)

    patched = patched_twin(attention())
    for name in ("q_proj", "k_proj", "v_proj"):
        patched.get_submodule(name).register_forward_hook(record)
    contexts = iter([torch.autocast("cpu", torch.bfloat16)])

    def enter(module: nn.Module, x: Tensor) -> None:
        for context in contexts:
            context.__enter__()
            entered.append(context)

    entered: list[torch.autocast] = []
    patched.between = enter
    patched(inputs())
    entered[0].__exit__(None, None, None)
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_dropout_that_is_switched_off_between_siblings_is_noticed() -> None:
    patched = patched_twin(attention(p=0.5))
    outputs = []
    patched.v_proj.register_forward_hook(lambda module, args, y: outputs.append(y))
    patched.between = lambda module, x: module.eval()
    x = inputs()
    patched(x)
    assert torch.equal(outputs[0], patched.v_proj(x))


def test_a_gradient_that_is_asked_for_between_siblings_is_given() -> None:
    results = []
    for module in (attention(), patched_twin(attention())):
        module.between = lambda module, x: x.requires_grad_()
        x = inputs().detach()
        module(x).sum().backward()
        results.append(x.grad)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_rule_of_one_sibling_keeps_all_apart(spy: Spy) -> None:
    plain = attention(p=0.5)
    plain.k_proj.update_layer("other", **rank_options(plain.k_proj, 2))
    for name in ("q_proj", "v_proj"):
        layer = plain.get_submodule(name)
        layer.set_adapter(["default"])
    plain.k_proj.set_adapter(["default", "other"])
    patched = patched_twin(plain)
    patched(inputs())  # two adapters with dropout, of two masks: for peft
    assert (spy.fused, spy.together, spy.peft) == (3, 0, 1)


def test_a_dead_branch_gets_no_gradient() -> None:
    class Dead(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> None:
            return None

    class Parent(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            k = self.k_proj(x)
            v = self.v_proj(x)
            return Dead.apply(q).sum() + 0 * (k.detach() * v.detach()).sum() + self.o_proj(x).sum()

    config = LoraConfig(r=4, target_modules=".*_proj", init_lora_weights=False)
    patched = patched_twin(inject_adapter_in_model(config, Parent()))
    patched(inputs()).backward()
    assert patched.q_proj.lora_A["default"].weight.grad is None
    assert patched.o_proj.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
def test_an_unused_sibling_takes_no_part_in_the_gradient(dropout_mask: str) -> None:
    def gradient(spoilt: bool) -> Tensor:
        module = attention(p=0.5)
        if spoilt:
            module.k_proj.base_layer.weight.data.fill_(float("inf"))
            module.k_proj.lora_A["default"].weight.data.fill_(float("nan"))
        patched = patched_twin(module, dropout_mask=dropout_mask)
        x, outputs = inputs(), []
        patched.q_proj.register_forward_hook(lambda module, args, y: outputs.append(y))
        torch.manual_seed(2)
        patched(x)
        return torch.autograd.grad(outputs[0].sum(), x)[0]

    assert torch.equal(gradient(spoilt=True), gradient(spoilt=False))


class Interrupted(Exception):
    pass


def interrupt(module: nn.Module, x: Tensor) -> None:
    raise Interrupted


def test_an_exception_between_siblings_leaves_nothing_behind(spy: Spy) -> None:
    plain = attention(p=0.5)
    patched = patched_twin(plain)
    expected = run(patched)
    patched.between = interrupt
    with pytest.raises(Interrupted):
        patched(inputs())
    assert not held(patched)
    patched.between = plain.between
    assert_same(run(patched), expected)


def test_a_sibling_that_is_never_called_gets_no_gradient_and_holds_no_memory() -> None:
    class Shared(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            self.between(self, x)
            if self.shares:
                return q
            return q + (self.k_proj(x) * self.v_proj(x)).sum(-1, keepdim=True)

    class Unconditional(Shared):
        """Whose forward, when it was read, called all three."""

        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            k = self.k_proj(x)
            v = self.v_proj(x)
            return q + (k * v).sum(-1, keepdim=True)

    module = Unconditional()
    config = LoraConfig(r=4, target_modules=".*_proj", init_lora_weights=False)
    plain = inject_adapter_in_model(config, module)
    patched = patched_twin(plain)
    assert [group.names for group in groups(patched)] == [("q_proj", "k_proj", "v_proj")]
    outputs: list[weakref.ref[Tensor]] = []
    together = siblings.apply_call

    def remember(*args):
        ys = together(*args)
        outputs.extend(map(weakref.ref, ys))
        return ys

    for module in (plain, patched):
        module.__class__ = Shared
        module.shares = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siblings, "apply_call", remember)
        ours, peft = run(patched), run(plain)
    assert ours.keys() == peft.keys()
    assert "k_proj.lora_A.default.weight" not in ours
    assert not held(patched)
    gc.collect()
    assert len(outputs) == 3
    assert outputs[1]() is None
    assert outputs[2]() is None


def test_a_child_that_is_called_outside_of_its_parent_runs_alone(spy: Spy) -> None:
    patched = patched_twin(attention())
    patched.k_proj(inputs())
    assert (spy.fused, spy.together) == (1, 0)
    assert not held(patched)


def test_a_call_of_the_parent_s_forward_past_its_hooks_is_right(spy: Spy) -> None:
    plain = attention()
    patched = patched_twin(plain)
    assert torch.allclose(patched.forward(inputs()), plain(inputs()), rtol=1e-5, atol=1e-5)
    assert (spy.fused, spy.together) == (4, 0)


def test_nothing_is_kept_after_a_step() -> None:
    patched = patched_twin(attention(p=0.1))
    x = inputs()
    inner = x * 1
    alive = weakref.ref(inner)
    y = patched(inner)
    assert not held(patched)
    y.sum().backward()
    del inner, y
    gc.collect()
    assert alive() is None


def test_inference_mode_runs_alone_and_right(spy: Spy) -> None:
    plain = attention()
    patched = patched_twin(plain)
    with torch.inference_mode():
        x = inputs().detach() * 1
        assert torch.allclose(patched(x), plain(x), rtol=1e-5, atol=1e-5)
    assert (spy.fused, spy.together) == (4, 0)
    # A tensor that can be changed, and that says so, is enough.
    with torch.inference_mode():
        patched(inputs())
    assert_right(patched, plain)


def test_threads_do_not_disturb_each_other() -> None:
    patched = patched_twin(attention()).eval()
    xs = [torch.randn(5, WIDTH) for _ in range(4)]
    with torch.no_grad():
        expected = [patched(x) for x in xs]
    wrong = []

    def work(x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            wrong.extend(None for _ in range(200) if not torch.allclose(patched(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Siblings that differ


def other_rank(module: nn.Module) -> None:
    module.k_proj.update_layer("default", **rank_options(module.k_proj, 8))


def rank_options(layer: nn.Module, r: int) -> dict[str, object]:
    options = {"lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False}
    if "config" in inspect.signature(type(layer).update_layer).parameters:
        options = {"config": LoraConfig(r=r, lora_alpha=8)}
    return {"r": r, "lora_alpha": 8, **options}


def other_dropout(module: nn.Module) -> None:
    module.k_proj.lora_dropout["default"] = nn.Dropout(0.25)


def other_adapter_dtype(module: nn.Module) -> None:
    module.k_proj.lora_A["default"].bfloat16()
    module.k_proj.lora_B["default"].bfloat16()


def merged(module: nn.Module) -> None:
    module.k_proj.merge()


def disabled(module: nn.Module) -> None:
    module.k_proj.enable_adapters(False)


def hooked(module: nn.Module) -> None:
    module.k_proj.lora_A["default"].register_forward_hook(lambda *args: None)


def replaced(module: nn.Module) -> None:
    module.k_proj = nn.Linear(WIDTH, 8)


@pytest.mark.parametrize(
    ("change", "alone", "said"),
    [
        pytest.param(other_rank, 4, "fused one by one: the siblings differ in rank", id="rank"),
        pytest.param(
            other_dropout, 4, "fused one by one: the siblings differ in dropout", id="dropout"
        ),
        pytest.param(
            other_adapter_dtype, 4, "fused one by one: the siblings differ in dtype", id="dtype"
        ),
        pytest.param(merged, 3, "falls back to peft: its adapters are merged", id="merged"),
        pytest.param(disabled, 3, "falls back to peft: its adapters are disabled", id="disabled"),
        pytest.param(hooked, 3, "falls back to peft: lora_A has hooks", id="hooks"),
        pytest.param(replaced, 3, "fused 3 of 3 LoRA linears; 0 fall back", id="replaced"),
    ],
)
def test_siblings_that_differ_run_alone(
    change: Callable[[nn.Module], None], alone: int, said: str, spy: Spy
) -> None:
    plain = attention()
    patched = patched_twin(plain)
    run(patched)  # as a group, which is then to be given up
    for module in (patched, plain):
        torch.manual_seed(7)
        change(module)
    for _ in range(2):  # the call that meets the change may compute the group in vain
        spy.reset()
        if change is other_dropout:  # another mask than nn.Dropout's
            run(patched)
        else:
            assert_right(patched, plain)
    assert (spy.fused, spy.together) == (alone, 0)
    assert said in fastlora.explain(patched)


def test_siblings_that_always_get_tensors_of_their_own_are_given_up(spy: Spy) -> None:
    plain = attention()
    patched = patched_twin(plain)
    for module in (patched, plain):
        for name in ("q_proj", "k_proj", "v_proj"):
            module.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0] * 1,))
    calls = 0
    while not spy.fused or spy.together:  # the others compute each group once for each member
        spy.reset()
        assert_right(patched, plain)
        calls += 1
        assert calls <= siblings.MAX_MISSED
    assert spy.fused == 4
    assert "each was called with a tensor of its own" in fastlora.explain(patched)
    fastlora.patch(patched)
    spy.reset()
    patched(inputs())
    assert spy.together


def test_large_ranks_in_fp32_run_alone(spy: Spy) -> None:
    patched = patched_twin(attention(rank=siblings.MAX_FP32_RANK + 1))
    run(patched)
    assert (spy.fused, spy.together) == (4, 0)
    with torch.autocast("cpu", torch.bfloat16):
        run(patched)
    assert (spy.fused, spy.together) == (8, 3)


def test_different_scalings_stay_together(spy: Spy) -> None:
    plain = attention()
    plain.k_proj.set_scale("default", 3.0)
    assert_right(patched_twin(plain), plain)
    assert spy.together == 3


@pytest.mark.parametrize(
    ("lora", "several"),
    [
        pytest.param({"lora_bias": True}, False, id="bias-of-lora-b"),
        pytest.param({}, True, id="two-active-adapters"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # v_proj has none that it merges into
def test_other_kinds_of_adapters_stay_together(
    lora: dict[str, object], several: bool, spy: Spy
) -> None:
    plain = attention(**lora)
    for layer in [module for module in plain.modules() if hasattr(module, "lora_A")]:
        if several:
            layer.update_layer("other", **rank_options(layer, 3))
            layer.set_adapter(["default", "other"])
            nn.init.normal_(layer.lora_B["other"].weight)
        else:
            nn.init.normal_(layer.lora_B["default"].bias)
    assert_right(patched_twin(plain), plain)
    assert (spy.fused, spy.together) == (4, 3)


def test_only_the_adapted_projections_are_a_group(spy: Spy) -> None:
    plain = attention(targets=".*[qv]_proj")
    patched = patched_twin(plain)
    assert [group.names for group in groups(patched)] == [("q_proj", "v_proj")]
    assert_right(patched, plain)
    assert (spy.fused, spy.together) == (2, 2)


# Copies, later adapters, other patches


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_has_groups_of_its_own(
    duplicate: Callable[[nn.Module], nn.Module], spy: Spy
) -> None:
    original = patched_twin(tiny_peft("qwen2"))
    loss_and_gradients(original)
    copied = duplicate(original)
    spy.reset()
    assert_same(loss_and_gradients(copied), loss_and_gradients(original))
    assert (spy.fused, spy.together) == (28, 20)
    assert not {id(group) for group in groups(copied)} & {id(group) for group in groups(original)}
    assert all(
        layer.fastlora_group in groups(copied)
        for layer in copied.modules()
        if isinstance(layer, LoRALinear) and layer.fastlora_group is not None
    )


def test_a_copied_child_is_on_its_own(spy: Spy) -> None:
    patched = patched_twin(attention())
    child = copy.deepcopy(patched.k_proj)
    assert torch.equal(child(inputs()), patched.k_proj(inputs()))
    assert spy.together == 0


def test_layers_that_peft_adds_later_join_their_siblings(spy: Spy) -> None:
    plain = tiny_peft("qwen2", target_modules=["q_proj"])
    patched = patched_twin(plain)
    assert not groups(patched)
    for model in (plain, patched):
        torch.manual_seed(4)
        model.add_adapter(
            "more", LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        )
        model.set_adapter("more")
    assert [group.names for group in groups(patched)] == [("q_proj", "k_proj")] * 2
    spy.reset()
    loss_and_gradients(patched)
    assert (spy.fused, spy.together) == (4, 4)


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_a_model_without_its_adapters_knows_nothing_of_fastlora(way: str) -> None:
    model = tiny_peft("qwen2")
    fastlora.patch(model)
    loss_and_gradients(model)
    left = getattr(model, way)()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in left.modules())
    assert not [name for m in left.modules() for name in vars(m) if "fastlora" in name]


def test_a_child_that_is_patched_again_stays_in_its_group(spy: Spy) -> None:
    patched = patched_twin(attention())
    fastlora.patch(patched.q_proj)
    patched(inputs())
    assert (spy.fused, spy.together) == (4, 3)


def test_dropout_that_differed_once_is_forgotten(spy: Spy) -> None:
    patched = patched_twin(attention(p=0.5))
    patched.k_proj.eval()
    patched(inputs())
    assert spy.together == 0
    assert "fused one by one: the siblings differ in dropout" in fastlora.explain(patched)
    patched.train()
    patched(inputs())
    assert spy.together == 3


def test_unpatch_leaves_no_trace() -> None:
    model = tiny_peft("qwen2")
    before = {name: (set(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()}
    fastlora.patch(model)
    fastlora.patch(model)
    loss_and_gradients(model)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 4
    fastlora.unpatch(model)
    after = {name: (set(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()}
    assert after == before


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
def test_checkpoints_recompute_the_same(use_reentrant: bool, dropout_mask: str, spy: Spy) -> None:
    plain = attention(p=0.5)
    expected = run(patched_twin(plain, dropout_mask=dropout_mask))
    patched = patched_twin(plain, dropout_mask=dropout_mask)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = patched

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    spy.reset()
    actual = run(Checkpointed())
    assert_same({name.removeprefix("inner."): t for name, t in actual.items()}, expected)
    assert spy.together == 6
    assert not held(patched)


def test_a_checkpoint_that_stops_early_holds_nothing() -> None:
    """The recomputation ends inside the group's forward, where its last saved tensor is made."""
    patched = patched_twin(attention(targets=".*[qkv]_proj"))
    y = checkpoint(lambda x: patched.q_proj(x) + 0 * x, inputs(), use_reentrant=False)
    y.sum().backward()
    y = checkpoint(patched, inputs(), use_reentrant=False)
    y.sum().backward()
    assert not held(patched)


class LigerLikeMLP:
    """The forward that Liger puts in the place of Qwen2MLP's, without its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("liger_first", [True, False], ids=["liger-first", "fastlora-first"])
def test_another_library_s_forward_may_come_before_or_after(liger_first: bool, spy: Spy) -> None:
    def apply_liger(model: nn.Module) -> None:
        for layer in model.base_model.model.model.layers:
            layer.mlp.forward = LigerLikeMLP.forward.__get__(layer.mlp)

    model = tiny_peft("qwen2")
    expected = loss_and_gradients(patched_twin(model))
    if liger_first:
        apply_liger(model)
    fastlora.patch(model)
    if not liger_first:
        apply_liger(model)
    spy.reset()
    assert_same(loss_and_gradients(model), expected)
    assert (spy.fused, spy.together, spy.peft) == (14, 10, 0)


def test_generation_with_a_cache_is_that_of_peft() -> None:
    plain = tiny_peft(model=tiny_model("qwen2", eos_token_id=None, pad_token_id=0)).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    expected = plain.generate(input_ids=token_ids(), **options)
    assert torch.equal(patched_twin(plain).generate(input_ids=token_ids(), **options), expected)
