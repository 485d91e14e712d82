import torch
import torch.nn.functional as F


def dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature):
    """Decoupled KD of each sample, (B,); temperature: a number or (B, 1).

    In log space, so that no probability that underflows makes it infinite.
    """
    odds_s, log_others_s = split_target(logits_student / temperature, target)
    odds_t, log_others_t = split_target(logits_teacher / temperature, target)
    tckd_loss = torch.sigmoid(odds_t) * (
        F.logsigmoid(odds_t) - F.logsigmoid(odds_s)
    ) + torch.sigmoid(-odds_t) * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
    nckd_loss = (log_others_t.exp() * (log_others_t - log_others_s)).sum(dim=1)
    loss = alpha * tckd_loss + beta * nckd_loss
    return (loss.unsqueeze(1) * temperature**2).squeeze(1)


def split_target(logits, target):
    """Log-odds of the target, (B,), and log-softmax of the others, (B, C - 1)."""
    target = target.unsqueeze(1)
    others = torch.arange(logits.shape[1] - 1, device=logits.device).unsqueeze(0)
    others = logits.gather(1, others + (others >= target).long())
    odds = -(others - logits.gather(1, target)).logsumexp(dim=1)
    return odds, F.log_softmax(others, dim=1)
