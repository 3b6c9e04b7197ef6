"""Every feature of peft's LoRA layers, part 3: what an adapter sits on.

One test for each row of the table of peft's features, as in test_peft_features. Where a library is
not installed, a stand-in carries the marks by which its layers are known.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator

import peft
import peft.import_utils
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import Spy
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora.layer import ParamWrapper
from test_peft_features import (
    IN,
    OUT,
    TARGETS,
    Change,
    Net,
    QuantizedLinear,
    assert_equal,
    assert_falls_back,
    assert_fused,
    assert_left_alone,
    assert_same_error,
    inputs,
    linears,
    peft_net,
    run,
    tokens,
    twins,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.modules import module as nn_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from transformers.integrations.bitnet import AutoBitLinear

import fastlora


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B", "lora_dropout", "everywhere"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_fall_back(spy: Spy, where: str, register: str) -> None:
    """Row: hooks on base_layer, lora_A[a], lora_B[a], lora_dropout[a], global module hooks."""
    fused, plain = twins(peft_net())
    called: list[int] = []

    def hook(*args: object) -> None:
        called.append(1)

    if where == "everywhere":
        reason = "hooks are registered on all modules"
        handles = [getattr(nn_module, register.replace("register", "register_module"))(hook)]
    else:
        reason = f"{'the base layer' if where == 'base_layer' else where} has hooks"
        handles = []
        for model in (fused, plain):
            for layer in linears(model):
                module = getattr(layer, where)
                module = module if where == "base_layer" else module["default"]
                handles.append(getattr(module, register)(hook))
    try:
        assert_falls_back(spy, fused, plain, f"falls back to peft: {reason}")
    finally:
        for handle in handles:
            handle.remove()
    assert len(called) >= 4  # two layers of each model
    assert_fused(spy, fused, plain)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "base-layers"])
def test_offloaded_layer_falls_back(spy: Spy, whole: bool) -> None:
    """Row: accelerate offload."""

    def offload(model: nn.Module) -> None:
        for module in [model] if whole else [layer.base_layer for layer in linears(model)]:
            cpu_offload(module, execution_device=torch.device("cpu"))

    fused, plain = twins(peft_net(), offload)
    assert all(layer.base_layer.weight.is_meta for layer in linears(fused))
    part = "lora_A" if whole else "the base layer"
    reason = f"falls back to peft: {part} is managed by an accelerate hook (offloading)"
    assert_falls_back(spy, fused, plain, reason)
    assert all(layer.base_layer.weight.is_meta for layer in linears(fused))


def test_layer_hooked_by_accelerate_before_patch_falls_back(spy: Spy) -> None:
    """Row: accelerate hook on the LoRA layer itself before patch."""
    model = peft_net()
    for layer in linears(model):
        add_hook_to_module(layer, ModelHook())
    fused, plain = twins(model)
    reason = "its forward was replaced on the instance before it was patched"
    assert reason in str(fastlora.patch(fused))
    assert_falls_back(spy, fused, plain, f"falls back to peft: {reason}")

    # Hooked after patch, the forward that accelerate wraps is the fused one.
    def hook(model: nn.Module) -> None:
        for layer in linears(model):
            add_hook_to_module(layer, ModelHook())

    fused, plain = twins(peft_net(), hook)
    assert_fused(spy, fused, plain)

    # Without the hooks it still is, and unpatched it is peft's again.
    unhooked = copy.deepcopy(fused)
    remove_hook_from_module(unhooked, recurse=True)
    assert_fused(spy, unhooked, plain)
    fastlora.unpatch(fused)
    assert_equal(run(fused, inputs()), run(plain, inputs()))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrize(base: nn.Linear) -> None:
    parametrize.register_parametrization(base, "weight", Doubled())


def _flatten(base: nn.Linear) -> None:
    # What FSDP1 leaves in a module: a view of a flat parameter in place of the parameter.
    weight = base.weight.detach()
    del base.weight
    base.weight = weight


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            _parametrize, "is a ParametrizedLinear, not an nn.Linear", id="parametrization"
        ),
        pytest.param(nn.utils.weight_norm, "has hooks", id="weight_norm"),
        pytest.param(
            nn.utils.parametrizations.weight_norm,
            "is a ParametrizedLinear, not an nn.Linear",
            id="weight_norm-parametrization",
        ),
        pytest.param(
            _flatten,
            "computes its weight (parametrization, weight norm or flattened parameters)",
            id="flattened",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_computed_base_weight_falls_back(spy: Spy, change: Change, reason: str) -> None:
    """Row: LayerNorm-like parametrize / weight_norm on base."""

    def change_all(model: nn.Module) -> None:
        for layer in linears(model):
            change(layer.base_layer)

    fused, plain = twins(peft_net(), change_all)
    assert_falls_back(spy, fused, plain, f"falls back to peft: the base layer {reason}")


class ScaledLinear(nn.Linear):
    """As FP8Linear and others: an nn.Linear by class, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("cls", [ScaledLinear, AutoBitLinear, NonDynamicallyQuantizableLinear])
