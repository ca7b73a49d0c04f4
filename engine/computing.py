"""How a run computes: its arithmetic, the form of its grouped convolutions, eager or compiled."""
import torch

from engine import compiling, parallel


def autocast(device, dtype):
    """A context in which convolutions and matrix products compute in `dtype`, bfloat16 or float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def choose_computing(run, wanted, images, shape, lay_out):
    """Set the arithmetic of `run`, the form of its grouped convolutions, and its forward function, eager or compiled.

    wanted, images, shape: see `compiling.choose_forward`; lay_out(run): applies the form to
    its network. Returns training images a second, and a sentence that says how it computes.
    """
    run.dtype = parallel.agreed(compiling.choose_arithmetic(run.settings["arithmetic"], run.model, images, run.device,
                                                            run.computed))
    asked, tried = run.settings["convolutions"], {}
    if asked == "auto" and run.form:
        asked = run.form                  # a resumed run keeps its form
    began = run.compiled if wanted == "auto" and run.settings["compile"] == "auto" else None
    for form in compiling.forms_of(asked, run.model, run.device):
        compiling.compute_as(run.model, form)
        tried[form] = compiling.choose_forward(run.model, "off" if began is False else wanted, images, shape,
                                               autocast(run.device, run.dtype), run.device, run.layout)
    run.form = parallel.agreed(compiling.fastest_form({form: speed for form, (_, speed, _) in tried.items()}))
    lay_out(run)
    run.forward, speed, note = tried[run.form]
    run.compiled = run.forward is not run.model
    if began and not run.compiled:
        raise ValueError(f"the run in {run.out} began compiled, and now it would be {note}, with other roundings; "
                         "--compile off --force goes on so")
    return speed, "eager (as it began)" if began is False else note
