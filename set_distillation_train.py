"""Distillation: a small network learns from the outputs of a large one for each image.

    loss = distilled(loss, logits, teach(teacher, images), temperature=4, weight=0.9)

Hinton et al. 2015 (arXiv:1503.02531), section 2. `train.py` calls it in each step
when --teacher names a checkpoint. The teacher gets the same batch as the student, but at
full size if --resize makes the student's images smaller. So distillation works with
CutMix and mixup, whose soft targets stay in the other part of the loss.

With --teacher-views N the teacher runs once, on N crops and mirrorings of every training
image (Shen and Xing 2021, arXiv:2112.01528); the student trains on just these, and mixes
the stored logits as it mixes the images.
"""
import torch
import torch.nn.functional as F

from engine import checkpoint, parallel
from engine.operations import macs_of
from engine.settings import Setting

UNWEIGHTED = (("distillation_weight", 0),)       # with which a teacher changes nothing
SETTINGS = {
    "teacher": Setting(None, "learn from this network too (distillation)", form=str, shown="CHECKPOINT",
                       unless=UNWEIGHTED),
    "teacher_views": Setting(None, "run the teacher once, on N crops and mirrorings of each training image", low=1,
                             high=1000, form=int, shown="N", fixed=True, unless=UNWEIGHTED,
                             clashes=(((), "recipe", ("published",), "which draws its own crops; leave one out"),)),
    "temperature": Setting(4.0, "of the distillation", low=1e-3, high=1e3, only=(("teacher", ()),), unless=UNWEIGHTED),
    "distillation_weight": Setting(0.9, "weight of the teacher's part in the loss", low=0, high=1,
                                   only=(("teacher", ()),)),
}


def check_settings(settings):
    """Raise ValueError if views are requested without a teacher."""
    if settings["teacher_views"] and not settings["teacher"]:
        raise ValueError("--teacher-views needs a --teacher to ask")


def share_of_teacher(teacher, model, shape, views):
    """(per step, once at the start): a teacher's operations per image, relative to those of a training step of `model`.

    shape: (C, H, W) of an image; views: the number of --teacher-views, or None.
    """
    if teacher is None:
        return 0.0, 0.0
    share = macs_of(teacher, shape) / (3 * macs_of(model, shape))
    return (0.0, views * share) if views else (share, 0.0)


@torch.no_grad()
def teach(teacher, images):
    """Return the teacher's logits, (N, K) float32, in evaluation mode and without gradients."""
    if teacher.training:                  # not in each step: eval() visits all modules, which takes a while
        teacher.eval()
    return teacher(images).float()


def distilled(loss, logits, teacher_logits, temperature, weight):
    """weight T^2 KL(teacher || student) + (1 - weight) loss, a scalar; both softened by the temperature T.

    loss: the student's own, a scalar; logits, teacher_logits: (N, K) float. T^2 keeps
    the gradients of the soft part as large as those of the hard one for every T;
    with T = 1 and weight = 1 only the teacher's probabilities are matched.
    """
    if temperature > 100 and logits.device.type != "mps":      # float32 is too coarse for what is left
        logits, teacher_logits = logits.double(), teacher_logits.double()
    soft = F.kl_div(F.log_softmax(logits / temperature, 1), F.log_softmax(teacher_logits / temperature, 1),
                    reduction="batchmean", log_target=True).to(loss.dtype)
    return weight * temperature**2 * soft + (1 - weight) * loss


@torch.no_grad()
def ask(teacher, batches, views, precision, chunk=500):
    """Draw `views` crops and mirrorings of every chosen training image of `batches`, and store the teacher's logits.

    precision: a context for its forward passes. Returns {"views": (N, views, 3) int8 of
    `Batches.draw_moves`, "answers": (N, views, K) float16 logits}; rows of images that are not chosen are zero.
    """
    count, chosen = len(batches.images), batches.chosen
    drawn = torch.zeros(count, views, 3, dtype=torch.int8, device=chosen.device)
    answers = None
    for number in range(views):
        batches.epoch = number                     # alternating flips: half of the views are mirrored
        for indices in chosen.split(chunk):
            moves = batches.draw_moves(indices)
            images = batches.normalise(batches.moved(indices, *moves).permute(0, 3, 1, 2))
            with precision:
                logits = teach(teacher, images)
            if answers is None:
                answers = torch.zeros(count, views, logits.shape[1], dtype=torch.float16, device=chosen.device)
            drawn[indices, number] = torch.cat(moves, 1).to(torch.int8)
            answers[indices, number] = logits.half()
    return {"views": drawn, "answers": answers}


def take_views(run, precision):
    """Give the training batches of `run` its --teacher-views, computed once and stored in its folder as views.pt.

    precision: see `ask`. Raises FileNotFoundError if the file of a resumed run is gone, and ValueError if it is of
    another teacher or other settings.
    """
    batches, path, settings = run.train, run.out / "views.pt", run.settings
    if batches.views is not None:
        return
    of = {"teacher": run.teacher_sha256, "--pad": settings["pad"], "number of images": len(batches.chosen),
          "line FLIPS": settings["flips"], "--dataset": settings["dataset"], "set of pictures": run.pictures_sha256}
    if parallel.agreed(path.exists()):
        held = checkpoint.read(path)
        theirs = held.get("of", {})       # an older file lacks some of these
        changed = [name for name in of if theirs.get(name, of[name]) != of[name]]
        if changed:
            raise ValueError(f"{path} was asked with another {changed[0]}: give the one of the run's beginning, or "
                             "start a new run with another --out")
    elif run.history:
        raise FileNotFoundError(f"{path} is gone, from which this run took the teacher's answers; start a new run")
    else:                                 # every process draws the same views, and one writes them
        held = ask(run.teacher, batches, settings["teacher_views"], precision) | {"of": of}
        if parallel.leads():
            checkpoint.save(path, held)
    batches.views, batches.answers = (held[name].to(run.device) for name in ("views", "answers"))
