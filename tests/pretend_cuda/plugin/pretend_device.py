"""Operators of the pretend CUDA devices: computed on the CPU, in the very memory of the "device".

torch loads this at the end of its import (entry point ``torch.backends``). Every operator with a CUDA kernel gets one
of ours. It calls torch's own first, which checks types, takes memory and launches kernels that compute nothing. Then it
sees the CUDA tensors as CPU tensors of the same memory and has the CPU's kernel compute what was to come out. While a
stream is captured that second part is only noted, with the addresses that it would use, and is done whenever the graph
is launched, as on a GPU. Views, allocation, reading a number and copies between host and device are torch's own alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

_NAMES = ("syncs", "operators", "kernels", "mallocs", "memcpys", "graphs", "pageable")
_OWN = {  # allocation, metadata, and reading a number: torch's own are real here
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::set_", "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor", "aten::_local_scalar_dense",
    "aten::record_stream", "aten::is_set_to", "aten::_pin_memory", "aten::is_pinned", "aten::_resize_output_",
}  # fmt: skip
_ALSO = ("aten::convolution", "aten::convolution_backward", "aten::copy_")
"""They reach their kernels past the dispatcher."""
_NOT_CALLED = tuple(
    "mm mv dot linalg fft cholesky solve qr svd lu_ conv cudnn sort topk median mode kthvalue unique nonzero "
    "masked_select multinomial attention histc bincount cumsum fastsimgan".split()
)
"""Parts of the names of operators whose own kernels call libraries (cuBLAS, cuDNN) or look at what was computed."""
_NOT_REPEATABLE = ("aten::cumsum", "aten::cumsum_", "aten::histc")
"""Of these: what the oldest torch that we serve refuses for floats under `torch.use_deterministic_algorithms`."""

_library = ctypes.CDLL(os.environ["LD_PRELOAD"].split(os.pathsep)[0]) if "LD_PRELOAD" in os.environ else None
_thread = threading.local()  # .inside: torch's own kernel is running, and what it calls computes nothing either
_noted: dict[int, Callable[[], object]] = {}  # operators of captures, by number
_registered: list[torch.library.Library] = []
CONVOLUTIONS: list[tuple[torch.Tensor, torch.Tensor]] | None = None
"""A list here receives the images and weights of each convolution (their shape, type and strides)."""


def counts() -> dict[str, int]:
    """What has been asked of the runtime so far.

    ``syncs``: the host waited for the device. ``operators``: operators enqueued, each at least one kernel on a GPU.
    ``kernels``: other kernels launched, which compute nothing. ``graphs``: graph launches. ``memcpys``, of which
    ``pageable`` from or to memory that is not pinned. ``mallocs``: blocks taken from the device.
    """
    assert _library is not None
    values = (ctypes.c_long * len(_NAMES))()
    _library.pretend_counts(values)
    return dict(zip(_NAMES, values, strict=True))


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """A dictionary that holds, after the block, what the block asked of the runtime."""
    before, found = counts(), {}
    yield found
    found |= {name: value - before[name] for name, value in counts().items()}


def install() -> None:
    """Called by torch. Does nothing in a process that has no pretend runtime."""
    if _library is None or not hasattr(_library, "pretend_operator") or torch.version.cuda is None:
        return
    _library.pretend_operator.argtypes = [ctypes.c_void_p, ctypes.c_long]
    _library.pretend_set_replay(_replay)
    names = set(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")) - _OWN | set(_ALSO)
    _override({name for name in names if name.startswith("aten::")})
    _after_import("fastsimgan.ops.history_swap", lambda: _override({"fastsimgan::history_swap"}))
    _after_import("triton.runtime.interpreter", _override_triton)
    _compile_by_aot_eager()


def _override(names: set[str]) -> None:
    """Register our kernels for these operators on CUDA."""
    for namespace in {name.partition("::")[0] for name in names}:
        _registered.append(torch.library.Library(namespace, "IMPL"))
        for name in sorted(name for name in names if name.startswith(namespace + "::")):
            packet, _, overload = name.partition("::")[2].partition(".")
            try:
                operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            except AttributeError:  # not an operator that Python can see
                continue
            returns = operator._schema.returns
            if any(value.alias_info is not None and not value.alias_info.is_write for value in returns):
                continue  # a view
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is overridden
                _registered[-1].impl(operator, _kernel(operator), "CUDA", with_keyset=True, allow_override=True)


def _kernel(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    if operator is torch.ops.aten.copy_.default:
        return _copy
    name = operator.name().partition(".")[0]
    own = None if any(part in name for part in _NOT_CALLED) else torch.library.get_kernel(operator, "CUDA")
    dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags)

    def kernel(keys: Any, *arguments: Any, **options: Any) -> Any:
        if own is not None and getattr(_thread, "inside", False):
            return own.call_boxed(keys, *arguments, **options)
        if name in _NOT_REPEATABLE and torch.are_deterministic_algorithms_enabled():
            if torch.is_floating_point(arguments[0]):
                raise RuntimeError(f"{name} does not have a deterministic implementation on CUDA for floats")
        waits = dynamic and ("index" not in name or _has_mask(arguments))  # an index of numbers waits for nothing
        torchs = None if own is None or waits else lambda *a, **o: own.call_boxed(keys, *a, **o)
        return _run(operator, torchs, arguments, options, bool(waits))

    return kernel


def _has_mask(arguments: Any) -> bool:
    return any(leaf.dtype == torch.bool for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor))


def _copy(keys: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    # torch's own, which is one function for all devices: reached by another device's name
    def own(*arguments: Any) -> torch.Tensor:
        return torch.ops.aten.copy_.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)

    if target.is_cuda and source.is_cuda and target.device == source.device and not getattr(_thread, "inside", False):
        return _run(torch.ops.aten.copy_.default, own, (target, source, non_blocking), {}, False)
    return own(target, source, non_blocking)


def _run(
    operator: torch._ops.OpOverload,
    own: Callable[..., Any] | None,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    waits: bool,
) -> Any:
    """Enqueue an operator on its device's current stream.

    Args:
        operator: with its arguments and options.
        own: torch's own kernel, if it is to be called.
        waits: whether the host has to wait, since the values decide about the result's shape.
    """
    leaves, form = pytree.tree_flatten((arguments, options))
    devices = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
    devices += [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == "cuda"]
    index = devices[0].index if devices and devices[0].index is not None else torch.cuda.current_device()
    if any(device.index not in (None, index) for device in devices):
        raise RuntimeError(f"Expected all tensors to be on the same device, {operator} got {set(map(str, devices))}")
    if CONVOLUTIONS is not None and operator is torch.ops.aten.convolution.default:
        CONVOLUTIONS.append((leaves[0].detach(), leaves[1].detach()))
    with torch._C._AutoDispatchBelowAutograd(), torch.cuda.device(index):
        stream = torch.cuda.current_stream(index)
        if waits:
            stream.synchronize()
        given = None
        if own is not None:
            _thread.inside = True
            try:
                given = own(*_numbers_as_tensors(operator, arguments), **options)
            finally:
                _thread.inside = False
        number = len(_noted)
        captured = _library.pretend_operator(stream.cuda_stream, number)
        if own is None:
            shapes_or_values = _mapped(leaves, form, _on_meta if captured else _on_cpu)
            given = _give(operator, _call(operator, *shapes_or_values), leaves, form, index)
            if not captured:
                return given
        seen_arguments, seen_options = _mapped(leaves, form, _noted_on_cpu if captured else _on_cpu)
        targets = [_on_cpu(leaf) for leaf in pytree.tree_leaves(given)]

        def compute() -> None:
            with torch._C._AutoDispatchBelowAutograd():
                found = pytree.tree_leaves(_call(operator, seen_arguments, seen_options))
                for target, value in zip(targets, found, strict=False):
                    if isinstance(target, torch.Tensor) and target.data_ptr() != value.data_ptr():
                        target.copy_(value)

        if captured:
            _noted[number] = compute
        else:
            compute()
        return given


def _numbers_as_tensors(operator: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> list[Any]:
    """Python numbers in tensors' places as tensors of the type that they would take on there."""
    like = next((value.dtype for value in arguments if isinstance(value, torch.Tensor)), torch.get_default_dtype())
    given = list(arguments)
    for position, (value, argument) in enumerate(zip(arguments, operator._schema.arguments, strict=False)):
        if isinstance(value, (int, float)) and isinstance(argument.type, torch.TensorType):
            real = isinstance(value, float) and not like.is_floating_point
            given[position] = torch.tensor(value, dtype=torch.get_default_dtype() if real else like)
    return given


