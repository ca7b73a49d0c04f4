"""Losses, gradients and weights that leave the finite numbers end a run before they are saved."""
import torch

from engine.settings import flag_of


def is_finite(run, loss):
    """Whether the loss and all gradients are finite: a bool tensor on the device."""
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    return torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients))


def refuse_nonfinite(run, loss, step):
    """RuntimeError before the update where the loss or a gradient is NaN or infinite."""
    if not is_finite(run, loss):
        raise RuntimeError(diverged(run, f"loss {loss.item():.3g} or its gradient is not finite", f"step {step + 1}"))


def count_finite(run, loss, step):
    """The same on CUDA, without waiting for it: count the steps of the epoch up to the first that is not finite.

    The host goes on, and weights in memory are lost with that step; `refuse_counted` ends the run before a save.
    """
    run.finite_steps += is_finite(run, loss) & (run.finite_steps == step)


def refuse_counted(run, step):
    """RuntimeError, after `step`, that names the first step of the epoch which was not finite; waits for the device."""
    finite = int(run.finite_steps)
    if finite > step:
        return
    if hasattr(run.schedule, "lr_lambdas"):      # the schedule has gone on since; the message names that step's rate
        share = run.schedule.lr_lambdas[0](run.schedule.last_epoch - (step + 1 - finite))
        run.optimizer.param_groups[0]["lr"] = run.schedule.base_lrs[0] * share
    raise RuntimeError(diverged(run, "the loss or its gradient is not finite", f"step {finite + 1}"))


def refuse_nonfinite_state(run, models, validation_loss):
    """RuntimeError before an epoch is saved whose validation loss, or a weight or buffer of `models`, is not finite."""
    tensors = [tensor for model in models for tensor in model.state_dict().values()
               if tensor.is_floating_point()]
    if not torch.isfinite(torch.nn.utils.get_total_norm(tensors, norm_type=float("inf")) + validation_loss):
        raise RuntimeError(diverged(run, f"validation loss {validation_loss:.3g} or a weight is not finite",
                                    f"step {len(run.train)}"))


def refuse_immense(run):
    """RuntimeError before channels are ranked by the norms of their weights where that of all weights is not finite."""
    norm = torch.nn.utils.get_total_norm([weight.detach() for weight in run.model.parameters()])
    if not torch.isfinite(norm):
        raise RuntimeError(diverged(run, "the norm of the weights is not finite", f"step {len(run.train)}"))


def diverged(run, what, step):
    """The message for a run that left the finite numbers."""
    last, first = run.out / "last.pt", run.optimizer.param_groups[0]
    return (f"{what}: epoch {len(run.history) + 1}, {step}, learning rate {first['lr']:.4g}; last good checkpoint: "
            f"{last if last.exists() else 'none yet'}; try a smaller {flag_of(first.get('rate', 'lr'))}")
