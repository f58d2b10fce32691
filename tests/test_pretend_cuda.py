"""The pretended GPU refuses what FakeTensorMode refuses, and lets through what it lets through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretend_cuda import CUDA, OnCuda, pretended_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

# What each makes of x [3, 4] on the GPU, and of c [3, 4], i [3] and s (a scalar) on the CPU.
OPERATIONS = {
    "both on the device": lambda x, c, i, s: x + x,
    "scalar of the CPU": lambda x, c, i, s: x * s,
    "tensor of the CPU": lambda x, c, i, s: x + c,
    "product": lambda x, c, i, s: c.t() @ x,
    "gather": lambda x, c, i, s: x.gather(1, i.unsqueeze(1)),
    "mask": lambda x, c, i, s: torch.where(c > 0, x, x),
    "concatenation": lambda x, c, i, s: torch.cat([x, c]),
    "index from the device": lambda x, c, i, s: c[x[:, 0].long()],
    "copy": lambda x, c, i, s: c.copy_(x),
    "moved": lambda x, c, i, s: x.cpu() + c,
    "scalar of the device": lambda x, c, i, s: c + x.sum(),
    "in place": lambda x, c, i, s: x.add_(c),
    "embedding": lambda x, c, i, s: torch.nn.functional.embedding(i, x),
    "new tensors": lambda x, c, i, s: torch.cat([x, x.new_zeros(1, 4), torch.ones(1, 4, device=CUDA)]),
    "foreach": lambda x, c, i, s: torch._foreach_add([x, x], [x, c]),
}


def outcome(make, operation) -> str:
    arguments = make(torch.rand(3, 4)), torch.rand(3, 4), torch.tensor([0, 2, 1]), torch.tensor(2.0)
    try:
        result = operation(*arguments)
    except RuntimeError as error:
        assert "device" in str(error)
        return "refused"
    return str((result[0] if isinstance(result, (list, tuple)) else result).device.type)


@pytest.mark.parametrize("name", OPERATIONS)
def test_devices_follow_the_rule_of_fake_tensors(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = outcome(lambda x: torch.empty_like(x, device=CUDA), OPERATIONS[name])
    with pretended_cuda():
        assert outcome(lambda x: x.to(CUDA), OPERATIONS[name]) == expected


def test_an_index_may_come_from_the_cpu():  # fakes cannot, where torch is built without CUDA
    with pretended_cuda():
        assert outcome(lambda x: x.to(CUDA), lambda x, c, i, s: x[i]) == "cuda"


def test_numbers_are_read_only_after_a_move():
    with pretended_cuda():
        x = torch.arange(3.0, device=CUDA)
        for read in (np.asarray, lambda x: x.numpy()):
            with pytest.raises(TypeError, match="cpu"):
                read(x)
        assert x.sum().item() == 3 and x.tolist() == [0, 1, 2] and x.cpu().numpy().sum() == 3


def test_a_fused_step_wants_its_counter_on_the_device():
    with pretended_cuda():
        weight = torch.nn.Parameter(torch.ones(2).to(CUDA))
        adam = torch.optim.AdamW([weight], fused=True)
        weight.sum().backward()
        adam.step()
        assert isinstance(weight, OnCuda) and weight.cpu().max() < 1
        adam.state[weight]["step"] = torch.tensor(1.0)
        with pytest.raises(RuntimeError, match="same device"):
            adam.step()
