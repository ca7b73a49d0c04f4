"""A GPU that is not there, for tests of what a run does on one: cuda:0 by its rules, its numbers on the CPU.

    with FakeCuda() as gpu:
        train.main(["--dataset", "digits", ...])       # --device auto finds one GPU
    gpu.waits, gpu.launches, gpu.turned, gpu.unsaved_draws, gpu.without_kernel       # Counters of what it saw

A tensor on it is a `CudaTensor`: to Python on cuda:0, to C++ on the CPU (autograd would ask
the driver for its streams), around the CPU tensor `inner` that does the work. All operators
come through one dispatch mode, where the device's rules hold:

- tensors of one operator are on one device, but for single numbers in pointwise ones;
- what draws takes a generator of the device, whose state is a seed and an offset, 16 bytes;
- numbers reach the host by a wait.

The device has its index: torch.device("cuda", 0), since without one C++ asks the driver which is meant.
So whole runs train, prune, save, resume and are tested. What it cannot tell: anything of CUDA's
kernels, of torch.compile, of NCCL, and which operators CUDA's autocast takes (the CPU's are).
"""
import contextlib
import struct
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401  before names of torch are replaced, which it looks up as it is imported
from torch.optim import optimizer
from torch.utils import _device, _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).resolve().parents[1])
DEVICE = torch.device("cuda", 0)
CpuGenerator = torch.Generator
_device._device_constructors()            # this list is made once: not while other functions stand there
current = None                            # the FakeCuda in force
# what only makes another view, or memory without numbers
NO_KERNEL = {"detach", "alias", "view", "_unsafe_view", "_reshape_alias", "expand", "permute", "transpose", "t",
             "slice", "select", "split", "split_with_sizes", "unbind", "unsqueeze", "squeeze", "diagonal", "as_strided",
             "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# what the host must have numbers for: a value, or how many there will be
NEEDS_HOST = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}
COPIES = {"copy_", "_to_copy", "_foreach_copy_", "set_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
KERNELS = ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional")


# ---- tensors and generators

class CudaTensor(torch.Tensor):
    """A tensor of cuda:0, around a CPU tensor."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                   storage_offset=inner.storage_offset(), device="cpu")
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    data = property(lambda self: self.detach())

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def __repr__(self):
        return f"CudaTensor({self.inner!r})"

    def __reduce_ex__(self, protocol):
        """What torch.save writes: the numbers, fetched."""
        return self.fetched("saved").__reduce_ex__(protocol)

    def fetched(self, how):
        """The numbers on the host, in memory of their own."""
        current.waits[f"{how}, {place()}"] += 1
        return self.inner.detach().clone()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Ways to the host, which C++ would not see as such; all else goes on to the dispatch mode."""
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if args and isinstance(args[0], cls):
            if name in ("cpu", "numpy", "tolist", "__array__"):
                inner = args[0].fetched(name)
                return inner if name == "cpu" else getattr(inner, name)(*args[1:], **kwargs)
            if name == "to" and not (len(args) > 1 and isinstance(args[1], torch.Tensor)):
                device, dtype, _, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
                if device is not None and device.type != "cuda":
                    there = args[0].fetched("to") if device.type == "cpu" else args[0].inner.detach()
                    return there.to(device, dtype or there.dtype)
                args = (args[0],)             # C++ would take cuda for another device than its own
                kwargs = {"dtype": dtype or args[0].dtype} | ({"memory_format": layout} if layout else {})
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return current.operate(function, args, kwargs or {})


class CudaGenerator(CpuGenerator):
    """A generator of the device: every draw has a CPU generator of its own, which seed and offset give."""

    made = {}                                 # an operator is handed the C++ object beneath, not this one

    def __init__(self):
        self.seed_, self.offset = 0, 0
        CudaGenerator.made[self._cdata] = self

    device = property(lambda self: DEVICE)

    def manual_seed(self, seed):
        self.seed_, self.offset = seed, 0
        return self

    def initial_seed(self):
        return self.seed_

    def get_state(self):
        return torch.tensor(list(struct.pack("<QQ", self.seed_, self.offset)), dtype=torch.uint8)

    def set_state(self, state):
        if state.device.type != "cpu" or len(state) != 16:
            raise RuntimeError("RNG state is wrong size")
        self.seed_, self.offset = struct.unpack("<QQ", bytes(state.tolist()))
        return self

    def next(self):
        self.offset += 4
        return CpuGenerator().manual_seed((self.seed_ * 6364136223846793005 + self.offset) % 2**63)


class GeneratorOfAnyDevice(type):
    """The class that stands for torch.Generator: it makes either kind, and both are of it."""

    def __call__(cls, device="cpu"):
        return CudaGenerator() if torch.device(device).type == "cuda" else CpuGenerator(device)

    def __instancecheck__(cls, instance):
        return isinstance(instance, CpuGenerator)


def place():
    """file:line function of the innermost line of the project, that of tests aside."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "/tests/" not in path and "/.venv/" not in path:
            return f"{Path(path).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


# ---- the device

class FakeCuda(TorchDispatchMode):
    """torch as a machine with one GPU has it, within the block."""

    def __init__(self):
        super().__init__()
        self.default = CudaGenerator()        # the device's own, which no checkpoint of this project holds
        self.waits, self.launches, self.turned = Counter(), Counter(), Counter()
        self.unsaved_draws, self.without_kernel = Counter(), Counter()

    def forget(self):
        """Begin to count anew."""
        for seen in (self.waits, self.launches, self.turned, self.unsaved_draws, self.without_kernel):
            seen.clear()

    def __enter__(self):
        global current
        self.before, current, self.patches = current, self, contextlib.ExitStack()
        for owner, names in stand_ins(self):
            self.patches.enter_context(mock.patch.multiple(owner, **names))
        return super().__enter__()

    def __exit__(self, *problem):
        global current
        super().__exit__(*problem)
        self.patches.close()
        current = self.before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.operate(function, args, kwargs or {})

    def operate(self, function, args, kwargs):
        """One operator: on the device where one of its tensors is, or where it is to make one."""
        name, device = function._schema.name.removeprefix("aten::"), kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        asked = device is not None and torch.device(device).type
        if not ours and asked != "cuda":
            return function(*args, **kwargs)
        refuse_other_devices(function, name, tensors, ours)
        inner_args, inner_kwargs = tree_map_only(CudaTensor, lambda tensor: tensor.inner, (args, kwargs))
        if asked in ("cuda", "cpu"):          # C++ fills in the device that it sees
            inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
        if ours and name in ("copy_", "_foreach_copy_") and not isinstance(tensors[0], CudaTensor):
            self.waits[f"{name}, {place()}"] += 1
            return function(*inner_args, **inner_kwargs)
        inner_args, inner_kwargs = self.with_generator(function, name, inner_args, inner_kwargs)
        self.note(function, name, args)
        made = tree_map_only(torch.Tensor, CudaTensor, function(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(function, args, kwargs, made) if ours and name != "_to_copy" else made

    def with_generator(self, function, name, args, kwargs):
        """The arguments, with a CPU generator for this one draw in place of the device's."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CpuGenerator)]
        if given:
            own = CudaGenerator.made.get(given[0]._cdata)
            if own is None:
                raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
            drawn = own.next()
            return tree_map_only(CpuGenerator, lambda _: drawn, (args, kwargs))
        draws = torch.Tag.nondeterministic_seeded in function.tags
        if draws and any(argument.name == "generator" for argument in function._schema.arguments):
            self.unsaved_draws[f"{name}, {place()}"] += 1
            kwargs = {**kwargs, "generator": self.default.next()}
        return args, kwargs

    def note(self, function, name, args):
        """Count a launch, a wait, a convolution whose images or weight change their layout first."""
        if name not in NO_KERNEL:
            self.launches[name] += 1
        chosen = [index for index in args[1] if index is not None] if name in INDEXED else []
        if name in NEEDS_HOST or any(index.dtype in (torch.bool, torch.uint8) for index in chosen):
            self.waits[f"{name}, {place()}"] += 1
        if name == "convolution":
            for what, tensor in zip(("images", "weight"), args[:2], strict=True):
                self.turned[what] += not tensor.is_contiguous(memory_format=torch.channels_last)
        known = torch._C._dispatch_has_kernel_for_dispatch_key
        if not name.startswith("mkldnn") and not any(known(function.name(), kind) for kind in KERNELS):
            self.without_kernel[function.name()] += 1


def refuse_other_devices(function, name, tensors, ours):
    """RuntimeError, in CUDA's words, where an operator's tensors are on two devices."""
    if not ours or name in COPIES:
        return
    if name in INDEXED:                       # indices may come from the host, not go there
        wrong = [] if tensors[0] is ours[0] else tensors[:1]
    else:
        free = torch.Tag.pointwise in function.tags or name.startswith("_foreach")
        wrong = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor) and not (free and not tensor.dim())]
    if wrong:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                           f"cpu! ({name}, whose tensor of {tuple(wrong[0].shape)} is on the CPU)")


