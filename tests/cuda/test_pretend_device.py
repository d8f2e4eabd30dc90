"""The pretend device keeps CUDA's rules: what it lets through, a GPU lets through too."""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = pytest.mark.pretend


@pytest.fixture
def pretend_device():
    return pytest.importorskip("pretend_device")


def graph_of(call, **options):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        call()
    return graph


def test_operators_compute_forward_and_backward_as_on_the_cpu():
    torch.manual_seed(0)
    on_cpu = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    on_cuda = copy.deepcopy(on_cpu).cuda()
    images = torch.randn(2, 3, 8, 8)
    on_cpu(images).square().mean().backward()
    on_cuda(images.cuda()).square().mean().backward()
    for mine, theirs in zip(on_cuda.parameters(), on_cpu.parameters(), strict=True):
        # not to the bit: a library takes another way where values lie otherwise in memory
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_cuda[1].running_var.cpu(), on_cpu[1].running_var, rtol=1e-5, atol=1e-6)


def test_a_graph_records_and_runs_nothing_then_computes_with_what_its_memory_holds(pretend_device):
    counter, factor = torch.zeros(3, device="cuda"), torch.tensor(2.0, device="cuda")
    out = []
    graph = graph_of(lambda: (counter.add_(1), out.append((counter * factor).sum())))
    assert counter.tolist() == [0, 0, 0]
    with pretend_device.counted() as asked:
        graph.replay()
        factor.fill_(10)
        graph.replay()
    assert counter.tolist() == [2, 2, 2] and out[0].item() == 60
    assert asked["graphs"] == 2 and asked["operators"] == 1 and asked["syncs"] == 0


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_what_runs_on_another_device_than_the_captured_one_is_not_in_the_graph():
    counter = torch.zeros(3, device="cuda:1")
    graph_of(lambda: counter.add_(1))
    assert counter.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=["item", "to the host", "nonzero", "mask", "from pageable memory", "synchronize"],
)
def test_a_capture_forbids_waiting_for_the_device(call):
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        graph_of(lambda: call(x))
    assert (x + 1).tolist() == [2, 2, 2]  # and the device is as before


def test_types_that_cuda_lacks_are_refused():
    words = torch.arange(8, dtype=torch.int32).to(torch.uint16).cuda()
    with pytest.raises(NotImplementedError, match="UInt16"):
        words[torch.tensor([0, 1], device="cuda")]
    with pytest.raises(NotImplementedError, match="UInt16"):
        words + words
    assert words.float().tolist() == list(range(8))


def test_tensors_of_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")


def test_memory_is_handed_out_full_of_nan():
    blocks = [torch.empty(1 << 20, device="cuda") for _ in range(4)]  # more than any that was freed before
    assert blocks[-1].isnan().all()


def test_waits_are_counted(pretend_device):
    x = torch.ones(3, device="cuda")
    with pretend_device.counted() as asked:
        x.add_(1)
        x.sum().item()
    assert asked["syncs"] == 1 and asked["operators"] == 2


def test_a_python_number_promotes_as_on_the_cpu():
    scalar = torch.tensor(1.5, dtype=torch.float16, device="cuda")
    assert (scalar * 2.0).dtype == torch.float16 and (torch.tensor(3, device="cuda") * 0.5).item() == 1.5


def test_what_is_compiled_is_traced_and_computes():
    compiled = torch.compile(lambda x: torch.tanh(x) * 2, dynamic=False)
    x = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(compiled(x.cuda()).cpu(), torch.tanh(x) * 2)