def _call(operator: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    for value, argument in zip(arguments, operator._schema.arguments, strict=False):
        if isinstance(value, (int, float, complex)) and isinstance(argument.type, torch.TensorType):
            # A Python number in a tensor's place: the overload for numbers, which promotes types as for a number.
            return operator.overloadpacket(*arguments, **options)
    return _INSTEAD.get(operator, operator)(*arguments, **options)


def _batch_norm(
    images: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, factor: Any, epsilon: Any
) -> Any:
    found = torch.ops.aten.native_batch_norm(images, weight, bias, mean, variance, training, factor, epsilon)
    return *found, torch.empty(0, dtype=torch.uint8, device=images.device)


def _batch_norm_backward(
    images: Any, grad: Any, weight: Any, mean: Any, variance: Any, saved_mean: Any, saved: Any, epsilon: Any, _: Any
) -> Any:
    return torch.ops.aten.native_batch_norm_backward(
        grad, images, weight, mean, variance, saved_mean, saved, True, epsilon, [True, True, True]
    )


_INSTEAD = {  # of operators that the CPU does not have
    torch.ops.aten.cudnn_batch_norm.default: _batch_norm,
    torch.ops.aten.cudnn_batch_norm_backward.default: _batch_norm_backward,
}


def _give(operator: torch._ops.OpOverload, found: Any, leaves: list[Any], form: Any, index: int) -> Any:
    """What the operator returns: the arguments that it wrote to, or new CUDA tensors that hold what was found."""
    arguments, options = pytree.tree_unflatten(leaves, form)
    schema = operator._schema
    written: dict[frozenset[str], Any] = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = arguments[position] if position < len(arguments) else options.get(argument.name)
            written[frozenset(argument.alias_info.before_set)] = value

    values = found if isinstance(found, tuple) else (found,) if len(schema.returns) == 1 else ()
    given = []
    for value, returned in zip(values, schema.returns, strict=True):
        if returned.alias_info is None:
            given.append(pytree.tree_map_only(torch.Tensor, lambda tensor: _new(tensor, index), value))
            continue
        own = written[frozenset(returned.alias_info.before_set)]
        if isinstance(own, torch.Tensor) and own.shape != value.shape:  # an ``out`` that had to grow
            own.resize_(value.shape)
            if not value.is_meta:
                _on_cpu(own).copy_(value)
        given.append(own)
    return tuple(given) if isinstance(found, tuple) else given[0] if given else None


def _new(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """A CUDA tensor like ``tensor``, with its values where it has some."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("cuda", index))
    if not tensor.is_meta:
        _on_cpu(made).copy_(tensor)
    return made


def _mapped(leaves: list[Any], form: Any, function: Callable[[Any], Any]) -> Any:
    return pytree.tree_unflatten([function(leaf) for leaf in leaves], form)


def _on_cpu(leaf: Any) -> Any:
    """The same memory as a CPU tensor; what is no CUDA tensor as a CPU's operator wants it."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if isinstance(leaf, torch.Generator):
        return None
    if not isinstance(leaf, torch.Tensor) or not leaf.is_cuda:
        return leaf
    if leaf.numel() == 0:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
    last = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    memory = (ctypes.c_uint8 * ((last + 1) * leaf.element_size())).from_address(leaf.data_ptr())
    return torch.frombuffer(memory, dtype=leaf.dtype).as_strided(leaf.shape, leaf.stride())


def _noted_on_cpu(leaf: Any) -> Any:
    """As `_on_cpu`; a host's number is taken by value, as a kernel's argument is."""
    if isinstance(leaf, torch.Tensor) and not leaf.is_cuda:
        if leaf.dim():
            raise RuntimeError("a captured operator reads host memory")
        return leaf.clone()
    return _on_cpu(leaf)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    if isinstance(leaf, torch.Generator):
        return None
    if not isinstance(leaf, torch.Tensor) or not leaf.is_cuda:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)
def _replay(number: int) -> int:
    try:
        with torch.inference_mode():  # what was captured in it may be replayed outside: a graph knows of no mode
            _noted[number]()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# -- what does not go through the dispatcher ---------------------------------------------------------------------------


def _override_triton() -> None:
    """A launch of an interpreted Triton kernel: on the CUDA tensors' memory itself, and a node of a capture."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        leaves, form = pytree.tree_flatten((arguments, options))
        on_cuda = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
        if not on_cuda:
            launch(self, *arguments, **options)
            return
        seen_arguments, seen_options = _mapped(leaves, form, _on_cpu)
        number, stream = len(_noted), torch.cuda.current_stream()
        if on_cuda[0].device.index != torch.cuda.current_device():
            raise RuntimeError(f"a Triton kernel on {on_cuda[0].device} is launched on {stream.device}")
        if _library.pretend_operator(stream.cuda_stream, number):
            _noted[number] = lambda: launch(self, *seen_arguments, **seen_options)
        else:
            launch(self, *seen_arguments, **seen_options)

    interpreter.GridExecutor.__call__ = call


def _compile_by_aot_eager() -> None:
    """`torch.compile` traces as ever, Dynamo's rules and AOTAutograd included, and runs the traced operators.

    Inductor would generate kernels for a GPU.
    """

    def call(self: Any, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._TorchCompileInductorWrapper.__call__ = call


def _after_import(name: str, action: Callable[[], None]) -> None:
    """Do ``action`` once the module has been imported."""
    if name in sys.modules:
        action()
        return

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, wanted: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
            if wanted != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.loader is not None
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())
