"""A GPU for tests on a machine without one: tensors that say cuda:0, with their numbers on the CPU.

    with Pretend() as gpu:                     # torch sees one GPU
        train.main(["--dataset", "digits", ...])
    gpu.syncs, gpu.launches, gpu.uncovered     # what would make the host wait; operators; those without a CUDA kernel

A tensor on the GPU is a subclass around a CPU tensor. Every operator passes `Pretend`, which
applies CUDA's rules: all tensors on one device (numbers apart), draws from a CUDA generator only,
whose state is 16 bytes; it counts what would be launched and what would wait. Numbers are the CPU's,
so that a whole run trains, prunes, saves and resumes. Not covered: CUDA kernels themselves,
torch.compile, CUDA autocast's own list of operators (the CPU's is used), NCCL. (torch's FakeTensorMode
has no generators, no backward pass and no `.item()` without a driver.)
"""
import contextlib
import struct
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # it must not meet what stands in for torch's names
from torch.optim import optimizer
from torch.utils import _foreach_utils as foreach
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

GPU, aten = torch.device("cuda", 0), torch.ops.aten
FREE = {"detach", "alias", "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "split",
        "unsqueeze", "squeeze", "as_strided", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty",
        "split_with_sizes", "unbind", "_reshape_alias", "new_empty_strided", "diagonal"}       # launch nothing
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim"}
MIXES = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_", "_foreach_copy_"}
REAL_GENERATOR = torch.Generator


class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:0. To C++ it is on the CPU, or autograd would ask the driver for streams."""

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="cpu", requires_grad=False)
        self.held = held
        return self

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def __reduce_ex__(self, protocol):           # saved as a tensor, as a real one is
        now().wait("torch.save")
        return self.held.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if isinstance(args[0] if args else None, OnGPU):
            if name in ("cpu", "numpy", "tolist", "__array__"):
                now().wait(name)
                held = args[0].held.detach()
                return held.clone() if name == "cpu" else getattr(held, name)(*args[1:], **kwargs)
            if name == "to" and not isinstance(args[1] if len(args) > 1 else None, torch.Tensor):
                device, dtype, _, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
                if device is not None and device.type == "cpu":
                    now().wait("to cpu")
                    return args[0].held.detach().to(dtype=dtype or args[0].dtype, copy=True)
                wanted = {"dtype": dtype or args[0].dtype} | ({"memory_format": layout} if layout else {})
                with torch._C.DisableTorchFunctionSubclass():
                    return function(args[0], **wanted)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return now().call(function, args, kwargs or {})


MADE = {}


class GPUGenerator(torch.Generator):
    """A generator as CUDA's Philox: its state is a seed and an offset, 16 bytes."""

    def __init__(self, seed=0):
        self.seeded, self.offset = seed, 0
        MADE[self._cdata] = self                 # an operator sees the generator beneath, not this object

    device = property(lambda self: GPU)

    def manual_seed(self, seed):
        self.seeded, self.offset = seed, 0
        return self

    def initial_seed(self):
        return self.seeded

    def get_state(self):
        return torch.frombuffer(bytearray(struct.pack("<qq", self.seeded, self.offset)), dtype=torch.uint8).clone()

    def set_state(self, state):
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        self.seeded, self.offset = struct.unpack("<qq", bytes(state.tolist()))
        return self

    def draw(self):
        """The CPU generator of the next operator."""
        self.offset += 4
        return REAL_GENERATOR().manual_seed((self.seeded * 1_000_003 + self.offset) % 2**63)


class AnyGenerator(type):
    """torch.Generator as a machine with a GPU has it."""

    def __call__(cls, device="cpu"):
        return GPUGenerator() if torch.device(device).type == "cuda" else REAL_GENERATOR(device)

    def __instancecheck__(cls, instance):
        return isinstance(instance, REAL_GENERATOR)


class Generator(metaclass=AnyGenerator):
    """Stands in for torch.Generator."""


ACTIVE = []


def now():
    """The `Pretend` that is in force."""
    return ACTIVE[-1]


