"""Settings that forks of the toolkit have, and what does the same here."""

# By the last part of a key, or an option in capitals.
FORKS = {
    "LOGIT_STAND": "logit standardisation is DISTILLER.TYPE KD_LS or DKD_LS, or LS in "
    "LOGIT.POLICIES",
    "BASE_TEMP": "the base temperature is T of the method, as KD_LS.T",
    "KD_WEIGHT": "the weight is that of the method, as KD_LS.KD_WEIGHT",
}


def fork_hint(word: str) -> str:
    """ "; what to write instead" of EXPERIMENT.LOGIT_STAND or --logit-stand, or ""."""
    name = word.lstrip("-").replace("-", "_").upper().rpartition(".")[2]
    return f"; here {FORKS[name]}" if name in FORKS else ""