def test_subclass_of_linear_falls_back(spy: Spy, cls: type[nn.Linear]) -> None:
    """Row: nn.Linear SUBCLASS base.

    FP8Linear, FbgemmFp8Linear, AutoBitLinear, bnb.nn.Linear8bitLt/Linear4bit, te..
    """
    model = peft_net(nn.Sequential(cls(IN, OUT)), target_modules=["0"])
    assert type(linears(model)[0]) is lora_layers.Linear
    fused, plain = twins(model)
    reason = f"falls back to peft: the base layer is a {cls.__name__}, not an nn.Linear"
    with torch.compiler.set_stance("force_eager"):  # BitNet's rounding is compiled
        assert_falls_back(spy, fused, plain, reason)


def test_replaced_forward_of_the_base_layer_falls_back(spy: Spy) -> None:
    """Row: nn.Linear with replaced forward (compressed-tensors, kernels.kernelize, deepspeed)."""

    def replace(model: nn.Module) -> None:
        for layer in linears(model):
            layer.base_layer.forward = types.MethodType(doubled, layer.base_layer)

    def doubled(self: nn.Linear, input: Tensor) -> Tensor:
        return 2 * nn.Linear.forward(self, input)

    fused, plain = twins(peft_net(), replace)
    reason = "falls back to peft: the base layer had its forward replaced"
    assert_falls_back(spy, fused, plain, reason)


class Quantized(Tensor):
    """A weight of another type than Tensor, as torchao, Float8 and GGUF have."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def detach(self) -> Quantized:  # nn.Parameter insists
        return super().detach().as_subclass(Quantized)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process alone as a device mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["subclass", "DTensor", "ZeRO-3"])
def test_weight_of_another_type_falls_back(spy: Spy, mesh: DeviceMesh, kind: str) -> None:
    """Row: tensor-subclass weight (torchao, DTensor, Float8, GGUF)."""

    def convert(model: nn.Module) -> None:
        for layer in linears(model):
            base = layer.base_layer
            if kind == "subclass":
                weight = base.weight.detach().as_subclass(Quantized)
                base.weight = nn.Parameter(weight, requires_grad=False)
            elif kind == "DTensor":
                weight = distribute_tensor(base.weight.detach(), mesh)
                base.weight = nn.Parameter(weight, requires_grad=False)
            else:
                base.weight.ds_id = 1

    fused, plain = twins(peft_net(), convert)
    if kind == "DTensor":  # torch itself refuses to mix them, outside tensor parallelism
        assert_same_error(fused, plain, inputs())
        reason = "has a weight of type DTensor"
        assert f"falls back to peft: the base layer {reason}" in fastlora.explain(fused)
    else:
        reason = {
            "subclass": "has a weight of type Quantized",
            "ZeRO-3": "has a weight that DeepSpeed ZeRO-3 gathers",
        }[kind]
        assert_falls_back(spy, fused, plain, f"falls back to peft: the base layer {reason}")
    assert spy.fused == 0

    # So does an input of another type.
    fused, plain = twins(peft_net(target_modules=["first"]))
    x = inputs().as_subclass(Quantized)
    assert torch.equal(fused(x), plain(x))
    assert "last call went to peft: the input is a Quantized" in fastlora.explain(fused)


def library(name: str, **contents: object) -> dict[str, types.ModuleType]:
    """Return stand-ins for a dotted module name and its parents; the last has the contents."""
    parts = name.split(".")
    modules = {".".join(parts[: n + 1]): types.ModuleType(name) for n in range(len(parts))}
    modules[name].__dict__.update(contents)
    return modules


def peft_layer(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    available: str = "",
    libraries: dict[str, types.ModuleType] | None = None,
) -> type:
    """Return one of peft's own layer classes, ``module.Class``, with or without its library.

    Some modules define the class only if a function of peft.import_utils finds the library.
    """
    for library_name, stand_in in (libraries or {}).items():
        monkeypatch.setitem(sys.modules, library_name, stand_in)
    for function in available.split():
        monkeypatch.setattr(peft.import_utils, function, lambda: True)
    module_name, cls = name.split(".")
    spec = importlib.util.find_spec(f"peft.tuners.lora.{module_name}")
    if spec is None:
        pytest.skip(f"peft {peft.__version__} has no {name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, cls)


def check_quantized_layer(cls: type, base: nn.Module | None = None, **arguments: object) -> None:
    """Put peft's layer on a stand-in for the quantized one, and see that patch leaves it alone."""
    base = QuantizedLinear(IN, OUT) if base is None else base
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({type(base): functools.partial(cls, **arguments)})
    model = get_peft_model(nn.Sequential(base, First()), config)
    fused, plain = twins(model)
    assert_left_alone(fused, plain, {"base_model.model.0": cls}, inputs())