def stand_ins(gpu):
    """[(module, {name: what stands there while the device is pretended})]."""
    seed, autocast = torch.manual_seed, torch.autocast

    def by_copy(make):                        # these go to the driver past every mode
        def made(data, *, device=None, **kwargs):
            tensor = make(data, **kwargs)     # of no device asked for: where a surrounding torch.device says
            return tensor if device is None else tensor.to(device)
        return made

    def one_hot(labels, classes):             # a helper tensor of its C++ is made where C++ sees the labels
        return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).long()

    class Autocast(autocast):
        def __init__(self, kind, *args, **kwargs):
            super().__init__("cpu" if kind == "cuda" else kind, *args, **kwargs)

    def manual_seed(value):
        gpu.default.manual_seed(value)
        return seed(value)
    def may_share(one, other):                # a module's parameter moves to the device by another object in its place
        return isinstance(one, CudaTensor) == isinstance(other, CudaTensor) and share(one, other)
    share = torch._has_compatible_shallow_copy_type
    fast = [*_foreach_utils._foreach_supported_types, CudaTensor]
    return [
        (torch.cuda, {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
                      "get_device_name": lambda *_: "NVIDIA Pretended", "_lazy_init": lambda: None,
                      "synchronize": lambda *_: gpu.waits.update([f"synchronize, {place()}"])}),
        (torch, {"Generator": GeneratorOfAnyDevice("Generator", (), {}), "manual_seed": manual_seed,
                 "autocast": Autocast, "_has_compatible_shallow_copy_type": may_share,
                 "tensor": by_copy(torch.tensor), "as_tensor": by_copy(torch.as_tensor)}),
        (torch.nn.functional, {"one_hot": one_hot}), (_foreach_utils, {"_foreach_supported_types": fast}),
        (optimizer, {"_foreach_supported_types": fast})]
