"""A pretended GPU: tensors that say they are on ``cuda:0``, keep their numbers on the CPU, and refuse to meet others.

FakeTensorMode knows where every result lies and raises where two devices meet, but its tensors hold no numbers, so
nothing that reads one (``item``, a rollout, a checkpoint) can run on them. These do: whole runs go through, with the
CPU's numbers. The rule of devices is FakeTensorMode's own (``test_pretend_cuda.py`` compares the two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import no_dispatch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda", 0)
FREE_BYTES = 80 * 10**9
FUSED = ("_fused_adam", "_fused_adamw", "_fused_sgd")  # their kernels read scalars on the device too
PRODUCTS = {
    torch.nn.functional.linear, torch.nn.functional.conv2d, torch.nn.functional.scaled_dot_product_attention,
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
}  # fmt: skip
INDEXING = ("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")


class OnCuda(torch.Tensor):
    """held: the numbers, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCuda:
        # Like FakeTensor it lies on "meta": a build without CUDA cannot back-propagate through tensors on "cuda".
        with no_dispatch():
            shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
            wrapper = torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=CUDA)
        wrapper.held = held
        return wrapper

    device = property(lambda self: CUDA)
    is_cuda, is_cpu, is_meta = (property(lambda self, it=it: it) for it in (True, False, False))

    @property
    def data(self) -> OnCuda:
        return OnCuda(self.held.detach())

    @data.setter
    def data(self, value: OnCuda) -> None:
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"OnCuda({self.held})"

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)  # C++ would use "meta"

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *, force: bool = False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return 0  # how copy.deepcopy learns that there is no storage to copy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Takes what names the device, such as ``zeros(device="cuda:0")`` and ``to("cuda:0")``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Autocast(TorchFunctionMode):
    """Products in the lower precision, which torch's own autocast does for tensors that C++ too takes for a GPU's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in PRODUCTS and torch.is_autocast_enabled("cuda"):
            kind = torch.get_autocast_dtype("cuda")
            lower = lambda x: x.to(kind) if x.dtype == torch.float32 else x  # noqa: E731
            args, kwargs = tree_map_only(OnCuda, lower, (args, kwargs))
        return func(*args, **kwargs)


def _run(func, args, kwargs):
    flat = list(_leaves((args, kwargs)))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = {id(x.held): x for x in tensors if isinstance(x, OnCuda)}
    named = kwargs.get("device")
    if named is not None and torch.device(named).type == "meta":
        named = CUDA  # torch's own C++, which takes our tensors for such
    if not ours and (named is None or torch.device(named).type != "cuda"):
        return func(*args, **kwargs)
    place = torch.device(named) if named is not None else common_device(func, args, tensors)
    args, kwargs = _each((args, kwargs), _on_cpu)
    return _each(func(*args, **kwargs), lambda value: _placed(value, place, ours))


# Containers of an operation's arguments and results; torch's own trees know many more, and take half of a test's time.
def _leaves(value) -> Iterator:
    if type(value) in (tuple, list, dict):
        for inner in value.values() if type(value) is dict else value:
            yield from _leaves(inner)
    else:
        yield value


def _each(value, change: Callable):
    if type(value) is dict:
        return {key: _each(inner, change) for key, inner in value.items()}
    return type(value)(_each(x, change) for x in value) if type(value) in (tuple, list) else change(value)


def _on_cpu(value):
    return torch.device("cpu") if isinstance(value, torch.device) else getattr(value, "held", value)


def _placed(value, place: torch.device, ours: dict):
    if id(value) in ours:  # in place: the very same object
        return ours[id(value)]
    return OnCuda(value) if isinstance(value, torch.Tensor) and place.type == "cuda" else value


def common_device(func, args, tensors: list) -> torch.device:
    """Where a result lies; RuntimeError where its arguments lie on two devices. Scalars of the CPU go anywhere."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name == "copy":
        return args[0].device
    if name in INDEXING and tensors[0].device.type == "cuda":
        indices = {id(x) for x in args[1] if x is not None}
        tensors = [x for x in tensors if id(x) not in indices]
    free = [x for x in tensors if x.dim() == 0 and x.device.type == "cpu" and name not in FUSED]
    bound = [x for x in tensors if not any(x is other for other in free)] or tensors
    devices = {x.device.type for x in bound}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {sorted(devices)}")
    return bound[0].device


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Inside, ``device="cuda"`` works: torch says that there is a GPU, and what is moved there is ``OnCuda``."""
    told = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (FREE_BYTES, FREE_BYTES),
        "max_memory_allocated": lambda *_: 0,
        "get_device_name": lambda *_: "a pretended GPU",
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda *_, **__: None,
    }
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # how a module's parameters can change their class
    try:
        # ``torch.tensor(..., device="cuda:0")`` then makes its tensor here and moves it by an operation, as for fakes.
        torch._C._set_only_lift_cpu_tensors(True)
        with mock.patch.multiple(torch.cuda, **told), _Mode(), _Autocast():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swap)


def to_cpu(values):
    """The numbers in any nest of containers."""
    return tree_map_only(OnCuda, lambda x: x.held, values)