class First(nn.Module):
    """The first of several outputs: Megatron's layers return their bias beside the result."""

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        return x[0] if isinstance(x, tuple) else x


@pytest.mark.parametrize("cls", ["Linear8bitLt", "Linear4bit"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_bitsandbytes_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch, cls: str) -> None:
    """Row: bnb 4/8 bit."""
    found = "is_bnb_available is_bnb_4bit_available"
    check_quantized_layer(peft_layer(monkeypatch, f"bnb.{cls}", found, library("bitsandbytes")))


class ParallelLinear(nn.Linear):
    """Megatron's constructor on an ordinary linear layer."""

    def __init__(self, input_size: int, output_size: int, bias: bool, **kwargs: object) -> None:
        super().__init__(input_size, output_size, bias=bias)
        self.gather_output = False


class ParallelBaseLinear(ParallelLinear):
    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        return super().forward(input), None


@pytest.mark.parametrize(
    ("name", "available", "libraries"),
    [
        pytest.param("gptq.GPTQLoraLinear", "", {}, id="GPTQ"),
        pytest.param("awq.AwqLoraLinear", "", {}, id="AWQ"),
        pytest.param("aqlm.AqlmLoraLinear", "", {}, id="AQLM"),
        pytest.param(
            "eetq.EetqLoraLinear",
            "is_eetq_available",
            library("eetq", EetqLinear=QuantizedLinear),
            id="EETQ",
        ),
        pytest.param(
            "hqq.HqqLoraLinear",
            "is_hqq_available",
            library("hqq.core.quantize", HQQLinear=QuantizedLinear),
            id="HQQ",
        ),
        pytest.param("te.TeLinear", "", {}, id="TE"),
        pytest.param("tp_layer.LoraParallelLinear", "", {}, id="Megatron"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_other_quantized_and_parallel_layers_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    available: str,
    libraries: dict[str, types.ModuleType],
) -> None:
    """Row: GPTQ, AWQ, AQLM, EETQ, HQQ, TE, Megatron."""
    cls = peft_layer(monkeypatch, name, available, libraries)
    if cls.__name__ == "LoraParallelLinear":
        backend = types.SimpleNamespace(
            RowParallelLinear=type(None), ColumnParallelLinear=ParallelLinear
        )
        base = ParallelBaseLinear(IN, OUT, bias=True)
        megatron = types.SimpleNamespace()
        check_quantized_layer(cls, base, backend=backend, megatron_config=megatron)
    else:
        check_quantized_layer(cls)


@pytest.mark.parametrize(
    ("name", "available", "libraries", "arguments"),
    [
        pytest.param(
            "torchao.TorchaoLoraLinear",
            "",
            library("torchao.quantization", Int4Tensor=type(None)),
            {"get_apply_tensor_subclass": None},
            id="torchao",
        ),
        pytest.param("inc.IncLoraLinear", "is_inc_available", {}, {}, id="INC"),
    ],
)
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_subclasses_of_pefts_linear_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    available: str,
    libraries: dict[str, types.ModuleType],
    arguments: dict[str, object],
) -> None:
    """Row: torchao, INC."""
    cls = peft_layer(monkeypatch, name, available, libraries)
    assert issubclass(cls, lora_layers.Linear)
    check_quantized_layer(cls, nn.Linear(IN, OUT), **arguments)


def test_adalora_is_left_alone() -> None:
    """Row: AdaLoRA."""
    config = AdaLoraConfig(
        target_modules=TARGETS, total_step=10, init_r=4, target_r=2, init_lora_weights=False
    )
    fused, plain = twins(get_peft_model(Net(), config))
    assert issubclass(SVDLinear, lora_layers.LoraLayer)
    classes = {f"base_model.model.{name}": SVDLinear for name in TARGETS}
    assert_left_alone(fused, plain, classes, inputs())


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("base", "target", "cls", "shape"),
    [
        pytest.param(lambda: nn.Embedding(64, 6), "0", "Embedding", None, id="Embedding"),
        pytest.param(lambda: nn.Conv1d(6, 4, 3), "0", "Conv1d", (2, 6, 5), id="Conv1d"),
        pytest.param(lambda: nn.Conv2d(6, 4, 3), "0", "Conv2d", (2, 6, 5, 5), id="Conv2d"),
        pytest.param(lambda: nn.Conv3d(6, 4, 3), "0", "Conv3d", (2, 6, 5, 5, 5), id="Conv3d"),
        pytest.param(SelfAttention, "0.attention", "MultiheadAttention", (2, 5, 8), id="MHA"),
    ],
)
def test_layers_other_than_linear_are_left_alone(
    base: Callable[[], nn.Module], target: str, cls: str, shape: tuple[int, ...] | None
) -> None:
    """Row: Embedding, Conv1d/2d/3d, MultiheadAttention."""
    fused, plain = twins(peft_net(nn.Sequential(base()), target_modules=[target]))
    x = tokens() if shape is None else inputs(*shape)
    classes = {f"base_model.model.{target}": getattr(lora_layers, cls)}
    assert_left_alone(fused, plain, classes, x)
    if cls == "MultiheadAttention":
        # Its out_proj is a LoRA Linear of its own, whose weight attention reads past forward.
        reason = "the base layer is a NonDynamicallyQuantizableLinear, not an nn.Linear"
        report = fastlora.patch(fused)
        assert report.fallback == {f"base_model.model.{target}.base_layer.out_proj": reason}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, IN, 8))
        self.down = nn.Parameter(torch.randn(3, 8, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up @ self.down).sum(0)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapted_parameters_are_left_alone() -> None:
    """Row: target_parameters."""
    base = nn.Sequential(Experts())
    fused, plain = twins(peft_net(base, target_modules=[], target_parameters=["0.up", "0.down"]))
    names = ("base_model.model.0", "base_model.model.0.base_layer")
    assert_left_alone(fused, plain, dict.fromkeys(names, ParamWrapper), inputs())


@pytest.mark.parametrize("part", ["base_layer", "lora_A"])
def test_tensor_parallel_layer_falls_back(spy: Spy, mesh: DeviceMesh, part: str) -> None:
    """Row: tensor parallel."""

    def shard(model: nn.Module) -> None:
        for layer in linears(model):
            if part == "base_layer":
                parallelize_module(layer.base_layer, mesh, ColwiseParallel())
            else:  # as transformers' style.install_forward
                module = layer.lora_A["default"]
                module.forward = functools.partial(nn.Linear.forward, module)

    fused, plain = twins(peft_net(), shard)
    reason = (
        "the base layer has hooks" if part == "base_layer" else "lora_A had its forward replaced"
    )
    assert_falls_back(spy, fused, plain, f"falls back to peft: {reason}")