class Pretend(TorchDispatchMode):
    """torch with one GPU, on a machine that has none; see the head of this file."""

    def __init__(self, here=None):
        super().__init__()
        self.here = str(here or Path.cwd())
        self.syncs, self.launches, self.uncovered, self.layouts = Counter(), Counter(), set(), Counter()
        self.default_draws, self.default, self.watch = Counter(), GPUGenerator(), True

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        cuda, seed, autocast = torch.cuda, torch.manual_seed, torch.autocast

        def manual_seed(value):
            self.default.manual_seed(value)
            return seed(value)

        def on_cpu_first(make):                  # torch.tensor goes to the driver past every mode
            def made(data, *, device=None, **kwargs):
                own = make(data, **kwargs)
                return own if device is None else own.to(device)
            return made

        def one_hot(labels, classes):            # its C++ makes a helper on the device that C++ sees
            return (labels[..., None] == torch.arange(classes, device=labels.device)).long()

        class Autocast(autocast):
            def __init__(self, device_type, *args, **kwargs):
                super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)
        for owner, name, value in (
                (cuda, "is_available", lambda: True), (cuda, "device_count", lambda: 1),
                (cuda, "_lazy_init", lambda: None), (cuda, "current_device", lambda: 0),
                (cuda, "get_device_name", lambda *_: "NVIDIA Pretend"),
                (cuda, "synchronize", lambda *_: self.wait("synchronize")), (torch, "Generator", Generator),
                (torch, "manual_seed", manual_seed), (torch, "autocast", Autocast),
                (torch.nn.functional, "one_hot", one_hot), (torch, "tensor", on_cpu_first(torch.tensor)),
                (torch, "as_tensor", on_cpu_first(torch.as_tensor))):
            self.stack.enter_context(mock.patch.object(owner, name, value))
        for module in (optimizer, foreach):
            if hasattr(module, "_foreach_supported_types"):
                self.stack.enter_context(mock.patch.object(
                    module, "_foreach_supported_types", [*module._foreach_supported_types, OnGPU]))
        kept = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)       # a parameter's .data cannot change kind
        self.stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, kept)
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *problem):
        super().__exit__(*problem)
        ACTIVE.remove(self)
        self.stack.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.call(function, args, kwargs or {})

    # ---- the rules

    def where(self):
        """file:line of the project's innermost frame."""
        for frame in reversed(traceback.extract_stack(limit=40)):
            if frame.filename.startswith(self.here) and not frame.filename.endswith("fake_cuda.py"):
                return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        return "backward or torch"

    def wait(self, what):
        if self.watch:
            self.syncs[f"{what:20} {self.where()}"] += 1

    def call(self, function, args, kwargs):
        name, tensors = function._schema.name.split("::")[1], []
        tree_map(lambda each: tensors.append(each) if isinstance(each, torch.Tensor) else None, (args, kwargs))
        on_gpu = [each for each in tensors if isinstance(each, OnGPU)]
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if on_gpu and asked is not None and asked.type == "cpu":
            asked = None                         # the C++ beneath filled in the device that it sees
        target = asked.type if asked is not None else "cuda" if on_gpu else "cpu"
        if on_gpu and name not in MIXES:
            numbers = torch.Tag.pointwise in function.tags or name.startswith("_foreach")
            wrong = [each for each in tensors if not isinstance(each, OnGPU) and not (numbers and each.dim() == 0)]
            if wrong:
                raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, "
                                   f"cuda:0 and cpu! ({function}, a CPU tensor of {tuple(wrong[0].shape)})")
        elif on_gpu and name in ("index", "index_put_", "index_put") and not isinstance(args[0], OnGPU):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if target == "cuda":
            args, kwargs = self.random(function, name, args, kwargs)
            self.note(function, name, args, tensors)

        def held(each):
            return each.held if isinstance(each, OnGPU) else each
        inner = dict(tree_map(held, kwargs))
        if asked is not None and asked.type == "cuda":
            inner["device"] = torch.device("cpu")
        out = function(*tree_map(held, args), **inner)
        if name == "copy_" and not isinstance(args[0], OnGPU) and on_gpu:
            self.wait("copy to cpu")
        if target != "cuda":
            return out
        wrapped = tree_map(lambda each: OnGPU(each) if isinstance(each, torch.Tensor) else each, out)
        if not on_gpu or name in ("_to_copy", "lift_fresh"):
            return wrapped
        return return_and_correct_aliasing(function, args, kwargs, wrapped)

    def random(self, function, name, args, kwargs):
        """The draws of an operator on the GPU: from a CUDA generator alone."""
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, REAL_GENERATOR)), None)
        accepts = any(argument.name == "generator" for argument in function._schema.arguments)
        if given is None and (torch.Tag.nondeterministic_seeded not in function.tags or not accepts):
            return args, kwargs
        if given is None:
            self.default_draws[f"{name:20} {self.where()}"] += 1
            return args, {**kwargs, "generator": self.default.draw()}
        own = MADE.get(given._cdata)
        if own is None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{given.device.type}' ({name})")
        drawn = own.draw()
        return (tuple(drawn if each is given else each for each in args),
                {word: drawn if each is given else each for word, each in kwargs.items()})

    def note(self, function, name, args, tensors):
        """Count launches, waits, layouts, and operators that have no CUDA kernel in this torch."""
        if not self.watch:
            return
        if name in WAITS or name in ("index", "index_put_") and any(
                isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1] or ()):
            self.wait(name)
        if name not in FREE:
            self.launches[name] += 1
        if name in ("convolution", "_convolution", "mkldnn_convolution"):
            layouts = ["last" if each.is_contiguous(memory_format=torch.channels_last) and each.shape[1] > 1 else
                       "first" for each in args[:2]]
            self.layouts[f"images channels_{layouts[0]}, weight channels_{layouts[1]}"] += 1
        if "mkldnn" not in name and torch.backends.cuda.is_built():
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            full = function.name()
            if not any(has(full, key) for key in ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd",
                                                  "CompositeExplicitAutogradNonFunctional")):
                self.uncovered.add(full)
