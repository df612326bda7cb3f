"""How long work ends before its end."""


class TrainingFault(RuntimeError):
    """Training stopped because a number was not finite or something failed; the last good snapshot is intact."""


class TrainingInterrupted(RuntimeError):
    """Training stopped because a signal asked for it; a snapshot holds everything."""
