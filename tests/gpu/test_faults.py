"""What finds faults, on a GPU: digests, anomalies and times of ranks are those of a CPU. Not yet run on a GPU."""

import pytest
import torch

from deco_scale.distributed.replica_check import bit_digest
from deco_scale.training.anomalies import AnomalyDetector
from deco_scale.training.config import FaultsConfig
from deco_scale.training.metrics import RankComputeTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine"),
]


def test_digests_are_those_of_a_cpu_and_every_bit_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((33, 5), (1,), (0,), (4097,))]
    tensors += [t.bfloat16() for t in tensors]
    on_gpu = [t.cuda() for t in tensors]
    assert torch.equal(bit_digest(on_gpu).cpu(), bit_digest(tensors))
    changed = on_gpu[3].clone()
    for place in (0, 1000, 4096):
        for bit in range(31):
            changed.view(torch.int32)[place] ^= 1 << bit
            assert bit_digest([changed]) != bit_digest([on_gpu[3]])
            changed.view(torch.int32)[place] ^= 1 << bit
    assert bit_digest([changed]) == bit_digest([on_gpu[3]])


def test_a_spike_is_detected_and_read_as_on_a_cpu() -> None:
    losses = [2.0, 2.1, 1.9, 2.0, 2.05, 9.0, 2.0, float("nan"), 2.0, 2.0]
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        cfg = FaultsConfig(spike="skip", spike_window=4)
        detector = AnomalyDetector(cfg, max_bad_steps=9, device=device)
        kinds = []
        for step, loss in enumerate(losses, start=1):
            value = torch.tensor(loss, device=device)
            should_skip = detector.should_skip(value)
            assert should_skip is not None
            detector.add(step, loss=value, skipped=torch.maximum(should_skip, (~torch.isfinite(value)).float()))
            kinds += [(one.step, one.kind, step) for one in detector.read()]
        kinds += [(one.step, one.kind, 0) for one in detector.read(everything=True)]
        found.append(kinds)
    assert found[0] == found[1] == [(6, "spike", 8), (8, "skip", 10)]


def test_own_work_is_the_linears_time_on_the_device() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 4096)).cuda()
    own = RankComputeTimer([block], torch.device("cuda"), whole_blocks=False)
    x = torch.randn(8192, 4096, device="cuda")
    block(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    own.start()
    begin.record()
    block(x)
    end.record()
    seconds = own.stop()
    end.synchronize()
    assert 0 < seconds <= begin.elapsed_time(end) / 1000
    assert own.stop() == 0.0
