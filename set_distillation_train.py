"""Distillation: a small network learns from what a large one says of each image.

    loss = distilled(loss, logits, teach(teacher, images), temperature=4, weight=0.9)

Hinton et al. 2015 (arXiv:1503.02531), section 2. `train.py` calls it in each step
when --teacher names a checkpoint. The teacher sees the batch as the student does,
so that it composes with CutMix and mixup, whose soft targets stay in the other
part of the loss.
"""
import torch
import torch.nn.functional as F


@torch.no_grad()
def teach(teacher, images):
    """The teacher's logits, (N, K) float, in evaluation mode and without gradients."""
    return teacher.eval()(images).float()


def distilled(loss, logits, teacher_logits, temperature, weight):
    """weight T^2 KL(teacher || student) + (1 - weight) loss, a scalar; both softened by the temperature T.

    loss: the student's own, a scalar; logits, teacher_logits: (N, K) float. T^2 keeps
    the gradients of the soft part as large as those of the hard one for every T;
    T = 1 and weight = 1 is matching the teacher's probabilities alone.
    """
    soft = F.kl_div(F.log_softmax(logits / temperature, 1), F.log_softmax(teacher_logits / temperature, 1),
                    reduction="batchmean", log_target=True)
    return weight * temperature**2 * soft + (1 - weight) * loss
