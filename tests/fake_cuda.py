"""Training steps on fake CUDA tensors, on a machine without a GPU.

    python tests/fake_cuda.py GUARD CASE...

Shapes, dtypes, devices and the choice of operators are those of a GPU; nothing is computed. GUARD
is the library that make_guard() builds: it must be there before torch looks for its CUDA hooks.
Prints a JSON line per case: the operators called, graph breaks and graphs compiled.
"""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace at;
const Device zero(kCUDA, 0);
// a device that does nothing, so that autograd accepts fake tensors on it
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  Device getDevice() const override { return zero; }
  Device exchangeDevice(Device) const override { return zero; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, zero); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, zero); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
"""
SIZES = {"vocab_size": 300, "seq_len": 256, "n_layer": 1, "n_head": 4, "d_model": 256}
B, T = 4, 256


def make_guard(folder: Path) -> str:
    """Build the library with g++. -> its path"""
    import torch

    root, library = torch.__path__[0], str(folder / "guard.so")
    (folder / "guard.cpp").write_text(GUARD)
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include"]
    command += [str(folder / "guard.cpp"), "-o", library, f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def pretend(library: str) -> None:
    """Make torch believe that it has an H100."""
    lib = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for path in (lib / "libgomp.so.1", lib / "libc10.so", lib / "libtorch_cpu.so", Path(library)):
        if path.exists():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch._functorch.config
    from torch._subclasses import fake_tensor

    warnings.filterwarnings("ignore")
    about = {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132}
    about["total_memory"] = 80 << 30
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None}
    answers |= {"is_initialized": True, "is_bf16_supported": True, "set_rng_state": None}
    answers |= {"get_device_capability": (9, 0), "get_device_name": "NVIDIA H100"}
    answers["get_rng_state"] = torch.zeros(16, dtype=torch.uint8)
    answers["get_device_properties"] = SimpleNamespace(**about)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **keys: answer)
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    fake_tensor.init_gpu_context = lambda device: None
    # wants a generator of a real GPU
    torch._functorch.config.graphsafe_rng_functionalization = False


def task_of(mode: str, B: int = B):
    """Return a task without data, and a batch of it on the device that is the default."""
    import torch

    import align
    from train import Pretrain

    ids = torch.zeros(B, T, dtype=torch.long)
    batch = {"idx": ids, "targets": ids}
    mode, _, chats = mode.partition(" beside ")
    if mode == "pretrain":
        return Pretrain.__new__(Pretrain), batch
    batch["docs"] = ids
    task = align.TASKS[mode].__new__(align.TASKS[mode])
    configs = {"dpo": align.DPOConfig, "rl": align.RLConfig, "verifier": align.VerifierConfig}
    task.cfg = configs.get(mode, object)()
    if mode == "dpo":
        if chats:
            task.cfg.replay = 0.5
            batch |= {f"chats_{key}": x[: B // 4] for key, x in batch.items()}
        halves = torch.zeros(2, B // 2)
        batch |= {"reference": halves, "lengths": halves + 1}
    if mode == "rl":
        task.reference, task.metrics = None, ["reward"]
        task.setup = SimpleNamespace(align=SimpleNamespace(max_new_tokens=T))
        batch |= dict.fromkeys(("reward", "signal", "advantages"), torch.ones(B))
    return task, batch | ({"labels": ids} if mode == "verifier" else {})


def compiled_step(mode: str = "pretrain", optimizer: str = "muon", **fields) -> dict:
    """Compile one training step and its optimizer. -> operators, graph breaks, graphs"""
    import torch
    from torch._dynamo.utils import counters
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import GPT, ModelConfig
    from train import LoopConfig, TrainStep, make_optimizers

    torch._dynamo.reset()
    counters.clear()
    ops, recompute = Counter(), fields.pop("recompute", False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = GPT(ModelConfig(**SIZES | fields | {"score_head": mode == "verifier"}))
            task, batch = task_of(mode)
        model.recompute = recompute
        step = TrainStep(model, task)
        step = torch.compile(step, dynamic=False, fullgraph=True, backend=counting(ops))
        with torch.autocast("cuda", torch.bfloat16):
            loss, balance, _ = step(batch)
        (loss + balance).backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        for o in make_optimizers(model, LoopConfig(optimizer=optimizer)):
            o.step()
    found = {"breaks": sum(counters["graph_break"].values())}
    return {**found, "graphs": counters["stats"]["unique_graphs"], "ops": dict(ops)}


def generation_step(**fields) -> dict:
    """Take the step of generation that a CUDA graph records, after a padded prompt. -> operators

    What waits for a number of the GPU cannot be recorded, and raises on fake tensors.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from inference.cache import FixedCache
    from inference.sampling import cache_of
    from model import GPT, ModelConfig

    ops = Counter()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ops[str(op).split(".")[1]] += 1
            return op(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        model = GPT(ModelConfig(**SIZES | fields))
        torch.set_default_dtype(torch.float32)
        cache = cache_of(model, B, T)
        model.hidden(torch.zeros(B, 8, dtype=torch.long), cache=cache, pads=torch.arange(B))
        fixed = FixedCache(cache)
        with Noted():
            model.hidden(torch.zeros(B, 1, dtype=torch.long), cache=fixed)
    return {"ops": dict(ops)}


def compiled_step_on_cpu(mode: str) -> dict[str, int]:
    """Run a compiled task as the loop does. -> graphs compiled after each kind of batch"""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    from model import GPT, ModelConfig
    from train import TrainStep

    torch._dynamo.reset()
    small = {"n_layer": 1, "d_model": 32, "score_head": mode == "verifier"}
    counter = CompileCounterWithBackend("aot_eager")
    step = TrainStep(GPT(ModelConfig(**SIZES | small)), task_of(mode)[0])
    step = torch.compile(step, dynamic=False, fullgraph=True, backend=counter)
    found, kinds = {}, {"train": B, "again": B, "val": B, "part": B // 2, "next": B}
    for kind, rows in kinds.items():
        batch = task_of(mode, rows)[1]
        with torch.set_grad_enabled(kind != "val"), torch.autocast("cpu", torch.bfloat16):
            loss, *_ = step(batch)
        if kind != "val":
            loss.backward()
        found[kind] = counter.frame_count
    return found


def counting(ops: Counter):
    """Return a backend that notes what Dynamo and AOT autograd make of a step, without Inductor."""
    import torch
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "call_function":
                # an operator may stand among the arguments: run_and_save_rng_state
                inner = [x for x in node.args if isinstance(x, torch._ops.OpOverload)]
                names = [str(x).removeprefix("aten.") for x in (node.target, *inner)]
                ops.update(name.partition(".")[0] for name in names)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


if __name__ == "__main__":
    pretend(sys.argv[1])
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    for case in sys.argv[2:]:
        fields = json.loads(case)
        run = generation_step if fields.pop("generate", False) else compiled_step
        print(json.dumps(run(**fields)), flush=True)
