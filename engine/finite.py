"""End a run before it saves losses, gradients or weights that are NaN or infinite."""
import torch

from engine.settings import flag_of


def is_finite(run, loss):
    """Whether the loss and all gradients are finite, as a bool tensor on the device."""
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    return torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients))


def refuse_nonfinite(run, loss, step):
    """RuntimeError, before the update, if the loss or a gradient is NaN or infinite."""
    if not is_finite(run, loss):
        raise RuntimeError(diverged(run, f"loss {loss.item():.3g} or its gradient is not finite", f"step {step + 1}"))


def count_finite(run, loss, step):
    """The check of a step on CUDA without synchronisation: count the epoch's steps before the first non-finite one.

    The host continues: the weights in memory are lost by such a step; `refuse_counted` ends the run before it saves.
    """
    run.finite_steps += is_finite(run, loss) & (run.finite_steps == step)


def refuse_counted(run, step):
    """RuntimeError after `step` if a step of the epoch was not finite; names the first one and waits for the device."""
    finite = int(run.finite_steps)
    if finite > step:
        return
    if hasattr(run.schedule, "lr_lambdas"):      # the schedule has advanced; the message gives that step's lr
        share = run.schedule.lr_lambdas[0](run.schedule.last_epoch - (step + 1 - finite))
        run.optimizer.param_groups[0]["lr"] = run.schedule.base_lrs[0] * share
    raise RuntimeError(diverged(run, "the loss or its gradient is not finite", f"step {finite + 1}"))


def refuse_nonfinite_state(run, models, validation_loss):
    """RuntimeError, before a save, if the epoch's validation loss, or a weight or buffer of `models`, is not finite."""
    tensors = [tensor for model in models for tensor in model.state_dict().values()
               if tensor.is_floating_point()]
    if not torch.isfinite(torch.nn.utils.get_total_norm(tensors, norm_type=float("inf")) + validation_loss):
        raise RuntimeError(diverged(run, f"validation loss {validation_loss:.3g} or a weight is not finite",
                                    f"step {len(run.train)}"))


def refuse_immense(run):
    """RuntimeError, before channels are ranked by weight norms, if the norm of all weights is not finite."""
    norm = torch.nn.utils.get_total_norm([weight.detach() for weight in run.model.parameters()])
    if not torch.isfinite(norm):
        raise RuntimeError(diverged(run, "the norm of the weights is not finite", f"step {len(run.train)}"))


def diverged(run, what, step):
    """The message for a run whose numbers are no longer finite."""
    last, first = run.out / "last.pt", run.optimizer.param_groups[0]
    return (f"{what}: epoch {len(run.history) + 1}, {step}, learning rate {first['lr']:.4g}; last good checkpoint: "
            f"{last if last.exists() else 'none yet'}; try a smaller {flag_of(first.get('rate', 'lr'))}")
